"""What flows back into an adapter, as two products: dy is read for each of them."""

from jaxtyping import Array, Float

from lorajax_kernels.precision import einsum, product


def xla_hidden_and_b(
    dy: Float[Array, "rows out"], u: Float[Array, "rows R"], b: Float[Array, "out R"]
) -> tuple[Float[Array, "rows R"], Float[Array, "out R"]]:
    """dy b in dy's dtype, and dy^T u in float32; all of one dtype."""
    return product("ro,ok->rk", dy, b), einsum("ro,rk->ok", dy, u)
