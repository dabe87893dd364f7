import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lorajax_kernels import Adapter

from lorajax.errors import UserError
from lorajax.lora.adapter import add_lora, merged_weight, select_targets
from lorajax.lora.config import LoRAConfig
from lorajax.models import decoder
from lorajax.models.checkpoint import load
from lorajax.models.decoder import LoRAParam

PROJECTIONS = [f"attention.{n}_proj" for n in "koqv"] + [f"mlp.{n}_proj" for n in ("down", "gate", "up")]


def adapters(model):
    """Tree path -> (A, B) of the layers that have an adapter."""
    return {
        path: (np.asarray(linear.lora_a[...]), np.asarray(linear.lora_b[...]))
        for path, linear in model.linears().items()
        if linear.lora_a is not None
    }


@pytest.mark.parametrize(
    ("target_modules", "selected"),
    [
        ("all-linear", [f"layers.{i}.{name}" for i in (0, 1) for name in PROJECTIONS]),
        (("q_proj",), ["layers.0.attention.q_proj", "layers.1.attention.q_proj"]),
        (("0.mlp.up_proj", "1.self_attn.k_proj"), ["layers.0.mlp.up_proj", "layers.1.attention.k_proj"]),
        (("model.layers.1.mlp.down_proj",), ["layers.1.mlp.down_proj"]),
        (r".*\.(q|v)_proj", [f"layers.{i}.attention.{name}_proj" for i in (0, 1) for name in "qv"]),
        (r"model\.layers\.0\.mlp\.\w+", [f"layers.0.{name}" for name in PROJECTIONS[4:]]),
    ],
)  # fmt: skip
def test_targets(model, target_modules, selected):
    assert select_targets(model, target_modules) == selected


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        ("q_proj", r"'q_proj' matches no whole module name; to give names, write a list, \[q_proj\]"),
        ("all-linera", r"did you mean all-linear, not 'all-linera'\?"),
        (
            r"layers\.0\..*",
            "k_proj, o_proj, q_proj, v_proj, down_proj, gate_proj, up_proj; in full, model.layers.0",
        ),
        (("q_proj", "query", "proj"), r"no linear layer is named query, proj\. The model has k_proj"),
        (r".*\.self_attn", "matches no whole module name"),
        (("mlp",), "no linear layer is named mlp"),
        (("q_proj", "lm_head"), "selects lm_head; adapters on the head .* are not supported"),
        (("model.embed_tokens",), "selects model.embed_tokens"),
        (".*", "selects model.embed_tokens"),
        ("(q|v_proj", r"'\(q\|v_proj' is no valid regular expression: missing \)"),
    ],
)
def test_targets_that_cannot_be(model, target_modules, message):
    with pytest.raises(UserError, match=f"^lora.target_modules: .*{message}"):
        select_targets(model, target_modules)
    with pytest.raises(UserError):
        add_lora(model, LoRAConfig(target_modules=target_modules), seed=0)
    assert adapters(model) == {} and model.lora_config is None


@pytest.mark.slow
def test_a_fresh_adapter_changes_nothing(model, tokens):
    base = np.asarray(model(tokens))
    add_lora(model, LoRAConfig(rank=4), seed=0)
    np.testing.assert_array_equal(np.asarray(model(tokens)), base)
    assert len(adapters(model)) == 14


def test_first_values(model):
    config = LoRAConfig(rank=64, alpha=8, dropout=0.25)
    add_lora(model, config, seed=0)
    for path, linear in model.linears().items():
        assert isinstance(linear.lora_a, LoRAParam) and isinstance(linear.lora_b, LoRAParam)
        a, b = linear.lora_a[...], linear.lora_b[...]
        assert a.shape == (64, linear.in_features) and b.shape == (linear.out_features, 64)
        assert a.dtype == b.dtype == jnp.float32
        assert not b.any()
        bound = linear.in_features**-0.5  # 2048 draws or more: the ends and the moments are close
        assert 0.99 * bound < jnp.abs(a).max() <= bound, path
        assert abs(a.mean()) < 0.06 * bound
        assert float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
        assert linear.lora_scale == 8 / 64 and linear.lora_dropout == 0.25
    assert model.lora_config == config


def test_adapters_of_a_half_precision_model_are_float32(llama_folder):
    model = load(llama_folder, dtype="bfloat16")
    add_lora(model, LoRAConfig(rank=2), seed=0)
    assert {leaf.dtype for pair in adapters(model).values() for leaf in pair} == {np.dtype("float32")}


