"""Loss and gradient of a chunk of logits in plain XLA: three passes over the logits, the last one writes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def capped(logits: Float[Array, "rows V"], softcap: float | None) -> Float[Array, "rows V"]:
    """softcap * tanh(logits / softcap), or the logits as they are, in float32."""
    logits = logits.astype(jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def losses(
    logits: Float[Array, "rows V"],
    lse: Float[Array, " rows"],
    targets: Int[Array, " rows"],
    weights: Float[Array, " rows"],
) -> Float[Array, " rows"]:
    """Weighted loss of each row from capped logits; NaN where a target that counts is no index."""
    vocab = logits.shape[1]
    at_target = jnp.take_along_axis(logits, jnp.clip(targets, 0, vocab - 1)[:, None], axis=-1)[:, 0]
    loss = jnp.where((targets >= 0) & (targets < vocab), lse - at_target, jnp.nan)
    return jnp.where(weights != 0, loss * weights, 0)


def xla_loss_and_gradient(
    logits: Float[Array, "rows width"],
    targets: Int[Array, " rows"],
    weights: Float[Array, " rows"],
    *,
    vocab: int,
    softcap: float | None,
    dtype: jnp.dtype,
) -> tuple[Float[Array, " rows"], Float[Array, "rows width"]]:
    """Weighted loss of each row, and the gradient of its unweighted loss in the logits, of `dtype`.

    Args:
        logits: before the softcap; finite, also in rows of weight 0.
        vocab: so many columns count; what fills up the others is 0, and so is its gradient.
    """
    z = capped(logits[:, :vocab], softcap)
    lse = jax.nn.logsumexp(z, axis=-1)
    hit = jnp.arange(vocab) == targets[:, None]
    gradient = jnp.exp(z - lse[:, None]) - hit
    if softcap is not None:
        gradient = gradient * (1 - jnp.square(z / softcap))
    filled = ((0, 0), (0, logits.shape[1] - vocab))
    return losses(z, lse, targets, weights), jnp.pad(gradient.astype(dtype), filled)
