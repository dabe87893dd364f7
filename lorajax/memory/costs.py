"""What a training step costs: bytes that stay, bytes that travel, and seconds, from shapes alone.

Seconds are a sum of three kinds of work, each at a rate of the machine (Rates): products by their operations,
everything else by the bytes that it reads and writes, and copies to and from the host. The shares of the
rates that programs reach (EFFICIENCY) are those of this library's steps on an H200, 1B and 8B shapes, and are
taken to hold elsewhere: a plan needs to know which of two programs is faster, and the rates are the machine's
own. A layer of few tokens takes what its kernels take to start; in between both count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lorajax_kernels.cross_entropy import LOGIT_BYTES

from lorajax.memory.policy import ACTIVATIONS, LayerPolicy
from lorajax.models.decoder import Decoder, DecoderOptions

# Of a layer.
NORMS = 2


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        flops: operations of a large product in 16 bits.
        memory: bytes of a copy within the GPU's memory, read and written together.
        link: bytes between GPU and host, one way at a time: activations leave in the forward pass and come
            back in the backward pass.
    """

    flops: float
    memory: float
    link: float


@dataclass(frozen=True)
class Efficiency:
    """Shares of the rates.

    Attributes:
        products: frozen products.
        attention: the forward pass, by the size of a head from which on it holds.
        passes: what goes over activations element by element.
        link: copies beside computation.
    """

    products: float
    attention: Mapping[int, float]
    passes: float
    link: float


EFFICIENCY = Efficiency(products=0.96, attention={0: 0.45, 80: 0.55, 128: 0.67}, passes=0.80, link=0.88)
# The backward pass of attention makes five products where the forward pass makes two, in more time each.
ATTENTION_BACKWARD = 3.3
# Passes over activations of width D and F in a layer's forward and backward pass, each reading or writing its
# input once: norms, rotation, residuals, gates, and what adapters read.
FORWARD_PASSES = {"hidden": 11.5, "inner": 3.0}
BACKWARD_PASSES = {"hidden": 24.0, "inner": 9.0}
# Times that the weights are read in a micro-batch besides what the products' own rate covers.
WEIGHT_PASSES = 2.0
# Seconds that a kernel takes however little it does, and about how many a layer has: in its forward pass, in
# its backward pass, and those that make all of its activations again.
KERNEL = 5e-6
FORWARD_KERNELS, BACKWARD_KERNELS, RECOMPUTED_KERNELS = 40, 47, 42

# Activations that a plan keeps or recomputes together, in the order in which a layer makes them.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("query", "key", "value"),
    "attention": ("attention_output", "attention_lse"),
    "block_middle": ("block_middle",),
    "gate": ("gate",),
    "up": ("up",),
}


