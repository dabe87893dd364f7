"""Checked mode: the ops look at the values that they are given, not only at shapes and dtypes.

    with lorajax_kernels.checked():
        attention(q, k, v, segment_ids, max_segments=8)

Each look costs a transfer to the host, so it is off by default. A function that jax.jit traces in the context
keeps its checks; one that was traced before has none.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

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


def check_segments(op: str, segment_ids: Int[Array, "B T"], max_segments: int | None) -> None:
    """In checked mode, raise for an id in two places of a row, and for more segments than max_segments."""
    _check(lambda ids: _wrong_segments(op, ids, max_segments), segment_ids)


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


def _wrong_target(op: str, targets: np.ndarray, weights: np.ndarray, vocab_size: int) -> str | None:
    wrong = np.flatnonzero((weights != 0) & ((targets < 0) | (targets >= vocab_size)))
    if not len(wrong):
        return None
    first = wrong[0]
    return (
        f"{op}: targets[{first}] is {targets[first]}, no index of a vocabulary of {vocab_size}, and its "
        f"weight is {weights[first]:g}, not 0"
    )
