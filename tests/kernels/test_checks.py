"""Checked mode: wrong values raise, eagerly and from inside a compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lorajax_kernels import attention, cached_attention, checked, linear_cross_entropy

Q = jnp.ones((2, 6, 2, 8), jnp.float32)
RIGHT = np.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3]], np.int32)
TORN = np.array([[1, 1, 2, 2, 2, 0], [1, 0, 1, 1, 2, 0]], np.int32)
X, HEAD = jnp.ones((4, 8), jnp.float32), jnp.ones((7, 8), jnp.float32)
ONE = jnp.ones(4, jnp.float32)


def attend(segment_ids, max_segments=None):
    return attention(Q, Q, Q, segment_ids, max_segments=max_segments)


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_segments(compiled):
    run = jax.jit(attend, static_argnums=1) if compiled else attend
    error = jax.errors.JaxRuntimeError if compiled else ValueError
    with checked():
        jax.block_until_ready(run(RIGHT, 3))
        with pytest.raises(
            error, match=r"attention: segment_ids\[0\] has 3 segments, more than max_segments=2"
        ):
            jax.block_until_ready(run(RIGHT, 2))
            jax.effects_barrier()
        torn = r"segment_ids\[1\] is not contiguous: segments of id 0 begin at 1, 5"
        with pytest.raises(error, match=torn):
            jax.block_until_ready(run(TORN, None))
            jax.effects_barrier()


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_targets(compiled):
    def loss(targets, weights):
        return linear_cross_entropy(X, HEAD, targets, weights)

    run = jax.jit(loss) if compiled else loss
    error = jax.errors.JaxRuntimeError if compiled else ValueError
    targets = np.array([0, 6, -100, 3])
    with checked():
        jax.block_until_ready(run(targets, ONE.at[2].set(0)))
        message = r"targets\[2\] is -100, no index of a vocabulary of 7, and its weight is 1, not 0"
        with pytest.raises(error, match=message):
            jax.block_until_ready(run(targets, ONE))
            jax.effects_barrier()


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize("wrong", (0, 7))
def test_lengths(compiled, wrong):
    run = jax.jit(cached_attention) if compiled else cached_attention
    error = jax.errors.JaxRuntimeError if compiled else ValueError
    with checked():
        jax.block_until_ready(run(Q[:, :1], Q, Q, np.array([1, 6])))
        message = rf"cached_attention: lengths\[1\] must be in 1..6, got {wrong}"
        with pytest.raises(error, match=message):
            jax.block_until_ready(run(Q[:, :1], Q, Q, np.array([1, wrong])))
            jax.effects_barrier()


def test_costs_nothing_when_off():
    with checked():
        inside = str(jax.make_jaxpr(lambda ids: attend(ids, 2))(RIGHT))
    outside = str(jax.make_jaxpr(lambda ids: attend(ids, 2))(RIGHT))
    assert "callback" in inside and "callback" not in outside
    attend(TORN, 1)  # runs of equal ids are segments, whatever their ids
