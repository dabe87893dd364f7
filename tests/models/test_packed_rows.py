"""A document's logits and gradients are the same alone and on a packed row.

Every token of the texts has an id of its own, so the gradient of the embedding table shows the gradient at
each single token. RoPE is of the dynamic kind, the only one that looks at lengths. Rows are long enough for
the attention paths to cut them into chunks, with documents across the cuts.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lorajax.models.checkpoint import load

LENGTH = 520
LENGTHS = (250, 1, 140, 100)  # on one row, 29 tokens of padding behind them
ROWS = len(LENGTHS) + 1  # packed: two rows of texts, three of padding; separate: one text to a row
VOCAB = 1024
OPTIONS = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "attention_bias": True,
}
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "reference"])


def rows() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[tuple[int, slice]]]:
    """The same texts packed and one to a row, both [ROWS, T]; (row, columns) of each when packed."""
    ids = np.random.default_rng(1).permutation(VOCAB).astype(np.int32)
    ends = np.cumsum(LENGTHS)
    places = [(0, slice(end - length, end)) for length, end in zip(LENGTHS, ends, strict=True)]
    places.append((1, slice(0, LENGTH)))
    packed = {name: np.zeros((ROWS, LENGTH), np.int32) for name in ("tokens", "segment_ids")}
    separate = {name: np.zeros((ROWS, LENGTH), np.int32) for name in packed}
    used = 0
    for row, (packed_row, columns) in enumerate(places):
        length = columns.stop - columns.start
        packed["tokens"][packed_row, columns] = ids[used : used + length]
        packed["segment_ids"][packed_row, columns] = row + 1
        separate["tokens"][row, :length] = ids[used : used + length]
        separate["segment_ids"][row, :length] = 1
        used += length
    return packed, separate, places


@pytest.fixture(scope="module")
def run(write_llama, tmp_path_factory):
    """run(batch, implementation, dtype): logits [ROWS, T, V], and gradients by tree path.

    Their loss gives every logit of the texts a weight of its own. One compiled program serves all batches.
    """
    folder: Path = write_llama(tmp_path_factory.mktemp("packed"), **OPTIONS)
    # Values that bfloat16 can hold, so that every dtype computes with the same weights.
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: values.astype(jnp.bfloat16).astype(np.float32) for name, values in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(VOCAB, VOCAB)), jnp.float32)

    @functools.cache
    def program(implementation: str, dtype: str):
        graph, state = nnx.split(load(folder, dtype=dtype, attention=implementation))

        def loss(state, tokens, segment_ids):
            model = nnx.merge(graph, state)
            logits = model.logits(model.hidden_states(tokens, segment_ids))
            return jnp.sum(logits * weights[tokens] * (segment_ids > 0)[..., None]), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True)), state

    def run(batch: dict[str, np.ndarray], implementation: str, dtype: str):
        compiled, state = program(implementation, dtype)
        (_, logits), gradients = compiled(state, **batch)
        flat = {path: np.asarray(leaf[...], np.float32) for path, leaf in nnx.to_flat_state(gradients)}
        assert len(flat) == 3 + 2 * 13
        return np.array(logits), flat

    return run


@pytest.mark.slow
@IMPLEMENTATIONS
def test_packed_equals_separate(implementation, run, difference):
    packed, separate, places = rows()
    logits, gradients = run(packed, implementation, "float32")
    expected_logits, expected_gradients = run(separate, implementation, "float32")
    for row, place in enumerate(places):
        found = logits[place]
        assert difference(found, expected_logits[row, : len(found)]) <= 1e-5
    for path, gradient in gradients.items():
        assert difference(gradient, expected_gradients[path]) <= 1e-5, path


@pytest.mark.slow
@IMPLEMENTATIONS
def test_packed_bfloat16_is_near_separate_float32(implementation, run):
    """In norm: bfloat16 has 8 bits, and single elements near zero lose more of them than 1e-2."""
    packed, separate, places = rows()
    logits, gradients = run(packed, implementation, "bfloat16")
    expected_logits, expected_gradients = run(separate, "reference", "float32")
    for row, place in enumerate(places):
        found = logits[place]
        expected = expected_logits[row, : len(found)]
        assert np.linalg.norm(found - expected) <= 1e-2 * np.linalg.norm(expected)
    off = [np.linalg.norm(gradient - expected_gradients[path]) for path, gradient in gradients.items()]
    size = [np.linalg.norm(gradient) for gradient in expected_gradients.values()]
    assert np.linalg.norm(off) <= 1e-2 * np.linalg.norm(size)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_segment_does_not_touch_the_others(dtype, implementation, run):
    packed, _, places = rows()
    before, _ = run(packed, implementation, dtype)
    changed = {name: values.copy() for name, values in packed.items()}
    third = places[2]
    changed["tokens"][third] = changed["tokens"][third][::-1]
    after, _ = run(changed, implementation, dtype)
    assert (before[third] != after[third]).any(axis=-1).all()
    before[third] = after[third] = 0
    np.testing.assert_array_equal(before, after)


def test_rows_of_an_odd_length_are_filled_up(llama_folder):
    """In 16 bits, so that XLA need not do that for each product; what is added is padding."""
    tokens = np.random.default_rng(0).integers(0, 300, (3, 13), np.int32)
    segments = np.repeat([[1, 2, 0], [1, 2, 3], [1, 1, 1]], (6, 6, 1), axis=1)
    filled = [np.pad(array, ((0, 0), (0, 3))) for array in (tokens, segments)]
    for dtype, width in (("bfloat16", 16), ("float32", 13)):
        model = load(llama_folder, dtype=dtype)

        def hidden(tokens, segments, model=model):
            return model.hidden_states(tokens, segments, max_segments=3)

        found = jax.jit(hidden)(tokens, segments)
        assert found.shape[:2] == (3, 13)
        expected = jax.jit(hidden)(*filled)[:, :13]
        error = np.abs(found.astype(np.float32) - expected.astype(np.float32)).max()
        assert error <= 1e-5
        text = jax.jit(hidden).lower(tokens, segments).as_text()
        lengths = re.findall(r"dot_general .*-> tensor<3x(\d+)x\d+x\w+>", text)
        assert set(lengths) & {"13", "16"} == {str(width)}
