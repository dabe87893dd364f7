"""AdamW, the course of its learning rate, and its update, from the train section of the config."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from lorajax.config import TrainConfig
from lorajax.training.weights import Weights


def learning_rate_schedule(train: TrainConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by number of updates made so far, as Transformers' schedulers give it.

    It rises from 0 over warmup_steps, so the first of them changes nothing; then it falls to 0 at total_steps
    (linear, cosine) or stays (constant).
    """
    peak, rest = train.learning_rate, max(total_steps - train.warmup_steps, 1)
    after: optax.Schedule
    if train.lr_scheduler_type == "linear":
        after = optax.linear_schedule(peak, 0.0, rest)
    elif train.lr_scheduler_type == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    else:
        after = optax.constant_schedule(peak)
    if train.warmup_steps == 0:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, train.warmup_steps), after], [train.warmup_steps]
    )


def adamw(train: TrainConfig, schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then AdamW (Loshchilov and Hutter, 2019); only matrices decay.

    Vectors of adapters are made of matrices. The update takes the global norm of the gradient as the keyword
    `norm`.
    """
    # optax computes 1 - beta as given, but 1 - beta**count in float32. They agree for a beta that float32
    # holds; with 0.999 itself, hundreds of steps would be too short by 6e-6 of their length.
    beta1, beta2 = float(np.float32(train.adam_beta1)), float(np.float32(train.adam_beta2))
    return optax.chain(
        _clip_by_known_norm(train.max_grad_norm) if train.max_grad_norm else optax.identity(),
        optax.scale_by_adam(beta1, beta2, train.adam_epsilon),
        optax.add_decayed_weights(train.weight_decay, mask=_decays)
        if train.weight_decay
        else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )


def updated(
    optimizer: optax.GradientTransformationExtraArgs,
    gradient: Weights,
    state: Any,
    weights: Weights,
    *,
    norm: Float[Array, ""],
    finite: Bool[Array, ""],
) -> tuple[Weights, Any]:
    """Weights and the optimizer's state after an update, or, where it is not finite, as they were.

    Args:
        optimizer: of adamw; `state` is its state.
        norm: of the whole gradient.
        finite: of the step.
    """
    changes, after = optimizer.update(gradient, state, weights, norm=norm)
    changes = jax.tree.map(lambda change: jnp.where(finite, change, 0), changes)
    after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
    return optax.apply_updates(weights, changes), after


def _decays(weights: Weights) -> dict[str, bool]:
    """Which are matrices, or vectors of them as split_weights makes."""
    return {name: leaf.ndim > 1 or name.endswith(".adapters") for name, leaf in weights.items()}


def _clip_by_known_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """optax.clip_by_global_norm without the norm, which a step knows already."""

    def update(gradient: Any, state: Any, weights: Any = None, *, norm: Array, **_: Any) -> tuple[Any, Any]:
        factor = jnp.where(norm < largest, 1, largest / norm)
        return jax.tree.map(lambda leaf: leaf * factor, gradient), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
