"""A model's weights as flat dicts, so that the compiled step sees plain pytrees and no module machinery."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from lorajax.memory.layers import apart, joined, joins
from lorajax.models.decoder import Decoder, LoRAParam

# Dotted tree path -> array: {"layers.0.attention.q_proj.lora_a": float32 [R, in], ...}.
Weights = dict[str, Array]

TRAINABLE = {"lora": LoRAParam, "full": nnx.Param}


def split_weights(model: Decoder, mode: str) -> tuple[Any, Weights, Weights]:
    """(graph, trainable, frozen): the model's structure, hashable, and its arrays by what trains them.

    Args:
        mode: "lora": the adapters are trainable; "full": everything is.
    """
    graph, trainable, frozen = nnx.split(model, TRAINABLE[mode], ...)  # type: ignore[misc]
    return graph, _flat(trainable), _flat(frozen)


def merge_weights(graph: Any, *weights: Weights) -> Decoder:
    """The model again, from split_weights' graph and dicts that hold all arrays between them."""
    leaves: Any = {_path(name): leaf for part in weights for name, leaf in part.items()}
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def by_layer(weights: Weights) -> Weights:
    """With a layer's small weights as one vector, "layers.0": what is done with it is one kernel, not dozens.

    Where the layer loop has made their gradients as such a vector, XLA takes it as it is.
    """
    found: Weights = {}
    for layer, names in _layers(weights):
        leaves = [weights[name] for name in names]
        together = names != [layer] and joins(leaves)
        found |= {layer: joined(leaves)} if together else dict(zip(names, leaves, strict=True))
    return found


def by_name(weights: Weights, like: Weights) -> Weights:
    """What by_layer has joined, under the names and in the shapes of `like`."""
    found: Weights = {}
    for layer, names in _layers(like):
        if layer in weights and names != [layer]:
            leaves = apart(weights[layer], [like[name] for name in names])
            found |= dict(zip(names, leaves, strict=True))
    return {name: found[name] if name in found else weights[name] for name in like}


def count(weights: Weights) -> int:
    """Number of elements."""
    return sum(leaf.size for leaf in weights.values())


def _layers(weights: Weights) -> list[tuple[str, list[str]]]:
    """Names by layer, in their order; those of no layer each alone."""

    def layer(name: str) -> str:
        found = re.match(r"\w+\.\d+(?=\.)", name)
        return found[0] if found else name

    return [(key, list(names)) for key, names in groupby(weights, key=layer)]


def _flat(state: nnx.State) -> Weights:
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
