"""Packed attention, forward and backward, beside the public implementations that run on the same machine.

    python kernels/benchmarks/attention.py [--tiny]

Random data. The work counts visible pairs only: 4 H operations a pair and head forward, 10 H backward.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lorajax_kernels import attention, attention_implementations
from results import Ceilings, Row, TorchResult, Work, measure_case, run_alone


@dataclass(frozen=True)
class Case:
    """B rows of the same segments, N query heads on K key heads of H."""

    batch: int
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def length(self) -> int:
        return sum(self.lengths)

    def __str__(self) -> str:
        shape = f"B{self.batch} T{self.length} N{self.heads} K{self.kv_heads} H{self.head_dim}"
        return f"{shape}, {len(self.lengths)} segments" if len(self.lengths) > 1 else f"{shape}, 1 segment"

    @property
    def flops(self) -> float:
        pairs = sum(length * (length + 1) / 2 for length in self.lengths)
        return 14 * self.head_dim * self.heads * self.batch * pairs

    def arrays(self, dtype: str) -> tuple[jax.Array, ...]:
        """q, k, v and the cotangent of the output."""
        random = np.random.default_rng(0)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        shapes = [(self.batch, self.length, n, self.head_dim) for n in heads]
        return tuple(jnp.asarray(random.standard_normal(shape, np.float32), dtype) for shape in shapes)

    def segment_ids(self) -> jax.Array:
        row = np.repeat(np.arange(1, len(self.lengths) + 1), self.lengths)
        return jnp.asarray(np.tile(row, (self.batch, 1)), jnp.int32)


CASES = (
    Case(4, (768,) * 5, 32, 8, 128),
    Case(4, (768,) * 5, 32, 8, 64),
    Case(4, (3840,), 32, 8, 128),
    Case(2, (8192,), 32, 8, 128),
    Case(2, (128,) * 64, 32, 8, 128),
)
TINY = (Case(2, (24, 40), 4, 2, 16),)


def benchmark(ceilings: Ceilings, tiny: bool) -> list[Row]:
    rows: list[Row] = []
    for case in TINY if tiny else CASES:
        rows += _measure(case, ceilings, rounds=3 if tiny else 9)
    return rows


def _measure(case: Case, ceilings: Ceilings, rounds: int) -> list[Row]:
    q, k, v, dout = case.arrays(ceilings.half)
    segment_ids = case.segment_ids()

    def ours(name: str) -> Callable[[], Any]:
        attend = functools.partial(attention, max_segments=len(case.lengths), implementation=name)
        return _compiled(lambda q, k, v: attend(q, k, v, segment_ids), q, k, v, dout)

    # The dense reference holds all scores.
    names = [name for name in attention_implementations() if name != "reference"]
    makers = {name: functools.partial(ours, name) for name in names}
    makers |= {name: functools.partial(peer, case, q, k, v, dout) for name, peer in PEERS.items()}
    return measure_case(
        "attention", str(case), Work(case.flops, "flops"), ceilings, makers, ours=tuple(names), rounds=rounds
    )


def _compiled(attend: Callable[..., Any], q: Any, k: Any, v: Any, dout: Any) -> Callable[[], Any]:
    """Forward and backward as one compiled function of no arguments."""

    @jax.jit
    def forward_and_backward(q, k, v, dout):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(dout)

    return lambda: forward_and_backward(q, k, v, dout)


def _pallas(case: Case, q: Any, k: Any, v: Any, dout: Any) -> Callable[[], Any]:
    """JAX' own kernel for GPUs; it takes as many key heads as query heads."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    group = case.heads // case.kv_heads
    segment_ids = case.segment_ids()

    def attend(q, k, v):
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        return mha(q, k, v, segment_ids, sm_scale=1 / math.sqrt(case.head_dim), causal=True)

    return _compiled(attend, q, k, v, dout)


def _flash3(case: Case, q: Any, k: Any, v: Any, dout: Any) -> Callable[[], Any]:
    """FlashAttention-3 in its variable-length form: all rows end to end."""
    from flash_attn3_jax import flash_mha_varlen

    ends = np.cumsum(case.lengths * case.batch)
    starts = jnp.asarray([0, *ends], jnp.int32)

    def attend(q, k, v):
        flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
        longest = max(case.lengths)
        out = flash_mha_varlen(*flat, starts, max_seqlen_q=longest, max_seqlen_k=longest, is_causal=True)
        return out.reshape(q.shape)

    return _compiled(attend, q, k, v, dout)


def _tokamax(case: Case, q: Any, k: Any, v: Any, dout: Any) -> Callable[[], Any]:
    import tokamax
    from lorajax_kernels import segments
    from tokamax._src.ops.attention.base import Mask

    k_start, _ = segments.bounds(case.segment_ids())
    mask = Mask(k_start=k_start[:, None], is_causal=True)
    return _compiled(lambda q, k, v: tokamax.dot_product_attention(q, k, v, mask=mask), q, k, v, dout)


def _torch(case: Case, q: Any, k: Any, v: Any, dout: Any) -> Callable[[], Any]:
    """torch's own flash attention in its variable-length form."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    def flat(x: Any) -> torch.Tensor:
        return torch.from_dlpack(x).reshape(-1, *x.shape[2:])

    tensors = [flat(x).clone().requires_grad_() for x in (q, k, v)]
    cotangent = flat(dout)
    ends = np.cumsum(case.lengths * case.batch).tolist()
    starts, longest = torch.tensor([0, *ends], dtype=torch.int32, device=cotangent.device), max(case.lengths)

    # Releases without the argument take fewer key heads as they are.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def forward_and_backward() -> Any:
        out = varlen_attn(*tensors, starts, starts, longest, longest, window_size=(-1, 0), **grouped)
        return TorchResult(torch.autograd.grad(out, tensors, cotangent))

    return forward_and_backward


PEERS = {
    "jax.experimental.pallas": _pallas,
    "flash_attn3_jax": _flash3,
    "tokamax": _tokamax,
    "torch varlen_attn": _torch,
}

if __name__ == "__main__":
    run_alone(benchmark, __doc__)
