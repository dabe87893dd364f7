"""FlashAttention-2 in Triton for Ampere and later GPUs: its launches, its blocks and its derivatives.

All that the kernels know of segments and windows are two integers per token, the oldest key that a query sees
and the end of the queries that see a key: neither a mask nor a list of blocks is ever made. They read q, k
and v where they are, [B, T, heads, H], and find the key head of a query head themselves.

The backward pass is two kernels. One owns the rows of dq. It also makes delta, the sum of dout * out of each
row, from a block of dout that it needs anyway; a pass of XLA would read dout once more. The other owns the
rows of dk and dv, and sums them over the query heads of a key head; where that makes too few programs for the
GPU, several share those heads out, and XLA adds up what they write. Scores are made in both, but no two
programs add to the same memory, so equal inputs give equal bits.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lorajax_kernels import segments
from lorajax_kernels.attention.problem import Problem
from lorajax_kernels.checks import why_not_capped
from lorajax_kernels.device import Device, current_device
from lorajax_kernels.triton_call import block_for, load_kernels, triton_call

MAX_HEAD_DIM = 256
# Of an H100 or H200; for a device that does not say how many it has.
_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Blocks:
    """How one kernel is compiled.

    Attributes:
        queries, keys: tokens in a block of each; powers of two from 16 to 128.
        warps: of a program.
        stages: of a loop's pipeline. Loads are issued at the end of an iteration, stages - 1 ahead of their
            use: with 2 stages they are waited for almost at once, with 3 they have an iteration to arrive.
        split: a loop each for blocks with and without a mask, as triton_kernels.py explains.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    split: bool


@dataclass(frozen=True)
class KernelBlocks:
    """The blocks of each kernel."""

    forward: Blocks
    dq: Blocks
    dkv: Blocks


# By family of GPUs and largest head_dim. A program has 163 KB of shared memory on compute capability 8.0 and
# 227 KB on 9.0 and 10.0, where the same blocks take more of it; 8.6 stands for all others, which have 99 KB
# or more. Without wgmma, `split` pays only where a program owns as many tokens as a head has columns,
# because its warps then share out tokens alone. Those of 9.0 up to head_dim 128 are the fastest of some
# twenty each on an H200, with five documents on a row; the others are chosen by registers and shared memory.
_BLOCKS = {
    ((8, 0), 64): KernelBlocks(
        forward=Blocks(queries=128, keys=64, warps=4, stages=3, split=True),
        dq=Blocks(queries=64, keys=64, warps=4, stages=3, split=True),
        dkv=Blocks(queries=64, keys=64, warps=4, stages=3, split=True),
    ),
    ((8, 0), 128): KernelBlocks(
        forward=Blocks(queries=128, keys=64, warps=8, stages=3, split=True),
        dq=Blocks(queries=128, keys=32, warps=8, stages=3, split=True),
        dkv=Blocks(queries=32, keys=128, warps=8, stages=3, split=True),
    ),
    ((8, 0), 256): KernelBlocks(
        forward=Blocks(queries=128, keys=32, warps=8, stages=3, split=False),
        dq=Blocks(queries=64, keys=32, warps=8, stages=3, split=False),
        dkv=Blocks(queries=64, keys=64, warps=8, stages=2, split=False),
    ),
    ((8, 6), 64): KernelBlocks(
        forward=Blocks(queries=128, keys=64, warps=4, stages=3, split=True),
        dq=Blocks(queries=64, keys=64, warps=4, stages=3, split=True),
        dkv=Blocks(queries=64, keys=64, warps=4, stages=3, split=True),
    ),
    ((8, 6), 128): KernelBlocks(
        forward=Blocks(queries=128, keys=64, warps=8, stages=3, split=True),
        dq=Blocks(queries=128, keys=32, warps=8, stages=3, split=True),
        dkv=Blocks(queries=32, keys=128, warps=8, stages=3, split=True),
    ),
    ((8, 6), 256): KernelBlocks(
        forward=Blocks(queries=64, keys=32, warps=8, stages=2, split=False),
        dq=Blocks(queries=32, keys=32, warps=4, stages=3, split=True),
        dkv=Blocks(queries=32, keys=32, warps=4, stages=3, split=False),
    ),
    ((9, 0), 64): KernelBlocks(
        forward=Blocks(queries=64, keys=64, warps=4, stages=3, split=False),
        dq=Blocks(queries=64, keys=32, warps=4, stages=3, split=False),
        dkv=Blocks(queries=64, keys=64, warps=4, stages=3, split=False),
    ),
    ((9, 0), 128): KernelBlocks(
        forward=Blocks(queries=64, keys=64, warps=4, stages=3, split=False),
        dq=Blocks(queries=64, keys=64, warps=4, stages=2, split=False),
        dkv=Blocks(queries=64, keys=64, warps=4, stages=2, split=False),
    ),
    ((9, 0), 256): KernelBlocks(
        forward=Blocks(queries=128, keys=64, warps=8, stages=2, split=False),
        dq=Blocks(queries=128, keys=32, warps=8, stages=2, split=False),
        dkv=Blocks(queries=32, keys=64, warps=8, stages=3, split=False),
    ),
}


