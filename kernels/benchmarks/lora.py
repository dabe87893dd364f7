"""Linear layers with adapters, forward and backward: each arrangement beside the frozen products alone.

    python kernels/benchmarks/lora.py [--tiny]

Random data. The work, and the time to be held against, is that of the frozen products y_i = x W_i^T and
dx = sum_i dy_i W_i, so that "to best peer" is what the adapters cost: 1.15 or less is the aim. An adapter
at least reads x twice, for x A^T and for dA, and each dy once, for dy B and dB if one kernel makes both. What
that alone costs at the speed of a copy is noted beside "frozen".

"triton" and "xla" are implementations of lora_linears, "joined" and "added" its arrangements; "autodiff" is
the formula as it stands, with the gradients that JAX makes of it. ", cuBLAS" marks programs that are compiled
with CUBLAS: products that XLA would fuse with nothing are cuBLAS' then, and it adds to sums of products as it
goes. Otherwise XLA tunes each product for itself, and a sum is a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lorajax_kernels.lora import ARRANGEMENTS, Adapter, choose_lora, lora_implementations, lora_linears
from lorajax_kernels.lora.products import sum_of_products
from lorajax_kernels.precision import product
from results import Ceilings, Row, Work, measure_case, run_alone

CUBLAS = {"xla_gpu_triton_gemm_any": False}
SCALE = 0.5


@dataclass(frozen=True)
class Case:
    """Layers that share x [rows, features], each of its own outputs, with adapters of one rank."""

    name: str
    rows: int
    features: int
    outputs: tuple[int, ...]
    rank: int = 32

    def __str__(self) -> str:
        outputs = " + ".join(map(str, self.outputs))
        return f"{self.name}: {self.rows} x {self.features} x ({outputs}), R {self.rank}"

    @property
    def flops(self) -> float:
        return 4 * self.rows * self.features * sum(self.outputs)

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds of reading x twice and each dy once, over those of the frozen products."""
        elements = self.rows * (2 * self.features + sum(self.outputs))
        seconds = elements * jnp.dtype(ceilings.half).itemsize / ceilings.bytes_per_second
        return seconds / (self.flops / ceilings.flops)

    def arrays(self, dtype: str) -> Arguments:
        random = np.random.default_rng(0)

        def normal(*shape: int, dtype: str = dtype) -> jax.Array:
            return jnp.asarray(random.standard_normal(shape, np.float32) / shape[-1] ** 0.5, dtype)

        x = normal(self.rows, self.features)
        weights = [normal(out, self.features) for out in self.outputs]
        adapters = [
            Adapter(
                normal(self.rank, self.features, dtype="float32"),
                normal(out, self.rank, dtype="float32"),
                SCALE,
            )
            for out in self.outputs
        ]
        return x, weights, adapters, tuple(normal(self.rows, out) for out in self.outputs)


Arguments = tuple[jax.Array, list[jax.Array], list[Adapter], tuple[jax.Array, ...]]

# Llama-3.2-1B at 8 x 2048 tokens.
CASES = (
    Case("gate, up", 16384, 2048, (8192, 8192)),
    Case("q, k, v", 16384, 2048, (2048, 512, 512)),
)
TINY = (Case("tiny", 64, 48, (96, 32), rank=4),)


def frozen(x: Any, weights: Any, adapters: Any, dys: Any) -> Any:
    """The products that there are without adapters."""
    del adapters
    ys = [product("ri,oi->ro", x, weight) for weight in weights]
    return ys, sum_of_products(dys, weights, join=False)


def arranged(**options: str) -> Callable[..., Any]:
    def forward_and_backward(x: Any, weights: Any, adapters: Any, dys: Any) -> Any:
        def forward(x: Any, adapters: Any) -> Any:
            return lora_linears(x, weights, adapters, **options)

        ys, vjp = jax.vjp(forward, x, adapters)
        return ys, *vjp(dys)

    return forward_and_backward


def autodiff(x: Any, weights: Any, adapters: Any, dys: Any) -> Any:
    def forward(x: Any, adapters: Any) -> Any:
        ys = []
        for weight, adapter in zip(weights, adapters, strict=True):
            u = product("ri,ki->rk", x, adapter.a.astype(x.dtype))
            v = product("rk,ok->ro", u, adapter.b.astype(x.dtype))
            ys.append(product("ri,oi->ro", x, weight) + adapter.scale * v)
        return tuple(ys)

    ys, vjp = jax.vjp(forward, x, adapters)
    return ys, *vjp(dys)


def served(dtype: str, rank: int) -> list[str]:
    """Names of the implementations that this device can run."""
    chosen = choose_lora(jnp.dtype(dtype), rank)
    return [name for name in lora_implementations() if name not in chosen.refused]


def benchmark(ceilings: Ceilings, tiny: bool) -> list[Row]:
    rows: list[Row] = []
    for case in TINY if tiny else CASES:
        rows += _measure(case, ceilings, rounds=3 if tiny else 21)
    return rows


def _measure(case: Case, ceilings: Ceilings, rounds: int) -> list[Row]:
    arguments = case.arrays(ceilings.half)
    functions = {"frozen": frozen, "autodiff": autodiff}
    functions |= {name: arranged(implementation=name) for name in served(ceilings.half, case.rank)}
    functions |= {name: arranged(arrangement=name) for name in ARRANGEMENTS if name != "auto"}
    programs = {name: _compiled(function, arguments, {}) for name, function in functions.items()}
    programs["frozen, cuBLAS"] = _compiled(frozen, arguments, CUBLAS)
    programs["auto, cuBLAS"] = _compiled(arranged(), arguments, CUBLAS)
    ours = tuple(name for name in programs if not name.startswith("frozen"))
    expected = programs["autodiff"](*arguments)
    for name in ours:
        _check(name, programs[name](*arguments), expected)
    del expected
    notes = {
        name: f"{program.memory_analysis().temp_size_in_bytes / 1e6:.0f} MB of temporary memory"
        for name, program in programs.items()
    }
    notes["frozen"] += f"; floor of adapters {1 + case.floor(ceilings):.2f}"
    makers = {name: lambda program=program: lambda: program(*arguments) for name, program in programs.items()}
    work = Work(case.flops, "flops")
    return measure_case(
        "lora_linears", str(case), work, ceilings, makers, ours=ours, rounds=rounds, notes=notes
    )


def _compiled(function: Callable[..., Any], arguments: Arguments, options: dict[str, Any]) -> Any:
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)


def _check(name: str, found: Any, expected: Any) -> None:
    """What is timed is right: two ways to compute the same have the same results."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        if not error < 2e-2:
            raise AssertionError(f"{name}: a result of shape {a.shape} is {error:.1e} off")


if __name__ == "__main__":
    run_alone(benchmark, __doc__)
