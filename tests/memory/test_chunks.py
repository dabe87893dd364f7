"""A function of tokens in chunks: the same values and gradients, one chunk at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorajax.memory.chunks import in_chunks

BATCH, LENGTH, WIDTH, INNER = 2, 11, 4, 8


def of_tokens(arrays, x, number):
    frozen, trained, key = arrays
    hidden = jnp.sin(x @ frozen) * (x @ trained["up"])
    return hidden @ trained["down"] * (1 if key is None else jax.random.uniform(key))


@pytest.fixture(scope="module")
def values():
    keys = jax.random.split(jax.random.key(0), 5)
    frozen = jax.random.normal(keys[0], (WIDTH, INNER))
    trained = {
        "up": jax.random.normal(keys[1], (WIDTH, INNER)),
        "down": jax.random.normal(keys[2], (INNER, 3)),
    }
    x = jax.random.normal(keys[3], (BATCH, LENGTH, WIDTH))
    dy = jax.random.normal(keys[4], (BATCH, LENGTH, 3))
    return frozen, trained, x, dy


def loss(chunks, frozen, trained, x, dy, key=None):
    return jnp.sum(dy * in_chunks(of_tokens, (frozen, trained, key), x, chunks=chunks))


@pytest.mark.parametrize("chunks", (2, 3, LENGTH))
@pytest.mark.parametrize("key", (None, jax.random.key(1)))
def test_values_and_gradients_are_those_of_all_tokens(chunks, key, values):
    frozen, trained, x, dy = values
    found, expected = (
        jax.jit(jax.value_and_grad(loss, argnums=(2, 3)), static_argnums=0)(n, frozen, trained, x, dy, key)
        for n in (chunks, 1)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


def test_each_chunk_knows_its_number():
    x = jnp.zeros((1, 6, 1))
    found = in_chunks(lambda _, part, number: part + number, None, x, chunks=3)
    assert found.ravel().tolist() == [0, 0, 1, 1, 2, 2]


def test_nothing_is_differentiated_that_is_not_asked_for(values):
    frozen, trained, x, dy = values
    run = jax.make_jaxpr(jax.grad(lambda trained: loss(2, frozen, trained, x, dy)))
    # Of a chunk: three products in each pass, two for the trained matrices, one for the hidden activations.
    assert str(run(trained)).count("dot_general") == 2 * (3 + 3 + 2 + 1)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="this XLA drops the barriers on a CPU")
def test_less_memory_is_taken(values):
    frozen, trained, _, _ = values
    x = jnp.ones((1, 4096, WIDTH))
    dy = jnp.ones((1, 4096, 3))

    def taken(chunks):
        run = jax.jit(jax.grad(loss, argnums=(2, 3)), static_argnums=0)
        return run.lower(chunks, frozen, trained, x, dy).compile().memory_analysis().temp_size_in_bytes

    assert taken(8) < 0.6 * taken(1)
