"""How XLA schedules a step for an H200 whose memory is nearly full: compiled where there is none."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import pytest
from lorajax_kernels.device import assume

from lorajax.config import load_config
from lorajax.memory.elsewhere import arguments_there, environment_there
from lorajax.memory.plan import outline_of
from lorajax.memory.policy import Layout
from lorajax.memory.targets import find_target
from lorajax.training.program import compile_step
from lorajax.training.weights import split_weights

LAYERS, ROWS, LENGTH = 4, 4, 2048
# Four copies a layer, and gate's and up's come from the middle of it.
AWAY = {"block_input": "offload", "gate": "offload", "up": "offload", "query": "offload", "value": "save"}
SHAPE = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
# Bytes of what all layers but the last keep there.
ON_HOST = (LAYERS - 1) * 2 * ROWS * LENGTH * (512 + 1536 + 1536 + 512)


def compiled_step(folder: str) -> Any:
    """lorajax' Program of a step, for an H200 with room for weights and state, and ON_HOST more."""
    settings = {
        "model.path": folder,
        "data.path": "none.jsonl",
        "data.max_length": LENGTH,
        "train.per_device_train_batch_size": ROWS,
        "memory.checkpointing": json.dumps(AWAY),
        "output.output_dir": "none",
    }
    config = load_config(None, [f"--{name}={value}" for name, value in settings.items()])
    target = find_target("h200")
    with assume(target.device):
        _, trainable, frozen = split_weights(outline_of(config), "lora")
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((trainable, frozen)))
        # XLA plans with four fifths of a GPU's memory, less what goes in and out.
        small = dataclasses.replace(target, memory=int((weights + ON_HOST) / 0.8))
        return compile_step(*arguments_there(config, small, Layout(ROWS, config.memory.checkpointing)))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        program = compiled_step(folder)
    print(json.dumps({"host": program.memory.host, "program": program.step.as_text()}))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("JAX' CUDA plugin is not installed (lorajax[plan])")
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment_there(), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_all_copies_of_a_layer_are_under_way_at_once(found):
    under_way, most = 0, 0
    for operation in re.findall(r"= .*? copy-(start|done)\(", found["program"]):
        under_way += 1 if operation == "start" else -1
        most = max(most, under_way)
    assert most >= 4
    assert found["host"] == ON_HOST


@pytest.mark.slow
def test_nothing_is_made_again_for_what_is_on_the_host(found):
    """XLA calls what it makes again so."""
    assert ".remat" not in found["program"]


if __name__ == "__main__":
    main()
