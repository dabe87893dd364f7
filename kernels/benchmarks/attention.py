"""Packed attention, forward and backward, beside the public implementations that run on the same machine.

    python kernels/benchmarks/attention.py [--tiny]

Random data. The work counts visible pairs only: 4 H operations a pair and head forward, 10 H backward.

Three questions have rows of their own. Which of Triton and cuDNN is faster for other heads, two documents and
windows? What could a forward kernel of Mosaic GPU gain? "attention_mgpu" is JAX's, for Hopper, with block_q x
block_kv x max_concurrent_steps: float16 alone, no segments, and no backward pass of a causal mask. And what
does cuDNN hold for a bound on the segments of a row? Compiled, not run.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lorajax_kernels import attention, attention_implementations
from lorajax_kernels.device import current_device
from results import (
    Ceilings,
    Row,
    TorchResult,
    Work,
    import_tokamax,
    measure_case,
    measure_cases,
    reason,
    run_alone,
    temporary_memory,
)


@dataclass(frozen=True)
class Case:
    """B rows of the same segments, N query heads on K key heads of H; window: of `attention`."""

    batch: int
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None

    @property
    def length(self) -> int:
        return sum(self.lengths)

    @property
    def shape(self) -> str:
        return f"B{self.batch} T{self.length} N{self.heads} K{self.kv_heads} H{self.head_dim}"

    def __str__(self) -> str:
        count = len(self.lengths)
        window = f", window {self.window}" if self.window else ""
        return f"{self.shape}, {count} segment{'s' if count > 1 else ''}{window}"

    @property
    def forward_flops(self) -> float:
        # The first keys of a segment are seen by fewer than a window of them would be.
        spans = [(length, min(length, self.window or length)) for length in self.lengths]
        pairs = sum(length * span - span * (span - 1) / 2 for length, span in spans)
        return 4 * self.head_dim * self.heads * self.batch * pairs

    @property
    def flops(self) -> float:
        return 3.5 * self.forward_flops

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of q, k, v and the cotangent of the output."""
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return [(self.batch, self.length, n, self.head_dim) for n in heads]

    def arrays(self, dtype: str) -> tuple[jax.Array, ...]:
        """q, k, v and the cotangent of the output."""
        random = np.random.default_rng(0)
        return tuple(jnp.asarray(random.standard_normal(shape, np.float32), dtype) for shape in self.shapes)

    def segment_ids(self) -> jax.Array:
        row = np.repeat(np.arange(1, len(self.lengths) + 1), self.lengths)
        return jnp.asarray(np.tile(row, (self.batch, 1)), jnp.int32)


CASES = (
    Case(4, (768,) * 5, 32, 8, 128),
    Case(4, (768,) * 5, 32, 8, 64),
    Case(4, (3840,), 32, 8, 128),
    Case(4, (3840,), 32, 8, 64),
    Case(2, (8192,), 32, 8, 128),
    Case(2, (128,) * 64, 32, 8, 128),
)
TINY = (Case(2, (24, 40), 4, 2, 16),)

# What the automatic choice between these two rests on besides.
CHOICES = ("triton", "cudnn")
CHOICE_CASES = (
    *(Case(4, (3840,), 32, 8, head_dim) for head_dim in (80, 96, 256)),
    *(Case(4, (1920, 1920), 32, 8, head_dim) for head_dim in (64, 128, 256)),
    *(Case(4, (3840,), 32, 8, head_dim, window=1024) for head_dim in (64, 128, 256)),
)
CHOICE_TINY = (Case(2, (24, 40), 4, 2, 16, window=8),)

FORWARD_CASE, FORWARD_TINY = Case(4, (3840,), 32, 8, 128), Case(1, (64,), 4, 2, 16)
# What fits the 227 KiB of shared memory at heads of 128.
MOSAIC_BLOCKS = ((64, 64, 4), (64, 128, 2), (128, 64, 2), (128, 64, 4), (128, 128, 2))

# Compiled for one bound after the other, and once with as many key heads as query heads.
MEMORY_CASE, MEMORY_TINY = Case(4, (3840,), 32, 8, 128), Case(1, (64,), 4, 2, 16)
SEGMENT_BOUNDS = (2, 5, 8, 16)


@dataclass(frozen=True)
class Program:
    """A compiled function with its arguments."""

    compiled: Any
    arguments: tuple[jax.Array, ...]

    def __call__(self) -> Any:
        return self.compiled(*self.arguments)


