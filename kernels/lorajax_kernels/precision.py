"""How the ops multiply: float32 sums always, float32 inputs at full precision, and whole multiples."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

# XLA copies what products in 16 bits read and write, to fill it up, where a size is no multiple of this.
MULTIPLE = 8


def einsum(equation: str, *operands: Array) -> Array:
    """jnp.einsum with a float32 result.

    Half-precision operands keep the tensor cores; float32 operands ask for HIGHEST, because the default on a
    GPU may round them to TF32 (10 bits of mantissa).
    """
    wide = any(operand.dtype == jnp.float32 for operand in operands)
    return jnp.einsum(
        equation,
        *operands,
        precision=jax.lax.Precision.HIGHEST if wide else None,
        preferred_element_type=jnp.float32,
    )


def product(equation: str, left: Array, right: Array) -> Array:
    """jnp.einsum of two operands of one dtype, with a result of that dtype from float32 sums.

    A float32 result that is cast afterwards would cost a pass where XLA takes cuBLAS.
    """
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.einsum(equation, left, right, precision=precision)
