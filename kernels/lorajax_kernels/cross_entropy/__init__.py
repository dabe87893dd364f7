"""Linear cross-entropy: the loss of a language-model head without its [N, V] logits.

The logits of a chunk of rows are made, turned into the loss, and dropped. Where a gradient is wanted it is
made in the same visit: the loss is a plain sum, so dx is known up to one scalar factor as soon as a row's
probabilities are, and nothing is computed twice (as in Liger-Kernel, Hsu et al., 2024).
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lorajax_kernels.checks import (
    at_least_int32,
    check_arrays,
    check_dtype,
    check_not_empty,
    check_options,
    check_targets,
)
from lorajax_kernels.cross_entropy import triton
from lorajax_kernels.cross_entropy.xla import capped, losses, xla_loss_and_gradient
from lorajax_kernels.device import Choice, Device, Implementation, anywhere, choose, function_of
from lorajax_kernels.precision import MULTIPLE, einsum, product

__all__ = ["choose_cross_entropy", "cross_entropy_implementations", "default_chunk", "linear_cross_entropy"]

# One chunk's logits take at most this much, unless MIN_CHUNK rows take more.
LOGIT_BYTES = 256 * 2**20
MIN_CHUNK = 128


@dataclass(frozen=True)
class Problem:
    """What an implementation is asked to do: loss and gradient of logits that x of this dtype has."""

    dtype: jnp.dtype
    softcap: float | None = None


# How the logits of a chunk become their loss and gradient. "auto" takes the first that can serve.
_IMPLEMENTATIONS: tuple[Implementation[Problem], ...] = (
    Implementation("triton", triton.why_not, triton.triton_loss_and_gradient, splits=False),
    Implementation("xla", anywhere, xla_loss_and_gradient),
)


def cross_entropy_implementations() -> tuple[str, ...]:
    """Names of the implementations of linear_cross_entropy, in the order in which "auto" tries them."""
    return tuple(known.name for known in _IMPLEMENTATIONS)


def choose_cross_entropy(
    dtype: jnp.dtype,
    *,
    softcap: float | None = None,
    implementation: str = "auto",
    device: Device | None = None,
) -> Choice:
    """Which implementation linear_cross_entropy runs for x of a dtype.

    Args:
        softcap: of the logits.
        device: where it is to run; None: the current one.

    Returns:
        (name, refused); `refused` maps each implementation tried before to the reason why it cannot serve. An
        automatic choice is logged once.

    Raises:
        ValueError: the implementation is unknown or cannot serve.
    """
    problem = Problem(jnp.dtype(dtype), softcap)
    return choose(
        "linear_cross_entropy", _IMPLEMENTATIONS, problem, implementation=implementation, device=device
    )


def linear_cross_entropy(
    x: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    softcap: float | None = None,
    chunk: int | None = None,
    trainable_head: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of -log softmax(x head^T)[target], and the sum of the weights.

    Rows of weight 0 count for nothing, whatever their x and target (-100, say); chunks of such rows are
    skipped. Differentiable in x, and in head if `trainable_head`; targets and weights are constants. Under
    differentiation the forward pass makes dx, in x's dtype, as its residual beside the weights; without it,
    only the loss.

    Args:
        x: activations after the final norm, float32, bfloat16 or float16. Logits have float32 sums and are
            kept as bfloat16 if x is, as float32 otherwise.
        head: one row for each token of the vocabulary.
        targets: index into the vocabulary, 0..V-1. Any other under a weight that is not 0 makes the loss NaN.
        weights: of each row, usually 0 or 1.
        softcap: logits become softcap * tanh(logits / softcap); default none.
        chunk: rows at a time at most; default: as many as have 256 MiB of logits, but at least 128.
        trainable_head: make the gradient of head too, summed in a float32 [V, D] buffer. Otherwise head is a
            constant, and its gradient is zero.
        implementation: of the passes over the logits where a gradient is made: a name of
            `cross_entropy_implementations()`, or "auto": the first of them that can serve.

    Returns:
        (loss_sum, weight_sum), float32 scalars.

    Raises:
        ValueError: shapes or dtypes do not fit together, V or D is 0, head is no array, chunk or softcap is
            not positive, or the implementation is unknown or cannot serve.
    """
    _check(x, head, targets, weights, softcap, chunk)
    check_targets("linear_cross_entropy", targets, weights, head.shape[0])
    limit = default_chunk(head.shape[0], x.dtype) if chunk is None else chunk
    chunks, rows = even_chunks(x.shape[0], limit)
    plan = _Plan(
        chunks=chunks,
        rows=rows,
        softcap=None if softcap is None else float(softcap),
        head_dtype=head.dtype if trainable_head else None,
        implementation=choose_cross_entropy(x.dtype, softcap=softcap, implementation=implementation).name,
    )
    weights = weights.astype(jnp.float32)
    targets = at_least_int32(targets)
    return _loss(plan, x, head, targets, weights), jax.lax.stop_gradient(jnp.sum(weights))


