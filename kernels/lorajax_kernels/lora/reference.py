"""Linear layers with adapters in plain float32: the definition that the fast path is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax_kernels.lora.dropout import drop
from lorajax_kernels.lora.operands import Adapter, Weight, dense
from lorajax_kernels.precision import einsum


def reference_lora_linears(
    x: Float[Array, "*rows in"],
    weights: Sequence[Weight],
    adapters: Sequence[Adapter | None],
    *,
    biases: Sequence[Float[Array, " out_i"] | None] | None = None,
) -> tuple[Float[Array, "*rows out_i"], ...]:
    """See lora_linears. Differentiable in every float array."""
    wide = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    ys = []
    for weight, adapter, bias in zip(weights, adapters, biases or [None] * len(weights), strict=True):
        y = einsum("ri,oi->ro", wide, dense(weight, jnp.dtype(jnp.float32)))
        if adapter is not None:
            u = einsum("ri,ki->rk", drop(wide, adapter), adapter.a)
            y = y + adapter.scale * einsum("rk,ok->ro", u, adapter.b)
        if bias is not None:
            y = y + bias
        ys.append(y.reshape(*x.shape[:-1], y.shape[-1]).astype(x.dtype))
    return tuple(ys)
