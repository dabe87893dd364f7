"""NF4 dequantisation to a 16-bit type, beside bitsandbytes' on the same bytes.

    python kernels/benchmarks/nf4.py [--tiny]

Random weights. The work is the bytes that must be moved: packed weight and scales read, the weight written.
The ceiling is a copy. Where bitsandbytes runs, every element is compared with its own, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lorajax_kernels.nf4 import NF4Weight, dequantize_nf4, nf4_implementations, quantize_nf4
from results import Ceilings, Row, TorchResult, Work, measure_case, run_alone

PEER = "bitsandbytes"


@dataclass(frozen=True)
class Case:
    out_features: int
    in_features: int
    double_quant: bool

    def __str__(self) -> str:
        shape = f"{self.out_features} x {self.in_features}"
        return f"{shape}, double quantisation" if self.double_quant else shape

    def weight(self, dtype: str) -> NF4Weight:
        shape = (self.out_features, self.in_features)
        w = np.random.default_rng(0).standard_normal(shape, np.float32)
        return quantize_nf4(jnp.asarray(w, dtype), self.double_quant)


CASES = (Case(4096, 14336, False), Case(4096, 14336, True), Case(2048, 2048, False))
TINY = (Case(64, 128, False), Case(64, 128, True))


def benchmark(ceilings: Ceilings, tiny: bool) -> list[Row]:
    rows: list[Row] = []
    for case in TINY if tiny else CASES:
        rows += _measure(case, ceilings, rounds=3 if tiny else 9)
    return rows


def _measure(case: Case, ceilings: Ceilings, rounds: int) -> list[Row]:
    q = case.weight(ceilings.half)
    half = jnp.dtype(ceilings.half)
    work = Work(q.nbytes + case.out_features * case.in_features * half.itemsize, "bytes")
    names = [name for name in nf4_implementations() if name != "reference"]
    makers: dict[str, Callable[[], Any]] = {name: functools.partial(_ours, q, half, name) for name in names}
    makers[PEER] = functools.partial(_bitsandbytes, q, half)
    notes = {name: _compared(makers[name], makers[PEER]) for name in names}
    return measure_case(
        "dequantize_nf4", str(case), work, ceilings, makers, ours=tuple(names), rounds=rounds, notes=notes
    )


def _ours(q: NF4Weight, dtype: jnp.dtype, implementation: str) -> Callable[[], Any]:
    dequantize = jax.jit(functools.partial(dequantize_nf4, dtype=dtype, implementation=implementation))
    return lambda: dequantize(q)


def _bitsandbytes(q: NF4Weight, dtype: jnp.dtype) -> Callable[[], Any]:
    """bitsandbytes' kernel on the very bytes and scales that ours reads."""
    import bitsandbytes.functional
    import torch

    def on_torch(array: Any) -> torch.Tensor:
        return torch.from_dlpack(array).clone()

    nested = {}
    if q.double_quant:
        inner = bitsandbytes.functional.QuantState(
            absmax=on_torch(q.absmax2), code=on_torch(q.absmax_code), blocksize=256, dtype=torch.float32
        )
        nested = {"offset": on_torch(q.offset), "state2": inner}
    state = bitsandbytes.functional.QuantState(
        absmax=on_torch(q.absmax),
        shape=torch.Size(q.shape),
        code=bitsandbytes.functional.get_4bit_type("nf4", device=on_torch(q.absmax).device),
        blocksize=64,
        quant_type="nf4",
        dtype=getattr(torch, dtype.name),
        **nested,
    )
    packed = on_torch(q.packed).reshape(-1, 1)
    return lambda: TorchResult(bitsandbytes.functional.dequantize_4bit(packed, state))


def _compared(ours: Callable[[], Any], theirs: Callable[[], Any]) -> str:
    """Whether all bits are bitsandbytes'; nothing where one of the two does not run."""
    try:
        found = np.asarray(ours()(), np.float32)
        expected = theirs()().result.float().cpu().numpy()
    except Exception:  # measure_case reports it
        return ""
    # As bits, so that -0 is not 0.
    wrong = int((found.view(np.int32) != expected.view(np.int32)).sum())
    return (
        f"{wrong} of {found.size} elements differ from {PEER}'" if wrong else f"equal to {PEER}', bit for bit"
    )


if __name__ == "__main__":
    run_alone(benchmark, __doc__)
