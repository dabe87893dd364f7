"""Launching Triton kernels: both spellings of jax-triton, what it needs of Triton; a fault to search for."""

import importlib
import sys
import types

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from lorajax_kernels import triton_call as module

OUT = object()


@pytest.fixture
def calls(monkeypatch):
    """calls(release, **attributes of Triton's driver): what reaches a jax-triton of that release."""

    def pretend(release, **attributes):
        received = []

        def call(*operands, **options):
            received.append((operands, options))
            return "result"

        driver = types.SimpleNamespace(**attributes)
        nvidia = types.SimpleNamespace(driver=driver)
        backends = types.SimpleNamespace(nvidia=nvidia)
        fakes = {
            "jax_triton": types.SimpleNamespace(__version__=release, triton_call=call),
            "triton": types.SimpleNamespace(backends=backends, __version__="3.6.0"),
            "triton.backends": backends,
            "triton.backends.nvidia": nvidia,
            "triton.backends.nvidia.driver": driver,
        }
        for name, fake in fakes.items():
            monkeypatch.setitem(sys.modules, name, fake)
        module._jax_triton.cache_clear()
        return received, driver

    yield pretend
    module._jax_triton.cache_clear()


@pytest.mark.parametrize(
    ("release", "spelling"), (("0.3.1", "out_shape"), ("0.4.1", "out_type"), ("0.10", "out_type"))
)
def test_each_release_gets_its_own_spelling(calls, release, spelling):
    received, _ = calls(release)
    options = {"grid": (3, 2), "num_warps": 4, "num_stages": 2, "compute_capability": 90}
    options["input_output_aliases"] = {1: 1}
    result = module.triton_call(
        "kernel", "x", 7, out_shape=OUT, BLOCK=64, kernel_for_0_3="older kernel", **options
    )
    assert result == "result"
    assert module.passes_aliased_outputs() == (release == "0.3.1")
    kernel = "older kernel" if release == "0.3.1" else "kernel"
    assert received == [(("x", 7), {"kernel": kernel, spelling: OUT, "BLOCK": 64, **options})]


def test_what_a_kernel_writes_over_is_apart_from_slices_around_it(monkeypatch):
    """On a GPU, XLA would make one fusion of the slice and the kernel, and lose what it writes over `x`."""
    monkeypatch.setattr(module, "is_assumed", lambda: True)

    def run(x, y):
        aliases = {0: 1}
        shapes = jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((2, 4), jnp.float32)
        options = {"grid": (1,), "num_warps": 4, "num_stages": 1, "input_output_aliases": aliases}
        made, over = module.triton_call(None, x[:2], y[:2], out_shape=shapes, **options)
        return made[:2], over[:1]

    wide = jnp.zeros((8, 4))
    equations = jax.make_jaxpr(run)(wide, wide).jaxpr.eqns
    [call] = [equation for equation in equations if equation.primitive.name == "ffi_call"]
    makers = {variable: equation.primitive.name for equation in equations for variable in equation.outvars}
    readers = {
        variable: equation.primitive.name
        for equation in equations
        for variable in equation.invars
        if isinstance(variable, jax.extend.core.Var)
    }
    assert [makers[variable] for variable in call.invars] == ["optimization_barrier", "slice"]
    assert [readers[variable] for variable in call.outvars] == ["slice", "optimization_barrier"]


def test_an_older_triton_gets_the_name_that_jax_triton_imports(calls):
    _, driver = calls("0.4.1")
    module._jax_triton()
    assert driver.TMA_TF32 == 11
    _, driver = calls("0.4.1", TMA_TF32=12)
    module._jax_triton()
    assert driver.TMA_TF32 == 12


@pytest.fixture
def looks_for_torch(monkeypatch):
    """looks_for_torch(): a Triton that imports torch where it can, as soon as it sees an argument.

    Gives whether it found torch, each time it looked.
    """

    def pretend():
        found = []

        def look(backend, argument, is_const, specialize, align):
            try:
                importlib.import_module("torch")
                found.append(True)
            except ImportError:
                found.append(False)
            return "i32", None

        library = types.SimpleNamespace(native_specialize_impl=look)
        monkeypatch.setitem(sys.modules, "triton._C", types.SimpleNamespace(libtriton=library))
        monkeypatch.setitem(sys.modules, "triton._C.libtriton", library)
        return found

    return pretend


def test_triton_does_not_import_torch(calls, looks_for_torch, monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    calls("0.4.1", TMA_TF32=11)
    found = looks_for_torch()
    module._jax_triton()
    assert found == [False]
    assert "torch" not in sys.modules


def test_torch_that_is_there_already_stays(calls, looks_for_torch, monkeypatch):
    torch = types.ModuleType("torch")
    monkeypatch.setitem(sys.modules, "torch", torch)
    calls("0.4.1", TMA_TF32=11)
    found = looks_for_torch()
    module._jax_triton()
    assert found == []
    assert sys.modules["torch"] is torch


def test_a_triton_that_looks_at_arguments_in_another_way_is_left_alone(calls):
    calls("0.4.1", TMA_TF32=11)
    assert module._jax_triton()[1] == "out_type"


# A loop as Triton compiles it for Hopper, less types: two blocks of %x are on their way before it begins.
PIPELINED = """
    %x = ttg.local_alloc : () -> !ttg.memdesc<{slots}x64x128xbf16>
    %x_0 = ttg.memdesc_index %x[%c0] : ...
    %0 = ttg.async_copy_global_to_local %p, %x_0 mask %m
    %x_1 = ttg.memdesc_index %x[%c1] : ...
    %1 = ttg.async_copy_global_to_local %p, %x_1 mask %m
    %sum = scf.for %i = %c0 to %n step %c1 iter_args(%so_far = %zeros) -> (tensor<64x64xf32>) {{
      %x_2 = ttg.memdesc_index %x[%here] : ...
      %x_3 = ttg.memdesc_trans %x_2 : ...
      %2 = ttng.warp_group_dot %x_3, %w, %so_far {{isAsync = true}} : ...
      %3:2 = ttng.warp_group_dot_wait %2, %x_3 {{pendings = {pendings} : i32}} : ...
      %x_4 = ttg.memdesc_index %x[%ahead] : ...
      %4 = ttg.async_copy_global_to_local %q, %x_4 mask %m
      scf.yield %3#0
    }}
"""


@pytest.mark.parametrize(
    ("slots", "pendings", "expected"), ((2, 1, {"%x"}), (3, 1, set()), (3, 2, {"%x"}), (2, 0, set()))
)
def test_what_is_overwritten_in_flight_is_found(overwritten_in_flight, slots, pendings, expected):
    ttgir = PIPELINED.format(slots=slots, pendings=pendings)
    assert overwritten_in_flight(ttgir) == expected
