"""One optimizer step as a pure function: micro-batches -> summed gradients -> AdamW.

The loss is the sum over target tokens divided by their number in the whole global batch: over micro-batches
and devices, sums and counts are carried apart and divided once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key, Shaped, UInt32
from lorajax_kernels import linear_cross_entropy
from lorajax_kernels.device import split_over

from lorajax.memory.policy import Checkpointing
from lorajax.models.decoder import Decoder
from lorajax.sharding import DATA_AXIS
from lorajax.training.optimizer import updated
from lorajax.training.weights import Weights, merge_weights

# tokens, targets, segment_ids, positions int32 and weights float32: A micro-batches of B rows.
Batch = dict[str, Shaped[Array, "A B T"]]
Rows = dict[str, Shaped[Array, "B T"]]

# Steps without an overflow after which float16's loss scale doubles; the scale below which it is hopeless.
_GROWTH_STEPS = 200
_LARGEST_FLOAT16_LOSS = 2.0**15
SMALLEST_LOSS_SCALE = 2.0**-40


class LossScale(NamedTuple):
    """Dynamic loss scaling for float16 (Micikevicius et al., 2018); without it the scale stays 1.

    Attributes:
        scale: by what the loss is multiplied before the backward pass, a power of two.
        good_steps: steps since it last changed.
    """

    scale: Float[Array, ""]
    good_steps: Int[Array, ""]


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        trainable: float32 leaves, by name.
        opt_state: optax's, over the trainable leaves.
        updates: updates made so far; a step whose gradient is not finite makes none.
        key: data of the dropout's key (jax.random.key_data); each update folds its number in. With a typed
            key among its results the step would miss JAX' fast path of dispatch.
        loss_scale: see LossScale.
    """

    trainable: Weights
    opt_state: Any
    updates: Int[Array, ""]
    key: UInt32[Array, " words"]
    loss_scale: LossScale


