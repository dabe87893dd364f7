"""What a device can do, and the rule that picks an op's implementation for it.

An op keeps its implementations in an ordered list, best first; each says why it cannot serve a problem on a
device. `choose` takes the first that can. A named one that cannot serve raises: nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

_log = logging.getLogger("lorajax_kernels")

AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)


@dataclass(frozen=True)
class Device:
    """What a kernel has to know of a device.

    Attributes:
        kind: its name, as JAX gives it.
        compute_capability: (major, minor) of an NVIDIA GPU; None for anything else.
        cudnn_version: of the cuDNN that JAX has loaded, major * 10000 + minor * 100 + patch; None without.
        no_triton: why Triton kernels cannot run there; None if they can.
        no_mosaic: why Pallas kernels of the Mosaic GPU backend cannot run there; None if they can.
        multiprocessors: of a GPU; None if that is not known.
    """

    kind: str
    compute_capability: tuple[int, int] | None = None
    cudnn_version: int | None = None
    no_triton: str | None = None
    no_mosaic: str | None = None
    multiprocessors: int | None = None

    @property
    def why_no_triton(self) -> str | None:
        """Why Triton kernels cannot run there, its age included; None if they can."""
        if self.no_triton is not None:
            return self.no_triton
        if self.compute_capability is None or self.compute_capability < AMPERE:
            return "it needs compute capability 8.0"
        return None

    @property
    def half_dtype(self) -> jnp.dtype:
        """The 16-bit type to compute in: float16 on GPUs older than Ampere, bfloat16 elsewhere."""
        is_old = self.compute_capability is not None and self.compute_capability < AMPERE
        return jnp.dtype(jnp.float16 if is_old else jnp.bfloat16)


_assumed: contextvars.ContextVar[Device | None] = contextvars.ContextVar(
    "lorajax_kernels.assumed", default=None
)


@contextlib.contextmanager
def assume(device: Device) -> Iterator[None]:
    """Ops traced in this context are compiled for a device that is not here, to see what they take.

    They choose as they would there. Kernels of libraries that are missing here are stood in for by calls of
    the same operands, results and workspace, which nothing can run.
    """
    token = _assumed.set(device)
    try:
        yield
    finally:
        _assumed.reset(token)


def is_assumed() -> bool:
    """Whether programs are compiled for a device that is not here."""
    return _assumed.get() is not None


def current_device() -> Device:
    """The device that JAX computes on by default; all of a machine's are taken to be alike."""
    return _assumed.get() or _device_at_hand(jax.config.jax_default_device)  # type: ignore[attr-defined]


@functools.cache
def _device_at_hand(default: Any = None) -> Device:
    """Of jax.default_device: a device, the name of a platform, or None."""
    device = jax.local_devices(backend=default)[0] if isinstance(default, str | None) else default
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    if device.platform != "gpu" or capability is None:
        reason = f"it needs an NVIDIA GPU, this is a {device.platform.upper()}"
        return Device(device.device_kind, no_triton=reason, no_mosaic=reason)
    compute_capability = (int(capability[1]), int(capability[2]))
    return Device(
        device.device_kind,
        compute_capability,
        _cudnn_version(),
        no_triton=_why_no_triton(compute_capability),
        no_mosaic=why_no_mosaic(compute_capability),
        multiprocessors=getattr(device, "core_count", None),
    )


def _cudnn_version() -> int | None:
    from jax._src.lib import cuda_versions  # JAX has no public way to ask

    try:
        return None if cuda_versions is None else int(cuda_versions.cudnn_get_version())
    except Exception:  # cuDNN is not installed, or older than JAX needs
        return None


