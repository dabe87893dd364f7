"""What each layer keeps for the backward pass: the activations that have a name, and policies over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

# The activations of a layer that may be saved, recomputed or offloaded, in the order in which they are made.
# D: hidden size, N and K: query and key heads, H: their size, F: intermediate size, R: LoRA rank. What has no
# name (normalised inputs, the product of gate and up) is an elementwise pass away from what has one, and is
# made again where it is needed.
ACTIVATIONS: dict[str, str] = {
    "block_input": "[B, T, D], what the layer reads; saved or offloaded, never recomputed",
    "query": "[B, T, N, H], rotated, as attention reads it",
    "key": "[B, T, K, H], rotated",
    "value": "[B, T, K, H]",
    "attention_output": "[B, T, N, H]",
    "attention_lse": "[B, N, T] float32, log-sum-exp of the scores; of use with attention_output",
    "block_middle": "[B, T, D], between attention and MLP",
    "gate": "[B, T, F]",
    "up": "[B, T, F]",
    "lora_hidden": "[B, T, R] for each projection with an adapter, x A^T, and [B, T] float32 for each norm",
}

# Not an activation, but a policy names it like one: what a layer's trained weights get.
GRADIENT = "gradient"

# These are never offloaded: with many small copies in a layer, XLA keeps the large ones on the GPU too.
_SMALL = frozenset({"attention_lse", "lora_hidden"})

# What an MLP in parts of a row never keeps.
MADE_IN_CHUNKS = ("gate", "up")
# As many parts at most: each is traced and compiled by itself.
MOST_MLP_CHUNKS = 64

Action = Literal["save", "offload", "recompute"]
ACTIONS: tuple[Action, ...] = ("save", "offload", "recompute")

PRESETS = ("none", "full", "offload")


@dataclass(frozen=True)
class LayerPolicy:
    """What one layer keeps.

    Attributes:
        saved: names of the activations kept on the GPU.
        offloaded: of those kept in host memory.
        gradient_away: keep the layer's gradient in host memory until all layers have theirs.
    """

    saved: frozenset[str] = frozenset()
    offloaded: frozenset[str] = frozenset()
    gradient_away: bool = False

    def __post_init__(self) -> None:
        if "block_input" not in self.saved | self.offloaded:
            raise ValueError("block_input: it cannot be recomputed, all else is made from it")
        if small := self.offloaded & _SMALL:
            raise ValueError(f"{min(small)}: it is too small to be worth a copy; save or recompute it")

    @classmethod
    def of(cls, actions: Mapping[str, str]) -> LayerPolicy:
        """From {name: action}; activations that are left out are recomputed, but for the block's input.

        That is saved, and so is the gradient.

        Raises:
            ValueError: a name or an action is unknown, the block's input or the gradient is to be recomputed,
                or something small is to be offloaded.
        """
        actions = dict(actions)
        gradient = actions.pop(GRADIENT, "save")
        if gradient not in ("save", "offload"):
            raise ValueError(f"{GRADIENT}: {gradient!r} is not one of save, offload")
        for name, action in actions.items():
            if name not in ACTIVATIONS:
                raise ValueError(
                    f"{name!r} is no activation of a layer; known: {', '.join(ACTIVATIONS)}, {GRADIENT}"
                )
            if action not in ACTIONS:
                raise ValueError(f"{name}: {action!r} is not one of {', '.join(ACTIONS)}")
        actions = {"block_input": "save", **actions}
        chosen = {
            action: frozenset(name for name in actions if actions[name] == action) for action in ACTIONS
        }
        return cls(chosen["save"], chosen["offload"], gradient_away=gradient == "offload")

    def keeps(self, *names: str) -> bool:
        """Any of these."""
        return not (self.saved | self.offloaded).isdisjoint(names)

    @property
    def actions(self) -> dict[str, str]:
        """What `of` takes, in the order of ACTIVATIONS."""
        where = {name: "save" for name in self.saved} | {name: "offload" for name in self.offloaded}
        actions = {name: where[name] for name in ACTIVATIONS if name in where}
        return actions | ({GRADIENT: "offload"} if self.gradient_away else {})


EVERYTHING = LayerPolicy(saved=frozenset(ACTIVATIONS))


@dataclass(frozen=True)
class Policy:
    """What all layers keep.

    Attributes:
        layers: one a layer, from the first.
        copy_span: number of layers that a copy to or from the host may take; while it runs, its activation is
            in the GPU's memory too.
    """

    layers: tuple[LayerPolicy, ...]
    copy_span: int = 1

    def __post_init__(self) -> None:
        if self.copy_span < 1:
            raise ValueError(f"copy_span must be at least 1, not {self.copy_span}")

    @classmethod
    def of(cls, checkpointing: Checkpointing, num_layers: int) -> Policy:
        """The same for all layers, from a preset or {name: action}; a Policy stays as it is.

        Raises:
            ValueError: the preset, a name or an action is unknown, or a Policy has another number of layers.
        """
        if isinstance(checkpointing, Policy):
            if len(checkpointing.layers) != num_layers:
                raise ValueError(f"a policy of {len(checkpointing.layers)} layers for {num_layers}")
            return checkpointing
        if isinstance(checkpointing, str):
            if checkpointing not in PRESETS:
                raise ValueError(f"checkpointing={checkpointing!r} is not one of {', '.join(PRESETS)}")
            if checkpointing == "none":
                return cls((EVERYTHING,) * num_layers)
            if checkpointing == "full":
                return cls((LayerPolicy.of({}),) * num_layers)
            away = {"block_input": "offload", GRADIENT: "offload"}
            # Nothing of the last layer travels. What is small may stay there, and XLA packs its backward
            # pass, which has the loss before it and no layer, as tightly as the others'.
            last = LayerPolicy.of(away | {"lora_hidden": "save"})
            return cls((*(LayerPolicy.of(away),) * (num_layers - 1), last))
        return cls((LayerPolicy.of(checkpointing),) * num_layers)

    def without(self, *names: str) -> Policy:
        """With these made again in every layer."""
        gone = frozenset(names)
        layers = (
            replace(layer, saved=layer.saved - gone, offloaded=layer.offloaded - gone)
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def with_gradients(self, *, away: bool) -> Policy:
        """With every layer's gradient in host memory, or none."""
        return replace(self, layers=tuple(replace(layer, gradient_away=away) for layer in self.layers))

    @property
    def as_run(self) -> Policy:
        """What the loop makes of it: nothing of the last layer leaves the GPU, nor does the first's gradient,
        which nothing follows that it could travel beside."""
        *others, last = self.layers
        first, *others = *others, LayerPolicy(last.saved | last.offloaded, gradient_away=last.gradient_away)
        return replace(self, layers=(replace(first, gradient_away=False), *others))

    @property
    def keeps_everything(self) -> bool:
        return all(layer == EVERYTHING for layer in self.layers)

    @property
    def offloads(self) -> bool:
        return any(layer.offloaded or layer.gradient_away for layer in self.layers)

    def as_plain(self) -> dict[str, Any]:
        """As JSON takes it: runs of equal layers, each with their number."""
        runs: list[list[Any]] = []
        for layer in self.layers:
            if runs and runs[-1][1] == layer.actions:
                runs[-1][0] += 1
            else:
                runs.append([1, layer.actions])
        return {"layers": runs, "copy_span": self.copy_span}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Policy:
        """What as_plain gave."""
        runs: Sequence[tuple[int, Any]] = plain["layers"]
        layers = [LayerPolicy.of(actions) for number, actions in runs for _ in range(number)]
        return cls(tuple(layers), plain["copy_span"])


# A preset, {name: action} for every layer, or a policy for each.
Checkpointing = str | Mapping[str, str] | Policy


class Layout(NamedTuple):
    """How a step goes over its rows.

    Attributes:
        rows: of a micro-batch on one device.
        checkpointing: what layers keep.
        mlp_chunks: parts of a row's tokens that an MLP takes one after the other (lorajax.memory.chunks).
    """

    rows: int
    checkpointing: Checkpointing
    mlp_chunks: int = 1
