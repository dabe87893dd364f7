"""The layer loop, and what of each layer is kept for the backward pass.

Layers run one after the other, each with its own weights; nothing is stacked, so no weight is ever copied.

| checkpointing | kept on the GPU per layer | kept on the host | recomputed in the backward pass |
|---|---|---|---|
| none    | every intermediate       | nothing         | nothing |
| full    | the layer's input [B,T,D] | nothing        | the layer |
| offload | nothing (last layer: its input) | the layer's input | the layer |

`full` and `offload` are one custom_vjp around all layers. XLA schedules a program as a whole: left alone, it
merges what the backward pass computes again with what the forward pass has computed, and copies to and from
the host when it likes, for all layers early or each at the last moment. Optimization barriers tie both to the
computation, one layer at a time:

    forward, layer i     x_i goes to the host while layer i runs, and layer i + 1 waits for the copy: then
                         nothing needs x_i on the GPU, and its memory is free.
    backward, layer i    x_(i-1) comes back while layer i is computed again and differentiated. It starts no
                         earlier than that, and layer i - 1 does not start before it is there.

So at most two inputs are on the GPU at a time, whatever the number of layers, and each copy has a layer to
hide behind.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

CHECKPOINTING = ("none", "full", "offload")

# A layer as a function of the leaves of its module and of its input.
Layer = Callable[[Sequence[Array], Array], Array]


def run_layers(
    layer: Callable[[Any, int, Array], Array],
    blocks: Sequence[Any],
    x: Float[Array, "B T D"],
    *,
    checkpointing: str,
) -> Float[Array, "B T D"]:
    """Apply `layer(block, index, x)` for each block in order.

    Args:
        layer: a pure function of its arguments and of arrays that it closes over; those are constants.
        blocks: one nnx module per layer.
        x: input of the first layer.
        checkpointing: one of CHECKPOINTING; see the table above (rematerialisation: Chen et al., 2016).
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing={checkpointing!r} is not one of {', '.join(CHECKPOINTING)}")
    if checkpointing == "none":
        for index, block in enumerate(blocks):
            x = layer(block, index, x)
        return x
    layers, leaves = [], []
    for index, block in enumerate(blocks):
        function, flat = _as_function(layer, block, index)
        layers.append(function)
        leaves.append(flat)
    return _rematerialised(layers, offload=checkpointing == "offload")(leaves, x)


def _as_function(
    layer: Callable[[Any, int, Array], Array], block: Any, index: int
) -> tuple[Layer, list[Array]]:
    graph, state = nnx.split(block)
    leaves, tree = jax.tree.flatten(state)

    def run(leaves: Sequence[Array], x: Array) -> Array:
        return layer(nnx.merge(graph, jax.tree.unflatten(tree, leaves)), index, x)

    return run, leaves


def _rematerialised(layers: Sequence[Layer], *, offload: bool) -> Callable[[Any, Array], Array]:
    """(leaves of each layer, x) -> output of the last, with a backward pass that computes layers again."""

    @jax.custom_vjp
    def run(leaves: Any, x: Array) -> Array:
        for layer, own in zip(layers, leaves, strict=True):
            x = layer(own, x)
        return x

    def forward(leaves: Any, x: Any) -> tuple[Array, Any]:
        trained = _Trained(tuple(tuple(leaf.perturbed for leaf in own) for own in leaves))
        leaves = [[leaf.value for leaf in own] for own in leaves]
        x = x.value
        inputs: list[Array] = []
        for layer, own in zip(layers, leaves, strict=True):
            # Together: otherwise what is made of the leaves alone is made for all layers before the first.
            x, own = jax.lax.optimization_barrier((x, own))
            kept, x = x, layer(own, x)
            # The last layer's input is needed again at once.
            if offload and len(inputs) + 1 < len(layers):
                kept = jax.device_put(kept, jax.memory.Space.Host)
                kept, x = jax.lax.optimization_barrier((kept, x))
            inputs.append(kept)
        return x, (trained, leaves, inputs)

    def backward(residuals: Any, dy: Any) -> tuple[Any, Array | None]:
        trained, leaves, (*inputs, x) = residuals
        if isinstance(dy, jax.custom_derivatives.SymbolicZero):
            return [[None] * len(own) for own in leaves], None
        gradients = []
        for layer, own, chosen in reversed(list(zip(layers, leaves, trained.leaves, strict=True))):
            before = inputs.pop() if inputs else None
            if offload and before is not None:
                before, dy = jax.lax.optimization_barrier((before, dy))
                before = jax.device_put(before, jax.memory.Space.Device)
            # The leaves too: otherwise what is made of them alone is kept from the forward pass.
            x, own, dy = jax.lax.optimization_barrier((x, own, dy))
            gradient, dy = _gradients(layer, own, chosen, x, dy)
            gradients.append(gradient)
            if offload and before is not None:
                before, dy = jax.lax.optimization_barrier((before, dy))
            x = before
        return gradients[::-1], dy

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Trained:
    """For each leaf of each layer, whether it is differentiated."""

    leaves: tuple[tuple[bool, ...], ...]


def _gradients(
    layer: Layer, leaves: Sequence[Array], trained: Sequence[bool], x: Array, dy: Array
) -> tuple[list[Array | None], Array]:
    """Cotangents of a layer's leaves, None for those that are not trained, and of its input."""
    places = [place for place, is_trained in enumerate(trained) if is_trained]

    def run(chosen: Sequence[Array], x: Array) -> Array:
        own = list(leaves)
        for place, leaf in zip(places, chosen, strict=True):
            own[place] = leaf
        return layer(own, x)

    _, vjp = jax.vjp(run, [leaves[place] for place in places], x)
    chosen, dx = vjp(dy)
    gradients: list[Array | None] = [None] * len(leaves)
    for place, gradient in zip(places, chosen, strict=True):
        gradients[place] = gradient
    return gradients, dx
