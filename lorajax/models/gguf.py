"""GGUF files, as llama.cpp writes them: metadata -> Hugging Face config, tensors dequantised one by one.

`rope_freqs.weight` becomes `rope_divisors` in the config: one divisor per rotary frequency, a key of our own.
`rope_scaling_of` translates it to what a config.json can say.
"""

import functools
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import MODEL_ARCH, GGUFReader, ReaderTensor, dequantize, get_tensor_name_map

from lorajax.errors import UserError
from lorajax.models import llama
from lorajax.models.rope import RopeOptions, rope_angles
from lorajax.models.stored import StoredCheckpoint, StoredTensor

_ELEMENTS_AT_ONCE = 1 << 22
_TOKENS = "tokenizer.ggml."


def open_gguf(file: Path) -> StoredCheckpoint:
    """Read the header of a GGUF file.

    Raises:
        UserError: the file is damaged, one part of several, or of an architecture or with an option that is
            not supported.
    """
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise UserError(
            f"{file}: truncated, damaged, or no GGUF file ({error}); download it again"
        ) from error
    metadata = Metadata(file, reader)
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UserError(f"{file}: architecture {architecture!r} is not supported; supported: {known}")
    if reader.byte_order != "I":
        raise UserError(f"{file}: the file has the other byte order than this machine; convert it")
    if metadata.get("split.count", 1) > 1:
        raise UserError(
            f"{file}: one part of {metadata.get('split.count')}; join them (llama-gguf-split --merge)"
        )
    return _ARCHITECTURES[architecture](file, reader, metadata)


class Metadata:
    """The key-value pairs of a GGUF file."""

    def __init__(self, file: Path, reader: GGUFReader):
        self.file, self.reader = file, reader

    def get(self, key: str, default: Any = None) -> Any:
        field = self.reader.get_field(key)
        return default if field is None else field.contents()

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int):
            raise UserError(f"{self.file}: {key} must be a number for the whole model, not {value!r}")
        return value

    def real(self, key: str, default: float) -> float:
        # The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(self.get(key, default))))


def _open_llama(file: Path, reader: GGUFReader, metadata: Metadata) -> StoredCheckpoint:
    stored = {tensor.name: tensor for tensor in reader.tensors}
    hf_config = _llama_config(file, metadata, stored)
    heads = {"attn_q": hf_config["num_attention_heads"], "attn_k": hf_config["num_key_value_heads"]}
    names = _llama_names(hf_config["num_hidden_layers"])
    tensors = {}
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        if name == "rope_freqs.weight":
            continue
        hf_name = f"{names[module]}.{leaf}" if module in names else name
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[hf_name] = StoredTensor(
            shape, functools.partial(_read, file, tensor, heads.get(module.rpartition(".")[2]))
        )
    ids = [metadata.get(f"{_TOKENS}{kind}_token_id") for kind in ("eos", "eot", "eom")]
    eos_token_ids = tuple(dict.fromkeys(token for token in ids if token is not None))
    if eos_token_ids:
        hf_config["eos_token_id"] = list(eos_token_ids) if len(eos_token_ids) > 1 else eos_token_ids[0]
    return StoredCheckpoint(file, hf_config, eos_token_ids, tensors)


def _llama_names(layers: int) -> dict[str, str]:
    """GGUF name -> Hugging Face name, both without the leaf."""
    table = get_tensor_name_map(MODEL_ARCH.LLAMA, layers)
    hf_names = [name.format(i=i) for name in llama.NAMES.values() for i in range(layers)]
    return {str(table.get_name(name)): name for name in hf_names}


