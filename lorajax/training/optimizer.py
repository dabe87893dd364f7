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

    Its update takes the gradient's global norm as the keyword `norm`.
    """
    # optax computes 1 - beta as given, but 1 - beta**count in float32. They agree for a beta that float32
    # holds; with 0.999 itself, hundreds of steps would be too short by 6e-6 of their length.
    beta1, beta2 = float(np.float32(train.adam_beta1)), float(np.float32(train.adam_beta2))
    update = optax.adamw(
        schedule,
        b1=beta1,
        b2=beta2,
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
        mask=lambda weights: jax.tree.map(lambda leaf: leaf.ndim > 1, weights),
    )
    clip = _clip_by_known_norm(train.max_grad_norm) if train.max_grad_norm else optax.identity()
    return optax.chain(clip, update)


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

    The update of a weight is a function of that weight alone, so that JAX traces one for each shape: a model
    has hundreds of adapters in a few shapes, and optax takes some twenty operations for each.

    Args:
        optimizer: of adamw.
        gradient: of the weights.
        norm: of the whole gradient.
        finite: of the step.
    """

    @jax.jit
    def update(gradient: Weights, state: Any, weights: Weights, norm: Array, finite: Array) -> Any:
        changes, after = optimizer.update(gradient, state, weights, norm=norm)
        new = optax.apply_updates(weights, changes), after
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, (weights, state))

    def holds_all(part: Any) -> bool:
        return isinstance(part, dict)  # optax' own containers are tuples

    def alone(name: str) -> Any:
        parts = (gradient, state, weights)
        return jax.tree.map(
            lambda part: {"": part[name]} if holds_all(part) else part, parts, is_leaf=holds_all
        )

    def together(old: Any, *new: Any) -> Any:
        # What all weights share, such as the number of updates, is the same from each.
        return {name: part[""] for name, part in zip(weights, new, strict=True)} if holds_all(old) else new[0]

    found = [update(*alone(name), norm, finite) for name in weights]
    return jax.tree.map(together, (weights, state), *found, is_leaf=holds_all)


def _clip_by_known_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """optax.clip_by_global_norm without the norm, which a step knows already."""

    def update(gradient: Any, state: Any, weights: Any = None, *, norm: Array, **_: Any) -> tuple[Any, Any]:
        factor = jnp.where(norm < largest, 1, largest / norm)
        return jax.tree.map(lambda leaf: leaf * factor, gradient), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