def kernel_blocks(compute_capability: tuple[int, int], head_dim: int) -> KernelBlocks:
    """The blocks for a GPU; those of its nearest relative if it has none of its own."""
    if compute_capability[0] in (9, 10):
        family = (9, 0)
    else:
        family = (8, 0) if compute_capability == (8, 0) else (8, 6)
    largest = min(largest for known, largest in _BLOCKS if known == family and head_dim <= largest)
    return _BLOCKS[family, largest]


def query_parts(programs: int, group: int, multiprocessors: int) -> int:
    """Over how many programs the query heads of a key head are shared out to make dk and dv.

    Early keys are seen by the most queries, the first block by twice the mean. Where all programs run at once
    it decides the time; where each multiprocessor has several to run one after the other, short ones fill in.
    Parts double while they divide the heads evenly and there are fewer than three programs for each
    multiprocessor. So there are never six, and the partial results in float32 stay within some 130 MB.

    Args:
        programs: that there are if heads are not shared out.
        group: query heads of a key head.
        multiprocessors: of the GPU.
    """
    parts = 1
    while group % (2 * parts) == 0 and programs * parts < 3 * multiprocessors:
        parts *= 2
    return parts


def why_not(problem: Problem, device: Device) -> str | None:
    """None if the kernels serve the problem on the device, otherwise the reason why not."""
    if device.why_no_triton is not None:
        return device.why_no_triton
    if problem.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, not {problem.dtype}"
    if problem.head_dim % 8 or problem.head_dim > MAX_HEAD_DIM:
        return f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, not {problem.head_dim}"
    return why_not_capped(problem.softcap)


