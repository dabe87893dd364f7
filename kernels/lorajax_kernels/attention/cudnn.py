"""Packed attention by cuDNN on Hopper and later GPUs.

JAX hands segments to cuDNN only through primitives of a private module (fused_attention_stablehlo), and all
that is private in that stays in this file. `why_not` refuses a JAX whose module is not the one that this was
written for, and compares a small problem of each kind with the dense reference, forward and gradients, before
it trusts cuDNN with others of that kind. That it may, JAX' compilation cache remembers.

cuDNN is told the starts and lengths of M segments a row. A row of fewer ends in segments of length 0, not in
the -1 that JAX proposes: JAX moves those of all rows to the end of the list, and the log-sum-exp of a segment
would no longer be found at row * M + segment.
"""

import functools
import inspect
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lorajax_kernels import jax_cache, segments
from lorajax_kernels.attention.problem import Problem
from lorajax_kernels.attention.reference import reference_attention
from lorajax_kernels.device import HOPPER, Device, current_device, is_assumed
from lorajax_kernels.triton_call import stand_in

_ARRAYS = ("query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets")
_PAGES = ("page_table_k", "page_table_v")
_OPTIONS = ("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length")
# What the private functions behind the primitives take besides: (their last arrays, their last option).
_LAST = {"fwd": ((), ("is_training",)), "bwd": (("activation", "fwd_output", "grad_output"), ())}
# The probe's relative error, in norm, of half precision against float32.
_TOLERANCE = 2e-2
# The reference runs once: timing ways to multiply would take longer than all else in the probe.
_AT_ONCE = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def why_not(problem: Problem, device: Device) -> str | None:
    """None if cuDNN can serve the problem there, otherwise the reason why not."""
    if device.compute_capability is None or device.compute_capability < HOPPER:
        return "packed rows need compute capability 9.0"
    if device.cudnn_version is None:
        return "cuDNN is not installed"
    if problem.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, not {problem.dtype}"
    if problem.head_dim % 8 or problem.head_dim > 256:
        return f"head_dim must be a multiple of 8 up to 256, not {problem.head_dim}"
    if problem.softcap is not None:
        return "it has no softcap"
    if problem.scale <= 0:
        return f"it is tried with positive scales alone, not {problem.scale}"
    if problem.max_segments is None:
        return "it needs max_segments, a bound on the segments of a row"
    elements = problem.batch * problem.length * problem.heads * problem.head_dim
    if elements >= 2**31:
        return f"JAX tells it places in q as 32-bit integers, and q has {elements:,} elements"
    is_grouped = problem.heads != problem.kv_heads
    if reason := _why_not_this_jax(is_grouped):
        return reason
    if is_assumed() or device != current_device():
        return None  # it cannot be tried
    return _failed_probe(problem.head_dim, is_grouped, problem.window is not None, problem.dtype)


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    max_segments: int | None,
) -> Float[Array, "B T N H"]:
    """See lorajax_kernels.attention. What follows the first `max_segments` segments of a row is undefined."""
    if softcap is not None or max_segments is None:
        raise ValueError("cuDNN attention has no softcap, and needs max_segments")
    places = max(max_segments, 2)  # JAX takes a single one for a row that is not packed
    rank = jnp.minimum(segments.ranks(segment_ids), places - 1)
    bounds = (*segments.starts_and_lengths(segment_ids, places), rank)
    return _attend(_Options(scale, window), q, k, v, *checkpoint_name(bounds, "segment_bounds"))


@dataclass(frozen=True)
class _Options:
    scale: float
    window: int | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: _Options, q: Array, k: Array, v: Array, starts: Array, lengths: Array, rank: Array
) -> Array:
    (out,) = _run(options, "fwd", q, k, v, starts, lengths, is_training=False)
    return checkpoint_name(out, "attention_output")


def _attend_forward(
    options: _Options, q: Array, k: Array, v: Array, starts: Array, lengths: Array, rank: Array
) -> tuple[Array, Any]:
    out, stats = _run(options, "fwd", q, k, v, starts, lengths, is_training=True)
    out = checkpoint_name(out, "attention_output")
    lse = checkpoint_name(_by_token(stats, starts, rank), "attention_lse")
    return out, (q, k, v, starts, lengths, out, lse)


