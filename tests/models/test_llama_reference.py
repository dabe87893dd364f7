"""Logits equal those of a plain Llama in numpy, float64: for machines without torch."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorajax.models.checkpoint import load

CONTEXT = 32
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": CONTEXT,
}
OPTIONS = {
    "plain": {},
    "linear, biases": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    },
    "dynamic, tied, head_dim of D/N": {
        "tie_word_embeddings": True,
        "head_dim": None,
        "rope_theta": 500.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "llama3, one key for all heads": {
        "num_key_value_heads": 1,
        "rope_theta": 500.0,
        "rope_scaling": LLAMA3,
    },
}


def llama(config: dict[str, Any], tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """[T] -> [T, V]."""
    length, heads, kv_heads = len(tokens), config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["head_dim"] or config["hidden_size"] // heads
    angles = np.arange(length)[:, None] * frequencies(config, head_dim, length)

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        mean = (x**2).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean + config["rms_norm_eps"]) * tensors[f"{name}.weight"]

    def rotate(x: np.ndarray) -> np.ndarray:
        turned = (x[:, : head_dim // 2] + 1j * x[:, head_dim // 2 :]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    hidden = tensors["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        x = norm(f"{block}.input_layernorm", hidden)
        q, k, v = (
            linear(f"{block}.self_attn.{name}_proj", x).reshape(length, -1, head_dim) for name in "qkv"
        )
        mixed = []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = rotate(q[:, head]) @ rotate(k[:, shared]).T / math.sqrt(head_dim)
            weights = np.tril(np.exp(scores - scores.max(axis=-1, keepdims=True)))
            mixed.append(weights / weights.sum(axis=-1, keepdims=True) @ v[:, shared])
        hidden = hidden + linear(f"{block}.self_attn.o_proj", np.concatenate(mixed, axis=-1))
        x = norm(f"{block}.post_attention_layernorm", hidden)
        gate = linear(f"{block}.mlp.gate_proj", x)
        inner = gate / (1 + np.exp(-gate)) * linear(f"{block}.mlp.up_proj", x)
        hidden = hidden + linear(f"{block}.mlp.down_proj", inner)
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return linear(head, norm("model.norm", hidden))


def frequencies(config: dict[str, Any], head_dim: int, length: int) -> np.ndarray:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    exponents = np.arange(0, head_dim, 2) / head_dim
    if kind == "dynamic" and length > CONTEXT:
        theta *= (factor * length / CONTEXT - (factor - 1)) ** (head_dim / (head_dim - 2))
    plain = theta**-exponents
    if kind == "linear":
        return plain / factor
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        scaled = []
        for frequency in plain:
            turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
            smooth = min(max((turns - low) / (high - low), 0), 1)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
        return np.array(scaled)
    return plain


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_logits(options, write_llama, tmp_path: Path, random_tokens, difference):
    """Of two documents on one row, the second beyond the original context."""
    folder = write_llama(tmp_path, **{"max_position_embeddings": CONTEXT} | options)
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: v.astype(np.float64) for name, v in load_file(folder / "model.safetensors").items()}
    tokens, segment_ids = random_tokens(1, 110), np.repeat([[1, 2]], [20, 90], axis=1)
    logits = load(folder, dtype="float32")(tokens, segment_ids)[0]
    for document in (slice(0, 20), slice(20, 110)):
        assert difference(logits[document], llama(config, tensors, tokens[0, document])) <= 1e-5
