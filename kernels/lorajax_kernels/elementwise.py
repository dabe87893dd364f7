"""What a decoder computes element by element, in plain XLA, which fuses each of these with its neighbours."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*rows D"], weight: Float[Array, " D"], *, epsilon: float
) -> Float[Array, "*rows D"]:
    """x over its root mean square (Zhang and Sennrich, 2019), times weight, in x's dtype.

    Statistics are float32; the normalised x is rounded to its dtype before it meets the weight, as in
    Hugging Face's Llama.

    Args:
        epsilon: added to the mean square.
    """
    normed = (x.astype(jnp.float32) * inverse_rms(x, epsilon=epsilon)).astype(x.dtype)
    return (normed * weight.astype(x.dtype)).astype(x.dtype)


def inverse_rms(x: Float[Array, "*rows D"], *, epsilon: float) -> Float[Array, "*rows 1"]:
    """One over the root mean square of each row, epsilon added to the mean square, in float32."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + epsilon)


def rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H/2"], sin: Float[Array, "B T H/2"]
) -> Float[Array, "B T N H"]:
    """Rotary position embedding (Su et al., 2021): feature pairs (i, i + H/2) turned by an angle, in float32.

    Args:
        cos, sin: of the angle of each token and pair, float32.

    Returns:
        In x's dtype.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def swiglu(gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"]) -> Float[Array, "*rows F"]:
    """silu(gate) * up (Shazeer, 2020)."""
    return jax.nn.silu(gate) * up


def geglu(
    gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"], *, approximate: bool
) -> Float[Array, "*rows F"]:
    """gelu(gate) * up (Shazeer, 2020); approximate: gelu by tanh."""
    return jax.nn.gelu(gate, approximate=approximate) * up
