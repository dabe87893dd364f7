"""What a decoder computes element by element, in plain XLA, which fuses each of these with its neighbours."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax_kernels.checks import check_arrays, check_dtype, check_number


def rms_norm(
    x: Float[Array, "*rows D"], weight: Float[Array, " D"], *, epsilon: float
) -> Float[Array, "*rows D"]:
    """x over its root mean square (Zhang and Sennrich, 2019), times weight, in x's dtype.

    Statistics are float32; the normalised x is rounded to its dtype before it meets the weight, as in
    Hugging Face's Llama.

    Args:
        epsilon: added to the mean square, at least 0.

    Raises:
        ValueError: shapes do not fit together, an array is not floating point, or epsilon is below 0.
    """
    check_arrays("rms_norm", x=x, weight=weight)
    check_dtype("rms_norm", "floating point", x=x, weight=weight)
    check_number("rms_norm", "epsilon", epsilon, at_least=0)
    if x.ndim < 1:
        raise ValueError(f"rms_norm: x must be [..., D], got shape {x.shape}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must be [D={x.shape[-1]}] to fit x, got shape {weight.shape}")
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

    Raises:
        ValueError: H is odd, shapes do not fit together, or an array is not floating point.
    """
    check_arrays("rope", x=x, cos=cos, sin=sin)
    check_dtype("rope", "floating point", x=x, cos=cos, sin=sin)
    if x.ndim != 4 or x.shape[3] % 2:
        raise ValueError(f"rope: x must be [B, T, N, H] with an even H, got shape {x.shape}")
    batch, length, _, head_dim = x.shape
    for name, array in (("cos", cos), ("sin", sin)):
        if array.shape != (batch, length, head_dim // 2):
            wanted = f"[B={batch}, T={length}, H/2={head_dim // 2}]"
            raise ValueError(f"rope: {name} must be {wanted} to fit x, got shape {array.shape}")
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def swiglu(gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"]) -> Float[Array, "*rows F"]:
    """silu(gate) * up (Shazeer, 2020); a ValueError unless they are floating point and have one shape."""
    _check_up("swiglu", gate, up)
    return jax.nn.silu(gate) * up


def geglu(
    gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"], *, approximate: bool
) -> Float[Array, "*rows F"]:
    """gelu(gate) * up (Shazeer, 2020), approximate: gelu by tanh; a ValueError as in swiglu."""
    _check_up("geglu", gate, up)
    return _gelu(gate, approximate) * up


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=1)
def _gelu(gate: Array, approximate: bool) -> Array:
    """In float32, as the cube of a float16 soon overflows; the backward pass takes that from gate again."""
    wide = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
    return jax.nn.gelu(wide, approximate=approximate).astype(gate.dtype)


def _check_up(op: str, gate: Array, up: Array) -> None:
    check_arrays(op, gate=gate, up=up)
    check_dtype(op, "floating point", gate=gate, up=up)
    if up.shape != gate.shape:
        raise ValueError(f"{op}: up must have the shape of gate, {gate.shape}, got {up.shape}")
