"""Attention of one new token a row over its cache, against the speed of a copy.

    python kernels/benchmarks/cached_attention.py [--tiny]

Random data, in caches that lie in memory as those of lorajax.generation do, [B, K, S, H]. The work is the
bytes that must be moved: both caches, which are full, queries and lengths read, and the output written.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from lorajax_kernels import cached_attention
from results import Ceilings, Row, measure_cases, measure_xla, run_alone


@dataclass(frozen=True)
class Case:
    """B rows of S tokens, N query heads on K key heads of H."""

    batch: int
    capacity: int
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"B{self.batch} S{self.capacity} N{self.heads} K{self.kv_heads} H{self.head_dim}"

    def arrays(self, dtype: str) -> list[jax.Array]:
        """q [B, 1, N, H] and both caches [B, K, S, H]."""
        cache = (self.batch, self.kv_heads, self.capacity, self.head_dim)
        shapes = ((self.batch, 1, self.heads, self.head_dim), cache, cache)
        keys = jax.random.split(jax.random.key(0), 3)
        return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


CASES = (Case(32, 8192, 32, 8, 128), Case(32, 8192, 32, 8, 64))
TINY = (Case(2, 64, 4, 2, 16),)


def benchmark(ceilings: Ceilings, tiny: bool) -> list[Row]:
    return measure_cases(_measure, TINY if tiny else CASES, ceilings, 3 if tiny else 9)


def _measure(case: Case, ceilings: Ceilings, rounds: int) -> list[Row]:
    arguments = *case.arrays(ceilings.half), jnp.full(case.batch, case.capacity, jnp.int32)
    return measure_xla("cached_attention", str(case), _attend, arguments, ceilings, rounds)


def _attend(q: jax.Array, k_cache: jax.Array, v_cache: jax.Array, lengths: jax.Array) -> jax.Array:
    return cached_attention(q, k_cache.swapaxes(1, 2), v_cache.swapaxes(1, 2), lengths)


if __name__ == "__main__":
    run_alone(benchmark, __doc__)
