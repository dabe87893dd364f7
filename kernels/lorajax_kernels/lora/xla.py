"""What flows back into an adapter, as two products: dy is read for each of them."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax_kernels.lora.operands import Adapter
from lorajax_kernels.precision import einsum, product


def scaled(b: Float[Array, "out R"], scale: float, dtype: jnp.dtype) -> Float[Array, "out R"]:
    """scale b, rounded once."""
    return (scale * b.astype(jnp.float32)).astype(dtype)


def xla_hidden_and_b(
    dy: Float[Array, "rows out"], u: Float[Array, "rows all"], adapter: Adapter, *, columns: slice
) -> tuple[Float[Array, "1 rows R"], Float[Array, "out R"]]:
    """dy (scale b) in dy's dtype, and dy^T u in float32, of the R columns of u that are the adapter's."""
    b = scaled(adapter.b, adapter.scale, dy.dtype)
    return product("ro,ok->rk", dy, b)[None], einsum("ro,rk->ok", dy, u[:, columns])
