"""Linear cross-entropy, loss and dx with a frozen head, beside its two products alone and other libraries.

    python kernels/benchmarks/cross_entropy.py [--tiny]

Random data. The work is that of the two products, 4 N D V operations. "the two products" makes all logits at
once and multiplies them with the head again, with no softmax between: no loss, but the time to be held
against, so that "to bound" is what the loss costs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lorajax_kernels import cross_entropy_implementations, linear_cross_entropy
from results import (
    Ceilings,
    Row,
    TorchResult,
    Work,
    import_tokamax,
    measure_case,
    measure_cases,
    run_alone,
    temporary_memory,
)

PRODUCTS = "the two products"


@dataclass(frozen=True)
class Case:
    """N rows of D features, V tokens in the vocabulary."""

    rows: int
    features: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.features} x {self.vocabulary}"

    def arrays(self, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [N, D], head [V, D], targets [N]."""
        random = np.random.default_rng(0)
        x = random.standard_normal((self.rows, self.features), np.float32)
        head = random.standard_normal((self.vocabulary, self.features), np.float32) / self.features**0.5
        targets = random.integers(0, self.vocabulary, self.rows, dtype=np.int32)
        return jnp.asarray(x, dtype), jnp.asarray(head, dtype), jnp.asarray(targets)


# GPT-2's vocabulary is no multiple of what products take whole.
CASES = (Case(16384, 2048, 128256), Case(16384, 2048, 50257))
TINY = (Case(256, 64, 1000), Case(256, 64, 1001))


def benchmark(ceilings: Ceilings, tiny: bool) -> list[Row]:
    return measure_cases(_measure, TINY if tiny else CASES, ceilings, 3 if tiny else 9)


def _measure(case: Case, ceilings: Ceilings, rounds: int) -> list[Row]:
    x, head, targets = case.arrays(ceilings.half)
    weights = jnp.ones(case.rows, jnp.float32)
    notes: dict[str, str] = {}

    def ours(name: str) -> Callable[[], Any]:
        def loss(x: Any, head: Any, targets: Any) -> Any:
            return linear_cross_entropy(x, head, targets, weights, implementation=name)[0]

        compiled = jax.jit(jax.value_and_grad(loss)).lower(x, head, targets).compile()
        notes[name] = temporary_memory(compiled)
        return lambda: compiled(x, head, targets)

    names = cross_entropy_implementations()
    products = jax.jit(lambda x, head: (x @ head.T) @ head)
    makers: dict[str, Callable[[], Any]] = {name: functools.partial(ours, name) for name in names}
    makers |= {
        PRODUCTS: lambda: lambda: products(x, head),
        "Liger": lambda: _liger(x, head, targets),
        "cut_cross_entropy": lambda: _cut(x, head, targets),
        "tokamax": lambda: _tokamax(x, head, targets),
    }
    flops = 4 * case.rows * case.features * case.vocabulary
    return measure_case(
        "linear_cross_entropy",
        str(case),
        Work(flops, "flops"),
        ceilings,
        makers,
        ours=names,
        bounds=(PRODUCTS,),
        rounds=rounds,
        notes=notes,
    )


def _torch_arrays(x: Any, head: Any, targets: Any) -> tuple[Any, Any, Any]:
    import torch

    copies = [torch.from_dlpack(array).clone() for array in (x, head, targets)]
    return copies[0].requires_grad_(), copies[1], copies[2].long()


def _liger(x: Any, head: Any, targets: Any) -> Callable[[], Any]:
    import torch
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    x, head, targets = _torch_arrays(x, head, targets)
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda: TorchResult(torch.autograd.grad(loss(head, x, targets), x))


def _cut(x: Any, head: Any, targets: Any) -> Callable[[], Any]:
    import torch
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    x, head, targets = _torch_arrays(x, head, targets)
    return lambda: TorchResult(torch.autograd.grad(cut_cross_entropy(x, head, targets, reduction="sum"), x))


def _tokamax(x: Any, head: Any, targets: Any) -> Callable[[], Any]:
    tokamax = import_tokamax()

    def loss(x: Any) -> Any:
        return tokamax.linear_softmax_cross_entropy_loss(x, targets, head.T, reduction="sum")

    gradient = jax.jit(jax.value_and_grad(loss))
    return lambda: gradient(x)


if __name__ == "__main__":
    run_alone(benchmark, __doc__)
