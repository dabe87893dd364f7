"""Models that cannot be loaded: each error says what is wrong, where, and what to do."""

import json
import re
from pathlib import Path

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorajax.errors import UserError
from lorajax.models.checkpoint import initialise, load, outline, resolve

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def refused(path: str | Path, *parts: str, **arguments) -> str:
    """Load, and check that the error has all these parts."""
    with pytest.raises(UserError) as error:
        load(path, **arguments)
    for part in parts:
        assert part in str(error.value)
    return str(error.value)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_surplus_and_misshapen_tensors_are_in_one_error(write_llama, tmp_path):
    folder = write_llama(tmp_path)

    def spoil(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"], tensors["lm_head.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
        tensors["model.norm.weight"] = np.zeros(31, np.float32)
        tensors["model.layers.1.self_attn.k_proj.weight"] = np.zeros((64, 32), np.float32)

    rewrite(folder, spoil)
    message = refused(folder, str(folder))
    assert set(message.split("\n  ")[1:]) == {
        "missing: model.layers.0.mlp.up_proj.weight [48, 32]",
        "missing: lm_head.weight [350, 32]",
        "surplus: model.layers.2.mlp.up_proj.weight [48, 32]",
        "surplus: model.layers.0.self_attn.q_proj.bias [64]",
        "wrong shape: model.norm.weight is [31], the config asks for [32]",
        "wrong shape: model.layers.1.self_attn.k_proj.weight is [64, 32], the config asks for [32, 32]",
    }


def test_tensors_are_checked_before_any_is_read(write_llama, tmp_path, monkeypatch):
    folder = write_llama(tmp_path, num_hidden_layers=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    monkeypatch.setattr("lorajax.models.safetensors._read", lambda *_: pytest.fail("a tensor was read"))
    refused(folder, "surplus: model.layers.2.input_layernorm.weight [32]")


def test_a_tied_head_that_differs_from_the_embeddings(write_llama, tmp_path):
    folder = write_llama(tmp_path, tie_word_embeddings=True)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": np.ones((350, 32), np.float32)}))
    refused(folder, "lm_head.weight is not model.embed_tokens.weight", '"tie_word_embeddings": false')


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_safetensors(kept, write_llama, tmp_path):
    folder = write_llama(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(folder, str(file), "truncated or damaged", "download it again")


def test_safetensors_of_another_format(write_llama, tmp_path):
    folder = write_llama(tmp_path)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    refused(folder, "model.safetensors", "truncated or damaged")


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn], ids=["I8", "F8_E4M3"])
def test_tensors_of_another_type(dtype, write_llama, tmp_path, request):
    folder = write_llama(tmp_path)
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(32, dtype)}))
    refused(folder, f"model.norm.weight ({request.node.callspec.id})", "only BF16, F16, F32")


def test_missing_shards(write_llama, tmp_path):
    folder = write_llama(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")
    shards = {name: f"model-{name}-of-00003.safetensors" for name in ("00001", "00002", "00003")}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    message = refused(
        folder, str(index), "model-00002-of-00003.safetensors, model-00003-of-00003.safetensors"
    )
    assert "model-00001" not in message


@pytest.mark.parametrize("text", ['{"weight_map": {', "[]", "{}", '{"weight_map": {"model.norm.weight": 1}}'])
def test_a_damaged_index(text, write_llama, tmp_path):
    folder = write_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, str(folder / "model.safetensors.index.json"))


