"""The layer loop, and what of each layer is kept for the backward pass.

Layers run one after the other, each with its own weights; nothing is stacked, so no weight is ever copied.

| checkpointing | kept on the GPU per layer | kept on the host | recomputed in the backward pass |
|---|---|---|---|
| none    | every intermediate       | nothing         | nothing |
| full    | the layer's input [B,T,D] | nothing        | the layer |
| offload | nothing (last layer: its input) | the layer's input | the layer |
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

CHECKPOINTING = ("none", "full", "offload")
LAYER_INPUT = "layer_input"
# Of lorajax_kernels.attention: an integer a token, the same in all layers, slow to compute and to compile.
SEGMENT_BOUNDS = "segment_bounds"


def run_layers(
    layer: Callable[[Any, int, Array], Array],
    blocks: Sequence[Any],
    x: Float[Array, "B T D"],
    *,
    checkpointing: str,
) -> Float[Array, "B T D"]:
    """Apply `layer(block, index, x)` for each block in order.

    Args:
        layer: a pure function of its arguments and of arrays that it closes over.
        blocks: one module per layer.
        x: input of the first layer.
        checkpointing: one of CHECKPOINTING; see the table above (rematerialisation: Chen et al., 2016).
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing={checkpointing!r} is not one of {', '.join(CHECKPOINTING)}")
    for index, block in enumerate(blocks):
        if checkpointing == "none":
            x = layer(block, index, x)
        else:
            # The last layer's input is needed again at once.
            offload = checkpointing == "offload" and index + 1 < len(blocks)
            x = _rematerialise(layer, block, index, offload=offload)(x)
    return x


def _rematerialise(
    layer: Callable[[Any, int, Array], Array], block: Any, index: int, *, offload: bool
) -> Callable[[Array], Array]:
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[SEGMENT_BOUNDS],
        names_which_can_be_offloaded=[LAYER_INPUT] if offload else [],
        offload_src="device",
        offload_dst="pinned_host",
    )
    # The name must be given inside the checkpointed function: outside, the policy never sees it.
    return jax.checkpoint(lambda x: layer(block, index, checkpoint_name(x, LAYER_INPUT)), policy=policy)
