"""The problem that an attention implementation is asked to serve."""

from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class Problem:
    """Everything static about one attention call.

    Attributes:
        batch, length, heads, kv_heads, head_dim: B, T, N, K, H.
        dtype: of q, k and v.
        window, softcap, max_segments, scale: as in `attention`.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    window: int | None
    softcap: float | None
    max_segments: int | None
    scale: float
