"""NF4: dequantisation to a 16-bit type and quantisation, beside bitsandbytes', and a linear layer.

    python kernels/benchmarks/nf4.py [--tiny]

Random weights, WEIGHTS of them a call, because one alone takes less time than it takes to call. The work is
the bytes that must be moved: packed weights and scales on one side, weights on the other. The ceiling is a
copy. Where bitsandbytes runs, every element of every dequantised weight is compared with its own, bit for
bit, and a difference ends the run.

nf4_linear, forward and backward, is held against the bound "dense": the same products with a weight that need
not be dequantised.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lorajax_kernels.nf4 import NF4Weight, dequantize_nf4, nf4_implementations, nf4_linear, quantize_nf4
from lorajax_kernels.precision import product
from results import Ceilings, Row, TorchResult, Work, measure_case, measure_cases, run_alone, temporary_memory

PEER, DENSE = "bitsandbytes", "dense"
WEIGHTS = 4


@dataclass(frozen=True)
class Case:
    out_features: int
    in_features: int
    double_quant: bool

    def __str__(self) -> str:
        shape = f"{self.out_features} x {self.in_features}"
        return f"{shape}, double quantisation" if self.double_quant else shape

    def dense(self, dtype: str) -> list[jax.Array]:
        shape = (self.out_features, self.in_features)
        return [jax.random.normal(jax.random.key(seed), shape, dtype) for seed in range(WEIGHTS)]

    def weights(self, dtype: str) -> list[NF4Weight]:
        return [quantize_nf4(w, self.double_quant) for w in self.dense(dtype)]


CASES = (Case(4096, 14336, False), Case(4096, 14336, True), Case(2048, 2048, False))
TINY = (Case(64, 128, False), Case(64, 128, True))
# Rows of x, with the first case's weight.
ROWS, TINY_ROWS = 8192, 32


def benchmark(ceilings: Ceilings, tiny: bool) -> list[Row]:
    rounds, cases = (3, TINY) if tiny else (9, CASES)
    rows = measure_cases(_measure, cases, ceilings, rounds)
    rows += measure_cases(_measure_quantize, cases[:2], ceilings, rounds)
    return rows + _measure_linear(cases[0], TINY_ROWS if tiny else ROWS, ceilings, rounds)


def _measure(case: Case, ceilings: Ceilings, rounds: int) -> list[Row]:
    weights = case.weights(ceilings.half)
    half = jnp.dtype(ceilings.half)
    work = Work(sum(q.nbytes + math.prod(q.shape) * half.itemsize for q in weights), "bytes")
    names = [name for name in nf4_implementations() if name != "reference"]
    makers: dict[str, Callable[[], Any]] = {
        name: functools.partial(_ours, weights, half, name) for name in names
    }
    makers[PEER] = functools.partial(_bitsandbytes, weights, half)
    notes = {name: _compared(makers[name], makers[PEER]) for name in names}
    return measure_case(
        "dequantize_nf4", str(case), work, ceilings, makers, ours=tuple(names), rounds=rounds, notes=notes
    )


def _measure_quantize(case: Case, ceilings: Ceilings, rounds: int) -> list[Row]:
    dense = case.dense(ceilings.half)
    quantize = jax.jit(lambda weights: [quantize_nf4(w, case.double_quant) for w in weights])
    work = Work(sum(w.nbytes for w in dense) + sum(q.nbytes for q in quantize(dense)), "bytes")

    def bitsandbytes() -> Callable[[], Any]:
        import torch
        from bitsandbytes.functional import quantize_4bit

        options = {"quant_type": "nf4", "compress_statistics": case.double_quant}
        on_torch = [torch.from_dlpack(w).clone() for w in dense]
        return lambda: TorchResult([quantize_4bit(w, **options) for w in on_torch])

    makers: dict[str, Callable[[], Any]] = {"xla": lambda: lambda: quantize(dense), PEER: bitsandbytes}
    return measure_case("quantize_nf4", str(case), work, ceilings, makers, ours=("xla",), rounds=rounds)


def _measure_linear(case: Case, rows: int, ceilings: Ceilings, rounds: int) -> list[Row]:
    keys = jax.random.split(jax.random.key(WEIGHTS), 2)
    x, dy = (
        jax.random.normal(key, (rows, width), ceilings.half)
        for key, width in zip(keys, (case.in_features, case.out_features), strict=True)
    )
    q = case.weights(ceilings.half)[0]
    weight = dequantize_nf4(q, x.dtype)
    notes: dict[str, str] = {}

    def both_passes(name: str, linear: Callable[..., Any], weight: Any) -> Callable[[], Any]:
        def forward_and_backward(x: Any, weight: Any, dy: Any) -> Any:
            y, vjp = jax.vjp(lambda x: linear(x, weight), x)
            return y, *vjp(dy)

        compiled = jax.jit(forward_and_backward).lower(x, weight, dy).compile()
        notes[name] = temporary_memory(compiled)
        return lambda: compiled(x, weight, dy)

    names = tuple(name for name in nf4_implementations() if name != "reference")
    makers: dict[str, Callable[[], Any]] = {
        name: functools.partial(both_passes, name, functools.partial(nf4_linear, implementation=name), q)
        for name in names
    }
    makers[DENSE] = lambda: both_passes(DENSE, lambda x, w: product("ri,oi->ro", x, w), weight)
    return measure_case(
        "nf4_linear",
        f"{rows} x {case.in_features} x {case.out_features}",
        Work(4 * rows * math.prod(q.shape), "flops"),
        ceilings,
        makers,
        ours=names,
        bounds=(DENSE,),
        rounds=rounds,
        notes=notes,
    )


def _ours(weights: list[NF4Weight], dtype: jnp.dtype, implementation: str) -> Callable[[], Any]:
    @jax.jit
    def dequantize(weights: list[NF4Weight]) -> list[jax.Array]:
        return [dequantize_nf4(q, dtype, implementation=implementation) for q in weights]

    return lambda: dequantize(weights)


def _bitsandbytes(weights: list[NF4Weight], dtype: jnp.dtype) -> Callable[[], Any]:
    """bitsandbytes' kernel on the very bytes and scales that ours reads."""
    import bitsandbytes.functional

    on_torch = [_on_torch(q, dtype) for q in weights]
    return lambda: TorchResult([bitsandbytes.functional.dequantize_4bit(*each) for each in on_torch])


