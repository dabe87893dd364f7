"""Weights, dtypes, EOS tokens and memory of loaded and of random models."""

import json
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lorajax.lora.adapter import add_lora
from lorajax.lora.config import LoRAConfig
from lorajax.models.checkpoint import fingerprint, initialise, load, outline, resolve
from lorajax.models.decoder import LoRAParam

DTYPES = ("float32", "bfloat16", "float16")


def rewrite(folder: Path, change) -> Path:
    """Replace the folder's tensors by change(tensors)."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shard(folder: Path, shards: int = 3) -> Path:
    """Split model.safetensors as Hugging Face does."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_any_stored_dtype_becomes_the_models(stored, wanted, write_llama, tmp_path, leaves):
    folder = write_llama(tmp_path, attention_bias=True)
    rewrite(folder, lambda tensors: {name: v.astype(jnp.dtype(stored)) for name, v in tensors.items()})
    tensors = load_file(folder / "model.safetensors")
    model = load(folder, dtype=wanted)
    assert model.dtype == jnp.dtype(wanted)
    found = leaves(model)
    assert len(found) == len(tensors)
    for path, name in {
        "embed.weight": "model.embed_tokens.weight",
        "head.weight": "lm_head.weight",
        "norm.weight": "model.norm.weight",
        "layers.1.mlp.down_proj.weight": "model.layers.1.mlp.down_proj.weight",
        "layers.1.mlp_norm.weight": "model.layers.1.post_attention_layernorm.weight",
        "layers.0.attention.k_proj.bias": "model.layers.0.self_attn.k_proj.bias",
    }.items():
        assert found[path].dtype == jnp.dtype(wanted)
        np.testing.assert_array_equal(found[path], tensors[name].astype(jnp.dtype(wanted)))


def test_param_dtype_is_of_the_weights_alone(write_llama, tmp_path, random_tokens, leaves):
    folder = write_llama(tmp_path)
    model = load(folder, dtype="bfloat16", param_dtype="float32")
    assert {leaf.dtype for leaf in leaves(model).values()} == {np.dtype(np.float32)}
    assert jax.eval_shape(model.hidden_states, random_tokens(1, 4)).dtype == jnp.bfloat16


def test_shards_equal_one_file(write_llama, tmp_path, leaves):
    one = leaves(load(write_llama(tmp_path / "one")))
    several = leaves(load(shard(write_llama(tmp_path / "several"))))
    assert one.keys() == several.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(several[name], values)


def test_a_fingerprint_is_of_the_weights_wherever_they_lie(write_llama, tmp_path):
    one, several = write_llama(tmp_path / "one"), shard(write_llama(tmp_path / "several"))
    expected = fingerprint(one)
    (one / "config.json").write_text("{}")
    assert fingerprint(one.rename(tmp_path / "moved")) == expected
    assert fingerprint(several) != expected
    changed = [fingerprint(write_llama(tmp_path / "other", seed=1)), expected]
    for file in sorted(several.glob("*.safetensors")):
        changed.append(fingerprint(several))
        weights = bytearray(file.read_bytes())
        weights[-1] ^= 1
        file.write_bytes(weights)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    changed += [fingerprint(several), fingerprint(gguf)]
    assert len(set(changed)) == len(changed)
    assert fingerprint(gguf.rename(tmp_path / "renamed.gguf")) == changed[-1]


def test_a_fingerprint_reads_little_of_a_large_file(tmp_path):
    file = tmp_path / "model.gguf"
    with file.open("wb") as stream:
        stream.truncate(1 << 40)  # takes no room, and would take minutes to read
    assert fingerprint(file)


def test_tensors_that_follow_from_others_are_ignored(write_llama, tmp_path, leaves):
    def add(tensors):
        derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
        return tensors | derived | {"lm_head.weight": tensors["model.embed_tokens.weight"]}

    plain = leaves(load(write_llama(tmp_path / "plain", tie_word_embeddings=True)))
    more = leaves(load(rewrite(write_llama(tmp_path / "more", tie_word_embeddings=True), add)))
    assert plain.keys() == more.keys()


def test_a_tied_table_may_be_stored_as_the_head(write_llama, tmp_path, leaves):
    def rename(tensors):
        return tensors | {"lm_head.weight": tensors.pop("model.embed_tokens.weight")}

    folder = write_llama(tmp_path, tie_word_embeddings=True)
    expected = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    model = load(rewrite(folder, rename), dtype="float32")
    np.testing.assert_array_equal(leaves(model)["embed.weight"], expected)
    assert "head.weight" not in leaves(model)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 6}, (5, 6)),
        ({"eos_token_id": 2}, {"eos_token_id": [3, 2, 4]}, (2, 3, 4)),
        ({"eos_token_id": None}, {}, ()),
    ],
)
def test_eos_tokens(config, generation, expected, write_llama, tmp_path):
    folder = write_llama(tmp_path, **config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert load(folder).eos_token_ids == outline(folder).eos_token_ids == expected


LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("config", "same"),
    [
        ({"rope_scaling": None, "rope_parameters": None}, {}),
        ({"rope_scaling": {}, "rope_theta": 10000}, {}),
        ({"rope_scaling": {"type": "default", "factor": None}}, {}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}, "rope_theta": None}, {}),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 500}}, LINEAR),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 500}, LINEAR),
        ({"attention_bias": None, "mlp_bias": False, "tie_word_embeddings": None}, {}),
        ({"head_dim": None, "num_key_value_heads": None}, {"head_dim": 8, "num_key_value_heads": 4}),
        ({"rms_norm_eps": None}, {"rms_norm_eps": 1e-6}),
        ({"rms_norm_eps": 0}, {"rms_norm_eps": 0.0}),
    ],
)
def test_spellings_of_one_config(config, same, write_outline, tmp_path):
    found, expected = write_outline(tmp_path / "found", **config), write_outline(tmp_path / "same", **same)
    assert outline(found).options == outline(expected).options