@dataclass(frozen=True)
class Workload:
    """A model and the rows of one micro-batch on one device.

    Attributes:
        options: the model's shapes.
        ranks: of the adapters of each projection, the largest of all layers, by its name; 0 without.
        itemsize: bytes of an element of the activations.
        weights: bytes of the frozen weights.
        trainable: number of trainable parameters.
        rows, length: of a micro-batch, in tokens.
        context: tokens of the document that a token is in, on average: attention costs by them.
        attention: bytes a token that the backward pass of attention holds for more than two segments a row.
        outside: number of trainable parameters that are in no layer, such as a trained head.
    """

    options: DecoderOptions
    ranks: Mapping[str, int]
    itemsize: int
    weights: int
    trainable: int
    rows: int
    length: int
    context: int
    attention: int = 0
    outside: int = 0

    @property
    def layers_gradient(self) -> int:
        """Bytes of all layers' gradients, which alone can travel."""
        return 4 * (self.trainable - self.outside)

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each projection of a layer."""
        o = self.options
        query, key, hidden, inner = (
            o.num_heads * o.head_dim,
            o.num_kv_heads * o.head_dim,
            o.hidden_size,
            o.intermediate_size,
        )
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, key),
            "v_proj": (hidden, key),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @functools.cached_property
    def activation_bytes(self) -> dict[str, int]:
        """Of each named activation of a layer, for the micro-batch."""
        o, tokens = self.options, self.tokens
        elements = {
            "block_input": o.hidden_size,
            "query": o.num_heads * o.head_dim,
            "key": o.num_kv_heads * o.head_dim,
            "value": o.num_kv_heads * o.head_dim,
            "attention_output": o.num_heads * o.head_dim,
            "block_middle": o.hidden_size,
            "gate": o.intermediate_size,
            "up": o.intermediate_size,
            "lora_hidden": sum(self.ranks.values()),
        }
        sizes = {name: count * self.itemsize * tokens for name, count in elements.items()}
        sizes["attention_lse"] = 4 * o.num_heads * tokens
        if any(self.ranks.values()):
            sizes["lora_hidden"] += NORMS * 4 * tokens
        assert sizes.keys() == ACTIVATIONS.keys()
        return sizes


class LayerCosts(NamedTuple):
    """What a layer's policy costs.

    Attributes:
        saved, offloaded: bytes that the layer keeps on the GPU and in host memory.
        backward: seconds of its backward pass.
        copies: seconds of its copies, one way.
        late: seconds that it ends later in either pass where the copies may take no longer than itself.
    """

    saved: int
    offloaded: int
    backward: float
    copies: float
    late: float


@dataclass(frozen=True)
class Costs:
    """Seconds of a workload's parts on a machine."""

    work: Workload
    rates: Rates

    def _product(self, into: int, out: int) -> float:
        """x [tokens, into] times a weight [out, into]."""
        tokens, itemsize = self.work.tokens, self.work.itemsize
        moved = itemsize * (tokens * (into + out) + into * out)
        return max(
            2 * tokens * into * out / (EFFICIENCY.products * self.rates.flops),
            moved / (EFFICIENCY.passes * self.rates.memory),
        )

    def _passes(self, counts: Mapping[str, float]) -> float:
        o = self.work.options
        elements = counts["hidden"] * o.hidden_size + counts["inner"] * o.intermediate_size
        moved = elements * self.work.tokens * self.work.itemsize
        return moved / (EFFICIENCY.passes * self.rates.memory)

    @property
    def attention(self) -> float:
        """Of a layer's forward pass."""
        o = self.work.options
        operations = 4 * self.work.tokens * (self.work.context / 2) * o.num_heads * o.head_dim
        share = max((size, share) for size, share in EFFICIENCY.attention.items() if size <= o.head_dim)[1]
        return operations / (share * self.rates.flops)

    @property
    def products(self) -> float:
        """All frozen products of a layer, once."""
        return sum(self._product(*widths) for widths in self.work.widths.values())

    @functools.cached_property
    def layer_forward(self) -> float:
        work = self.products + self.attention + self._passes(FORWARD_PASSES)
        return math.hypot(work, KERNEL * FORWARD_KERNELS)

    @functools.cached_property
    def recomputed(self) -> dict[str, float]:
        """Of a layer, to make each activation again from those before it; what cannot be has no entry.

        attention_lse comes with the output, without which it is of no use; lora_hidden with the products that
        read the same input.
        """
        product = {name: self._product(*widths) for name, widths in self.work.widths.items()}
        share = {name: value / 8 for name, value in FORWARD_PASSES.items()}
        one = self._passes(share)
        return {
            "query": product["q_proj"] + one,
            "key": product["k_proj"] + one,
            "value": product["v_proj"] + one,
            "attention_output": self.attention,
            "attention_lse": 0.0,
            "block_middle": product["o_proj"] + one,
            "gate": product["gate_proj"] + 3 * one,
            "up": product["up_proj"] + 3 * one,
            "lora_hidden": 0.0,
        }

    def again(self, kept: Container[str]) -> float:
        """Seconds to make again what a layer does not keep; both results of attention are made at once."""
        missing = {name for name in self.recomputed if name not in kept}
        if "attention_lse" in missing:
            missing.add("attention_output")
        return sum(seconds for name, seconds in self.recomputed.items() if name in missing)

    @functools.cached_property
    def made_after(self) -> dict[str, float]:
        """Seconds from the start of a layer's forward pass until an activation is there."""
        made, seconds = {"block_input": 0.0}, 0.0
        for names in GROUPS.values():
            seconds += sum(self.recomputed[name] for name in names)
            made |= dict.fromkeys(names, min(seconds, self.layer_forward))
        return made

    @functools.cached_property
    def of_layer(self) -> Callable[[LayerPolicy], LayerCosts]:
        """policy -> what it costs, beside layer_forward, which all have."""
        sizes, all_again = self.work.activation_bytes, sum(self.recomputed.values())
        work = self.products + ATTENTION_BACKWARD * self.attention + self._passes(BACKWARD_PASSES)

        @functools.cache
        def of_layer(policy: LayerPolicy) -> LayerCosts:
            kept = policy.saved | policy.offloaded
            missing = self.again(kept)
            saved, offloaded = (
                sum(map(sizes.__getitem__, names)) for names in (policy.saved, policy.offloaded)
            )
            kernels = BACKWARD_KERNELS + RECOMPUTED_KERNELS * missing / all_again
            backward = math.hypot(work + missing, KERNEL * kernels)
            copies = self.copied(offloaded)
            late = max(0.0, self._until_copied(policy) - self.layer_forward) + max(0.0, copies - backward)
            return LayerCosts(saved, offloaded, backward, copies, late)

        return of_layer

    def _until_copied(self, policy: LayerPolicy) -> float:
        """Seconds from the start of a layer's forward pass until what it offloads is in host memory.

        It goes one after the other, as it is made: what is made late has little of the layer to hide behind.
        """
        end = 0.0
        for name in sorted(policy.offloaded, key=self.made_after.__getitem__):
            end = max(end, self.made_after[name]) + self.copied(self.work.activation_bytes[name])
        return end

    @functools.cached_property
    def micro_batch(self) -> float:
        """What a micro-batch costs beside its layers: the head's loss, and weights that are read again."""
        o, work = self.work.options, self.work
        head = 2 * self._product(o.hidden_size, o.vocab_size)
        softmax = 3 * o.vocab_size * work.tokens * work.itemsize / (EFFICIENCY.passes * self.rates.memory)
        again = WEIGHT_PASSES * work.weights / (EFFICIENCY.passes * self.rates.memory)
        return head + softmax + again

    @property
    def mlp_weights(self) -> float:
        """Of a layer's MLP, read once more in each of the passes that a part of the tokens makes."""
        o = self.work.options
        size = 3 * o.hidden_size * o.intermediate_size * self.work.itemsize
        return WEIGHT_PASSES * size / (EFFICIENCY.passes * self.rates.memory)

    @property
    def update(self) -> float:
        """Of the optimizer: parameters, gradients and two moments are read, all but gradients written."""
        return 7 * 4 * self.work.trainable / (EFFICIENCY.passes * self.rates.memory)

    def copied(self, size: float) -> float:
        """Seconds of a copy of `size` bytes to or from the host."""
        return size / (EFFICIENCY.link * self.rates.link)


