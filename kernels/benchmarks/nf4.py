"""NF4 dequantisation to a 16-bit type, beside bitsandbytes' on the same bytes.

    python kernels/benchmarks/nf4.py [--tiny]

Random weights, WEIGHTS of them a call, because one alone takes less time than it takes to call. The work is
the bytes that must be moved: packed weights and scales read, weights written. The ceiling is a copy. Where
bitsandbytes runs, every element of the first weight is compared with its own, bit for bit.
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
from lorajax_kernels.nf4 import NF4Weight, dequantize_nf4, nf4_implementations, quantize_nf4
from results import Ceilings, Row, TorchResult, Work, measure_case, run_alone

PEER = "bitsandbytes"
WEIGHTS = 4


@dataclass(frozen=True)
class Case:
    out_features: int
    in_features: int
    double_quant: bool

    def __str__(self) -> str:
        shape = f"{self.out_features} x {self.in_features}"
        return f"{shape}, double quantisation" if self.double_quant else shape

    def weights(self, dtype: str) -> list[NF4Weight]:
        shape = (self.out_features, self.in_features)
        random = (jax.random.normal(jax.random.key(seed), shape, dtype) for seed in range(WEIGHTS))
        return [quantize_nf4(w, self.double_quant) for w in random]


CASES = (Case(4096, 14336, False), Case(4096, 14336, True), Case(2048, 2048, False))
TINY = (Case(64, 128, False), Case(64, 128, True))


def benchmark(ceilings: Ceilings, tiny: bool) -> list[Row]:
    rows: list[Row] = []
    for case in TINY if tiny else CASES:
        rows += _measure(case, ceilings, rounds=3 if tiny else 9)
    return rows


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
    """Whether all bits are bitsandbytes'; nothing where one of the two does not run."""
    try:
        found = np.asarray(ours()()[0], np.float32)
        expected = theirs()().result[0].float().cpu().numpy()
    except Exception:  # measure_case reports it
        return ""
    # As bits, so that -0 is not 0.
    wrong = int((found.view(np.int32) != expected.view(np.int32)).sum())
    return (
        f"{wrong} of {found.size} elements differ from {PEER}'" if wrong else f"equal to {PEER}', bit for bit"
    )


if __name__ == "__main__":
    run_alone(benchmark, __doc__)
