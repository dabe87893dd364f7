"""Triton kernels that read a large operand of an adapter once where XLA reads it twice.

In the backward pass a program owns some columns of dy and goes down some of its rows: dB of its columns stays
in registers, and for each block of rows it leaves what its columns add to dy B. Both are then summed over the
programs, dB by XLA. What is added to dy B is rounded to dy's dtype: each is a few hundred products, and there
are a few dozen, so that the sum is as exact as its own rounding.

In the forward pass x is copied, for the product with [x, u], by the kernel that makes u of it.

What flows back through SwiGLU is written over what it is made of: XLA makes its three results one by one,
each in memory of its own.

What is small takes as long as a kernel takes to start, so one kernel makes it for all adapters of an input:
the operands of their products, and the sums of what flows back into their hidden activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax_kernels.device import Device
from lorajax_kernels.lora.operands import Adapter
from lorajax_kernels.triton_call import block_for, load_kernels, triton_call

if TYPE_CHECKING:
    from lorajax_kernels.lora import Problem

MAX_RANK = 128
# Narrower layers have too few columns for the programs to own, and little to gain.
MIN_OUT = 1024


@dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up.

    Attributes:
        rows: in a block, a power of two from 16.
        columns: in a strip, a power of two from 16; fewer where the rank is more than 32.
        programs: to aim for, some for each of the GPU's multiprocessors.
        num_warps, num_stages: of the kernel.
    """

    rows: int
    columns: int
    programs: int
    num_warps: int
    num_stages: int


# Of one input that these kernels take at once.
MOST_ADAPTERS = 3
# The fastest of twelve on an H200.
TILING = Tiling(rows=64, columns=256, programs=132, num_warps=8, num_stages=3)


# Of u, that the kernel of the forward pass makes at once.
MOST_COLUMNS = 256


