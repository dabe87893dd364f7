"""Merged checkpoints: what is written, what loads it, and what happens to what was there before."""

import errno
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorajax.errors import UserError
from lorajax.lora.config import LoRAConfig
from lorajax.models import export
from lorajax.models.checkpoint import initialise, load, save_merged
from lorajax.models.decoder import LoRAParam


def trained(model):
    """The model with random values in its adapter's B, as after some steps."""
    rng = np.random.default_rng(0)
    for linear in model.linears().values():
        if linear.lora_b is not None:
            linear.lora_b = LoRAParam(jnp.asarray(rng.normal(0, 0.1, linear.lora_b.shape), jnp.float32))
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tied, dtype, write_llama, tmp_path, assert_same_leaves):
    folder = write_llama(tmp_path / "model", tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    model = load(folder, dtype=dtype)
    save_merged(model, tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert stored.keys() == load_file(folder / "model.safetensors").keys()
    assert {values.dtype for values in stored.values()} == {jnp.dtype(dtype)}
    again = load(tmp_path / "merged", dtype=dtype)
    assert again.options == model.options
    assert_same_leaves(again, model)


def test_configs(write_llama, tmp_path):
    folder = write_llama(tmp_path / "model", bos_token_id=1, torch_dtype="float32", note="kept")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    save_merged(load(folder), tmp_path / "merged")
    config = json.loads((folder / "config.json").read_text())
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged == config | {"torch_dtype": "bfloat16"}
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 7]}
    assert load(tmp_path / "merged").eos_token_ids == (2, 7)


def test_all_files_have_the_same_permissions(write_llama, tmp_path):
    save_merged(load(write_llama(tmp_path / "model")), tmp_path / "merged")
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "merged").iterdir()}
    assert modes.keys() == {"config.json", "generation_config.json", "model.safetensors"}
    assert len(set(modes.values())) == 1


def test_the_newer_spelling_of_dtype_is_kept(write_llama, tmp_path):
    save_merged(load(write_llama(tmp_path / "model", dtype="float32")), tmp_path / "merged")
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (merged["dtype"], "torch_dtype" in merged) == ("bfloat16", False)


def test_full_precision_weights_are_cast_to_the_models_dtype(write_llama, tmp_path, assert_same_leaves):
    folder = write_llama(tmp_path / "model")
    save_merged(load(folder, dtype="bfloat16", param_dtype="float32"), tmp_path / "merged")
    assert_same_leaves(load(tmp_path / "merged"), load(folder))


def test_merged_weights(write_llama, tmp_path):
    config = LoRAConfig(rank=4, alpha=6.0, target_modules=("q_proj", "down_proj"))
    model = trained(load(write_llama(tmp_path / "model"), lora=config))
    save_merged(model, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    down = model.layers[1].mlp.down_proj
    weight, a, b = (np.asarray(p[...], np.float64) for p in (down.weight, down.lora_a, down.lora_b))
    expected = (weight + 6.0 / 4 * b @ a).astype(np.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found["model.layers.1.mlp.down_proj.weight"], expected)
    np.testing.assert_array_equal(
        found["model.layers.1.mlp.up_proj.weight"], model.layers[1].mlp.up_proj.weight
    )
    assert not any("lora" in name for name in found)


@pytest.mark.slow
def test_merged_logits(write_llama, tmp_path, random_tokens, difference):
    config = LoRAConfig(rank=4, alpha=6.0)
    model = trained(load(write_llama(tmp_path / "model"), lora=config, dtype="float32"))
    save_merged(model, tmp_path / "merged")
    tokens = random_tokens(1, 40)
    assert difference(load(tmp_path / "merged", dtype="float32")(tokens), model(tokens)) <= 1e-5


def test_transformers_loads_it(write_llama, tmp_path, random_tokens, transformers_logits, difference):
    config = LoRAConfig(rank=4, alpha=6.0)
    folder = write_llama(tmp_path / "model", rope_scaling={"type": "linear", "factor": 2.0})
    model = trained(load(folder, lora=config, dtype="float32"))
    save_merged(model, tmp_path / "merged")
    tokens = random_tokens(1, 40)
    (found,) = transformers_logits(tmp_path / "merged", list(tokens))
    assert difference(found, model(tokens)[0]) <= 1e-5


def test_transformers_loads_shards(
    write_llama, tmp_path, random_tokens, transformers_logits, difference, monkeypatch
):
    model = load(write_llama(tmp_path / "model"), dtype="float32")
    monkeypatch.setattr(export, "SHARD_BYTES", 30_000)
    save_merged(model, tmp_path / "merged")
    tokens = random_tokens(1, 40)
    (found,) = transformers_logits(tmp_path / "merged", list(tokens))
    assert difference(found, model(tokens)[0]) <= 1e-5


def test_shards(write_llama, tmp_path, monkeypatch, leaves, assert_same_leaves):
    model = load(write_llama(tmp_path / "model"))
    monkeypatch.setattr(export, "SHARD_BYTES", 30_000)
    folder = tmp_path / "merged"
    save_merged(model, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    held = {file.name: load_file(file) for file in shards}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    sizes = [sum(values.nbytes for values in tensors.values()) for tensors in held.values()]
    assert index["metadata"]["total_size"] == sum(sizes) == sum(v.nbytes for v in leaves(model).values())
    assert len(shards) >= 3
    assert max(sizes) <= 30_000
    assert_same_leaves(load(folder), model)


@pytest.mark.slow
@pytest.mark.parametrize("old_shards", [True, False])
def test_an_older_model_is_replaced(old_shards, write_llama, tmp_path, monkeypatch, assert_same_leaves):
    """Also where one of the two is in shards; files of other names stay."""
    source, folder = write_llama(tmp_path / "model"), tmp_path / "merged"
    with monkeypatch.context() as patch:
        patch.setattr(export, "SHARD_BYTES", 30_000 if old_shards else 10**9)
        save_merged(initialise(source, seed=0), folder)
    (folder / "tokenizer.json").write_text("{}")
    model = load(source)
    with monkeypatch.context() as patch:
        patch.setattr(export, "SHARD_BYTES", 10**9 if old_shards else 30_000)
        save_merged(model, folder)
    assert_same_leaves(load(folder), model)
    assert (folder / "model.safetensors").exists() == old_shards
    assert (folder / "model.safetensors.index.json").exists() != old_shards
    assert (folder / "tokenizer.json").exists()
    assert not list(folder.glob(".saving-*"))


def test_a_full_disk_leaves_the_older_model(write_llama, tmp_path, monkeypatch, assert_same_leaves):
    source, folder = write_llama(tmp_path / "model"), tmp_path / "merged"
    old = initialise(source, seed=0)
    save_merged(old, folder)

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "save_file", fail)
    with pytest.raises(UserError, match="merged: the model cannot be written there.*No space left"):
        save_merged(load(source), folder)
    assert_same_leaves(load(folder), old)
    assert not list(folder.glob(".saving-*"))


def test_a_file_in_the_folders_place(write_llama, tmp_path):
    (tmp_path / "merged").write_text("")
    with pytest.raises(UserError, match="merged: the model cannot be written there"):
        save_merged(load(write_llama(tmp_path / "model")), tmp_path / "merged")