def _attend_backward(options: _Options, residuals: Any, dout: Array) -> tuple[Array | None, ...]:
    q, k, v, starts, lengths, out, lse = residuals
    stats = _by_segment(lse, starts)
    dq, dk, dv = _run(options, "bwd", q, k, v, starts, lengths, stats, out, dout)
    return dq, dk, dv, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _by_token(
    stats: Float[Array, "BM N T"], starts: Int[Array, "B M"], rank: Int[Array, "B T"]
) -> Float[Array, "B N T"]:
    """The log-sum-exp of each token, from where cuDNN leaves it: segment by segment, each from place 0 on.

    As a residual it is M times smaller than what cuDNN gives.
    """
    batch, places = starts.shape
    length = rank.shape[1]
    position = jnp.arange(length) - jnp.take_along_axis(starts, rank, axis=1)  # [B, T]
    by_row = stats.reshape(batch, places, -1, length)
    return by_row[jnp.arange(batch)[:, None], rank, :, position].transpose(0, 2, 1)


def _by_segment(lse: Float[Array, "B N T"], starts: Int[Array, "B M"]) -> Float[Array, "BM N T"]:
    """The inverse of _by_token; places after a segment's end, which cuDNN does not read, hold anything."""
    batch, heads, length = lse.shape
    token = jnp.minimum(starts[:, :, None] + jnp.arange(length), length - 1)  # [B, M, T]
    stats = jnp.take_along_axis(lse[:, None], token[:, :, None], axis=3)  # [B, M, N, T]
    return stats.reshape(-1, heads, length)


def _run(options: _Options, direction: str, *arrays: Array, **settings: Any) -> Any:
    """Bind the primitive of a direction; the arrays are q, k, v, starts, lengths, and what else it takes."""
    q, k, v, starts, lengths, *more = arrays
    if is_assumed():
        return _stand_in(direction, *arrays, **settings)
    private = _private()
    empty = jnp.zeros(0, q.dtype)  # no bias, no page tables
    # The offsets have one place more than there are segments, which must be -1 where nothing comes after.
    offsets = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    return getattr(private, f"_dot_product_attention_{direction}_p_wrapper").bind(
        *(q, k, v, empty, lengths, lengths, offsets, offsets, empty, empty),
        *more,
        scale=options.scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(False, False),
        mask_type=private.MaskType.PADDING_CAUSAL,
        layout=private.AttentionLayout.BTNH.value,
        sliding_window_length=options.window,
        **({"score_mod": None} if _has_score_mod() else {}),
        **settings,
    )


def _stand_in(direction: str, *arrays: Array, is_training: bool = False) -> Any:
    """For a GPU that is not here: results, and the workspace of the backward pass."""
    q, k, v, starts, *_ = arrays
    batch, length, heads, _ = q.shape
    places = batch * starts.shape[1]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in ((q, k, v) if direction == "bwd" else (q,))]
    if is_training:
        results.append(jax.ShapeDtypeStruct((places, heads, length), jnp.float32))
    workspace = workspace_bytes(places, q.shape, k.shape) if direction == "bwd" else 0
    size = jax.ShapeDtypeStruct((workspace,), jnp.uint8)
    return stand_in(*arrays, out_shape=[*results, size])[:-1]


