"""Linear layers with adapters, forward and backward: each arrangement beside the frozen products alone.

    python kernels/benchmarks/lora.py [--tiny]

Random data. The work, and the time to be held against, is that of the frozen products y_i = x W_i^T and
dx = sum_i dy_i W_i, so that "to bound" is what the adapters cost: 1.15 or less is the aim. An adapter
at least reads x twice, for x A^T and for dA, and each dy once, for dy B and dB if one kernel makes both. What
that alone costs at the speed of a copy is noted beside "frozen".

"mosaic", "triton" and "xla" are implementations of lora_linears, "joined" and "added" its arrangements;
"autodiff" is the formula as it stands, with the gradients that JAX makes of it. ", cuBLAS" marks programs
that are compiled with CUBLAS: products that XLA would fuse with nothing are cuBLAS' then, and it adds to sums
of products as it goes. Otherwise XLA tunes each product for itself, and a sum is a pass of its own. "auto,
cuBLAS" is left out where "auto" is "mosaic": its sums are not XLA's.

"mlp" is gate and up and, after them, swiglu_lora_linear; "frozen" the same without adapters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lorajax_kernels.elementwise import swiglu
from lorajax_kernels.lora import (
    ARRANGEMENTS,
    Adapter,
    choose_lora,
    lora_implementations,
    lora_linears,
    swiglu_lora_linear,
)
from lorajax_kernels.lora.dropout import drop
from lorajax_kernels.lora.products import sum_of_products
from lorajax_kernels.precision import product
from results import Ceilings, Row, Work, measure_case, measure_cases, reason, run_alone, temporary_memory

BOUNDS = ("frozen", "frozen, cuBLAS")
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
    dropout: float = 0.0

    def __str__(self) -> str:
        outputs = " + ".join(map(str, self.outputs))
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{self.name}: {self.rows} x {self.features} x ({outputs}), R {self.rank}{dropout}"

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
                self.dropout,
                jax.random.key(number) if self.dropout else None,
            )
            for number, out in enumerate(self.outputs)
        ]
        return x, weights, adapters, tuple(normal(self.rows, out) for out in self.outputs)


Arguments = tuple[jax.Array, list[jax.Array], list[Adapter], tuple[jax.Array, ...]]

# Llama-3.2-1B at 8 x 2048 tokens.
CASES = (
    Case("gate, up", 16384, 2048, (8192, 8192)),
    Case("q, k, v", 16384, 2048, (2048, 512, 512)),
    Case("gate, up", 16384, 2048, (8192, 8192), dropout=0.1),
)
TINY = (Case("tiny", 64, 48, (96, 32), rank=4), Case("tiny", 64, 48, (96, 32), rank=4, dropout=0.1))
# Gate and up of an MLP; a third layer goes back to the features.
MLP, MLP_TINY = Case("mlp", 16384, 2048, (8192, 8192)), Case("mlp", 64, 48, (96, 96), rank=4)


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
    ys, vjp = jax.vjp(
        lambda x, adapters: tuple(map(as_written, [x] * len(weights), weights, adapters)), x, adapters
    )
    return ys, *vjp(dys)


def as_written(x: Any, weight: Any, adapter: Adapter) -> Any:
    """One layer with its adapter, as the formula says."""
    u = product("ri,ki->rk", drop(x, adapter), adapter.a.astype(x.dtype))
    v = product("rk,ok->ro", u, adapter.b.astype(x.dtype))
    return product("ri,oi->ro", x, weight) + adapter.scale * v


def mlp(layers: Callable[..., Any], after_gate: Callable[..., Any]) -> Callable[..., Any]:
    """Both passes of layers(x, weights, adapters) -> (gate, up) and after_gate(gate, up, weight, adapter)."""

    def forward_and_backward(x: Any, weights: Any, adapters: Any, dys: Any) -> Any:
        def forward(x: Any, adapters: Any) -> Any:
            gate, up = layers(x, weights[:2], adapters[:2])
            return after_gate(gate, up, weights[2], adapters[2])

        y, vjp = jax.vjp(forward, x, adapters)
        return y, *vjp(dys[0])

    return forward_and_backward


MLP_FROZEN = mlp(
    lambda x, weights, adapters: [product("ri,oi->ro", x, weight) for weight in weights],
    lambda gate, up, weight, adapter: product("ri,oi->ro", swiglu(gate, up), weight),
)
MLP_AS_WRITTEN = mlp(
    lambda x, weights, adapters: [as_written(x, *pair) for pair in zip(weights, adapters, strict=True)],
    lambda gate, up, weight, adapter: as_written(swiglu(gate, up), weight, adapter),
)


def served(dtype: str, rank: int) -> list[str]:
    """Names of the implementations that this device can run."""
    chosen = choose_lora(jnp.dtype(dtype), rank)
    return [name for name in lora_implementations() if name not in chosen.refused]


def benchmark(ceilings: Ceilings, tiny: bool) -> list[Row]:
    rounds = 3 if tiny else 21
    rows = measure_cases(_measure, TINY if tiny else CASES, ceilings, rounds)
    return rows + _measure_mlp(MLP_TINY if tiny else MLP, ceilings, rounds)


def _measure(case: Case, ceilings: Ceilings, rounds: int) -> list[Row]:
    arguments = case.arrays(ceilings.half)
    functions = {"frozen": frozen, "autodiff": autodiff}
    functions |= {name: arranged(implementation=name) for name in served(ceilings.half, case.rank)}
    functions |= {name: arranged(arrangement=name) for name in ARRANGEMENTS if name != "auto"}
    programs = _all_compiled(case, functions, arguments)
    programs["frozen, cuBLAS"] = _compiled(frozen, arguments, CUBLAS)
    if choose_lora(jnp.dtype(ceilings.half), case.rank).name != "mosaic":
        programs["auto, cuBLAS"] = _compiled(arranged(), arguments, CUBLAS)
    floor = {"frozen": f"floor of adapters {1 + case.floor(ceilings):.2f}"}
    return _timed("lora_linears", case, case.flops, programs, arguments, ceilings, rounds, floor)


def _measure_mlp(case: Case, ceilings: Ceilings, rounds: int) -> list[Row]:
    down = Case("down", case.rows, case.outputs[0], (case.features,), case.rank)
    x, weights, adapters, _ = case.arrays(ceilings.half)
    _, last_weight, last_adapter, dys = down.arrays(ceilings.half)
    arguments = (x, weights + last_weight, adapters + last_adapter, dys)
    functions = {"frozen": MLP_FROZEN, "autodiff": MLP_AS_WRITTEN}
    for name in served(ceilings.half, case.rank):
        functions[name] = mlp(
            functools.partial(lora_linears, implementation=name),
            functools.partial(swiglu_lora_linear, implementation=name),
        )
    programs = _all_compiled(case, functions, arguments)
    flops = case.flops + down.flops
    return _timed("swiglu_lora_linear", case, flops, programs, arguments, ceilings, rounds, {})


def _timed(
    op: str,
    case: Case,
    flops: float,
    programs: dict[str, Any],
    arguments: Arguments,
    ceilings: Ceilings,
    rounds: int,
    remarks: dict[str, str],
) -> list[Row]:
    """measure_case with the temporary memory of each as a note; all results must be those of "autodiff"."""
    ours = tuple(name for name in programs if name not in (*BOUNDS, "autodiff"))
    expected = programs["autodiff"](*arguments)
    for name in ours:
        _check(name, programs[name](*arguments), expected)
    del expected
    notes = {
        name: "; ".join([temporary_memory(program), *([remarks[name]] if name in remarks else [])])
        for name, program in programs.items()
    }
    makers = {name: lambda program=program: lambda: program(*arguments) for name, program in programs.items()}
    work = Work(flops, "flops")
    return measure_case(
        op, str(case), work, ceilings, makers, ours=ours, bounds=BOUNDS, rounds=rounds, notes=notes
    )


def _all_compiled(
    case: Case, functions: dict[str, Callable[..., Any]], arguments: Arguments
) -> dict[str, Any]:
    """By name. An implementation that does not serve sizes as small as these is left out, with its reason."""
    programs = {}
    for name, function in functions.items():
        try:
            programs[name] = _compiled(function, arguments, {})
        except ValueError as error:
            if name not in lora_implementations():
                raise
            print(f"{case}, {name}: {reason(error)}")
    return programs


def _compiled(function: Callable[..., Any], arguments: Arguments, options: dict[str, Any]) -> Any:
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)


def _check(name: str, found: Any, expected: Any) -> None:
    """What is timed is right: two ways to compute the same have the same results."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if a.dtype == jax.dtypes.float0:
            continue  # of a dropout's key
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        if not error < 2e-2:
            raise AssertionError(f"{name}: a result of shape {a.shape} is {error:.1e} off")


if __name__ == "__main__":
    run_alone(benchmark, __doc__)