def triton_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    max_segments: int | None,
    blocks: KernelBlocks | None = None,
    parts: int | None = None,
) -> Float[Array, "B T N H"]:
    """See lorajax_kernels.attention. T that is no multiple of the largest block (128 at most) is padded.

    Args:
        blocks: of the kernels; None: those of the table for the current device.
        parts: over which the query heads of a key head are shared out to make dk and dv, a divisor of N / K;
            None: as many as query_parts says for the current device.

    Raises:
        ValueError: there is no GPU to choose the blocks for, or parts do not divide the query heads.
    """
    del max_segments
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    device = current_device()
    if blocks is None:
        if device.compute_capability is None:
            raise ValueError("triton_attention: there is no NVIDIA GPU to choose the blocks for")
        blocks = kernel_blocks(device.compute_capability, q.shape[3])
    if scale <= 0:  # the kernels take the largest product of a row for its largest score
        q, scale = q * scale, 1.0
    pad = -length % _largest(blocks)
    if pad:
        # Keys come before the queries that see them, so padding at the end is invisible to the real queries.
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)), mode="edge")
    first, end = checkpoint_name(segments.bounds(segment_ids), "segment_bounds")  # [B, T]
    if window is not None:
        index = jnp.arange(length + pad, dtype=jnp.int32)
        window = min(window, length)  # so that nothing overflows
        first, end = jnp.maximum(first, index - (window - 1)), jnp.minimum(end, index + window)
    if parts is None:
        batch, padded, kv_heads, _ = k.shape
        programs = kv_heads * (padded // blocks.dkv.keys) * batch
        parts = query_parts(programs, group, device.multiprocessors or _MULTIPROCESSORS)
    elif group % parts:
        raise ValueError(f"triton_attention: {group} query heads of a key head do not make {parts} parts")
    return _attend(_Plan(scale, softcap, blocks, parts), q, k, v, first, end)[:, :length]


def _largest(blocks: KernelBlocks) -> int:
    return max(max(x.queries, x.keys) for x in (blocks.forward, blocks.dq, blocks.dkv))


@dataclass(frozen=True)
class _Plan:
    """All that is static beside the shapes."""

    scale: float
    softcap: float | None
    blocks: KernelBlocks
    parts: int


Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B T K H"]
PerToken = Int[Array, "B T"]
PerQuery = Float[Array, "B N T"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q: Queries, k: Keys, v: Keys, first: PerToken, end: PerToken) -> Queries:
    return _forward(plan, q, k, v, first)[0]


def _attend_forward(plan: _Plan, q: Queries, k: Keys, v: Keys, first: PerToken, end: PerToken):
    out, lse = _forward(plan, q, k, v, first)
    out, lse = checkpoint_name(out, "attention_output"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, first, end, out, lse)


def _attend_backward(plan: _Plan, residuals, dout: Queries):
    q, k, v, first, end, out, lse = residuals
    dq, delta = _dq(plan, q, k, v, first, out, lse, dout)
    dk, dv = _dkv(plan, q, k, v, end, lse, delta, dout)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(plan: _Plan, q: Queries, k: Keys, v: Keys, first: PerToken) -> tuple[Queries, PerQuery]:
    """Output, and the log-sum-exp of each row to base 2 in float32."""
    triton_kernels = load_kernels("lorajax_kernels.attention.triton_kernels")
    batch, length, heads, _ = q.shape
    blocks = plan.blocks.forward
    return triton_call(
        triton_kernels.forward_kernel,
        *(q, k, v, first, length),
        out_shape=(_like(q), _per_query(q)),
        grid=(heads, length // blocks.queries, batch),
        **_settings(plan, blocks, q, k),
    )


def _dq(
    plan: _Plan,
    q: Queries,
    k: Keys,
    v: Keys,
    first: PerToken,
    out: Queries,
    lse: PerQuery,
    dout: Queries,
) -> tuple[Queries, PerQuery]:
    """dq, and delta: the sum of dout * out of each row in float32."""
    triton_kernels = load_kernels("lorajax_kernels.attention.triton_kernels")
    batch, length, heads, _ = q.shape
    blocks = plan.blocks.dq
    return triton_call(
        triton_kernels.dq_kernel,
        *(q, k, v, first, out, lse, dout, length),
        out_shape=(_like(q), _per_query(q)),
        grid=(heads, length // blocks.queries, batch),
        SCALE=plan.scale,
        **_settings(plan, blocks, q, k),
    )


def _dkv(
    plan: _Plan,
    q: Queries,
    k: Keys,
    v: Keys,
    end: PerToken,
    lse: PerQuery,
    delta: PerQuery,
    dout: Queries,
) -> tuple[Keys, Keys]:
    triton_kernels = load_kernels("lorajax_kernels.attention.triton_kernels")
    batch, length, kv_heads, head_dim = k.shape
    blocks, parts = plan.blocks.dkv, plan.parts
    # What is summed again stays in float32.
    partial = jax.ShapeDtypeStruct((batch, length, kv_heads * parts, head_dim), jnp.float32)
    dk, dv = triton_call(
        triton_kernels.dkv_kernel,
        *(q, k, v, end, lse, delta, dout, length),
        out_shape=(_like(k), _like(v)) if parts == 1 else (partial, partial),
        grid=(kv_heads * parts, length // blocks.keys, batch),
        PARTS=parts,
        SCALE=plan.scale,
        **_settings(plan, blocks, q, k),
    )
    if parts == 1:
        return dk, dv
    dk, dv = (jnp.sum(x.reshape(batch, length, kv_heads, parts, head_dim), axis=3) for x in (dk, dv))
    return dk.astype(k.dtype), dv.astype(v.dtype)


def _settings(plan: _Plan, blocks: Blocks, q: Queries, k: Keys) -> dict[str, Any]:
    """What all kernels are compiled with."""
    heads, head_dim = q.shape[2:]
    log2_e = math.log2(math.e)
    return {
        "FACTOR": log2_e * (plan.scale if plan.softcap is None else plan.softcap),
        "TANH_FACTOR": None if plan.softcap is None else 2 * log2_e * plan.scale / plan.softcap,
        "HEADS": heads,
        "KV_HEADS": k.shape[2],
        "HEAD_DIM": head_dim,
        "BLOCK_H": block_for(head_dim),
        "BLOCK_Q": blocks.queries,
        "BLOCK_K": blocks.keys,
        "SPLIT": blocks.split,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _per_query(q: Queries) -> jax.ShapeDtypeStruct:
    batch, length, heads, _ = q.shape
    return jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
