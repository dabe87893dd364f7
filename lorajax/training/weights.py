"""A model's weights as flat dicts, so that the compiled step sees plain pytrees and no module machinery."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

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


def count(weights: Weights) -> int:
    """Number of elements."""
    return sum(leaf.size for leaf in weights.values())


def _flat(state: nnx.State) -> Weights:
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