def _llama_config(file: Path, metadata: Metadata, stored: dict[str, ReaderTensor]) -> dict[str, Any]:
    hidden, heads = metadata.size("llama.embedding_length"), metadata.size("llama.attention.head_count")
    head_dim = metadata.size("llama.attention.key_length", hidden // heads)
    if metadata.size("llama.expert_count", 0) > 0:
        raise UserError(f"{file}: a mixture of experts, which is not supported")
    if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{file}: RoPE on a part of each head, which is not supported")
    if "token_embd.weight" not in stored:
        raise UserError(f"{file}: no tensor token_embd.weight")
    hf_config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(stored["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": metadata.size("llama.feed_forward_length"),
        "num_hidden_layers": metadata.size("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.size("llama.context_length"),
        "rms_norm_eps": metadata.real("llama.attention.layer_norm_rms_epsilon", 1e-6),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in stored,
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_gate.bias" in stored,
        "rope_theta": metadata.real("llama.rope.freq_base", 10000.0),
    }
    for name, key in {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}.items():
        if (token := metadata.get(_TOKENS + key)) is not None:
            hf_config[name] = token
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling == "linear":
        factor = metadata.real("llama.rope.scaling.factor", 1.0)
        hf_config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif scaling != "none":
        raise UserError(f"{file}: RoPE scaling {scaling!r} is not supported; supported: none, linear")
    if "rope_freqs.weight" in stored:
        divisors = _read(file, stored["rope_freqs.weight"], None, np.dtype(np.float32))
        if divisors.shape != (head_dim // 2,):
            raise UserError(
                f"{file}: rope_freqs.weight must have the shape [{head_dim // 2}], not {list(divisors.shape)}"
            )
        if (divisors != 1).any():
            hf_config["rope_divisors"] = divisors.tolist()
    return hf_config


def _read(file: Path, tensor: ReaderTensor, heads: int | None, dtype: np.dtype) -> np.ndarray:
    """Dequantise to dtype, some rows at a time; heads: of a tensor whose rows llama.cpp has permuted."""
    try:
        # Not the reader's memory map: its pages would count as this process's memory.
        data = np.fromfile(file, tensor.data.dtype, tensor.data.size, offset=tensor.data_offset)
        packed = data.reshape(-1, tensor.data.shape[-1])
        values = np.empty((len(packed), int(tensor.shape[0])), dtype)
        step = max(1, _ELEMENTS_AT_ONCE // values.shape[1])
        for start in range(0, len(packed), step):
            values[start : start + step] = dequantize(packed[start : start + step], tensor.tensor_type)
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{file}: {tensor.name} cannot be read: {error}") from error
    values = values.reshape([int(n) for n in reversed(tensor.shape)])
    return values if heads is None else _unpermute(values, heads)


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows [N * H, ...] from llama.cpp's order (rotary pairs side by side) to Hugging Face's (H/2 apart)."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def rope_scaling_of(divisors: tuple[float, ...], *, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The llama3 `rope_scaling` of a config.json that gives these divisors; None if there is none.

    The rule divides a frequency f by 1 / (s + (1 - s) / factor), where s rises linearly with f from 0 to 1.
    Its context length and low_freq_factor matter by their ratio alone, so low_freq_factor is set to 1.
    """
    factor = max(divisors)
    if factor <= 1:
        return None
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    share = (1 / np.asarray(divisors) - 1 / factor) / (1 - 1 / factor)
    between = (share > 1e-4) & (share < 1 - 1e-4)
    if between.sum() < 2:
        return None
    slope, offset = np.polyfit(frequencies[between], share[between], 1)
    if offset >= 0:
        return None
    # s = (turns - 1) / (high - 1), where turns = context * f / 2 pi
    high = round(1 - 1 / float(offset), 4)
    context = round(float(slope) * (high - 1) * 2 * math.pi)
    rule = RopeOptions(theta, "llama3", factor, 1.0, high, context)
    one = jnp.ones((1, 1), jnp.int32)
    scaled = rope_angles(rule, head_dim, one, one)[0, 0]  # angles at position 1 are the frequencies
    if not np.allclose(frequencies / np.asarray(scaled), divisors, rtol=1e-5):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


_ARCHITECTURES = {"llama": _open_llama}
