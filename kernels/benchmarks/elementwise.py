"""rms_norm, rope, swiglu and geglu, forward and backward, against the speed of a copy.

    python kernels/benchmarks/elementwise.py [--tiny]

Random data. The work is the bytes that must be moved: each argument read, and each result and gradient
written, once. In a model XLA fuses these ops with their neighbours, which moves less.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from lorajax_kernels import geglu, rms_norm, rope, swiglu
from results import Ceilings, Row, measure_xla, run_alone


@dataclass(frozen=True)
class Case:
    """B rows of T tokens; D features, F of them in an MLP, N heads of H."""

    batch: int
    length: int
    features: int
    inner: int
    heads: int
    head_dim: int

    def ops(self, dtype: str) -> dict[str, tuple[Callable[..., Any], list[jax.Array], list[jax.Array]]]:
        """By name: the op, the arguments that have a gradient, and those that have none."""
        rows, angles = self.batch * self.length, (self.batch, self.length, self.head_dim // 2)

        def random(seed: int, *shape: int) -> jax.Array:
            return jax.random.normal(jax.random.key(seed), shape, dtype)

        gate, up = (random(seed, rows, self.inner) for seed in range(2))
        angle = jax.random.normal(jax.random.key(2), angles)
        heads = random(3, self.batch, self.length, self.heads, self.head_dim)
        return {
            "rms_norm": (
                functools.partial(rms_norm, epsilon=1e-5),
                [random(4, rows, self.features)],
                [random(5, self.features)],
            ),
            "rope": (rope, [heads], [jnp.cos(angle), jnp.sin(angle)]),
            "swiglu": (swiglu, [gate, up], []),
            "geglu": (functools.partial(geglu, approximate=True), [gate, up], []),
        }


# Llama-3.2-1B at 8 x 2048 tokens.
CASE, TINY = Case(8, 2048, 2048, 8192, 32, 64), Case(2, 32, 64, 96, 2, 16)


def benchmark(ceilings: Ceilings, tiny: bool) -> list[Row]:
    rows: list[Row] = []
    for name, (op, trained, constants) in (TINY if tiny else CASE).ops(ceilings.half).items():
        rows += _measure(name, op, trained, constants, ceilings, rounds=3 if tiny else 9)
    return rows


def _measure(
    name: str,
    op: Callable[..., Any],
    trained: list[jax.Array],
    constants: list[jax.Array],
    ceilings: Ceilings,
    rounds: int,
) -> list[Row]:
    def forward_and_backward(trained: list[Any], constants: list[Any], dy: Any) -> Any:
        y, vjp = jax.vjp(lambda *trained: op(*trained, *constants), *trained)
        return y, vjp(dy)

    x = trained[0]
    arguments = trained, constants, jnp.flip(x, axis=0)
    shape = " x ".join(map(str, x.shape))
    return measure_xla(name, shape, forward_and_backward, arguments, ceilings, rounds)


if __name__ == "__main__":
    run_alone(benchmark, __doc__)
