"""Rows split over two devices: the gradient, and the run, of one device.

The number of devices is fixed when jax starts, so two need a process of their own: this file as a script.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from lorajax.config import save_config
from lorajax.lora.config import LoRAConfig
from lorajax.models.checkpoint import load
from lorajax.sharding import DATA_AXIS, data_mesh, replicated, rows
from lorajax.training import fit
from lorajax.training.step import loss_and_gradient
from lorajax.training.weights import split_weights

SHAPE = A, B, T = 2, 4, 16
ADAPTERS = {
    "lora": LoRAConfig(rank=4, alpha=8, dropout=0.3, target_modules=("v_proj",)),
    "full": None,
}


def make_batch() -> dict[str, np.ndarray]:
    """Three documents on most rows; the rows of the second device have most of the targets."""
    rng = np.random.default_rng(0)
    segment_ids = np.sort(rng.integers(1, 4, SHAPE, dtype=np.int32), axis=-1)
    starts = np.reshape([np.searchsorted(row, row) for row in segment_ids.reshape(-1, T)], SHAPE)
    share = np.linspace(0, 1, B)[:, None]
    return {
        "tokens": rng.integers(0, 350, SHAPE, dtype=np.int32),
        "targets": rng.integers(0, 350, SHAPE, dtype=np.int32),
        "segment_ids": segment_ids,
        "positions": (np.arange(T) - starts).astype(np.int32),
        "weights": (rng.random(SHAPE) < share).astype(np.float32),
    }


def gradient(model, mode: str, mesh) -> dict[str, np.ndarray]:
    """Of make_batch, with dropout in mode lora; the loss is under "loss"."""
    graph, trainable, frozen = split_weights(model, mode)

    def run(trainable, frozen, batch, key):
        return loss_and_gradient(
            graph,
            trainable,
            frozen,
            batch,
            mesh=mesh,
            checkpointing="full",
            train_head=mode == "full",
            dropout_key=key if mode == "lora" else None,
        )

    batch = jax.device_put(make_batch(), rows(mesh))
    assert batch["tokens"].addressable_shards[0].data.shape == (A, B // mesh.size, T)
    arguments = jax.device_put((trainable, frozen, jax.random.key(1)), replicated(mesh))
    trainable, frozen, key = arguments
    compiled = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    loss, leaves = compiled(trainable, frozen, batch, key)
    return jax.tree.map(np.asarray, leaves | {"loss": loss})


def compare(folder: str) -> None:
    """Print, as JSON, the relative norm of the difference between one device's gradient and that of two."""
    one = jax.make_mesh((1,), (DATA_AXIS,), axis_types=data_mesh().axis_types, devices=jax.devices()[:1])
    found: dict[str, float] = {"devices": jax.device_count()}
    for mode, lora in ADAPTERS.items():
        model = load(folder, lora=lora, dtype="float32")
        for linear in model.linears().values():
            if linear.lora_b is not None:
                linear.lora_b[...] = 0.3 * jax.random.normal(jax.random.key(0), linear.lora_b[...].shape)
        expected, split = gradient(model, mode, one), gradient(model, mode, data_mesh())
        apart = [np.linalg.norm(split[name] - leaf) for name, leaf in expected.items()]
        found[mode] = float(
            np.linalg.norm(apart) / np.linalg.norm([np.linalg.norm(g) for g in expected.values()])
        )
    print(json.dumps(found))


def on_two_devices(*arguments, cache) -> str:
    """What python prints."""
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_gradients_are_those_of_one_device(write_llama, tmp_path):
    folder = write_llama(tmp_path / "llama", num_hidden_layers=1, tie_word_embeddings=True)
    found = json.loads(on_two_devices(__file__, folder, cache=tmp_path / "xla"))
    assert found["devices"] == 2
    assert found["lora"] <= 1e-6 and found["full"] <= 1e-6


@pytest.mark.slow
def test_a_run_is_that_of_one_device(quick_config, exact_metrics, tmp_path):
    """With half the rows on each device."""

    def config(rows: int, folder: str):
        return quick_config(
            lora={"dropout": 0.2, "target_modules": ("v_proj",)},
            data={"eval_fraction": 0.3},
            train={"per_device_train_batch_size": rows, "gradient_accumulation_steps": 2, "eval_steps": 2},
            output={"output_dir": str(tmp_path / folder)},
        )

    save_config(config(1, "two"), tmp_path / "config.yaml")
    printed = on_two_devices("-m", "lorajax.train", tmp_path / "config.yaml", cache=tmp_path / "xla")
    assert "4 rows = 1 a device x 2 accumulated x 2 devices" in printed
    fit(config(2, "one"))
    two, one = exact_metrics(tmp_path / "two"), exact_metrics(tmp_path / "one")
    assert len(one) == 4 + 3
    for found, expected in zip(two, one, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


if __name__ == "__main__":
    compare(sys.argv[1])
