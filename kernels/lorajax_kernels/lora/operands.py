"""What a linear layer is made of: a frozen weight, and a low-rank adapter that sees some of x."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lorajax_kernels.nf4 import NF4Weight, dequantize_nf4

Weight = Float[Array, "out in"] | NF4Weight


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("a", "b", "key", "first_row", "vector"),
    meta_fields=("scale", "dropout", "a_start", "b_start"),
)
@dataclass(frozen=True, eq=False)
class Adapter:
    """What is added to x W^T: scale * dropout(x) a^T b^T (LoRA: Hu et al., 2021). A pytree of arrays.

    Attributes:
        a, b: trainable, float32; cast to x's dtype for the products.
        scale: as a rule alpha / R.
        dropout: rate, at least 0 and below 1.
        key: of the dropout, another one for each adapter; None switches it off.
        first_row: what the dropout takes the first row of x for, an integer: parts of one x that are given
            one after the other, with one key, see what they would see together. None: 0.
        vector: that a and b are parts of, float32: a constant, which kernels read in place of a and b, so
            that these need not be copied out of it; some only where it is the same array for all adapters of
            a call. None: they are arrays of their own.
        a_start, b_start: where a's and b's elements begin in the vector.
    """

    a: Float[Array, "R in"]
    b: Float[Array, "out R"]
    scale: float = 1.0
    dropout: float = 0.0
    key: PRNGKeyArray | None = None
    first_row: Int[Array, ""] | None = None
    vector: Float[Array, " N"] | None = None
    a_start: int = 0
    b_start: int = 0

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    @property
    def drops(self) -> bool:
        """Whether it sees less than all of x."""
        return self.dropout > 0 and self.key is not None


def dense(weight: Weight, dtype: jnp.dtype) -> Float[Array, "out in"]:
    """The weight as an array of `dtype`."""
    return dequantize_nf4(weight, dtype) if isinstance(weight, NF4Weight) else jnp.asarray(weight, dtype)