class StepMetrics(NamedTuple):
    """What a step reports, float32 scalars.

    Attributes:
        loss: per target token, before the update.
        grad_norm: global norm before clipping.
        learning_rate: of this update.
        loss_scale: that this step used.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    loss_scale: Float[Array, ""]


def init_state(
    trainable: Weights,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    dtype: Any,
    tokens_per_step: int,
) -> TrainState:
    """The state before the first step.

    Args:
        dtype: of the activations; float16 starts with a loss scale that suits `tokens_per_step`, since the
            gradient that flows back is that of a sum over tokens.
    """
    scale = 1.0
    if jnp.dtype(dtype) == jnp.float16:
        scale = _LARGEST_FLOAT16_LOSS / 2 ** (tokens_per_step - 1).bit_length()
    return TrainState(
        trainable,
        optimizer.init(trainable),
        jnp.zeros((), jnp.int32),
        jax.random.key_data(jax.random.key(seed)),
        LossScale(jnp.asarray(scale, jnp.float32), jnp.zeros((), jnp.int32)),
    )


def make_train_step(
    graph: Any,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    mesh: Mesh,
    checkpointing: Checkpointing,
    mlp_chunks: int = 1,
    max_segments: int | None = None,
    dropout: bool,
    train_head: bool,
    scale_loss: bool,
) -> Callable[[TrainState, Weights, Batch], tuple[TrainState, StepMetrics]]:
    """step(state, frozen, batch) -> (state, metrics), to be jitted with the state donated.

    Args:
        graph: of split_weights.
        optimizer: of adamw.
        checkpointing: as in lorajax.memory.policy.
        mlp_chunks: as in Decoder.hidden_states.
        max_segments: as in Decoder.hidden_states.
        dropout: apply the adapters' dropout.
        train_head: the head's weight is among the trainable ones.
        scale_loss: adapt the loss scale (float16).
    """

    def step(state: TrainState, frozen: Weights, batch: Batch) -> tuple[TrainState, StepMetrics]:
        scale = state.loss_scale.scale
        loss, gradient = loss_and_gradient(
            graph,
            state.trainable,
            frozen,
            batch,
            mesh=mesh,
            checkpointing=checkpointing,
            mlp_chunks=mlp_chunks,
            max_segments=max_segments,
            dropout_key=_update_key(state) if dropout else None,
            train_head=train_head,
            loss_scale=scale,
        )
        norm = optax.tree.norm(gradient)
        metrics = StepMetrics(loss, norm, jnp.asarray(schedule(state.updates), jnp.float32), scale)
        # A step that is not finite leaves everything as it was, so that the last good state can be kept.
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        trainable, opt_state = updated(
            optimizer, gradient, state.opt_state, state.trainable, norm=norm, finite=finite
        )
        made = jnp.where(finite, state.updates + 1, state.updates)
        next_scale = _next_loss_scale(state.loss_scale, finite) if scale_loss else state.loss_scale
        return TrainState(trainable, opt_state, made, state.key, next_scale), metrics

    return step


def loss_and_gradient(
    graph: Any,
    trainable: Weights,
    frozen: Weights,
    batch: Batch,
    *,
    mesh: Mesh,
    checkpointing: Checkpointing,
    mlp_chunks: int = 1,
    max_segments: int | None = None,
    dropout_key: Key[Array, ""] | None = None,
    train_head: bool = False,
    loss_scale: Float[Array, ""] | float = 1.0,
) -> tuple[Float[Array, ""], Weights]:
    """Mean loss per target token of the whole batch, and its gradient, float32.

    Arguments as in make_train_step; the loss scale is taken out of the gradient again.
    """
    micro_batches = batch["tokens"].shape[0]
    targets = jnp.maximum(jnp.sum(batch["weights"]), 1)

    def scaled_loss(trainable: Weights, rows: Rows, index: Array) -> tuple[Array, Array]:
        model = merge_weights(graph, trainable, frozen)
        loss = loss_sum(
            model,
            rows,
            mesh=mesh,
            checkpointing=checkpointing,
            mlp_chunks=mlp_chunks,
            max_segments=max_segments,
            dropout_key=dropout_key,
            first_row=index * rows["tokens"].shape[0],
            train_head=train_head,
        )
        return loss * loss_scale, loss

    def add(sums: tuple[Array, Weights], micro_batch: tuple[Rows, Array]):
        (_, loss), gradient = jax.value_and_grad(scaled_loss, has_aux=True)(trainable, *micro_batch)
        return jax.tree.map(jnp.add, sums, (loss, gradient)), None

    sums: tuple[Array, Weights]
    # Around the backward pass too, which traces layers again.
    with split_over(mesh.size):
        if micro_batches == 1:
            rows = {name: array[0] for name, array in batch.items()}
            (_, loss), gradient = jax.value_and_grad(scaled_loss, has_aux=True)(trainable, rows, jnp.int32(0))
            sums = (loss, gradient)
        else:
            zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trainable))
            sums, _ = jax.lax.scan(add, zeros, (batch, jnp.arange(micro_batches)))
    loss, gradient = sums
    gradient = jax.tree.map(lambda leaf: leaf / (targets * loss_scale), gradient)
    return loss / targets, gradient


def loss_sum(
    model: Decoder,
    rows: Rows,
    *,
    mesh: Mesh,
    checkpointing: Checkpointing | None = None,
    mlp_chunks: int = 1,
    max_segments: int | None = None,
    dropout_key: Key[Array, ""] | None = None,
    first_row: Int[Array, ""] | int = 0,
    train_head: bool = False,
) -> Float[Array, ""]:
    """Sum of the cross-entropy over the target tokens of the rows, weighted; arguments as in hidden_states.

    To be traced in split_over(mesh.size), and so is its backward pass.
    """
    hidden = model.hidden_states(
        rows["tokens"],
        rows["segment_ids"],
        rows["positions"],
        max_segments=max_segments,
        dropout_key=dropout_key,
        first_row=first_row,
        checkpointing=checkpointing,
        mlp_chunks=mlp_chunks,
    )
    split, everywhere = PartitionSpec(DATA_AXIS), PartitionSpec()

    # Each device runs over its own tokens: chunks of a global list of tokens would have to travel.
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(split, everywhere, split, split),
        out_specs=split,
        check_vma=False,  # the loop of linear_cross_entropy knows nothing of meshes
    )
    def sum_per_device(hidden: Array, head: Array, targets: Array, weights: Array) -> Array:
        flat = hidden.reshape(-1, hidden.shape[-1])
        with split_over(1):
            loss, _ = linear_cross_entropy(
                flat, head, targets.reshape(-1), weights.reshape(-1), trainable_head=train_head
            )
        return loss[None]

    return jnp.sum(sum_per_device(hidden, model.head_weight, rows["targets"], rows["weights"]))


def _update_key(state: TrainState) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.updates)


def _next_loss_scale(current: LossScale, finite: Array) -> LossScale:
    """Half after an overflow, double after _GROWTH_STEPS steps without one."""
    grows = current.good_steps + 1 >= _GROWTH_STEPS
    scale = jnp.where(finite, jnp.where(grows, current.scale * 2, current.scale), current.scale / 2)
    return LossScale(scale, jnp.where(finite & ~grows, current.good_steps + 1, 0))