def _why_no_triton(compute_capability: tuple[int, int]) -> str | None:
    if compute_capability < AMPERE:
        # Triton compiles a float16 dot for Turing to scalar instructions.
        return f"Triton needs compute capability 8.0, this GPU has {_dotted(compute_capability)}"
    missing = [name for name in ("triton", "jax_triton") if not _is_installed(name)]
    if missing:
        return f"{' and '.join(missing).replace('_', '-')} not installed (pip install jax-triton)"
    return None


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def why_no_mosaic(compute_capability: tuple[int, int]) -> str | None:
    """Why Mosaic GPU kernels cannot run on GPUs of a compute capability; None if they can."""
    if compute_capability < HOPPER:
        return f"Mosaic GPU needs compute capability 9.0, this GPU has {_dotted(compute_capability)}"
    if compute_capability[0] > BLACKWELL[0]:
        return f"Mosaic GPU serves compute capability 9 and 10, not {_dotted(compute_capability)}"
    return None


def _dotted(compute_capability: tuple[int, int]) -> str:
    return ".".join(map(str, compute_capability))


Problem = TypeVar("Problem")


@dataclass(frozen=True)
class Implementation(Generic[Problem]):
    """One way to compute an op.

    Attributes:
        name: as users write it.
        why_not: (problem, device) -> None if it can serve, otherwise the reason why it cannot.
        function: what computes it, a function or several; that is the op's affair.
        splits: whether XLA can split it over devices. What it cannot split runs on all rows on each device.
    """

    name: str
    why_not: Callable[[Problem, Device], str | None]
    function: Any
    splits: bool = True


def anywhere(problem: Any, device: Device) -> None:
    """`why_not` of an implementation that serves every problem on every device."""


_split_over = contextvars.ContextVar("lorajax_kernels.split_over", default=1)


@contextlib.contextmanager
def split_over(devices: int) -> Iterator[None]:
    """Ops traced in this context belong to a program that XLA splits over this many devices.

    "auto" then passes over what it cannot split. Within jax.shard_map each device has a program of its own:
    split_over(1).
    """
    token = _split_over.set(devices)
    try:
        yield
    finally:
        _split_over.reset(token)


class Choice(NamedTuple):
    """The implementation chosen, and why each one that comes before it was refused."""

    name: str
    refused: dict[str, str]


def choose(
    op: str,
    implementations: Sequence[Implementation[Problem]],
    problem: Problem,
    *,
    implementation: str = "auto",
    device: Device | None = None,
) -> Choice:
    """Pick an op's implementation.

    Args:
        op: name of the op, for messages.
        implementations: best first.
        problem: what the op is asked to do, as its implementations understand it.
        implementation: a name, or "auto": the first that can serve. An automatic choice is logged once.
        device: where it is to run; None: the current one.

    Raises:
        ValueError: the implementation is unknown or cannot serve, or none can.
    """
    device = device or current_device()
    if implementation != "auto":
        for known in implementations:
            if known.name == implementation:
                if reason := known.why_not(problem, device):
                    raise ValueError(f"{op} implementation {implementation!r} cannot serve: {reason}")
                return Choice(implementation, {})
        names = ", ".join(("auto", *(known.name for known in implementations)))
        raise ValueError(f"unknown {op} implementation {implementation!r}; known: {names}")
    refused: dict[str, str] = {}
    for known in implementations:
        reason = known.why_not(problem, device)
        if not known.splits and _split_over.get() > 1:
            reason = reason or f"XLA cannot split it over {_split_over.get()} devices"
        if reason is None:
            _log_once(op, known.name, "; ".join(f"not {name}: {why}" for name, why in refused.items()))
            return Choice(known.name, refused)
        refused[known.name] = reason
    reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
    raise ValueError(f"no {op} implementation can serve: {reasons}")


def function_of(implementations: Sequence[Implementation[Problem]], name: str) -> Any:
    """What computes the op, of the implementation of that name."""
    return next(known.function for known in implementations if known.name == name)


@functools.cache
def _log_once(op: str, name: str, refused: str) -> None:
    _log.info("%s: %s%s", op, name, f" ({refused})" if refused else "")
