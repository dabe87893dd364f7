"""Triton kernels of adapters with dropout: masks are made in registers, and nothing dropped is in memory.

XLA writes what each adapter sees of x, and what flows back through each, into memory of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from lorajax_kernels.lora.dropout import Dropped, columns_of, seed_of
from lorajax_kernels.lora.operands import Adapter
from lorajax_kernels.lora.triton import MOST_ADAPTERS
from lorajax_kernels.triton_call import block_for, load_kernels, triton_call


@dataclass(frozen=True)
class DropoutTiling:
    """How the kernels are cut up.

    Attributes:
        rows, columns: of a block of x, powers of two from 16.
        programs: to aim for where the rows are summed up.
        num_warps, num_stages: of the kernels.
    """

    rows: int
    columns: int
    programs: int
    num_warps: int
    num_stages: int


TILING = DropoutTiling(rows=64, columns=64, programs=264, num_warps=4, num_stages=3)


def triton_dropped_hidden(
    x: Float[Array, "rows in"],
    a: Float[Array, "width in"],
    adapters: Sequence[Adapter],
    width: int,
    *,
    tiling: DropoutTiling | None = None,
) -> Float[Array, "rows width"]:
    """See xla_dropped_hidden."""
    kernels, tiling = load_kernels("lorajax_kernels.lora.triton_dropout_kernels"), tiling or TILING
    rows, inner = x.shape
    ranks = _ranks(adapters)
    return triton_call(
        kernels.dropped_hidden_kernel,
        *(x, a, _seeds(adapters), rows),
        *ranks,
        width,
        out_shape=jax.ShapeDtypeStruct((rows, width), x.dtype),
        grid=(len(adapters), -(-rows // tiling.rows)),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        IN=inner,
        BLOCK_ROWS=tiling.rows,
        BLOCK_IN=tiling.columns,
        BLOCK_R=block_for(max(ranks)),
        FILLED=block_for(max(width - sum(ranks), 1)),
    )


def triton_dropped_gradients(
    x: Float[Array, "rows in"],
    du: Float[Array, "rows width"],
    adapters: Sequence[Adapter],
    *,
    tiling: DropoutTiling | None = None,
) -> list[Float[Array, "R_i in"]]:
    """See xla_dropped_gradients."""
    kernels, tiling = load_kernels("lorajax_kernels.lora.triton_dropout_kernels"), tiling or TILING
    rows, inner = x.shape
    ranks = _ranks(adapters)
    blocks, strips = -(-rows // tiling.rows), -(-inner // tiling.columns)
    per_program = -(-blocks // max(1, tiling.programs // (strips * len(adapters))))
    pieces = -(-blocks // per_program)
    da = triton_call(
        kernels.dropped_gradients_kernel,
        *(x, du, _seeds(adapters), rows),
        *ranks,
        du.shape[1],
        out_shape=jax.ShapeDtypeStruct((pieces, sum(ranks), inner), jnp.float32),
        grid=(len(adapters), strips, pieces),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        IN=inner,
        BLOCKS_PER_PROGRAM=per_program,
        BLOCK_ROWS=tiling.rows,
        BLOCK_IN=tiling.columns,
        BLOCK_R=block_for(max(ranks)),
    )
    return [jnp.sum(da[:, own], axis=0) for own in columns_of(adapters)]


def triton_dropped_added(
    dx: Float[Array, "rows in"],
    du: Float[Array, "rows width"],
    a: Float[Array, "width in"],
    adapters: Sequence[Adapter],
    *,
    tiling: DropoutTiling | None = None,
) -> Float[Array, "rows in"]:
    """See xla_dropped_added; the result takes the memory of dx."""
    kernels, tiling = load_kernels("lorajax_kernels.lora.triton_dropout_kernels"), tiling or TILING
    rows, inner = dx.shape
    ranks = _ranks(adapters)
    return triton_call(
        kernels.dropped_added_kernel,
        *(dx, du, a, _seeds(adapters), rows),
        *ranks,
        du.shape[1],
        out_shape=jax.ShapeDtypeStruct(dx.shape, dx.dtype),
        grid=(-(-inner // tiling.columns), -(-rows // tiling.rows)),
        num_warps=tiling.num_warps,
        num_stages=1,
        input_output_aliases={0: 0},
        kernel_for_0_3=kernels.dropped_added_kernel_for_0_3,
        ADAPTERS=len(adapters),
        IN=inner,
        BLOCK_ROWS=tiling.rows,
        BLOCK_IN=tiling.columns,
        BLOCK_R=block_for(max(ranks)),
    )


TRITON_DROPPED = Dropped(triton_dropped_hidden, triton_dropped_gradients, triton_dropped_added)


def _ranks(adapters: Sequence[Adapter]) -> list[int]:
    return [adapter.rank for adapter in adapters] + [0] * (MOST_ADAPTERS - len(adapters))


def _seeds(adapters: Sequence[Adapter]) -> UInt32[Array, "adapters 3"]:
    return jnp.stack([seed_of(adapter) for adapter in adapters])
