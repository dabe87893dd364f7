"""What ops ask of their arguments: of dtypes and options always, of the values of arrays in checked mode.

    with lorajax_kernels.checked():
        attention(q, k, v, segment_ids, max_segments=8)

Each look at values costs a transfer to the host, so it is off by default. A function that jax.jit traces in
the context keeps its checks; one that was traced before has none.
"""

from __future__ import annotations

import contextlib
import contextvars
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# What an op may ask of a dtype, as its message says it.
_KINDS = {
    "float32, bfloat16 or float16": (jnp.float32, jnp.bfloat16, jnp.float16),
    "floating point": (jnp.floating,),
    "integers": (jnp.integer,),
}
_LARGEST = float(np.finfo(np.float32).max)
# Of factors, up and down: their squares, and products with scores, are still normal numbers of float32.
_RANGE = 1e15
# Triton's kernels make tanh(s) of 1 - 2 / (exp(2 s) + 1), whose error of 6e-8 a softcap multiplies.
_MOST_SOFTCAP = 1e4

_active = contextvars.ContextVar("lorajax_kernels.checked", default=False)


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Ops called in this context raise for wrong values: a ValueError that names the argument and the value.

    Raised inside a compiled program it reaches the caller as JAX' runtime error, with the same text.
    """
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


def check_dtype(op: str, kind: str, **arrays: Any) -> None:
    """Raise unless the dtypes are of that kind, a key of _KINDS."""
    for name, array in arrays.items():
        if not any(jnp.issubdtype(array.dtype, known) for known in _KINDS[kind]):
            raise ValueError(f"{op}: {name} must be {kind}, got {array.dtype}")


def at_least_int32(x: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """The same integers in int32, which bounds and differences fit: in int8 or uint8 these would wrap.

    Those beyond int32 become the nearest in it.
    """
    own, info = jnp.iinfo(x.dtype), jnp.iinfo(jnp.int32)
    library = np if isinstance(x, np.ndarray) else jnp  # whose own conversion of int64 would wrap
    if own.max > info.max:
        x = library.clip(x, max(own.min, info.min), info.max)
    return x.astype(jnp.int32)


def check_not_empty(op: str, **arrays: Any) -> None:
    """Raise for an array without elements."""
    for name, array in arrays.items():
        if 0 in array.shape:
            raise ValueError(f"{op}: {name} must have no axis of length 0, got shape {array.shape}")


def check_arrays(op: str, **arrays: Any) -> None:
    """Raise for what is no array."""
    for name, array in arrays.items():
        if not (hasattr(array, "ndim") and hasattr(array, "dtype")):
            raise ValueError(f"{op}: {name} must be an array, got {type(array).__name__}")


def check_number(op: str, name: str, number: Any, *, at_least: float = -_LARGEST) -> None:
    """Raise unless it is a number, finite in float32, and not below `at_least`."""
    if not (isinstance(number, numbers.Real) and abs(float(number)) <= _LARGEST):
        raise ValueError(f"{op}: {name} must be a number, finite in float32, got {number}")
    if number < at_least:
        raise ValueError(f"{op}: {name} must be at least {at_least:g}, got {number}")


def check_options(
    op: str, *, scale: float | None = None, softcap: float | None = None, **counts: int | None
) -> None:
    """Raise unless scale and softcap are what float32 can reckon with, and each count 1, 2, ...; None passes.

    A softcap is positive; a scale of 0 passes.
    """
    for name, number in (("scale", scale), ("softcap", softcap)):
        if number is None:
            continue
        check_number(op, name, number)
        if name == "softcap" and number <= 0:
            raise ValueError(f"{op}: softcap must be positive, got {number}")
        if number and not 1 / _RANGE <= abs(number) <= _RANGE:
            raise ValueError(f"{op}: {name} must be between {1 / _RANGE:g} and {_RANGE:g}, got {number}")
    for name, count in counts.items():
        if count is None:
            continue
        if not isinstance(count, numbers.Integral):
            raise ValueError(f"{op}: {name} must be an integer, got {count}")
        if count < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {count}")


def why_not_capped(softcap: float | None) -> str | None:
    """Why Triton's kernels do not serve a softcap; None if they do."""
    if softcap is None or softcap <= _MOST_SOFTCAP:
        return None
    return f"it takes softcaps up to {_MOST_SOFTCAP:g}, not {softcap:g}"


def check_segments(op: str, segment_ids: Int[Array, "B T"], max_segments: int | None) -> None:
    """In checked mode, raise for an id in two places of a row, and for more segments than max_segments."""
    _check(lambda ids: _wrong_segments(op, ids, max_segments), segment_ids)


def check_lengths(op: str, lengths: Int[Array, " B"], capacity: int) -> None:
    """In checked mode, raise for a length that is not in 1..capacity."""
    _check(lambda lengths: _wrong_length(op, lengths, capacity), lengths)


def check_targets(op: str, targets: Int[Array, " N"], weights: Float[Array, " N"], vocab_size: int) -> None:
    """In checked mode, raise for a target that counts and is no index of the vocabulary."""
    _check(lambda *given: _wrong_target(op, given[0], given[1], vocab_size), targets, weights)


def _check(wrong: Callable[..., str | None], *arrays: Any) -> None:
    if not _active.get():
        return

    def look(*values: Any) -> None:
        if message := wrong(*map(np.asarray, values)):
            raise ValueError(message)

    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        jax.debug.callback(look, *arrays)
    else:
        look(*arrays)


def _wrong_segments(op: str, segment_ids: np.ndarray, max_segments: int | None) -> str | None:
    for number, row in enumerate(segment_ids):
        starts = np.flatnonzero(np.diff(row, prepend=row[:1] - 1))
        ids, counts = np.unique(row[starts], return_counts=True)
        if (counts > 1).any():
            twice = ids[counts.argmax()]
            places = ", ".join(map(str, starts[row[starts] == twice]))
            return f"{op}: segment_ids[{number}] is not contiguous: segments of id {twice} begin at {places}"
        if max_segments is not None and len(starts) > max_segments:
            count = f"{len(starts)} segments, more than max_segments={max_segments}"
            return f"{op}: segment_ids[{number}] has {count}"
    return None


def _wrong_length(op: str, lengths: np.ndarray, capacity: int) -> str | None:
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if not len(wrong):
        return None
    return f"{op}: lengths[{wrong[0]}] must be in 1..{capacity}, got {lengths[wrong[0]]}"


def _wrong_target(op: str, targets: np.ndarray, weights: np.ndarray, vocab_size: int) -> str | None:
    wrong = np.flatnonzero((weights != 0) & ((targets < 0) | (targets >= vocab_size)))
    if not len(wrong):
        return None
    first = wrong[0]
    return (
        f"{op}: targets[{first}] is {targets[first]}, no index of a vocabulary of {vocab_size}, and its "
        f"weight is {weights[first]:g}, not 0"
    )
