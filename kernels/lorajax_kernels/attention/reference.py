"""Dense attention in float32: the definition that every other implementation is compared with."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from lorajax_kernels import segments
from lorajax_kernels.precision import einsum


def mask(segment_ids: Int[Array, "B T"], window: int | None = None) -> Bool[Array, "B T T"]:
    """mask[b, t, s]: may the query at t see the key at s?"""
    length = segment_ids.shape[1]
    run = segments.ranks(segment_ids)
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]  # [T, T]: t - s
    near = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return (run[:, :, None] == run[:, None, :]) & near


def reference_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    max_segments: int | None,
) -> Float[Array, "B T N H"]:
    """See lorajax_kernels.attention. Holds [B, N, T, T] in float32."""
    del max_segments
    dtype, group = q.dtype, q.shape[2] // k.shape[2]
    q = q.astype(jnp.float32)
    k = jnp.repeat(k.astype(jnp.float32), group, axis=2)  # [B, T, N, H]
    v = jnp.repeat(v.astype(jnp.float32), group, axis=2)
    scores = einsum("btnh,bsnh->bnts", q, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask(segment_ids, window)[:, None], scores, -jnp.inf)
    out = einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v).astype(dtype)
    return checkpoint_name(out, "attention_output")
