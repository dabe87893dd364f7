"""What to keep, offload or recompute, and in which micro-batches: the fastest that fits a budget.

Estimates come from shapes alone (costs.py), in milliseconds for each layout, so that all that could be
chosen is looked at: micro-batches, groups of activations kept in none, some or all of the layers, and names
offloaded in none, some or all of those that keep them. What is chosen is then compiled, and XLA's own
analysis of its memory decides whether it fits; how far it is from the estimate corrects the other estimates.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from lorajax_kernels.cross_entropy import LOGIT_BYTES
from lorajax_kernels.precision import MULTIPLE

from lorajax.memory.costs import GROUPS, Costs, Rates, Workload
from lorajax.memory.policy import MADE_IN_CHUNKS, LayerPolicy, Layout, Policy

T = TypeVar("T")

# Steps between none and all of the layers that are looked at.
PARTS = 8
# What may be offloaded, the first first. The small ones are not worth a copy each.
OFFLOADED = ("block_input", "gate", "up", "attention_output", "query", "block_middle")
# Into how many parts the tokens of an MLP may be cut, and the fewest that a part has.
CHUNKS, LEAST_CHUNK = (2, 4, 8, 16), 2048
# Of a token in a batch: itself, its target, segment, position and weight.
BATCH_BYTES = 5 * 4
# Share of a copy's time that a step loses even where the copy hides behind computation.
COPY_COST = 0.03


class Breakdown(NamedTuple):
    """Memory of one GPU during a step, in bytes.

    Attributes:
        weights: frozen ones.
        adapters: what is trained.
        optimizer: its state, and the batch.
        activations: kept for the backward pass, those that travel to and from the host included.
        workspace: gradients, and what a layer or the head's loss needs for itself.
    """

    weights: int
    adapters: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class Estimate:
    """A layout and what it is expected to cost.

    Attributes:
        layout: rows of a micro-batch on a device, and what layers keep.
        micro_batches: of a step.
        seconds: of a step.
        device: memory of one GPU.
        host: pinned memory of the host for one GPU, in bytes.
    """

    layout: Layout
    micro_batches: int
    seconds: float
    device: Breakdown
    host: int

    def corrected(self, bytes_: int, away: float = 1.0) -> Estimate:
        """With so much more workspace than was estimated, and so many times the host memory."""
        workspace = max(0, self.device.workspace + bytes_)
        device = self.device._replace(workspace=workspace)
        return replace(self, device=device, host=int(self.host * away))


@dataclass(frozen=True)
class Problem:
    """What is to be planned.

    Attributes:
        workload: rows of a micro-batch on a device -> their work.
        rates: of the machine.
        rows: of a step on one device.
        fixed: memory of weights, adapters and optimizer, in bytes.
        offloads: whether the device can keep activations in host memory.
        micro_batches: those that may be chosen; each divides `rows`.
        mlp_chunks: parts of its tokens that an MLP takes one after the other, where that is not to be chosen.
        evaluation: (layout, tokens of a row) -> bytes that an evaluation takes beside weights and state;
            None: there is none.
        answering: bytes that an answer to one of the sample prompts takes beside weights and state.
    """

    workload: Callable[[int], Workload]
    rates: Rates
    rows: int
    fixed: tuple[int, int, int]
    offloads: bool
    micro_batches: Sequence[int]
    mlp_chunks: int | None = None
    evaluation: Callable[[Layout, int], int] | None = None
    answering: int = 0

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.workload(1).length

    def evaluating(self, layout: Layout) -> int:
        """Bytes that an evaluation takes beside weights and state; 0 without one."""
        return 0 if self.evaluation is None else self.evaluation(layout, self.length)

    def chunks(self, work: Workload, policy: Policy) -> Sequence[int]:
        """Those that may be chosen with a policy; more than one only where rows cannot be taken apart."""
        kept = any(layer.keeps(*MADE_IN_CHUNKS) for layer in policy.layers)
        if self.mlp_chunks is not None:
            return [] if kept and self.mlp_chunks > 1 else [self.mlp_chunks]
        if work.rows > 1 or kept:
            return [1]
        return [1, *(chunks for chunks in CHUNKS if work.length // chunks >= LEAST_CHUNK)]

    def shortened(self, length: int) -> Problem:
        """With rows of so many tokens."""

        def work(rows: int) -> Workload:
            longer = self.workload(rows)
            return replace(longer, length=length, context=min(longer.context, length))

        weights, adapters, optimizer = self.fixed
        less = BATCH_BYTES * self.rows * (self.length - length)
        return replace(self, workload=work, fixed=(weights, adapters, optimizer - less))


def micro_batch_counts(rows: int) -> list[int]:
    """Into how many micro-batches of equal size so many rows can be cut, from one up."""
    small = [count for count in range(1, math.isqrt(rows) + 1) if rows % count == 0]
    return sorted({*small, *(rows // count for count in small)})


def estimates(problem: Problem) -> list[Estimate]:
    """All that could be chosen and is not beaten in time and both memories at once; fastest first."""
    found = [estimate for count in problem.micro_batches for estimate in _layouts(problem, count)]
    return unbeaten(found, lambda each: (each.seconds, each.device.total, each.host))


def unbeaten(options: Iterable[T], cost: Callable[[T], tuple[float, int, int]]) -> list[T]:
    """Those that none other is as low as in all three costs, the lowest first."""
    best: list[T] = []
    # What those so far reach in the last two costs: the more of the one, the less of the other.
    ones: list[int] = []
    others: list[int] = []
    for option in sorted(options, key=cost):
        _, one, other = cost(option)
        below = bisect.bisect_right(ones, one)
        if below and others[below - 1] <= other:
            continue
        best.append(option)
        first = end = bisect.bisect_left(ones, one)
        while end < len(others) and others[end] >= other:
            end += 1
        ones[first:end], others[first:end] = [one], [other]
    return best


def estimate(problem: Problem, layout: Layout) -> Estimate:
    """What a given layout is expected to cost.

    Of the preset "offload", gradients stay on the GPU where those of a layer are larger than its input, as in
    steps of few tokens: their copies would have nothing to hide behind.
    """
    work = problem.workload(layout.rows)
    layers = work.options.num_layers
    policy = Policy.of(layout.checkpointing, layers)
    if (
        layout.checkpointing == "offload"
        and work.layers_gradient > layers * work.activation_bytes["block_input"]
    ):
        policy = policy.with_gradients(away=False)
    if layout.mlp_chunks > 1:
        policy = policy.without(*MADE_IN_CHUNKS)
    return _estimate(problem, Costs(work, problem.rates), layout._replace(checkpointing=policy))


def _layouts(problem: Problem, micro_batches: int) -> Iterator[Estimate]:
    rows = problem.rows // micro_batches
    work = problem.workload(rows)
    layers = work.options.num_layers
    costs = Costs(work, problem.rates)
    sizes, again = work.activation_bytes, costs.recomputed

    def worth(group: str) -> float:
        """Seconds that each of its bytes saves."""
        return sum(again[name] for name in GROUPS[group]) / sum(sizes[name] for name in GROUPS[group])

    by_worth = sorted(GROUPS, key=worth, reverse=True)
    counts = sorted({round(layers * part / PARTS) for part in range(1, PARTS + 1)} - {0})
    everywhere: list[str] = []
    for group, count in itertools.chain([(None, 0)], itertools.product(by_worth, counts)):
        some = [] if group is None else list(GROUPS[group])
        small = ["lora_hidden"] if some or everywhere else []
        those, others = (frozenset({"block_input", *small, *everywhere, *more}) for more in (some, ()))
        kept = [those if _spread(layer, count, layers) else others for layer in range(layers)]
        for policy in _offloading(kept, counts if problem.offloads else [], costs):
            for chunks in problem.chunks(work, policy):
                yield _estimate(problem, costs, Layout(rows, policy, chunks))
        if count == layers:
            everywhere += some


def _offloading(kept: Sequence[frozenset[str]], counts: Sequence[int], costs: Costs) -> Iterator[Policy]:
    """With the same activations kept: none offloaded, then more and more of them.

    Once with the layers' gradients, where all inputs are offloaded: whoever needs that needs the memory.
    Where a layer would end late for its copies, they may also go on beside the next, which takes more memory.
    """
    layers = len(kept)
    yield Policy(tuple(map(_kept, kept)))
    everywhere: list[str] = []
    for name in OFFLOADED:
        if not any(name in names for names in kept):
            continue
        for count in counts:
            away = [
                _kept(names, (*everywhere, name) if _spread(layer, count, layers) else (*everywhere,))
                for layer, names in enumerate(kept)
            ]
            late = any(costs.of_layer(layer).late for layer in set(away))
            for copy_span in (1, 2) if late else (1,):
                policy = Policy(tuple(away), copy_span)
                yield policy
                if name == "block_input" and count == layers:
                    yield policy.with_gradients(away=True)
        everywhere.append(name)


@functools.cache
def _kept(names: frozenset[str], away: tuple[str, ...] = ()) -> LayerPolicy:
    """Of those names, some in host memory."""
    return LayerPolicy(saved=names.difference(away), offloaded=names.intersection(away))


def _spread(layer: int, count: int, layers: int) -> bool:
    """Whether a layer is one of `count` that are spread evenly over all."""
    return (layer + 1) * count // layers > layer * count // layers


def _estimate(problem: Problem, costs: Costs, layout: Layout) -> Estimate:
    work, micro_batches, policy = costs.work, problem.rows // layout.rows, layout.checkpointing
    assert isinstance(policy, Policy)
    layers = [costs.of_layer(layer) for layer in policy.as_run.layers]
    saved, travelling = [layer.saved for layer in layers], [layer.offloaded for layer in layers]
    forward, backward = len(layers) * costs.layer_forward, sum(layer.backward for layer in layers)
    copies = sum(layer.copies for layer in layers)
    if policy.copy_span == 1:
        late = sum(layer.late for layer in layers)
    else:
        late = max(0.0, copies - forward) + max(0.0, copies - backward)
    step = forward + backward + late + COPY_COST * copies
    step += (layout.mlp_chunks - 1) * costs.mlp_weights * len(policy.layers)
    waiting = work.layers_gradient * sum(layer.gradient_away for layer in policy.layers) / len(policy.layers)
    # They come back behind the first layer, as far as there is room for them.
    alone = max(0.0, waiting - policy.copy_span * max(travelling))
    step += 2 * COPY_COST * costs.copied(waiting) + costs.copied(alone)
    seconds = micro_batches * (step + costs.micro_batch) + costs.update
    one = work.layers_gradient // len(saved)
    here = [0 if layer.gradient_away else one for layer in policy.layers]
    away = [one if layer.gradient_away else 0 for layer in policy.layers]
    activations, made = _activations_and_gradients(saved, travelling, here, policy.copy_span)
    # Of gradients in host memory too, what they sum up to over micro-batches stays on the GPU.
    sums = 4 * work.trainable if micro_batches > 1 else 0
    workspace = _workspace(work, policy, layout.mlp_chunks) + made + sums + 4 * work.outside
    # The update has all gradients on the GPU, those that waited in host memory too.
    workspace = max(workspace, 4 * work.trainable - activations)
    device = Breakdown(*problem.fixed, activations, int(workspace))
    return Estimate(layout, micro_batches, seconds, device, _host(travelling, away))


def _host(travelling: Sequence[int], gradients: Sequence[int]) -> int:
    """The most of both that is in host memory while a layer's backward pass runs.

    Activations are those of the layers below it, which have not come back; gradients are those of the layers
    above it, and take the places of what has.
    """
    below = list(itertools.accumulate(travelling, initial=0))[:-1]
    above = list(itertools.accumulate(reversed(gradients), initial=0))[-2::-1]
    return max(map(sum, zip(below, above, strict=True)))


def _activations_and_gradients(
    saved: Sequence[int], travelling: Sequence[int], gradients: Sequence[int], copy_span: int
) -> tuple[int, int]:
    """The most of both that is there while a layer's backward pass runs.

    Activations are what it and the layers below it saved, and what has come back for it and is on its way for
    the next ones. Copies that start in its turn are not among them: XLA starts them behind the MLP, which
    takes the most. Gradients are its own and those of the layers above it.
    """
    below = itertools.accumulate(saved)
    windows = (sum(travelling[max(0, index - copy_span + 1) : index + 1]) for index in range(len(saved)))
    above = list(itertools.accumulate(reversed(gradients)))[::-1]
    return max(
        ((kept + coming, made) for kept, coming, made in zip(below, windows, above, strict=True)), key=sum
    )


def _workspace(work: Workload, policy: Policy, mlp_chunks: int) -> float:
    """The most that a layer's backward pass, or the head's loss, needs besides what is kept.

    Counted in activations of width D and F, as compiled for an H200.
    """
    o, row = work.options, work.tokens * work.itemsize
    hidden, inner, logits = row * o.hidden_size, row * o.intermediate_size / mlp_chunks, row * o.vocab_size
    # Filled up to a whole multiple, which is a copy.
    head = work.itemsize * o.vocab_size * o.hidden_size if o.vocab_size % MULTIPLE else 0
    loss = min(logits, LOGIT_BYTES) + head + 2.5 * hidden
    # While attention is differentiated; more than the MLP takes where that is cut.
    most = max(loss, 7 * hidden + work.attention * work.tokens)
    for layer in set(policy.layers):
        kept = layer.saved | layer.offloaded
        gates = ("gate" not in kept) + ("up" not in kept)
        attention = 0 if "attention_output" in kept else 1
        most = max(most, inner * (1 + gates) + hidden * (2.4 + 2.2 * attention + 0.9 * gates))
    return most
