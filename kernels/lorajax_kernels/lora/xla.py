"""What flows back into an adapter, as two products: dy is read for each of them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax_kernels.elementwise import swiglu
from lorajax_kernels.precision import einsum, product


def scaled(b: Float[Array, "out R"], scale: float, dtype: jnp.dtype) -> Float[Array, "out R"]:
    """scale b, rounded once."""
    return (scale * b.astype(jnp.float32)).astype(dtype)


def xla_hidden_and_b(
    dy: Float[Array, "rows out"],
    u: Float[Array, "rows all"],
    b: Float[Array, "out R"],
    *,
    columns: slice,
    scale: float,
) -> tuple[Float[Array, "rows R"], Float[Array, "out R"]]:
    """dy (scale b) in dy's dtype, and dy^T u in float32, of the R columns of u that belong to b."""
    u = u[:, columns]
    return product("ro,ok->rk", dy, scaled(b, scale, dy.dtype)), einsum("ro,rk->ok", dy, u)


class MLPGradients(NamedTuple):
    """What flows back through h = silu(gate) * up, and what the adapters around it need.

    Attributes:
        dys: dgate and dup, in dh's dtype.
        dus: dgate (scale b) and dup (scale b), each of its own layer, likewise.
        dbs: dgate^T u and dup^T u, each of its own columns of u, float32.
        da: du^T h of the layer after the gate, float32.
    """

    dys: tuple[Float[Array, "rows F"], Float[Array, "rows F"]]
    dus: list[Float[Array, "rows R"]]
    dbs: list[Float[Array, "F R"]]
    da: Float[Array, "R F"]


def xla_mlp_backward(
    dh: Float[Array, "rows F"],
    gate: Float[Array, "rows F"],
    up: Float[Array, "rows F"],
    u: Float[Array, "rows all"],
    du: Float[Array, "rows R"],
    bs: Sequence[Float[Array, "F R"]],
    *,
    columns: Sequence[slice],
    scales: Sequence[float],
) -> MLPGradients:
    """Gradients of gate and up, and the small products that share a factor with them.

    Args:
        dh, gate, up: of one dtype.
        u: hidden activations of the layers that make gate and up; each has `columns` of its own.
        du: gradient of the hidden activations of the layer after the gate.
        bs, scales: of the adapters of gate and up.
    """
    h, vjp = jax.vjp(swiglu, gate, up)
    dys = vjp(dh)
    each = [
        xla_hidden_and_b(dy, u, b, columns=own, scale=scale)
        for dy, b, own, scale in zip(dys, bs, columns, scales, strict=True)
    ]
    return MLPGradients(dys, [du for du, _ in each], [db for _, db in each], einsum("rk,ro->ko", du, h))
