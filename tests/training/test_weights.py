"""A model's weights as flat dicts: the adapters of a layer in one vector, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax.config import Config, DataConfig, LoRAConfig, ModelConfig, OutputConfig
from lorajax.memory.plan import outline_of
from lorajax.models.checkpoint import load
from lorajax.models.decoder import LoRAParam
from lorajax.training.weights import count, give_back_adapters, merge_weights, split_weights

TOKENS = jnp.arange(24).reshape(2, 12)
RANK = 4
LORA = {
    "all": LoRAConfig(rank=RANK, alpha=8),
    "some": LoRAConfig(rank=RANK, alpha=8, target_modules=("0.self_attn.v_proj", "down_proj")),
}


@pytest.fixture(scope="module")
def models(write_llama, tmp_path_factory):
    """By name of LORA, the tiny Llama in float32, its adapter random in both halves."""
    folder = write_llama(tmp_path_factory.mktemp("weights") / "llama")
    models = {name: load(folder, lora=lora, dtype="float32") for name, lora in LORA.items()}
    for model in models.values():
        for index, linear in enumerate(model.linears().values()):
            if linear.lora_b is not None:
                linear.lora_b[...] = jax.random.normal(jax.random.key(index), linear.lora_b[...].shape)
    return models


def adapters(model):
    """{path: (A, B)}"""
    return {
        path: (np.asarray(linear.lora_a[...]), np.asarray(linear.lora_b[...]))
        for path, linear in model.linears().items()
        if linear.lora_a is not None
    }


@pytest.mark.parametrize("name", LORA)
def test_the_adapters_of_a_layer_are_one_vector(name, models):
    model = models[name]
    before = adapters(model)
    graph, trainable, frozen = split_weights(model, "lora")
    assert adapters(model).keys() == before.keys()  # it is as it was
    assert list(trainable) == [f"layers.{index}.adapters" for index in range(len(model.layers))]
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in trainable.values())
    assert count(trainable) == sum(a.size + b.size for a, b in before.values())
    assert not any("lora" in path for path in frozen)
    again = merge_weights(graph, jax.tree.map(jnp.asarray, trainable), frozen)
    assert not adapters(again)
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
    give_back_adapters(again)
    jax.tree.map(np.testing.assert_array_equal, adapters(again), before)
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
    assert nnx.graphdef(again) == nnx.graphdef(model)


@pytest.mark.parametrize("name", LORA)
def test_the_gradient_of_a_vector_is_that_of_its_parts(name, models):
    model = models[name]
    graph, trainable, frozen = split_weights(model, "lora")

    def loss(model):
        return jnp.mean(jnp.square(model.logits(model.hidden_states(TOKENS))))

    whole, own, rest = nnx.split(model, LoRAParam, ...)
    expected = jax.jit(jax.grad(lambda own: loss(nnx.merge(whole, own, rest))))(own)
    found = jax.jit(jax.grad(lambda trainable: loss(merge_weights(graph, trainable, frozen))))(trainable)
    moved = merge_weights(graph, found, frozen)
    give_back_adapters(moved)
    for path, pair in adapters(nnx.merge(whole, expected, rest)).items():
        for gradient, exactly in zip(adapters(moved)[path], pair, strict=True):
            assert np.linalg.norm(exactly) > 0
            np.testing.assert_allclose(gradient, exactly, rtol=1e-5, atol=1e-7)


def test_shapes_are_split_as_arrays_are(models, write_llama, tmp_path):
    config = Config(
        model=ModelConfig(path=str(write_llama(tmp_path / "llama")), dtype="float32"),
        data=DataConfig(path="rows.jsonl"),
        lora=LORA["some"],
        output=OutputConfig(output_dir="unused"),
    )
    outline = outline_of(config)
    graph, trainable, _ = split_weights(outline, "lora")
    expected_graph, arrays, _ = split_weights(models["some"], "lora")
    assert graph == expected_graph and hash(graph) == hash(expected_graph)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in trainable.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in arrays.items()
    }
    assert isinstance(trainable["layers.0.adapters"], jax.ShapeDtypeStruct)
