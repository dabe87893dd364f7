"""What tests share: a tiny tokenizer, tiny checkpoints with random weights, and ways to write data."""

from __future__ import annotations

import gc
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lorajax.config import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Most of the time goes into making programs fast that then run for milliseconds: into LLVM's optimisation on
# a CPU, and on a GPU into timing the ways to multiply.
_HAS_GPU = shutil.which("nvidia-smi") is not None
_QUICK = "--xla_gpu_autotune_level=0" if _HAS_GPU else "--xla_backend_optimization_level=0"
if not _HAS_GPU and tuple(map(int, version("jaxlib").split(".")[:2])) < (
    0,
    11,
):  # a later XLA knows no such flag, and stops at it
    _QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _QUICK)
# Which lines an op comes from, up to ten for each, is a tenth of the time that programs take to be made.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
if not _HAS_GPU:
    # JAX' CUDA plugin, which tests compile with, complains in every process of the libraries it lacks.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_collection_finish() -> None:
    """Python's collector would walk the modules of jax, torch and transformers every few seconds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? The capital of France is Paris.",
    "user assistant system hello thanks, you are welcome",
]

# Like many chat templates: turns end in EOS and a newline; no generation marks, so turns are found by role.
ROLE_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% "
    "endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _make_tokenizer(template: str | None = ROLE_TEMPLATE, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose pad token is its EOS token."""
    from transformers import PreTrainedTokenizerFast

    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(name, special=True) for name in ("<|end|>", "<|im_start|>", "<|im_end|>")],
    )
    rust.train_from_iterator(LINES, trainer)
    special = special or {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer():
    return _make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return _make_tokenizer()


@pytest.fixture(scope="session")
def role_template() -> str:
    return ROLE_TEMPLATE


@pytest.fixture(scope="session")
def marked_template() -> str:
    return MARKED_TEMPLATE


@pytest.fixture
def write_rows(tmp_path: Path):
    def write(rows: list, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def data_config(tmp_path: Path):
    def make(path: str, **settings) -> DataConfig:
        return DataConfig(path=path, cache_dir=str(tmp_path / "cache"), **settings)

    return make


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 350,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def _llama_tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random float32 weights of a Llama, by their Hugging Face names."""
    rng = np.random.default_rng(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    attention_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden) * hidden**0.5}
    tensors["model.norm.weight"] = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(vocab, hidden)
    projections = {
        "self_attn.q_proj": (query, hidden, attention_bias),
        "self_attn.k_proj": (key, hidden, attention_bias),
        "self_attn.v_proj": (key, hidden, attention_bias),
        "self_attn.o_proj": (hidden, query, attention_bias),
        "mlp.gate_proj": (inner, hidden, mlp_bias),
        "mlp.up_proj": (inner, hidden, mlp_bias),
        "mlp.down_proj": (hidden, inner, mlp_bias),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
        for name, (rows, columns, bias) in projections.items():
            tensors[f"{prefix}.{name}.weight"] = matrix(rows, columns)
            if bias:
                tensors[f"{prefix}.{name}.bias"] = rng.normal(0, 0.3, rows).astype(np.float32)
    return tensors


@pytest.fixture(scope="session")
def write_llama():
    """write_llama(folder, seed=0, **config): a checkpoint in Hugging Face layout; gives the folder."""

    def write(folder: Path, seed: int = 0, **config: Any) -> Path:
        config = _write_config(folder, config)
        save_file(_llama_tensors(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


@pytest.fixture(scope="session")
def write_outline():
    """write_outline(folder, **config): the same, of any size, with weights that cannot be read."""

    def write(folder: Path, **config: Any) -> Path:
        _write_config(folder, config)
        (folder / "model.safetensors").write_bytes(b"no weights")
        return folder

    return write


def _write_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """LLAMA with these changes, into the folder."""
    config = LLAMA | config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.fixture(scope="session")
def llama_folder(write_llama, tmp_path_factory) -> Path:
    """A tiny Llama with its tokenizer, as `train` takes it."""
    folder = write_llama(tmp_path_factory.mktemp("models") / "llama")
    _make_tokenizer().save_pretrained(str(folder))
    return folder
