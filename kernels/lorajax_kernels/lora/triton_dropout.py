"""Triton kernels of adapters with dropout: masks are made in registers, and nothing dropped is in memory.

XLA writes what each adapter sees of x, and what flows back through each, into memory of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax_kernels.lora.dropout import Dropped, columns_of, seed_of
from lorajax_kernels.lora.operands import Adapter
from lorajax_kernels.lora.triton import MOST_ADAPTERS, Tiling
from lorajax_kernels.triton_call import block_for, load_kernels, triton_call

TILING = Tiling(rows=64, columns=64, programs=264, num_warps=4, num_stages=3)


def triton_dropped_hidden(
    x: Float[Array, "rows in"],
    a: Float[Array, "width in"],
    adapters: Sequence[Adapter],
    width: int,
    *,
    tiling: Tiling = TILING,
) -> Float[Array, "rows width"]:
    """See xla_dropped_hidden."""
    rows = x.shape[0]
    return _call(
        "dropped_hidden",
        *(x, a),
        adapters=adapters,
        width=width,
        tiling=tiling,
        out_shape=jax.ShapeDtypeStruct((rows, width), x.dtype),
        grid=(len(adapters) * -(-rows // tiling.rows),),
        ADAPTERS=len(adapters),
        FILLED=block_for(max(width - sum(adapter.rank for adapter in adapters), 1)),
    )


def triton_dropped_gradients(
    x: Float[Array, "rows in"],
    du: Float[Array, "rows width"],
    adapters: Sequence[Adapter],
    *,
    tiling: Tiling = TILING,
) -> list[Float[Array, "R_i in"]]:
    """See xla_dropped_gradients."""
    rows, inner = x.shape
    blocks, strips = -(-rows // tiling.rows), -(-inner // tiling.columns)
    per_program = -(-blocks // max(1, tiling.programs // (strips * len(adapters))))
    pieces = -(-blocks // per_program)
    ranks = sum(adapter.rank for adapter in adapters)
    da = _call(
        "dropped_gradients",
        *(x, du),
        adapters=adapters,
        width=du.shape[1],
        tiling=tiling,
        out_shape=jax.ShapeDtypeStruct((pieces, ranks, inner), jnp.float32),
        grid=(len(adapters), strips, pieces),
        BLOCKS_PER_PROGRAM=per_program,
    )
    return [jnp.sum(da[:, own], axis=0) for own in columns_of(adapters)]


def triton_dropped_added(
    dx: Float[Array, "rows in"],
    du: Float[Array, "rows width"],
    a: Float[Array, "width in"],
    adapters: Sequence[Adapter],
    *,
    tiling: Tiling = TILING,
) -> Float[Array, "rows in"]:
    """See xla_dropped_added; the result takes the memory of dx."""
    rows, inner = dx.shape
    return _call(
        "dropped_added",
        *(dx, du, a),
        adapters=adapters,
        width=du.shape[1],
        tiling=tiling,
        out_shape=jax.ShapeDtypeStruct(dx.shape, dx.dtype),
        grid=(-(-inner // tiling.columns) * -(-rows // tiling.rows),),
        input_output_aliases={0: 0},
        ADAPTERS=len(adapters),
    )


TRITON_DROPPED = Dropped(triton_dropped_hidden, triton_dropped_gradients, triton_dropped_added)


def _call(
    name: str, *operands: Array, adapters: Sequence[Adapter], width: int, tiling: Tiling, **options: Any
) -> Any:
    """A kernel on operands of which the first is [rows, in]; options as of triton_call.

    Args:
        width: columns of u, or of du.
    """
    kernels = load_kernels("lorajax_kernels.lora.triton_dropout_kernels")
    rows, inner = operands[0].shape
    ranks = [adapter.rank for adapter in adapters] + [0] * (MOST_ADAPTERS - len(adapters))
    return triton_call(
        getattr(kernels, f"{name}_kernel"),
        *operands,
        jnp.stack([seed_of(adapter) for adapter in adapters]),
        rows,
        *ranks,
        width,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        kernel_for_0_3=getattr(kernels, f"{name}_kernel_for_0_3", None),
        IN=inner,
        BLOCK_ROWS=tiling.rows,
        BLOCK_IN=tiling.columns,
        BLOCK_R=block_for(max(ranks)),
        **options,
    )
