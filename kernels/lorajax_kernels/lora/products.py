"""Sums of matrix products, and what each way to compute them costs in passes over large arrays."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax_kernels.precision import product

ARRANGEMENTS = ("auto", "joined", "added")

# What "auto" compares: the cost of an element that is copied to be joined, so read and written once more, and
# of one that is added: written, read, and, where no fusion takes the sum, read and written again.
COPIED, ADDED = 1.0, 1.5


def sum_of_products(
    lefts: Sequence[Float[Array, "rows k"]],
    rights: Sequence[Float[Array, "k out"]],
    *,
    join: bool,
) -> Float[Array, "rows out"]:
    """Sum of left @ right over the pairs; each has its own k.

    Args:
        lefts, rights: of one dtype, which is the result's.
        join: copy all pairs side by side and run one GEMM. Otherwise each pair has a GEMM, and the results
            are added: by XLA, in a pass of its own or in the fusion that takes the sum, or, in a program that
            is compiled with xla_gpu_triton_gemm_any=False, by cuBLAS within the GEMM (beta = 1).
    """
    if join:
        return product("rk,ko->ro", jnp.concatenate(lefts, axis=1), jnp.concatenate(rights, axis=0))
    total = product("rk,ko->ro", lefts[-1], rights[-1])
    for left, right in zip(reversed(lefts[:-1]), reversed(rights[:-1]), strict=True):
        # In this order every sum can go into a GEMM: XLA gives cuBLAS the sum so far only as right operand.
        total = product("rk,ko->ro", left, right) + total
    return total


def should_join(arrangement: str, *, terms: int, rows: int, k: int, out: int) -> bool:
    """Whether a sum of products is to join its operands.

    "auto" compares what is written and read again: both sides of the joined product, or the result of every
    product but one. Results that XLA adds in a pass of its own cost up to twice as much as that.

    Args:
        arrangement: one of ARRANGEMENTS.
        terms: number of pairs.
        rows, k, out: k of all pairs together, and `out` of all sums that share the lefts.
    """
    if arrangement != "auto":
        return arrangement == "joined"
    return COPIED * k * (rows + out) < ADDED * (terms - 1) * rows * out
