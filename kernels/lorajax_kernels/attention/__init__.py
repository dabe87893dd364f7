"""Causal attention within segments: one entry point, several implementations, a rule that picks."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lorajax_kernels import segments
from lorajax_kernels.attention import cudnn, triton
from lorajax_kernels.attention.cached import cached_attention
from lorajax_kernels.attention.problem import Problem
from lorajax_kernels.attention.reference import reference_attention
from lorajax_kernels.attention.xla import xla_attention
from lorajax_kernels.checks import check_arrays, check_dtype, check_not_empty, check_options, check_segments
from lorajax_kernels.device import Choice, Device, Implementation, anywhere, choose, function_of

__all__ = ["attention", "attention_implementations", "cached_attention", "choose_attention"]


# Fastest first, as measured on packed rows; see _fastest_first.
_IMPLEMENTATIONS: tuple[Implementation[Problem], ...] = (
    Implementation("triton", triton.why_not, triton.triton_attention, splits=False),
    Implementation("cudnn", cudnn.why_not, cudnn.cudnn_attention),
    Implementation("xla", anywhere, xla_attention),
    Implementation("reference", anywhere, reference_attention),
)


def _fastest_first(problem: Problem) -> tuple[Implementation[Problem], ...]:
    """The order in which "auto" tries them.

    Where rows hold one document there are few blocks to skip, and cuDNN takes 14 to 20% less time than Triton
    with heads of 80 to 128, 46% less with 256; with heads of 64 it takes more. So it is, by less, with two
    documents or a window. With five documents it is behind (benchmarks/results/kernels-h200.json).
    """
    one_document = problem.max_segments is not None and problem.max_segments <= 2  # and padding
    if one_document and problem.head_dim > 64:
        return tuple(sorted(_IMPLEMENTATIONS, key=lambda known: known.name != "cudnn"))
    return _IMPLEMENTATIONS


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    max_segments: int | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """Causal softmax attention that never leaves a segment.

    The residuals of the backward pass are named for rematerialisation policies: "attention_output" and, where
    an implementation keeps it, "attention_lse" (the log-sum-exp of each row). Saving both avoids running the
    forward pass again. "segment_bounds" are integers [B, T] that depend on segment_ids alone.

    Args:
        q, k, v: of one dtype (float32, bfloat16 or float16); N is a multiple of K, and query heads
            n*N/K .. (n+1)*N/K - 1 share key/value head n. All must be finite, padding too: what
            a token does not see is multiplied by 0, and a NaN so reaches the other segments of its row.
        segment_ids: a segment is a maximal run of equal ids; padding is a segment like any other.
        scale: of the scores; default 1/sqrt(H).
        window: the query at t sees the keys at s with 0 <= t - s < window; default all s <= t.
        softcap: scores become softcap * tanh(scores / softcap); default none.
        max_segments: static bound on the segments of a row, for implementations that need one. What cuDNN
            holds grows with it, and on a row with more segments cuDNN's output is undefined.
        implementation: a name of `attention_implementations()`, or "auto": the fastest that can serve.

    Returns:
        In q's dtype. Softmax and all sums are float32; float32 inputs are multiplied at full precision.

    Raises:
        ValueError: shapes, dtypes or options do not fit together, or the implementation is unknown or cannot
            serve.
    """
    problem = _problem(q, k, v, segment_ids, scale, window, softcap, max_segments)
    choice = choose("attention", _fastest_first(problem), problem, implementation=implementation)
    check_segments("attention", segment_ids, max_segments)
    if isinstance(segment_ids, np.ndarray):
        # JAX would cut int64 to 32 bits, and ids that differ might become one.
        segment_ids = segments.ranks(segment_ids)
    return function_of(_IMPLEMENTATIONS, choice.name)(
        q,
        k,
        v,
        segment_ids,
        scale=problem.scale,
        window=problem.window,
        softcap=problem.softcap,
        max_segments=max_segments,
    )


def attention_implementations() -> tuple[str, ...]:
    """Names of the implementations, in the order in which "auto" tries them on packed rows."""
    return tuple(known.name for known in _IMPLEMENTATIONS)


def choose_attention(
    q: Any,
    k: Any,
    v: Any,
    segment_ids: Any,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    max_segments: int | None = None,
    implementation: str = "auto",
    device: Device | None = None,
) -> Choice:
    """Which implementation `attention` runs for these arguments.

    Args:
        q, k, v, segment_ids: arrays or jax.ShapeDtypeStruct, as in `attention`; so are the options.
        device: where it is to run; None: the current one.

    Returns:
        (name, refused); `refused` maps each implementation tried before to the reason why it cannot serve. An
        automatic choice is logged once.

    Raises:
        ValueError: as in `attention`.
    """
    problem = _problem(q, k, v, segment_ids, scale, window, softcap, max_segments)
    return choose("attention", _fastest_first(problem), problem, implementation=implementation, device=device)


def _problem(
    q: Any,
    k: Any,
    v: Any,
    segment_ids: Any,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    max_segments: int | None,
) -> Problem:
    """The arguments as a Problem, once they are known to fit together; its window is at most T."""
    check_arrays("attention", q=q, k=k, v=v, segment_ids=segment_ids)
    if len(q.shape) != 4:
        raise ValueError(f"attention: q must be [B, T, N, H], got shape {q.shape}")
    batch, length, heads, head_dim = q.shape
    if len(k.shape) != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (batch, length, head_dim):
        raise ValueError(
            f"attention: k must be [B={batch}, T={length}, K, H={head_dim}] to fit q, got shape {k.shape}"
        )
    if v.shape != k.shape:
        raise ValueError(f"attention: v must have the shape of k, {k.shape}, got {v.shape}")
    check_not_empty("attention", q=q, k=k)
    if heads % k.shape[2]:
        raise ValueError(f"attention: q has {heads} heads, not a multiple of the {k.shape[2]} heads of k")
    if segment_ids.shape != (batch, length):
        raise ValueError(
            f"attention: segment_ids must be [B={batch}, T={length}] to fit q, got shape {segment_ids.shape}"
        )
    check_dtype("attention", "integers", segment_ids=segment_ids)
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "attention: q, k and v must all be float32, bfloat16 or float16, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    check_options("attention", scale=scale, softcap=softcap, window=window, max_segments=max_segments)
    return Problem(
        batch=batch,
        length=length,
        heads=heads,
        kv_heads=k.shape[2],
        head_dim=head_dim,
        dtype=jnp.dtype(q.dtype),
        window=None if window is None else min(window, length),
        softcap=None if softcap is None else float(softcap),
        max_segments=max_segments,
        scale=1 / math.sqrt(head_dim) if scale is None else float(scale),
    )
