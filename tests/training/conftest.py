"""A small run: a tiny Llama, a few dialogues, everything it writes in the test's own folder."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from lorajax.config import Config, DataConfig, ModelConfig, OutputConfig, TrainConfig
from lorajax.lora.config import LoRAConfig
from lorajax.training.metrics import read_metrics

_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "capital", "of", "France", "Paris")

# Fields of metrics.jsonl that are measured, and differ from run to run.
_MEASURED = {"step_seconds", "tokens_per_second", "eval_seconds", "peak_memory_bytes"}


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Programs compiled by one test serve the next, and none is left in the user's cache folder."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def dialogues(count: int, seed: int = 0) -> list[dict]:
    """Rows of messages, each a question and an answer of some random words."""
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(rng.choices(_WORDS, k=rng.randint(1, longest)))

    return [
        {
            "messages": [
                {"role": "user", "content": text(4)},
                {"role": "assistant", "content": text(8)},
            ]
        }
        for _ in range(count)
    ]


@pytest.fixture
def run_config(tmp_path: Path, write_rows, llama_folder: Path) -> Callable[..., Config]:
    """run_config(rows=24, **overrides): the config of a small float32 run into tmp_path / "run".

    Overrides are dicts by section: run_config(train={"max_steps": 3}, output={"save_steps": 1}).
    """

    def make(rows: int = 24, **overrides: dict) -> Config:
        full = overrides.get("train", {}).get("mode") == "full"  # which takes no settings of an adapter
        config = Config(
            model=ModelConfig(path=str(llama_folder), dtype="float32"),
            lora=LoRAConfig() if full else LoRAConfig(rank=4, alpha=8),
            data=DataConfig(
                path=write_rows(dialogues(rows)), max_length=64, cache_dir=str(tmp_path / "cache")
            ),
            train=TrainConfig(per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2),
            output=OutputConfig(output_dir=str(tmp_path / "run")),
        )
        sections = {
            name: dataclasses.replace(getattr(config, name), **settings)
            for name, settings in overrides.items()
        }
        return dataclasses.replace(config, **sections)

    return make


@pytest.fixture(scope="session")
def one_layer_folder(write_llama, make_tokenizer, tmp_path_factory) -> Path:
    """A Llama of one layer with its tokenizer, which compiles in half the time."""
    folder = write_llama(tmp_path_factory.mktemp("models") / "one-layer", num_hidden_layers=1)
    make_tokenizer().save_pretrained(str(folder))
    return folder


@pytest.fixture
def quick_config(run_config, one_layer_folder: Path) -> Callable[..., Config]:
    """run_config with a model of one layer, for tests in which the model does not matter."""

    def make(rows: int = 24, *, model: dict | None = None, **overrides: dict) -> Config:
        model = {"path": str(one_layer_folder)} | (model or {})
        return run_config(rows, **({"memory": {"checkpointing": "none"}} | overrides), model=model)

    return make


@pytest.fixture(scope="session")
def exact_metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """exact_metrics(run_folder): the rows of its metrics.jsonl without what is measured."""

    def read(folder: Path) -> list[dict[str, Any]]:
        rows = read_metrics(folder / "metrics.jsonl")
        return [{name: value for name, value in row.items() if name not in _MEASURED} for row in rows]

    return read
