"""Linear cross-entropy with all of its logits in float32: the definition the fast path is compared with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lorajax_kernels.checks import at_least_int32
from lorajax_kernels.precision import einsum


def reference_linear_cross_entropy(
    x: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    softcap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """See linear_cross_entropy. Differentiable in x and head; under a weight of 0 x has to be finite."""
    logits = einsum("nd,vd->nv", x.astype(jnp.float32), head.astype(jnp.float32))
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    index = jnp.clip(at_least_int32(targets), 0, head.shape[0] - 1)
    logs = jnp.take_along_axis(jax.nn.log_softmax(logits), index[:, None], axis=1)[:, 0]
    weights = weights.astype(jnp.float32)
    return -jnp.sum(logs * weights), jnp.sum(weights)