def benchmark(ceilings: Ceilings, tiny: bool) -> list[Row]:
    rounds = 3 if tiny else 9
    rows = measure_cases(_measure, TINY if tiny else CASES, ceilings, rounds)
    rows += measure_cases(_measure_choice, CHOICE_TINY if tiny else CHOICE_CASES, ceilings, rounds)
    rows += _measure_forward(FORWARD_TINY if tiny else FORWARD_CASE, ceilings, rounds)
    return rows + _memory_of_cudnn(MEMORY_TINY if tiny else MEMORY_CASE, ceilings.half)


def _measure(case: Case, ceilings: Ceilings, rounds: int) -> list[Row]:
    # The dense reference holds all scores.
    names = tuple(name for name in attention_implementations() if name != "reference")
    return _measure_both_passes(case, ceilings, rounds, names, PEERS)


def _measure_choice(case: Case, ceilings: Ceilings, rounds: int) -> list[Row]:
    return _measure_both_passes(case, ceilings, rounds, CHOICES, {})


def _measure_both_passes(
    case: Case,
    ceilings: Ceilings,
    rounds: int,
    names: tuple[str, ...],
    peers: Mapping[str, Callable[..., Callable[[], Any]]],
) -> list[Row]:
    q, k, v, dout = case.arrays(ceilings.half)
    segment_ids = case.segment_ids()

    def ours(name: str) -> Callable[[], Any]:
        attend = functools.partial(
            attention, window=case.window, max_segments=len(case.lengths), implementation=name
        )
        return _both_passes(lambda q, k, v: attend(q, k, v, segment_ids), q, k, v, dout)

    makers = {name: functools.partial(ours, name) for name in names}
    makers |= {name: functools.partial(peer, case, q, k, v, dout) for name, peer in peers.items()}
    return _timed(str(case), Work(case.flops, "flops"), ceilings, makers, ours=names, rounds=rounds)


def _measure_forward(case: Case, ceilings: Ceilings, rounds: int) -> list[Row]:
    """The forward pass alone; triton and attention_mgpu write the log-sum-exp of each row too."""
    q, k, v, _ = case.arrays(ceilings.half)
    segment_ids = case.segment_ids()

    def ours(name: str) -> Program:
        attend = functools.partial(attention, max_segments=1, implementation=name)
        return _program(lambda q, k, v: attend(q, k, v, segment_ids), q, k, v)

    expected = ours("xla")()
    names = ("triton", "cudnn", "xla")
    makers = {name: functools.partial(ours, name) for name in names}
    for blocks in MOSAIC_BLOCKS:
        name = f"attention_mgpu {'x'.join(map(str, blocks))}"
        makers[name] = functools.partial(_mosaic, blocks, q, k, v, expected)
    work = Work(case.forward_flops, "flops")
    return _timed(f"{case}, forward only", work, ceilings, makers, ours=names, rounds=rounds)


def _timed(
    case: str,
    work: Work,
    ceilings: Ceilings,
    makers: dict[str, Callable[[], Any]],
    *,
    ours: tuple[str, ...],
    rounds: int,
) -> list[Row]:
    """measure_case, with the temporary memory of what XLA compiles as a note."""
    notes: dict[str, str] = {}

    def noted(name: str) -> Any:
        call = makers[name]()
        if isinstance(call, Program):
            notes[name] = temporary_memory(call.compiled)
        return call

    noting = {name: functools.partial(noted, name) for name in makers}
    return measure_case("attention", case, work, ceilings, noting, ours=ours, rounds=rounds, notes=notes)


def _memory_of_cudnn(case: Case, dtype: str) -> list[Row]:
    """What cuDNN holds in both passes, by the bound on the segments of a row."""
    ungrouped = dataclasses.replace(case, kv_heads=case.heads)
    segment_ids = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32)
    rows = []
    for each, bound in (*((case, bound) for bound in SEGMENT_BOUNDS), (ungrouped, SEGMENT_BOUNDS[1])):
        attend = functools.partial(attention, max_segments=bound, implementation="cudnn")

        def both(q, k, v, dout, segment_ids, attend=attend):
            out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, segment_ids), q, k, v)
            return out, vjp(dout)

        arrays = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in each.shapes]
        try:
            compiled = jax.jit(both).lower(*arrays, segment_ids).compile()
            size = compiled.memory_analysis().temp_size_in_bytes / (bound * math.prod(each.shapes[0]))
            note = f"{temporary_memory(compiled)}: {size:.2f} bytes for each element of q and segment"
        except Exception as error:  # cuDNN is absent, or refuses
            note = reason(error)
        rows.append(Row("attention", f"{each.shape}, max_segments {bound}", "cudnn", True, None, note=note))
    return rows


