"""What one attention implementation is, and the problem it is asked to serve."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array


@dataclass(frozen=True)
class Problem:
    """Everything static about one attention call.

    Attributes:
        batch, length, heads, kv_heads, head_dim: B, T, N, K, H.
        dtype: of q, k and v.
        window, softcap, max_segments: as in `attention`.
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


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    Attributes:
        name: as users write it.
        is_supported: None if it can serve the problem here, otherwise the reason why not.
        function: (q, k, v, segment_ids, *, scale, window, softcap, max_segments) -> [B, T, N, H].
    """

    name: str
    is_supported: Callable[[Problem], str | None]
    function: Callable[..., Array]


class Choice(NamedTuple):
    """The implementation chosen, and why each one that comes before it was refused."""

    name: str
    refused: dict[str, str]
