"""A run's folder: what is in it, what may be replaced, and what stays when a run fails."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorajax.config import Config, load_config
from lorajax.errors import UserError
from lorajax.training import fit
from lorajax.training.checkpoints import steps
from lorajax.training.folder import check_folder, prepare_folder
from lorajax.training.metrics import MetricsLog, read_metrics, truncate_metrics


def changed(config: Config, **overrides: dict) -> Config:
    sections = {
        name: dataclasses.replace(getattr(config, name), **settings) for name, settings in overrides.items()
    }
    return dataclasses.replace(config, **sections)


OVERWRITE = {"overwrite_output_dir": True}
AUTO = {"resume_from_checkpoint": "auto"}


# --- what a run writes ---


@pytest.mark.slow
def test_a_run_writes_what_is_documented(quick_config, exact_metrics):
    config = quick_config(
        data={"eval_fraction": 0.25},
        train={"max_steps": 5, "eval_steps": 2},
        output={"save_steps": 2, "logging_steps": 2, "sample_prompts": ["What is the capital of France?"]},
    )
    folder = fit(config).output_dir
    assert sorted(os.listdir(folder)) == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "samples.json",
    ]
    assert sorted(os.listdir(folder / "checkpoints")) == ["4", "5"]
    assert sorted(os.listdir(folder / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert load_config(folder / "config.yaml") == config
    [sample] = json.loads((folder / "samples.json").read_text())
    assert sample.keys() == {"prompt", "before", "after"}

    rows = read_metrics(folder / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 4, 5]  # the first, the last, and every second
    for row in trained:
        assert list(row) == [
            "step",
            "loss",
            "grad_norm",
            "learning_rate",
            "tokens",
            "target_tokens",
            "step_seconds",
            "tokens_per_second",
            "peak_memory_bytes",
        ]
        assert all(math.isfinite(value) for value in row.values())
        assert 0 < row["target_tokens"] < row["tokens"] <= 2 * 64
        assert row["step_seconds"] > 0 and row["peak_memory_bytes"] > 2**20
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 2, 4, 5]
    for row in evaluated:
        fields = ["step", "eval_loss", "eval_target_tokens", "eval_seconds", "peak_memory_bytes"]
        assert list(row) == fields
        assert row["eval_loss"] > 0 and row["eval_target_tokens"] == evaluated[0]["eval_target_tokens"] > 0


# --- what may be replaced ---


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


RESULTS = {
    "metrics.jsonl": lambda run: write(run / "metrics.jsonl", '{"step": 1}\n'),
    "adapter": lambda run: write(run / "adapter" / "adapter_model.safetensors"),
    "model": lambda run: write(run / "model" / "model.safetensors"),
    "checkpoints": lambda run: write(run / "checkpoints" / "3" / "state" / "data"),
}


@pytest.mark.parametrize("result", RESULTS)
def test_another_run_is_refused_unless_told(result, quick_config, tmp_path):
    config, run = quick_config(), tmp_path / "run"
    path = RESULTS[result](run)
    before = path.read_text()
    with pytest.raises(UserError) as error:
        fit(config)
    assert str(error.value) == (
        f"output.output_dir: {run} holds another run ({result}). To go on with it, add "
        "--train.resume_from_checkpoint auto; to replace it, --output.overwrite_output_dir true; or choose "
        "another folder"
    )
    assert path.read_text() == before and os.listdir(run) == [result]
    # A checkpoint from elsewhere does not make this run the other one.
    elsewhere = tmp_path / "elsewhere" / "3"
    elsewhere.mkdir(parents=True)
    with pytest.raises(UserError, match="holds another run"):
        check_folder(changed(config, train={"resume_from_checkpoint": str(elsewhere)}))
    assert check_folder(changed(config, output=OVERWRITE)) is None


@pytest.mark.parametrize("result", ["adapter", "model"])
def test_auto_does_not_replace_a_run_whose_checkpoints_are_gone(result, quick_config, tmp_path):
    RESULTS[result](tmp_path / "run")
    with pytest.raises(UserError, match=rf"holds another run \({result}\), but no checkpoint to go on from"):
        fit(quick_config(train=AUTO))


def test_auto_takes_the_newest_checkpoint_or_none(quick_config, tmp_path):
    config, run = quick_config(train=AUTO), tmp_path / "run"
    assert check_folder(config) is None
    RESULTS["metrics.jsonl"](run)
    (run / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir(parents=True)
    assert check_folder(config) is None
    for step in (3, 10, 9):
        (run / "checkpoints" / str(step)).mkdir()
    assert check_folder(config) == run / "checkpoints" / "10"


def test_overwriting_takes_away_the_run_and_nothing_else(quick_config, tmp_path):
    run = tmp_path / "run"
    foreign = write(run / "notes.txt", "mine"), write(run / "data" / "rows.jsonl", "mine too")
    for make in RESULTS.values():
        make(run)
    write(run / "samples.json")
    write(run / "tensorboard" / "events")
    write(run / "config.yaml")
    config = quick_config(output=OVERWRITE)
    prepare_folder(config, check_folder(config))
    assert sorted(os.listdir(run)) == ["config.yaml", "data", "notes.txt"]
    assert [path.read_text() for path in foreign] == ["mine", "mine too"]
    assert load_config(run / "config.yaml") == config


@pytest.mark.parametrize(
    "key, place",
    [
        ("model.path", "model"),
        ("model.tokenizer", "adapter/tokenizer"),
        ("data.path", "tensorboard/rows.jsonl"),
        ("data.eval_path", "samples.json"),
        ("data.chat_template", "link/template.jinja"),
        ("train.resume_from_checkpoint", "checkpoints/other/3"),
    ],
)
def test_overwriting_spares_what_the_run_reads(key, place, quick_config, tmp_path):
    run, (section, name) = tmp_path / "run", key.split(".")
    path = run / place
    (run / "model").mkdir(parents=True)
    (run / "link").symlink_to("model")
    write(path) if path.suffix else path.mkdir(parents=True, exist_ok=True)
    config = changed(quick_config(output=OVERWRITE), **{section: {name: str(path)}})
    with pytest.raises(UserError) as error:
        check_folder(config)
    assert str(error.value) == (
        f"output.overwrite_output_dir would delete {path} ({key}); choose another output.output_dir"
    )


def test_data_beside_the_run_and_a_hub_id_are_nothing_that_overwriting_deletes(
    quick_config, monkeypatch, tmp_path
):
    RESULTS["model"](tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run" / "model")
    read = {"model": {"path": "owner/name"}, "data": {"path": str(write(tmp_path / "run" / "rows.jsonl"))}}
    assert check_folder(changed(quick_config(output=OVERWRITE), **read)) is None


def test_going_on_replaces_nothing(quick_config, tmp_path):
    run = tmp_path / "run"
    for make in RESULTS.values():
        make(run)
    checkpoint = run / "checkpoints" / "3"
    for settings in (AUTO, {"resume_from_checkpoint": str(checkpoint)}):
        config = quick_config(train=settings)
        prepare_folder(config, check_folder(config))
        assert sorted(os.listdir(run)) == sorted([*RESULTS, "config.yaml"])
    # Overwriting is said of what is replaced, not of the checkpoint that the run goes on from.
    config = quick_config(train={"resume_from_checkpoint": str(checkpoint)}, output=OVERWRITE)
    prepare_folder(config, check_folder(config))
    assert steps(run / "checkpoints") == [3] and (run / "adapter").exists()


def test_a_folder_that_cannot_be_used_is_named(quick_config, tmp_path):
    write(tmp_path / "run")
    with pytest.raises(UserError, match=r"output\.output_dir: .*/run is a file$"):
        fit(quick_config())
    below = quick_config(output={"output_dir": str(tmp_path / "run" / "below")})
    for make in (check_folder, lambda config: prepare_folder(config, None)):
        with pytest.raises(UserError, match=r"output\.output_dir: .*/run/below cannot be written: Not a dir"):
            make(below)
        for folder in ("/proc", "/proc/a/b"):
            with pytest.raises(UserError, match=rf"output\.output_dir: {folder} cannot be written"):
                make(quick_config(output={"output_dir": folder}))


def test_nothing_stays_of_a_look_at_the_folder(quick_config, tmp_path):
    config = quick_config(output={"output_dir": str(tmp_path / "a" / "b")})
    before = sorted(os.listdir(tmp_path))
    assert check_folder(config) is None
    assert sorted(os.listdir(tmp_path)) == before


def test_the_old_config_stays_where_the_new_one_cannot_be_written(quick_config, monkeypatch, tmp_path):
    write(tmp_path / "run" / "config.yaml", "old")

    def full(config: Config, path: Path) -> None:
        Path(path).write_text("half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("lorajax.training.folder.save_config", full)
    with pytest.raises(UserError, match="run cannot be written: No space left on device"):
        prepare_folder(quick_config(), None)
    assert (tmp_path / "run" / "config.yaml").read_text() == "old"


# --- metrics.jsonl ---


def test_half_a_row_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "eval_loss": 2.0}, {"step": 1, "loss": 1.5}, {"step": 2, "loss": 1.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    assert read_metrics(path) == rows
    assert truncate_metrics(path, 2) == rows
    with contextlib.closing(MetricsLog(path)) as log:
        log.write({"step": 3, "loss": 0.5})
    assert read_metrics(path) == [*rows, {"step": 3, "loss": 0.5}]
    assert truncate_metrics(path, 1) == rows[:2] == read_metrics(path)
    assert read_metrics(tmp_path / "missing.jsonl") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_is_named_when_a_row_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    log = MetricsLog(path)
    with pytest.raises(UserError, match=r"metrics\.jsonl: the row of step 3 .* \(No space left on device\)"):
        log.write({"step": 3, "loss": 1.0})
    log.close()


# --- a loss that is no number ---


@pytest.fixture
def spoil_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """spoil_step(n): the loss of step n is NaN; None: no longer."""
    module = sys.modules["lorajax.training.fit"]
    batches = module.training_batches

    def arm(number: int | None) -> None:
        def spoiled(inputs, position):
            for step, batch in enumerate(batches(inputs, position), 1):
                if step == number:
                    weights = batch.arrays["weights"] * np.nan
                    batch = batch._replace(arrays=batch.arrays | {"weights": weights})
                yield batch

        monkeypatch.setattr(module, "training_batches", spoiled)

    return arm


@pytest.mark.slow
@pytest.mark.parametrize("save_steps", [1, 3])
def test_a_loss_that_is_no_number_stops_the_run(
    save_steps, quick_config, exact_metrics, spoil_step, monkeypatch, tmp_path
):
    config = quick_config(train={"max_steps": 8}, output={"save_steps": save_steps})
    spoil_step(5)
    with pytest.raises(UserError) as error:
        fit(config)
    last = {1: 4, 3: 3}[save_steps]
    kept = tmp_path / "run" / "checkpoints" / str(last)
    assert str(error.value) == f"step 5: the loss is nan; the last good checkpoint is {kept}"
    assert steps(kept.parent)[-1] == last
    assert [row["step"] for row in exact_metrics(tmp_path / "run")] == [1, 2, 3, 4]

    spoil_step(None)
    fit(changed(config, train=AUTO))
    other = fit(changed(config, output={"output_dir": str(tmp_path / "other")})).output_dir
    assert exact_metrics(tmp_path / "run") == exact_metrics(other)
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (other / file).read_bytes()


@pytest.mark.slow
def test_a_run_that_failed_before_its_first_step_is_in_nobodys_way(quick_config, one_layer_folder, tmp_path):
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    for file in one_layer_folder.iterdir():
        (spoiled / file.name).write_bytes(file.read_bytes())
    tensors = load_file(spoiled / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].copy()
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    config = quick_config()
    with pytest.raises(UserError) as error:
        fit(changed(config, model={"path": str(spoiled)}))
    assert str(error.value) == "step 1: the loss is nan; there is no checkpoint yet (output.save_steps)"
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", "config.yaml", "metrics.jsonl"]
    assert fit(config).steps == 4