def test_what_the_model_knows_of_its_checkpoint(write_llama, tmp_path):
    folder = write_llama(tmp_path)
    model = load(str(folder), attention="reference")
    assert json.loads(model.hf_config) == json.loads((folder / "config.json").read_text())
    assert (model.family, model.attention_implementation) == ("llama", "reference")
    assert model.lora_config is None


def test_adapter(write_llama, tmp_path, leaves):
    folder, config = write_llama(tmp_path), LoRAConfig(rank=4, target_modules=("q_proj",))
    expected = load(folder)
    add_lora(expected, config, seed=3)
    model = load(folder, lora=config, seed=3)
    assert model.lora_config == config
    adapter = nnx.to_flat_state(nnx.state(model, LoRAParam))
    assert len(adapter) == 2 * 2
    found, expected = leaves(model), leaves(expected)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name])


@pytest.mark.slow
def test_random_weights(write_llama, tmp_path, leaves):
    folder = write_llama(tmp_path, attention_bias=True, initializer_range=0.5)
    (folder / "model.safetensors").unlink()
    model = initialise(folder, dtype="float32", seed=1)
    found = leaves(model)
    assert len(found) == 3 + 2 * 13
    for name, values in found.items():
        if "norm" in name:
            assert (values == 1).all()
        elif name.endswith("bias"):
            assert (values == 0).all()
        else:
            assert abs(values.mean()) < 5 * 0.5 / values.size**0.5
            assert values.std() == pytest.approx(0.5, rel=5 / (2 * values.size) ** 0.5)
    matrices = [values.ravel()[:64] for name, values in found.items() if values.ndim == 2]
    assert len({values.tobytes() for values in matrices}) == len(matrices)
    again, other = (leaves(initialise(folder, dtype="float32", seed=seed)) for seed in (1, 2))
    np.testing.assert_array_equal(again["embed.weight"], found["embed.weight"])
    assert (other["embed.weight"] != found["embed.weight"]).mean() > 0.99


@pytest.mark.slow
def test_random_weights_by_default(write_llama, tmp_path, leaves):
    found = leaves(initialise(write_llama(tmp_path), seed=0))
    assert {values.dtype for values in found.values()} == {jnp.dtype(jnp.bfloat16)}
    assert found["embed.weight"].astype(np.float32).std() == pytest.approx(0.02, rel=0.05)


def test_outline_has_shapes_and_no_arrays(write_llama, tmp_path, leaves):
    folder = write_llama(tmp_path)
    expected = {name: (v.shape, v.dtype) for name, v in leaves(load(folder)).items()}
    (folder / "model.safetensors").unlink()
    model = outline(folder, attention="xla")
    assert model.attention_implementation == "xla"
    found = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} == expected
    assert {type(leaf) for leaf in found.values()} == {jax.ShapeDtypeStruct}


def test_a_hub_id_is_found_in_the_cache_offline(write_llama, tmp_path, monkeypatch, leaves):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--name"
    folder = write_llama(repo / "snapshots" / "0123")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123")
    assert resolve("owner/name") == folder
    assert leaves(load("owner/name"))["norm.weight"].shape == (32,)


@pytest.mark.parametrize("weights", [True, False])
def test_a_download_takes_no_pickles(weights, tmp_path, monkeypatch):
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    files += ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "original/params.json", "README.md"]

    def download(repo, *, allow_patterns, ignore_patterns):
        kept = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        (tmp_path / "kept").write_text(f"{repo} {' '.join(kept)}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name", weights=weights) == tmp_path
    expected = [name for name in files[:5] if weights or name != "model.safetensors"]
    assert (tmp_path / "kept").read_text() == f"owner/name {' '.join(expected)}"


@pytest.mark.slow
def test_the_host_holds_the_model_once(write_llama, tmp_path, loading_memory):
    """float32 on disk, bfloat16 in memory: neither the file nor a float32 copy is ever held as a whole."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "head_dim": 128}
    folder = write_llama(tmp_path, **sizes)
    stored = (folder / "model.safetensors").stat().st_size
    assert stored > 100 * 2**20
    assert loading_memory(folder) < 0.7 * stored