def test_a_folder_without_weights(write_llama, tmp_path):
    folder = write_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    refused(folder, str(folder), "no weights", "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights(name, write_llama, tmp_path):
    folder = write_llama(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, name, "unpickling a file runs whatever code is in it", "convert them to safetensors")
    refused(folder / name, name, "unpickling a file runs whatever code is in it", "convert them")


def test_a_folder_of_gguf_files(write_llama, tmp_path):
    folder = write_llama(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-Q8_0.gguf")
    refused(folder, "give its own path", str(folder / "model-Q8_0.gguf"))


def test_a_file_of_a_folder(write_llama, tmp_path):
    refused(write_llama(tmp_path) / "model.safetensors", "give the folder")


@pytest.mark.parametrize("open_model", [load, outline, lambda folder: initialise(folder, seed=0)])
def test_a_folder_without_config(open_model, write_llama, tmp_path):
    folder = write_llama(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(folder))}: no config.json"):
        open_model(folder)


def test_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refused(tmp_path, "PEFT adapter, not a model", f"lorajax.load_adapter(model, {str(tmp_path)!r})")


@pytest.mark.parametrize(
    ("text", "part"),
    [('{\n"model_type": llama}', "config.json:2: not JSON"), ("[]", "must hold a JSON object, not list")],
)
def test_a_damaged_config(text, part, write_llama, tmp_path):
    folder = write_llama(tmp_path)
    (folder / "config.json").write_text(text)
    refused(folder, part)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama"),
        ({"model_type": None}, "model_type None is not supported; supported: llama"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported; supported: llama"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantized (gptq)"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not one of silu"),
        ({"hidden_act": ["silu"]}, "hidden_act ['silu'] is not one of silu"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number of at least 1, not '32'"),
        ({"num_key_value_heads": True}, "num_key_value_heads must be a whole number of at least 1, not True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1, not 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "RoPE scaling 'yarn' is not one of default"),
        ({"rope_scaling": {"type": "linear"}}, "RoPE scaling 'linear' needs factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "RoPE scaling 'llama3' needs high_freq_factor",
        ),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1}},
            "high_freq_factor 1.0 must be above low_freq_factor 1.0",
        ),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": "8192"}},
            "original_max_position_embeddings must be a number above 0, not '8192'",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object with a rope_type, not 'linear'"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object with a rope_type, not [1]"),
        ({"rope_parameters": "x"}, "rope_parameters must be an object with a rope_type, not 'x'"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "RoPE scaling ['linear'] is not one of default"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "RoPE scaling 'linear' needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor must be a number above 0, not 'two'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0}}, "factor must be a number above 0, not 0"),
        ({"rope_theta": "x"}, "rope_theta must be a number above 0, not 'x'"),
        ({"rope_parameters": {"rope_theta": -5}}, "rope_theta must be a number above 0, not -5"),
        ({"rope_theta": float("inf")}, "rope_theta must be a number above 0, not inf"),
        ({"rms_norm_eps": "a"}, "rms_norm_eps must be a number of at least 0, not 'a'"),
        ({"rms_norm_eps": True}, "rms_norm_eps must be a number of at least 0, not True"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, not 'false'"),
        ({"attention_bias": 1}, "attention_bias must be true or false, not 1"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a whole number or a list of them, not '</s>'"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id must be a whole number or a list of them, not {'a': 1}"),
        ({"eos_token_id": [[1]]}, "eos_token_id must be a whole number or a list of them, not [[1]]"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_is_not_supported(config, part, write_llama, tmp_path):
    folder = write_llama(tmp_path)
    original = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(original | config))
    refused(folder, str(folder), part)


def test_a_damaged_generation_config(write_llama, tmp_path):
    folder = write_llama(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, "</s>"]}')
    refused(folder, f"{folder}/generation_config.json: eos_token_id must be a whole number or a list of them")


def test_random_weights_of_no_range(write_llama, tmp_path):
    folder = write_llama(tmp_path, initializer_range="small")
    with pytest.raises(UserError, match="initializer_range must be a number of at least 0, not 'small'"):
        initialise(folder, seed=0)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"dtype": "float64"}, "dtype 'float64' is not one of bfloat16, float16, float32"),
        ({"param_dtype": "int8"}, "param_dtype 'int8' is not one of bfloat16, float16, float32"),
        ({"quantization": "nf4"}, "quantization 'nf4' is not supported"),
        ({"attention": "flash"}, "model.attention 'flash' is not one of auto, triton, cudnn, xla, reference"),
    ],
)
def test_arguments(arguments, part):
    """Checked before the path is looked at."""
    refused("./nowhere", part, **arguments)


@pytest.mark.parametrize(
    "path",
    ["./model", "/no/model", "~/no/model", "a/b/c", "model.gguf", "model.bin", "a b", "x/", Path("x/y")],
)
def test_a_local_path_that_is_not_there(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    refused(path, f"{path}: no such file or folder")


def test_a_hub_id_that_is_not_cached_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        resolve("owner/name")
    for part in ("owner/name: no such file or folder here", "hf download owner/name", "a local folder"):
        assert part in str(error.value)