def workspace_bytes(places: int, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> int:
    """Bytes that the backward pass holds beside its results.

    A row for each of all segments, and of each query head dq in float32 and a float32; with grouped queries
    also dk and dv in 16 bits. A test compares it with what was recorded on an H200.
    """
    _, length, heads, head_dim = q_shape
    grouped = 4 * head_dim if k_shape[2] != heads else 0
    return places * length * heads * (4 * head_dim + grouped + 4)


def _private() -> Any:
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _has_score_mod() -> bool:
    """Since 0.12 the primitives take a function that changes scores, and its arguments."""
    return "score_mod" in inspect.signature(_private()._dot_product_attention_fwd_impl).parameters


def _expected(direction: str) -> tuple[str, ...]:
    """The parameters that the private function of a direction is known to have."""
    arrays, option = _LAST[direction]
    function, arguments = (("score_mod",), ("score_mod_args",)) if _has_score_mod() else ((), ())
    return (*_ARRAYS, *_PAGES, *arrays, *arguments, *_OPTIONS, *function, *option)


@functools.cache
def _why_not_this_jax(is_grouped: bool) -> str | None:
    try:
        private = _private()
        for direction in _LAST:
            name = f"_dot_product_attention_{direction}_impl"
            if tuple(inspect.signature(getattr(private, name)).parameters) != _expected(direction):
                return f"jax {jax.__version__} has another {name} than this library knows"
        wrappers = ("_dot_product_attention_fwd_p_wrapper", "_dot_product_attention_bwd_p_wrapper")
        if missing := [name for name in wrappers if not hasattr(private, name)]:
            return f"jax {jax.__version__} has no {missing[0]}"
    except (ImportError, AttributeError, TypeError) as error:
        return f"jax {jax.__version__} has changed what this library uses of it: {error}"
    if is_grouped and jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__} misplaces the keys of grouped queries on packed rows; 0.11 does not"
    return None


@functools.cache
def _failed_probe(head_dim: int, is_grouped: bool, has_window: bool, dtype: jnp.dtype) -> str | None:
    """None if a small problem comes out as the dense reference says, otherwise what went wrong.

    What has come out right once is not tried again by other processes, as long as nothing changes.
    """
    kind = head_dim, is_grouped, has_window, str(dtype)
    versions = jax.__version__, jaxlib.__version__, current_device(), os.environ.get("XLA_FLAGS")
    key = repr((kind, versions, Path(__file__).read_text(encoding="utf-8")))
    if jax_cache.load("cudnn", key) is not None:
        return None
    try:
        # In a thread of its own: a program may be being traced in this one, and jax.ensure_compile_time_eval
        # makes constants of what JAX's custom_partitioning wants as operands.
        with ThreadPoolExecutor(1) as thread:
            error = thread.submit(_probe, head_dim, is_grouped, has_window, dtype).result()
    except Exception as failure:  # whatever cuDNN, XLA or JAX raise
        first_line = (str(failure).strip() or repr(failure)).splitlines()[0]
        return f"it failed on a small problem: {first_line}"
    if not error <= _TOLERANCE:
        return f"it is wrong here: a relative error of {error:.1e} on a small problem, over {_TOLERANCE:.0e}"
    jax_cache.store("cudnn", key, error)
    return None


def _probe(head_dim: int, is_grouped: bool, has_window: bool, dtype: jnp.dtype) -> float:
    """Largest relative error, in norm, of output and gradients on rows of unequal segments."""
    kv_heads = 2
    heads, length = kv_heads * (4 if is_grouped else 1), 256
    random = np.random.default_rng(0)
    shapes = [(2, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    arrays = [random.normal(size=shape).astype(dtype) for shape in shapes]
    rows = [np.repeat([1, 2, 3, 0], [100, 1, 130, 25]), np.repeat([1, 0], [200, 56])]
    segment_ids = np.stack(rows).astype(np.int32)

    def run(function: Any, arrays: list[np.ndarray], options: dict[str, Any]) -> list[np.ndarray]:
        def attend(q, k, v):
            kind = {"scale": 1 / math.sqrt(head_dim), "window": 48 if has_window else None}
            return function(q, k, v, jnp.asarray(segment_ids), softcap=None, max_segments=5, **kind)

        def forward_and_gradients(q, k, v, dout):
            out, vjp = jax.vjp(attend, q, k, v)
            return [out, *vjp(dout)]

        compiled = jax.jit(forward_and_gradients, compiler_options=options)
        return [np.asarray(x, np.float64) for x in compiled(*arrays)]

    # Side by side, because compiling is what takes the time.
    with ThreadPoolExecutor(2) as threads:
        of_cudnn = threads.submit(run, cudnn_attention, arrays, {})
        wide = [x.astype(np.float32) for x in arrays]
        of_reference = threads.submit(run, reference_attention, wide, _AT_ONCE)
        found, expected = of_cudnn.result(), of_reference.result()
    pairs = zip(found, expected, strict=True)
    # NaN, wherever it is, stays the largest.
    return float(np.max([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]))