def workload(
    model: Decoder,
    *,
    weights: int,
    trainable: int,
    rows: int,
    length: int,
    context: int,
    attention: int = 0,
    outside: int = 0,
) -> Workload:
    """Of a model, whose arrays may be abstract; see Workload."""
    ranks: dict[str, int] = {}
    for path, linear in model.linears().items():
        name = path.rpartition(".")[2]
        rank = 0 if linear.lora_a is None else linear.lora_a.get_value().shape[0]
        ranks[name] = max(rank, ranks.get(name, 0))
    return Workload(
        options=model.options,
        ranks=ranks,
        itemsize=model.dtype.itemsize,
        weights=weights,
        trainable=trainable,
        rows=rows,
        length=length,
        context=min(context, length),
        attention=attention,
        outside=outside,
    )


def evaluating_bytes(
    options: DecoderOptions, *, itemsize: int, rows: int, length: int, mlp_chunks: int
) -> int:
    """About what the loss of rows takes beside the model, without gradients, as compiled for an H100.

    Args:
        itemsize: bytes of an element of weights and activations.
        rows, length: of the micro-batch.
    """
    o, row = options, rows * length * itemsize
    hidden, inner = row * o.hidden_size, row * o.intermediate_size // mlp_chunks
    logits = min(row * o.vocab_size, LOGIT_BYTES)
    return int(max(4.1 * hidden + 2.2 * inner + logits / 3, logits + 5 * hidden))


def answering_bytes(options: DecoderOptions, *, itemsize: int, rows: int, prompt: int, new: int) -> int:
    """About what lorajax.generation.generate takes beside the model, as its programs for an H100 do.

    Args:
        itemsize: bytes of an element of weights and activations.
        rows: prompts that are answered at a time.
        prompt, new: tokens of the longest prompt and of its answer.
    """
    o = options
    caches = 2 * o.num_layers * rows * (prompt + new) * o.num_kv_heads * o.head_dim * itemsize
    reading = rows * prompt * (o.intermediate_size + o.hidden_size) * itemsize
    # Of some lengths XLA holds some of the caches twice; the programs' code is a few MiB.
    return int(1.25 * caches + 2.4 * reading) + 4 * rows * o.vocab_size + 2**23