def default_chunk(vocab_size: int, dtype: jnp.dtype) -> int:
    """Rows in one chunk for x of `dtype`: a multiple of MIN_CHUNK."""
    itemsize = 2 if dtype == jnp.bfloat16 else 4
    return max(LOGIT_BYTES // (itemsize * vocab_size) // MIN_CHUNK, 1) * MIN_CHUNK


def even_chunks(rows: int, limit: int) -> tuple[int, int]:
    """(chunks, rows of each) for this many rows: as few as `limit` allows, and as even as MULTIPLE does."""
    chunks = max(1, -(-rows // limit))
    each = max(1, -(-rows // chunks))
    return chunks, min(-(-each // MULTIPLE) * MULTIPLE, limit)


@dataclass(frozen=True)
class _Plan:
    """All that is static; `rows` are those of one chunk, `head_dtype` is None if the head is a constant."""

    chunks: int
    rows: int
    softcap: float | None
    head_dtype: jnp.dtype | None
    implementation: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(plan: _Plan, x: Array, head: Array, targets: Array, weights: Array) -> Array:
    vocab, head = head.shape[0], _filled_up(head.astype(x.dtype))

    def visit(total, piece):
        x, targets, weights = piece

        def compute(total):
            logits = capped(_logits(x, head, weights)[:, :vocab], plan.softcap)
            return total + jnp.sum(losses(logits, jax.nn.logsumexp(logits, axis=-1), targets, weights))

        return jax.lax.cond(jnp.any(weights != 0), compute, lambda total: total, total), None

    total, _ = jax.lax.scan(visit, jnp.zeros((), jnp.float32), _split(plan, x, targets, weights))
    return total


def _loss_forward(plan: _Plan, x: Array, head: Array, targets: Array, weights: Array):
    vocab, head = head.shape[0], _filled_up(head.astype(x.dtype))
    largest = _largest(weights)
    loss_and_gradient = functools.partial(
        function_of(_IMPLEMENTATIONS, plan.implementation), vocab=vocab, softcap=plan.softcap, dtype=x.dtype
    )

    def visit(carry, piece):
        x, targets, weights = piece

        def compute(carry):
            total, dhead = carry
            logits = _logits(x, head, weights)
            loss, d = loss_and_gradient(logits, targets, weights)
            total = total + jnp.sum(loss)
            # Without its weight, which float16 may be too narrow for before the loss is scaled back.
            dx = product("rv,vd->rd", d, head)
            if dhead is not None:
                shares = (weights / largest)[:, None]
                weighted = jnp.where(weights[:, None] != 0, x * shares, 0).astype(x.dtype)
                dhead = dhead + einsum("rv,rd->vd", d, weighted)
            return (total, dhead), dx

        return jax.lax.cond(jnp.any(weights != 0), compute, lambda carry: (carry, jnp.zeros_like(x)), carry)

    dhead = None if plan.head_dtype is None else jnp.zeros(head.shape, jnp.float32)
    (total, dhead), dx = jax.lax.scan(
        visit, (jnp.zeros((), jnp.float32), dhead), _split(plan, x, targets, weights)
    )
    dx = dx.reshape(-1, x.shape[1])[: x.shape[0]]
    return total, (dx, weights, None if dhead is None else dhead[:vocab])


def _loss_backward(plan: _Plan, residuals, dloss: Array):
    dx, weights, dhead = residuals
    dx = (dx.astype(jnp.float32) * weights[:, None] * dloss).astype(dx.dtype)
    if dhead is not None:
        # A sum over many tokens fits float16 only once it is scaled.
        dhead = (dhead * (_largest(weights) * dloss)).astype(plan.head_dtype)
    return dx, dhead, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _largest(weights: Array) -> Array:
    """Of the weights, 1 if all are 0: x times a share of it is at most x, which fits float16."""
    largest = jnp.max(jnp.abs(weights), initial=0)
    return jnp.where(largest > 0, largest, 1)


def _filled_up(head: Array) -> Array:
    """With rows of zeros to a multiple: a copy, but of most vocabularies none."""
    missing = -head.shape[0] % MULTIPLE
    return jnp.pad(head, ((0, missing), (0, 0))) if missing else head


def _logits(x: Array, head: Array, weights: Array) -> Array:
    """Logits of one chunk, [rows, width], bfloat16 if x is, otherwise float32, which cannot overflow.

    Those of rows of weight 0 are 0, whatever their x.
    """
    multiply = product if x.dtype == jnp.bfloat16 else einsum
    return multiply("rd,vd->rv", jnp.where(weights[:, None] != 0, x, 0), head)


def _split(plan: _Plan, x: Array, targets: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Rows as [chunks, rows, ...]; those added at the end have weight 0."""
    pad = plan.chunks * plan.rows - x.shape[0]
    return (
        jnp.pad(x, ((0, pad), (0, 0))).reshape(plan.chunks, plan.rows, x.shape[1]),
        jnp.pad(targets, (0, pad)).reshape(plan.chunks, plan.rows),
        jnp.pad(weights, (0, pad)).reshape(plan.chunks, plan.rows),
    )


def _check(x: Array, head: Array, targets: Array, weights: Array, softcap: float | None, chunk: int | None):
    check_arrays("linear_cross_entropy", x=x, head=head, targets=targets, weights=weights)
    if x.ndim != 2 or head.ndim != 2 or x.shape[1] != head.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: x must be [N, D] and head [V, D], got shapes {x.shape} and {head.shape}"
        )
    check_not_empty("linear_cross_entropy", head=head)
    for name, rows in (("targets", targets), ("weights", weights)):
        if rows.shape != x.shape[:1]:
            raise ValueError(
                f"linear_cross_entropy: {name} must be [N={x.shape[0]}] to fit x, got shape {rows.shape}"
            )
    check_dtype("linear_cross_entropy", "float32, bfloat16 or float16", x=x)
    check_dtype("linear_cross_entropy", "floating point", head=head, weights=weights)
    check_dtype("linear_cross_entropy", "integers", targets=targets)
    check_options("linear_cross_entropy", softcap=softcap, chunk=chunk)