def test_first_values_depend_on_seed_and_module_alone(model):
    add_lora(model, LoRAConfig(rank=4), seed=3)
    every = {path: a for path, (a, _) in adapters(model).items()}
    add_lora(model, LoRAConfig(rank=4, target_modules=("v_proj", "q_proj")), seed=3)
    some = {path: a for path, (a, _) in adapters(model).items()}
    assert sorted(some) == [f"layers.{i}.attention.{name}_proj" for i in (0, 1) for name in "qv"]
    for path, a in some.items():
        np.testing.assert_array_equal(a, every[path])
    assert len({a.tobytes() for a in every.values()}) == 14
    add_lora(model, LoRAConfig(rank=4), seed=4)
    assert not {a.tobytes() for a in every.values()} & {a.tobytes() for a, _ in adapters(model).values()}


def test_first_values_are_the_same_in_every_process(model):
    add_lora(model, LoRAConfig(rank=4), seed=0)
    a, _ = adapters(model)["layers.1.mlp.up_proj"]
    # Python's own hash of a string would give other values in each process.
    np.testing.assert_allclose(a[0, :3], [0.105152, -0.17443712, -0.02176358], rtol=1e-6)


@pytest.mark.slow
def test_a_new_adapter_replaces_the_old_one(model, randomise, tokens):
    base = np.asarray(model(tokens))
    add_lora(model, LoRAConfig(rank=4, dropout=0.5, target_modules=("q_proj",)), seed=0)
    randomise(model)
    assert np.abs(np.asarray(model(tokens)) - base).max() > 0.1
    config = LoRAConfig(rank=2, target_modules=("down_proj",))
    add_lora(model, config, seed=0)
    assert list(adapters(model)) == ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]
    assert model.linears()["layers.0.attention.q_proj"].lora_dropout == 0
    assert model.lora_config == config
    np.testing.assert_array_equal(np.asarray(model(tokens)), base)


def test_each_adapter_drops_by_a_key_of_its_own(model, tokens, monkeypatch):
    add_lora(model, LoRAConfig(rank=2, dropout=0.5), seed=0)
    keys = []

    def noting(function):
        def call(x, *others, **options):
            found = [other for other in jax.tree.leaves(others, is_leaf=is_adapter) if is_adapter(other)]
            keys.extend(tuple(jax.random.key_data(adapter.key).tolist()) for adapter in found)
            return function(x, *others, **options)

        return call

    for name in ("lora_linears", "swiglu_lora_linear"):
        monkeypatch.setattr(decoder, name, noting(getattr(decoder, name)))
    model.hidden_states(tokens, dropout_key=jax.random.key(3))
    assert len(keys) == len(set(keys)) == 14


def is_adapter(value):
    return isinstance(value, Adapter)


def test_adapters_live_on_all_devices(model):
    add_lora(model, LoRAConfig(rank=2), seed=0)
    a = model.linears()["layers.0.mlp.up_proj"].lora_a[...]
    assert a.sharding.device_set == set(jax.devices()) and a.sharding.is_fully_replicated


def test_merged_weight(model, randomise, tokens):
    add_lora(model, LoRAConfig(rank=4, alpha=6, target_modules=("q_proj", "up_proj")), seed=0)
    randomise(model)
    expected = np.asarray(model(tokens))
    for path, linear in model.linears().items():
        merged, weight = merged_weight(linear), np.asarray(linear.weight[...])
        update = (
            1.5 * np.asarray(linear.lora_b[...]) @ np.asarray(linear.lora_a[...])
            if path in adapters(model)
            else 0
        )
        np.testing.assert_allclose(np.asarray(merged), weight + update, rtol=0, atol=1e-6)
        linear.weight[...] = merged
        linear.lora_a = linear.lora_b = None
    assert np.abs(np.asarray(model(tokens)) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_merging_rounds_once(llama_folder, randomise):
    model = load(llama_folder, dtype="bfloat16")
    add_lora(model, LoRAConfig(rank=4, alpha=8), seed=0)
    randomise(model)
    linear = model.linears()["layers.0.mlp.up_proj"]
    merged = merged_weight(linear)
    assert merged.dtype == jnp.bfloat16
    a, b = adapters(model)["layers.0.mlp.up_proj"]
    exact = np.asarray(linear.weight[...], np.float64) + 2 * b.astype(np.float64) @ a.astype(np.float64)
    # bfloat16 keeps 8 bits: half a unit of the last one is at most 2**-8 of the value.
    assert np.all(np.abs(np.asarray(merged, np.float64) - exact) <= np.abs(exact) * (2**-8 + 1e-6))