def _program(function: Callable[..., Any], *arguments: jax.Array) -> Program:
    return Program(jax.jit(function).lower(*arguments).compile(), arguments)


def _both_passes(attend: Callable[..., Any], q: Any, k: Any, v: Any, dout: Any) -> Program:
    def forward_and_backward(q, k, v, dout):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(dout)

    return _program(forward_and_backward, q, k, v, dout)


def _mosaic(blocks: tuple[int, int, int], q: Any, k: Any, v: Any, expected: Any) -> Program:
    """JAX's kernel for Hopper on rows of one document, once its output is known to be right."""
    if no_mosaic := current_device().no_mosaic:
        raise ValueError(no_mosaic)
    from jax.experimental.pallas.ops.gpu.attention_mgpu import TuningConfig
    from jax.experimental.pallas.ops.gpu.attention_mgpu import attention as attend

    config = TuningConfig(*blocks, causal=True)
    q = q / math.sqrt(q.shape[-1])  # it does not scale the scores
    q, k, v = (x.astype(jnp.float16) for x in (q, k, v))
    program = _program(lambda q, k, v: attend(q, k, v, config, save_residuals=True), q, k, v)
    out, _ = program()
    a, b = out.astype(jnp.float32), expected.astype(jnp.float32)
    error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    if not error < 2e-2:
        raise AssertionError(f"the output is {error:.1e} off")
    return program


def _pallas(case: Case, q: Any, k: Any, v: Any, dout: Any) -> Callable[[], Any]:
    """JAX' own kernel for GPUs; it takes as many key heads as query heads."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    group = case.heads // case.kv_heads
    segment_ids = case.segment_ids()

    def attend(q, k, v):
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        return mha(q, k, v, segment_ids, sm_scale=1 / math.sqrt(case.head_dim), causal=True)

    return _both_passes(attend, q, k, v, dout)


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

    return _both_passes(attend, q, k, v, dout)


def _tokamax(implementation: str, case: Case, q: Any, k: Any, v: Any, dout: Any) -> Callable[[], Any]:
    """Its public function takes masks of T x T only; the implementations under it take bounds of segments."""
    import_tokamax()
    from lorajax_kernels import segments
    from tokamax._src.ops.attention.api import IMPLEMENTATIONS
    from tokamax._src.ops.attention.base import Mask

    k_start, _ = segments.bounds(case.segment_ids())
    mask = Mask(k_start=k_start[:, None], is_causal=True)
    return _both_passes(lambda q, k, v: IMPLEMENTATIONS[implementation](q, k, v, mask=mask), q, k, v, dout)


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


def _sdpa(case: Case, q: Any, k: Any, v: Any, dout: Any) -> Callable[[], Any]:
    """torch's own attention, which skips what is masked on rows of one document alone."""
    import torch
    import torch.nn.functional as F

    tensors = [torch.from_dlpack(x).clone().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    cotangent = torch.from_dlpack(dout).transpose(1, 2)
    if len(case.lengths) == 1:
        mask: dict[str, Any] = {"is_causal": True}
    else:
        ids = torch.from_dlpack(case.segment_ids())
        causal = torch.ones(case.length, case.length, dtype=torch.bool, device=ids.device).tril()
        mask = {"attn_mask": ((ids[:, :, None] == ids[:, None]) & causal)[:, None]}

    def forward_and_backward() -> Any:
        out = F.scaled_dot_product_attention(*tensors, enable_gqa=True, **mask)
        return TorchResult(torch.autograd.grad(out, tensors, cotangent))

    return forward_and_backward


PEERS = {
    "jax.experimental.pallas": _pallas,
    "flash_attn3_jax": _flash3,
    "tokamax mosaic_gpu": functools.partial(_tokamax, "mosaic_gpu"),
    "tokamax triton": functools.partial(_tokamax, "triton"),
    "torch varlen_attn": _torch,
    "torch SDPA": _sdpa,
}

if __name__ == "__main__":
    run_alone(benchmark, __doc__)
