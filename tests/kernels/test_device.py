"""What a device can do, and the rule that picks an implementation."""

import dataclasses
import logging
import types

import jax
import jax.numpy as jnp
import pytest
from lorajax_kernels import device
from lorajax_kernels.device import Choice, Device, Implementation, choose

CPU = Device("cpu")
IMPLEMENTATIONS = (
    Implementation("fast", lambda problem, device: f"no {problem} on a {device.kind}", None),
    Implementation("plain", lambda problem, device: None, None),
    Implementation("slow", lambda problem, device: None, None),
)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(compute capability, packages, cuDNN's version, attributes): the machine has one of these."""

    def pretend(capability, packages=("triton", "jax_triton"), cudnn=91900, **attributes):
        attributes |= {"platform": "gpu", "device_kind": "a GPU", "compute_capability": capability}
        fake = types.SimpleNamespace(**attributes)
        versions = types.SimpleNamespace(cudnn_get_version=lambda: cudnn)
        monkeypatch.setattr(jax, "local_devices", lambda backend=None: [fake])
        monkeypatch.setattr(jax._src.lib, "cuda_versions", versions)
        monkeypatch.setattr(device, "_is_installed", packages.__contains__)
        return device._device_at_hand.__wrapped__()

    return pretend


def test_this_machine():
    found = device.current_device()
    assert found.kind == jax.local_devices()[0].device_kind
    if jax.default_backend() == "cpu":
        assert (found.compute_capability, found.cudnn_version) == (None, None)
        assert found.no_triton == found.no_mosaic == "it needs an NVIDIA GPU, this is a CPU"
        assert found.half_dtype == jnp.bfloat16


def test_follows_the_default_device(monkeypatch):
    """On a machine with a GPU, a program for its CPU."""
    cpu, plain = jax.devices("cpu")[0], jax.local_devices
    fake = types.SimpleNamespace(platform="gpu", device_kind="a GPU", compute_capability="9.0")
    monkeypatch.setattr(
        jax, "local_devices", lambda backend=None: [fake] if backend is None else plain(backend=backend)
    )
    device._device_at_hand.cache_clear()
    try:
        for default in (cpu, "cpu"):
            with jax.default_device(default):
                assert device.current_device().kind == cpu.device_kind
        assert device.current_device().kind == "a GPU"
    finally:
        device._device_at_hand.cache_clear()


@pytest.mark.parametrize(
    ("capability", "half", "no_triton", "no_mosaic"),
    (
        ("7.5", jnp.float16, "needs compute capability 8.0, this GPU has 7.5", "9.0, this GPU has 7.5"),
        ("8.0", jnp.bfloat16, None, "needs compute capability 9.0, this GPU has 8.0"),
        ("8.9", jnp.bfloat16, None, "needs compute capability 9.0, this GPU has 8.9"),
        ("9.0", jnp.bfloat16, None, None),
        ("10.3", jnp.bfloat16, None, None),
        ("12.0", jnp.bfloat16, None, "serves compute capability 9 and 10, not 12.0"),
    ),
)
def test_generations(gpu, capability, half, no_triton, no_mosaic):
    found = gpu(capability)
    assert found.compute_capability == tuple(map(int, capability.split(".")))
    assert (found.kind, found.cudnn_version, found.half_dtype) == ("a GPU", 91900, half)
    for reason, expected in ((found.no_triton, no_triton), (found.no_mosaic, no_mosaic)):
        assert reason is None if expected is None else expected in reason


def test_multiprocessors_are_counted_where_jax_says_how_many(gpu):
    assert gpu("8.0", core_count=108).multiprocessors == 108
    assert gpu("8.0").multiprocessors is None


def test_what_is_missing_is_named(gpu):
    assert "jax-triton not installed" in gpu("9.0", packages=("triton",)).no_triton
    assert "triton and jax-triton not installed" in gpu("9.0", packages=()).no_triton


def test_cudnn_that_is_not_there(gpu, monkeypatch):
    def missing():
        raise RuntimeError("no cuDNN")

    assert gpu("9.0").cudnn_version == 91900
    monkeypatch.setattr(jax._src.lib.cuda_versions, "cudnn_get_version", missing)
    assert device._cudnn_version() is None
    monkeypatch.setattr(jax._src.lib, "cuda_versions", None)
    assert device._cudnn_version() is None


def test_auto_takes_the_first_that_can_serve_and_logs_it_once(caplog):
    with caplog.at_level(logging.INFO, "lorajax_kernels"):
        choices = [choose("test op", IMPLEMENTATIONS, "problem", device=CPU) for _ in range(2)]
    assert choices == [Choice("plain", {"fast": "no problem on a cpu"})] * 2
    assert [record.message for record in caplog.records] == ["test op: plain (not fast: no problem on a cpu)"]


def test_a_name_is_honoured_or_raises():
    assert choose("op", IMPLEMENTATIONS, "problem", implementation="slow", device=CPU) == Choice("slow", {})
    with pytest.raises(ValueError, match="op implementation 'fast' cannot serve: no problem on a cpu"):
        choose("op", IMPLEMENTATIONS, "problem", implementation="fast", device=CPU)
    with pytest.raises(ValueError, match="unknown op implementation 'best'; known: auto, fast, plain, slow"):
        choose("op", IMPLEMENTATIONS, "problem", implementation="best", device=CPU)


def test_none_can_serve():
    picky = [dataclasses.replace(IMPLEMENTATIONS[0], name=name) for name in ("a", "b")]
    with pytest.raises(ValueError, match="no op implementation can serve: a: no x on a cpu; b: no x"):
        choose("op", picky, "x", device=CPU)