@dataclass(frozen=True)
class JoinTiling:
    """The same of the kernel of the forward pass; a program goes along the columns of its rows."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def join_tiling(rank: int) -> JoinTiling:
    """For all columns of u: of eleven tried on an H200 with 64 none was much faster.

    What it holds of x and A fits into the 99 KB of shared memory that there are on the smallest GPUs (compute
    capability 8.6, 8.9 and 12.0).
    """
    return JoinTiling(rows=64, columns=128 if rank <= 64 else 64, num_warps=8, num_stages=3)


def why_not(problem: Problem, device: Device) -> str | None:
    """None if the kernel can serve the problem there, otherwise the reason why not."""
    if device.why_no_triton is not None:
        return device.why_no_triton
    if problem.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies bfloat16 and float16, not {problem.dtype}"
    if problem.rank > MAX_RANK:
        return f"it takes ranks up to {MAX_RANK}, not {problem.rank}"
    return None


def why_no_kernel(weights: Sequence[Any], adapters: Sequence[Adapter | None]) -> str | None:
    """Why none of these kernels would run for layers of one input; None if some would."""
    outs = [weight.shape[0] for weight, own in zip(weights, adapters, strict=True) if own is not None]
    if len(outs) <= MOST_ADAPTERS or max(outs) >= MIN_OUT:
        return None
    return f"of more than {MOST_ADAPTERS} adapters its kernels take those of {MIN_OUT} columns or more"


def triton_hidden_and_b(
    dy: Float[Array, "rows out"],
    u: Float[Array, "rows all"],
    adapter: Adapter,
    *,
    columns: slice,
    tiling: Tiling | None = None,
) -> tuple[Float[Array, "strips rows R"], Float[Array, "out R"]]:
    """See xla_hidden_and_b; the first is still to be summed over the strips."""
    triton_kernels = load_kernels("lorajax_kernels.lora.triton_kernels")
    tiling = tiling or TILING
    (rows, out), rank = dy.shape, adapter.rank
    block_r = block_for(rank)
    # A program's share of dB, columns * block_r, is in registers.
    strip = min(tiling.columns * 32 // max(block_r, 32), block_for(out))
    blocks, strips = -(-rows // tiling.rows), -(-out // strip)
    per_program = -(-blocks // max(1, tiling.programs // strips))
    pieces = -(-blocks // per_program)
    hidden, db = triton_call(
        triton_kernels.hidden_and_b_kernel,
        *(dy, u, adapter.b if adapter.vector is None else adapter.vector, rows),
        out_shape=(
            jax.ShapeDtypeStruct((strips, rows, rank), dy.dtype),
            jax.ShapeDtypeStruct((pieces, out, rank), jnp.float32),
        ),
        grid=(strips, pieces),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        OUT=out,
        RANK=rank,
        U_WIDTH=u.shape[1],
        U_START=columns.start,
        B_START=adapter.b_start,
        SCALE=adapter.scale,
        BLOCKS_PER_PROGRAM=per_program,
        BLOCK_ROWS=tiling.rows,
        BLOCK_OUT=strip,
        BLOCK_R=block_r,
    )
    return hidden, jnp.sum(db, axis=0)


# Rows of a program of the kernel that sums, and its warps.
SUMMED_ROWS, SUM_WARPS = 64, 4


def triton_hidden_sums(
    parts: Sequence[Float[Array, "strips_i rows R_i"]],
    *,
    width: int,
    inverse: Float[Array, " rows"] | None = None,
) -> tuple[Float[Array, "rows width"], Float[Array, "rows R"] | None]:
    """Sums over the strips, in the parts' dtype, side by side and filled up with zeros.

    Args:
        parts: up to MOST_ADAPTERS, from triton_hidden_and_b.
        inverse: float32; the second result is the sums, as they are rounded, times it, not filled up.
    """
    triton_kernels = load_kernels("lorajax_kernels.lora.triton_kernels")
    (_, rows, _), dtype = parts[0].shape, parts[0].dtype
    missing = MOST_ADAPTERS - len(parts)
    sizes = [size for strips, _, rank in (part.shape for part in parts) for size in (strips, rank)]
    sizes += [0, 0] * missing
    ranks = sum(part.shape[2] for part in parts)
    summed, scaled = triton_call(
        triton_kernels.hidden_sums_kernel,
        *[*parts, *[parts[0]] * missing],
        parts[0] if inverse is None else inverse,
        rows,
        *sizes,
        ranks,
        width,
        out_shape=(
            jax.ShapeDtypeStruct((rows, width), dtype),
            jax.ShapeDtypeStruct((1, 1) if inverse is None else (rows, ranks), dtype),
        ),
        grid=(-(-rows // SUMMED_ROWS), len(parts)),
        num_warps=SUM_WARPS,
        num_stages=1,
        SCALED=inverse is not None,
        BLOCK_ROWS=SUMMED_ROWS,
        BLOCK_R=block_for(max(part.shape[2] for part in parts)),
        FILLED=block_for(max(width - ranks, 1)),
    )
    return summed, None if inverse is None else scaled


def triton_hidden_and_joined(
    x: Float[Array, "rows in"], a: Float[Array, "R in"], *, tiling: JoinTiling | None = None
) -> tuple[Float[Array, "rows R"], Float[Array, "rows joined"]]:
    """u = x a^T in x's dtype, and x with u beside it; all of one dtype, R up to MOST_COLUMNS."""
    triton_kernels = load_kernels("lorajax_kernels.lora.triton_kernels")
    (rows, width), rank = x.shape, a.shape[0]
    tiling = tiling or join_tiling(rank)
    return triton_call(
        triton_kernels.hidden_and_joined_kernel,
        *(x, a, rows),
        out_shape=(
            jax.ShapeDtypeStruct((rows, rank), x.dtype),
            jax.ShapeDtypeStruct((rows, width + rank), x.dtype),
        ),
        grid=(-(-rows // tiling.rows),),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        IN=width,
        RANK=rank,
        BLOCK_ROWS=tiling.rows,
        BLOCK_IN=tiling.columns,
        BLOCK_R=block_for(rank),
    )


# Elements of a program of the kernel that copies, and its warps.
COPIED, COPY_WARPS = 1024, 4


class Columns(NamedTuple):
    """Where a B goes: scale * B in `window` columns, zeros but for those from `left` on."""

    left: int
    window: int


def triton_operands(
    adapters: Sequence[Adapter], *, width: int, columns: Sequence[Columns], dtype: jnp.dtype
) -> tuple[Float[Array, "width in"], list[Float[Array, "out_i window_i"]]]:
    """What products with adapters read of them: all A, filled up with rows of zeros, and each B in columns.

    Args:
        adapters: up to MOST_ADAPTERS, parts of a vector, A after A; nothing but that is read.
        columns: of B; none: the A alone.
        dtype: of the results.
    """
    triton_kernels = load_kernels("lorajax_kernels.lora.triton_kernels")
    rows, inner = sum(adapter.rank for adapter in adapters), adapters[0].a.shape[1]
    vector, placed = adapters[0].vector, list(zip(adapters, columns, strict=False))
    assert vector is not None
    shapes = [(adapter.b.shape[0], own.window) for adapter, own in placed]
    programs = sum(-(-math.prod(shape) // COPIED) for shape in [(width, inner), *shapes])
    missing = MOST_ADAPTERS - len(placed)
    sizes = [inner, rows, adapters[0].a_start, width]
    for adapter, own in placed:
        sizes += [adapter.b.shape[0], adapter.rank, adapter.b_start, own.left, own.window]
    # Multiples of 16 as most: Triton compiles other kernels for other numbers.
    sizes += [0, 16, 0, 0, 16] * missing
    scales = [*(adapter.scale for adapter in adapters), *[adapters[-1].scale] * MOST_ADAPTERS]
    constants: dict[str, Any] = {f"SCALE_{i}": float(scales[i]) for i in range(MOST_ADAPTERS)}
    stacked, *found = triton_call(
        triton_kernels.operands_kernel,
        vector,
        *sizes,
        out_shape=tuple(
            jax.ShapeDtypeStruct(shape, dtype) for shape in [(width, inner), *shapes, *[(1, 1)] * missing]
        ),
        grid=(programs,),
        num_warps=COPY_WARPS,
        num_stages=1,
        BLOCK=COPIED,
        **constants,
    )
    return stacked, found[: len(shapes)]


# Elements of one program of the element by element kernel, and its warps: an H200's memory is what limits it.
ELEMENTS, ELEMENT_WARPS = 2048, 4


def triton_swiglu_backward(
    dh: Float[Array, "rows F"], gate: Float[Array, "rows F"], up: Float[Array, "rows F"]
) -> tuple[Float[Array, "rows F"], Float[Array, "rows F"], Float[Array, "rows F"]]:
    """Gradients of gate and up in h = silu(gate) * up, and h itself once more.

    dup takes the memory of dh, dgate that of gate, and h that of up.
    """
    triton_kernels = load_kernels("lorajax_kernels.lora.triton_kernels")
    dup, dgate, h = triton_call(
        triton_kernels.swiglu_backward_kernel,
        *(dh, gate, up),
        out_shape=(jax.ShapeDtypeStruct(dh.shape, dh.dtype),) * 3,
        grid=(-(-dh.size // ELEMENTS),),
        num_warps=ELEMENT_WARPS,
        num_stages=1,
        input_output_aliases={0: 0, 1: 1, 2: 2},
        kernel_for_0_3=triton_kernels.swiglu_backward_kernel_for_0_3,
        SIZE=dh.size,
        BLOCK=ELEMENTS,
    )
    return dgate, dup, h
