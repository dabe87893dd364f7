"""What tests of models share: logits from transformers, and how far two arrays are apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx


@pytest.fixture(scope="session")
def difference():
    """difference(found, expected): largest difference over the largest expected value."""

    def relative(found, expected) -> float:
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        assert found.shape == expected.shape
        assert np.isfinite(found).all() and np.abs(expected).max() > 0
        return float(np.abs(found - expected).max() / np.abs(expected).max())

    return relative


@pytest.fixture(scope="session")
def leaves():
    """leaves(model): all arrays by dotted tree path."""

    def flat(model) -> dict[str, np.ndarray]:
        state = nnx.to_flat_state(nnx.state(model))
        return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}

    return flat


@pytest.fixture(scope="session")
def assert_same_leaves(leaves):
    """assert_same_leaves(model, expected): the same leaves, bit for bit."""

    def check(model, expected) -> None:
        found, wanted = leaves(model), leaves(expected)
        assert found.keys() == wanted.keys()
        for path, values in wanted.items():
            assert found[path].dtype == values.dtype, path
            np.testing.assert_array_equal(found[path], values, path)

    return check


@pytest.fixture(scope="session")
def random_tokens():
    """random_tokens(*shape, seed=0): ids below the tiny models' vocabulary of 350."""

    def draw(*shape: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 350, shape, dtype=np.int32)

    return draw


@pytest.fixture(scope="session")
def transformers_logits():
    """transformers_logits(folder, documents): float32 logits, one array [T, V] per document.

    The model is loaded once and its rotary embedding made anew for each document: the dynamic kind remembers
    the longest text so far.
    """
    torch = pytest.importorskip("torch", reason="torch is the reference of these tests")
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    def run(folder: Path, documents: list[np.ndarray]) -> list[np.ndarray]:
        model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()
        logits = []
        with torch.no_grad():
            for tokens in documents:
                model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
                logits.append(model(torch.tensor(tokens[None]).long()).logits[0].numpy())
        return logits

    return run


MEASURE = """
import sys
import jax
from lorajax.models.checkpoint import load

def kilobytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))

jax.block_until_ready(jax.numpy.zeros(8))
before = kilobytes("VmRSS:")
model = load(sys.argv[1], dtype="bfloat16")
print(1024 * (kilobytes("VmHWM:") - before))
"""


@pytest.fixture(scope="session")
def loading_memory():
    """loading_memory(path): peak memory, in bytes, that loading a model in bfloat16 adds to a new process."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak memory is read from /proc")

    def measure(path: Path) -> int:
        command = [sys.executable, "-c", MEASURE, str(path)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return int(result.stdout)

    return measure
