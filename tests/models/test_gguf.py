"""GGUF files, written here as llama.cpp's converter writes them, against the folders that they come from."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType, dequantize, quantize
from safetensors.numpy import load_file, save_file

from lorajax.errors import UserError
from lorajax.models.checkpoint import load, outline, save_merged
from lorajax.models.gguf import rope_scaling_of

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# All widths are whole blocks of the quantized types.
SIZES = {"intermediate_size": 64, "max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_1")


def gguf_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{leaf}"
    return f"{NAMES[module]}.{leaf}"


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """To llama.cpp's order: the two halves of a head become pairs."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def write_gguf(folder: Path, kind: str = "F32", tensors=None, architecture="llama", **metadata) -> Path:
    """model.gguf beside the folder's safetensors, which then hold what is left of them in the file's type.

    tensors: more of them, or with None fewer; metadata: the same for keys.
    """
    config = json.loads((folder / "config.json").read_text())
    originals = load_file(folder / "model.safetensors")
    quantized = GGMLQuantizationType[kind]
    writer = GGUFWriter(folder / "model.gguf", architecture)
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "head_count": config["num_attention_heads"],
        "head_count_kv": config["num_key_value_heads"],
        "key_length": config["head_dim"],
        "rope_dimension_count": config["head_dim"],
        "layer_norm_rms_eps": config["rms_norm_eps"],
        "eos_token_id": config["eos_token_id"],
    }
    for key, value in (keys | metadata).items():
        if value is not None:
            getattr(writer, f"add_{key}")(value)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    stored = {}
    for name, values in originals.items():
        if values.ndim == 2:
            stored[name] = quantize(values, quantized)
            originals[name] = dequantize(stored[name], quantized)
        else:
            stored[name] = values
        part = name.split(".")[-2]
        if part in heads:
            stored[name] = permute(stored[name], heads[part])
    stored = {gguf_name(name): values for name, values in stored.items()} | (tensors or {})
    for name, values in stored.items():
        if values is not None:
            writer.add_tensor(name, values, raw_dtype=quantized if values.ndim == 2 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(originals, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.gguf"


def llama3_divisors(head_dim: int, theta: float = 10000.0, **changes) -> np.ndarray:
    """The tensor rope_freqs.weight, float32, by the rule of the Llama 3.1 release."""
    rule = LLAMA3 | changes
    factor, low, high = rule["factor"], rule["low_freq_factor"], rule["high_freq_factor"]
    divisors = []
    for frequency in theta ** -(np.arange(0, head_dim, 2) / head_dim):
        turns = rule["original_max_position_embeddings"] * frequency / (2 * np.pi)
        if turns > high:
            divisors.append(1.0)
        elif turns < low:
            divisors.append(factor)
        else:
            smooth = (turns - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", TYPES)
def test_same_model_as_the_folder(kind, dtype, write_llama, tmp_path, assert_same_leaves):
    folder = write_llama(tmp_path, **SIZES, attention_bias=True, mlp_bias=True)
    model = load(write_gguf(folder, kind), dtype=dtype)
    expected = load(folder, dtype=dtype)
    assert model.options == expected.options
    assert_same_leaves(model, expected)


def test_large_tensors_are_dequantised_in_parts(write_llama, tmp_path, monkeypatch, assert_same_leaves):
    monkeypatch.setattr("lorajax.models.gguf._ELEMENTS_AT_ONCE", 3 * 32)
    folder = write_llama(tmp_path, **SIZES)
    assert_same_leaves(load(write_gguf(folder, "Q8_0")), load(folder))


def test_logits(write_llama, tmp_path, random_tokens, difference):
    folder = write_llama(tmp_path, **SIZES)
    tokens = random_tokens(1, 90)
    file = write_gguf(folder, "Q8_0")
    assert difference(load(file, dtype="float32")(tokens), load(folder, dtype="float32")(tokens)) == 0


def test_options_from_metadata(write_llama, tmp_path):
    config = {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 8, "rms_norm_eps": 1e-3}
    folder = write_llama(tmp_path, **SIZES, **config, rope_theta=500.0, eos_token_id=[2, 7, 9])
    defaults = {"key_length": None, "rope_dimension_count": None, "head_count_kv": None}
    eos = {"eos_token_id": 2, "eot_token_id": 7, "eom_token_id": 9}
    file = write_gguf(folder, rope_freq_base=500.0, **defaults, **eos)
    expected = outline(folder)
    for model in (load(file), outline(file)):
        assert model.options == expected.options
        assert model.eos_token_ids == (2, 7, 9)


def test_linear_scaling(write_llama, tmp_path):
    folder = write_llama(tmp_path, **SIZES, rope_scaling={"type": "linear", "factor": 4.0})
    scaling = {"rope_scaling_type": RopeScalingType.LINEAR, "rope_scaling_factor": 4.0}
    assert outline(write_gguf(folder, **scaling)).options == outline(folder).options


def test_llama3_scaling(write_llama, tmp_path, random_tokens, difference):
    folder = write_llama(tmp_path / "model", **SIZES, head_dim=32, rope_scaling=LLAMA3)
    file = write_gguf(folder, tensors={"rope_freqs.weight": llama3_divisors(32)})
    tokens = random_tokens(1, 120)
    expected = load(folder, dtype="float32")(tokens)
    model = load(file, dtype="float32")
    assert difference(model(tokens), expected) <= 1e-5
    save_merged(model, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["rope_scaling"] == LLAMA3
    assert difference(load(tmp_path / "merged", dtype="float32")(tokens), expected) <= 1e-5


@pytest.mark.parametrize(
    ("head_dim", "theta", "rule"),
    [
        (128, 5e5, {"original_max_position_embeddings": 8192}),
        (64, 5e5, {"original_max_position_embeddings": 8192, "factor": 32.0}),
        (128, 1e6, {"original_max_position_embeddings": 4096, "factor": 4.0, "high_freq_factor": 16.0}),
    ],
)
def test_divisors_as_a_llama3_rule(head_dim, theta, rule):
    divisors = tuple(llama3_divisors(head_dim, theta, **rule).tolist())
    assert rope_scaling_of(divisors, theta=theta, head_dim=head_dim) == LLAMA3 | rule


def test_divisors_of_one_change_nothing(write_llama, tmp_path):
    folder = write_llama(tmp_path, **SIZES)
    file = write_gguf(folder, tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    assert outline(file).options == outline(folder).options


@pytest.mark.parametrize(
    "divisors", [(1.0, 8.0) * 8, (8.0,) * 16, (1.0, 2.0, 1.5, 3.0) * 4, (4.0, 2.0, 1.0) * 5]
)
def test_divisors_of_no_rule(divisors):
    assert rope_scaling_of(divisors, theta=1e4, head_dim=2 * len(divisors)) is None


def test_divisors_that_no_config_can_state(write_llama, tmp_path):
    divisors = llama3_divisors(32)
    divisors[5] *= 1.01
    folder = write_llama(tmp_path / "model", **SIZES, head_dim=32)
    model = load(write_gguf(folder, tensors={"rope_freqs.weight": divisors}))
    with pytest.raises(UserError, match="follow no rule that a config.json can state.*save the adapter"):
        save_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_the_host_holds_the_model_once(write_llama, tmp_path, loading_memory):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "head_dim": 128}
    file = write_gguf(write_llama(tmp_path, **sizes))
    stored = file.stat().st_size
    assert stored > 100 * 2**20
    assert loading_memory(file) < 0.7 * stored


BAD = {
    "architecture": ({"architecture": "mamba"}, "architecture 'mamba' is not supported; supported: llama"),
    "experts": ({"expert_count": 8}, "mixture of experts"),
    "part of a head": ({"rope_dimension_count": 8}, "RoPE on a part of each head"),
    "yarn": ({"rope_scaling_type": RopeScalingType.YARN}, "RoPE scaling 'yarn' is not supported"),
    "no size": ({"block_count": None}, "llama.block_count must be a number"),
    "sizes by layer": ({"head_count": [4, 2]}, "llama.attention.head_count must be a number"),
    "no embeddings": ({"tensors": {"token_embd.weight": None}}, "no tensor token_embd.weight"),
    "missing": ({"tensors": {"blk.1.ffn_up.weight": None}}, "missing: model.layers.1.mlp.up_proj.weight"),
    "surplus": (
        {"tensors": {"blk.0.other.weight": np.zeros(4, np.float32)}},
        "surplus: blk.0.other.weight [4]",
    ),
    "shape": (
        {"tensors": {"blk.0.ffn_up.weight": np.zeros((32, 32), np.float32)}},
        "wrong shape: model.layers.0.mlp.up_proj.weight is [32, 32], the config asks for [64, 32]",
    ),
    "divisors": (
        {"tensors": {"rope_freqs.weight": np.ones(4, np.float32)}},
        "must have the shape [8], not [4]",
    ),
    "type": (
        {"tensors": {"output_norm.weight": np.ones(32, np.int32)}},
        "output_norm.weight cannot be read: Dequantization for I32",
    ),
}


@pytest.mark.parametrize(("changes", "part"), BAD.values(), ids=BAD.keys())
def test_files_that_cannot_be_loaded(changes, part, write_llama, tmp_path):
    file = write_gguf(write_llama(tmp_path, **SIZES), **changes)
    with pytest.raises(UserError) as error:
        load(file)
    assert str(file) in str(error.value)
    assert part in str(error.value)


def test_one_part_of_several(write_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(
        GGUFWriter, "add_split_count", lambda self, n: self.add_uint16("split.count", n), raising=False
    )
    file = write_gguf(write_llama(tmp_path, **SIZES), split_count=3)
    with pytest.raises(UserError, match="one part of 3; join them"):
        load(file)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_truncated(share, write_llama, tmp_path):
    file = write_gguf(write_llama(tmp_path, **SIZES))
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="truncated, damaged, or no GGUF file.*download it again"):
        load(file)


def test_another_format(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1 " * 3)
    with pytest.raises(UserError, match="model.gguf: truncated, damaged, or no GGUF file"):
        load(tmp_path / "model.gguf")
