"""A model's weights as flat dicts, so that the compiled step sees plain pytrees and no module machinery."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from lorajax.models.decoder import (
    AdapterShapes,
    Block,
    Decoder,
    LoRAParam,
    adapters_apart,
    adapters_joined,
)

# Dotted tree path -> array: {"layers.0.attention.q_proj.weight": bfloat16 [out, in], ...}.
Weights = dict[str, Array]

TRAINABLE = {"lora": LoRAParam, "full": nnx.Param}


def split_weights(model: Decoder, mode: str) -> tuple[Any, Weights, Weights]:
    """(graph, trainable, frozen): the model's structure, hashable, and its arrays by what trains them.

    The adapters of a layer are one vector, "layers.0.adapters" [N]: an update, or a copy to the host, is one
    kernel then, not one for each A and B, and XLA has as much less to compile.

    Args:
        model: with arrays, or shapes in place of them.
        mode: "lora": the adapters are trainable; "full": everything is.

    Returns:
        The vectors of arrays are in host memory, for the device to have room for them where the model's own
        adapters were: beside them they would leave holes that nothing else fits in.
    """
    if mode == "lora":
        model = nnx.merge(*nnx.split(model))  # another module of the same arrays
        for block in model.layers:
            _join_adapters(block)
    graph, trainable, frozen = nnx.split(model, TRAINABLE[mode], ...)  # type: ignore[misc]
    return graph, _flat(trainable), _flat(frozen)


def _join_adapters(block: Block) -> None:
    pairs = [
        None if a is None or b is None else (a.get_value(), b.get_value())
        for a, b in ((linear.lora_a, linear.lora_b) for linear in block.linears())
    ]
    leaves = [leaf for pair in pairs if pair is not None for leaf in pair]
    if not leaves:
        return
    shapes: AdapterShapes = tuple(None if pair is None else (pair[0].shape, pair[1].shape) for pair in pairs)
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        vector: Any = jax.ShapeDtypeStruct((sum(leaf.size for leaf in leaves),), leaves[0].dtype)
    else:
        vector = adapters_joined(shapes, jax.tree.map(np.asarray, pairs), np)
    block.adapters, block.adapter_shapes = LoRAParam(vector), shapes
    for linear in block.linears():
        linear.lora_a = linear.lora_b = None


def delete_adapters(model: Decoder) -> None:
    """Free their memory now: nnx leaves modules in cycles, which hold it until Python collects them."""
    for leaf in jax.tree.leaves(nnx.state(model, LoRAParam)):
        leaf.delete()


def give_back_adapters(model: Decoder) -> None:
    """Undo, in place, what split_weights has done to the adapters of a model that merge_weights gave.

    Layer by layer, and the vectors are deleted: a model has no more room for both than for one.
    """
    for block in model.layers:
        if block.adapters is None:
            continue
        vector = block.adapters.get_value()
        # On the host: the slices would be programs to compile.
        pairs = adapters_apart(block.adapter_shapes, np.asarray(vector))
        for linear, pair in zip(block.linears(), pairs, strict=True):
            if pair is not None:
                linear.lora_a, linear.lora_b = (LoRAParam(jax.device_put(x, vector.sharding)) for x in pair)
        vector.delete()
        block.adapters, block.adapter_shapes = None, ()


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