def _on_torch(q: NF4Weight, dtype: jnp.dtype) -> tuple[Any, Any]:
    """The packed bytes and bitsandbytes' description of them."""
    import bitsandbytes.functional
    import torch

    def tensor(array: Any) -> torch.Tensor:
        return torch.from_dlpack(array).clone()

    nested = {}
    if q.double_quant:
        inner = bitsandbytes.functional.QuantState(
            absmax=tensor(q.absmax2), code=tensor(q.absmax_code), blocksize=256, dtype=torch.float32
        )
        nested = {"offset": tensor(q.offset), "state2": inner}
    state = bitsandbytes.functional.QuantState(
        absmax=tensor(q.absmax),
        shape=torch.Size(q.shape),
        code=bitsandbytes.functional.get_4bit_type("nf4", device=tensor(q.absmax).device),
        blocksize=64,
        quant_type="nf4",
        dtype=getattr(torch, dtype.name),
        **nested,
    )
    return tensor(q.packed).reshape(-1, 1), state


def _compared(ours: Callable[[], Any], theirs: Callable[[], Any]) -> str:
    """That all bits of all weights are bitsandbytes'; nothing where one of the two does not run."""
    try:
        found, expected = ours()(), theirs()().result
    except Exception:  # measure_case reports it
        return ""
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        a, b = np.asarray(a, np.float32), b.float().cpu().numpy()
        # As bits, so that -0 is not 0.
        wrong = int((a.view(np.int32) != b.view(np.int32)).sum())
        if wrong:
            raise AssertionError(f"weight {number}: {wrong} of {a.size} elements differ from {PEER}'")
    return f"{len(found)} weights equal to {PEER}', bit for bit"


if __name__ == "__main__":
    run_alone(benchmark, __doc__)
