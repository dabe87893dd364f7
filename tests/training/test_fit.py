"""A run from beginning to end: what it writes, what it learns, what it compiles, and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from lorajax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OutputConfig,
    TrainConfig,
    as_plain,
    load_config,
    save_config,
)
from lorajax.data import load_tokenizer
from lorajax.errors import UserError
from lorajax.generation import generate
from lorajax.lora.config import LoRAConfig
from lorajax.lora.peft import load_adapter
from lorajax.models.checkpoint import load
from lorajax.training import Result, Sample, fit
from lorajax.training.fit import _closing_line, dry_run
from lorajax.training.folder import RunFolder
from lorajax.training.inputs import prepare, training_batches
from lorajax.training.metrics import read_metrics
from lorajax.training.progress import Progress

COMPILED = "/jax/core/compile/backend_compile_duration"
STARTED = "a step has started"
MAX_LENGTH = 64


def question(number: int) -> str:
    return f"Question {number}?"


def answer(number: int) -> str:
    return f"The answer is {3 * number}." * (1 + number % 3)


def dialogue(number: int) -> dict:
    return {
        "messages": [
            {"role": "user", "content": question(number)},
            {"role": "assistant", "content": answer(number)},
        ]
    }


@pytest.fixture
def numbered(write_rows):
    """numbered(numbers): the path of a file with these dialogues."""
    return lambda numbers: write_rows([dialogue(number) for number in numbers], "numbered.jsonl")


@contextlib.contextmanager
def recorded_compilations():
    """A list that names, in order, each program that is compiled, and STARTED for each step."""
    jax.clear_caches()  # so that no program is there already, from another test
    events: list[str] = []

    def compiled(event: str, seconds: float, **details) -> None:
        if event == COMPILED:
            events.append(details["fun_name"])

    original = Progress.step_started

    def started(self, *arguments) -> None:
        events.append(STARTED)
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "step_started", started)
        jax.monitoring.register_event_duration_secs_listener(compiled)
        try:
            yield events
        finally:
            jax.monitoring.unregister_event_duration_listener(compiled)


class Run(NamedTuple):
    config: Config
    result: Result
    events: list[str]
    printed: str


@pytest.fixture(scope="module")
def run(llama_folder, tmp_path_factory) -> Run:
    """Six steps with everything on: evaluation and checkpoints every two, samples, a tracker."""
    folder = tmp_path_factory.mktemp("fit")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(dialogue(number)) + "\n" for number in range(40)))
    config = Config(
        model=ModelConfig(path=str(llama_folder), dtype="float32"),
        lora=LoRAConfig(rank=4, alpha=8, dropout=0.1, target_modules=("q_proj", "v_proj", "down_proj")),
        data=DataConfig(
            path=str(data), eval_fraction=0.25, max_length=MAX_LENGTH, cache_dir=str(folder / "cache")
        ),
        train=TrainConfig(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=2e-2,
            max_steps=6,
            warmup_steps=1,
            eval_steps=2,
        ),
        output=OutputConfig(
            output_dir=str(folder / "run"),
            save_steps=2,
            save_total_limit=2,
            sample_prompts=[question(1), question(2)],
            sample_max_new_tokens=8,
            report_to=["tensorboard"] if importlib.util.find_spec("tensorboardX") else [],
        ),
    )
    printed = io.StringIO()
    with recorded_compilations() as events, contextlib.redirect_stdout(printed):
        result = fit(config)
    return Run(config, result, events, printed.getvalue())


def test_every_step_runs_the_program_of_the_first(run):
    """Evaluation is compiled for step 0; nothing is compiled later, not by checkpoints either."""
    assert run.events.count(STARTED) == 6
    before, after = run.events[: run.events.index(STARTED)], run.events[run.events.index(STARTED) :]
    assert after == [STARTED] * 6
    assert before.count("jit(step)") == before.count("jit(evaluate)") == 1


def test_what_a_run_reports(run):
    result = run.result
    assert (result.steps, result.stopped_by) == (6, None)
    assert result.output_dir == Path(run.config.output.output_dir)
    assert result.peak_memory_bytes > 0
    assert result.metrics == read_metrics(result.output_dir / "metrics.jsonl")
    training = [row for row in result.metrics if "loss" in row]
    evaluation = [row for row in result.metrics if "eval_loss" in row]
    assert len(training) + len(evaluation) == len(result.metrics)
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in evaluation] == [0, 2, 4, 6]
    assert set(training[0]) == {
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens",
        "target_tokens",
        "step_seconds",
        "tokens_per_second",
        "peak_memory_bytes",
    }
    rates = [row["learning_rate"] for row in training]
    np.testing.assert_allclose(rates, 2e-2 * np.array([0, 5, 4, 3, 2, 1]) / 5, rtol=1e-6)
    assert training[-1]["loss"] < 0.9 * training[0]["loss"]
    assert result.seconds == pytest.approx(sum(row["step_seconds"] for row in training))
    tokens = sum(row["tokens"] for row in training)
    assert result.tokens_per_second == pytest.approx(tokens / result.seconds)


def test_losses_are_means_over_the_target_tokens(run):
    """Held-out losses before and after, against plain logits of one document at a time."""
    model = load(run.config.model.path, dtype="float32")
    inputs = prepare(run.config)

    def mean_loss(documents, model) -> float:
        total, count = 0.0, 0
        for tokens, mask in documents:
            padded = np.zeros((1, MAX_LENGTH), np.int32)
            padded[0, : len(tokens)] = tokens
            logits = np.asarray(model(padded), np.float64)[0, : len(tokens) - 1]
            losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[1:, None], 1)[:, 0]
            total += losses[mask[1:]].sum()
            count += mask[1:].sum()
        return total / count

    evaluation = [row for row in run.result.metrics if "eval_loss" in row]
    held_out = inputs.documents.eval
    assert len(held_out) == 10 and evaluation[0]["eval_target_tokens"] == held_out.targets.sum()
    assert evaluation[0]["eval_loss"] == pytest.approx(mean_loss(held_out, model), rel=1e-5)
    load_adapter(model, run.result.output_dir / "adapter")
    assert evaluation[-1]["eval_loss"] == pytest.approx(mean_loss(held_out, model), rel=1e-5)
    assert evaluation[-1]["eval_loss"] < 0.9 * evaluation[0]["eval_loss"]


def test_the_run_folder(run):
    folder = run.result.output_dir
    expected = {"config.yaml", "metrics.jsonl", "checkpoints", "adapter", "samples.json"}
    assert {path.name for path in folder.iterdir()} == expected | set(run.config.output.report_to)
    assert load_config(folder / "config.yaml") == run.config
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["4", "6"]
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert settings["base_model_name_or_path"] == run.config.model.path


def test_the_adapter_gives_the_logits_of_the_trained_model(run):
    tokens = np.random.default_rng(0).integers(0, 350, (2, 9))
    base = load(run.config.model.path, dtype="float32")
    before = np.asarray(base(tokens))
    expected = np.asarray(run.result.model(tokens))
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_array_equal(load_adapter(base, run.result.output_dir / "adapter")(tokens), expected)


def test_samples_are_answers_before_and_after(run):
    prompts, tokenizer = run.config.output.sample_prompts, load_tokenizer(run.config.model.path)
    base = load(run.config.model.path, dtype="float32")
    before = generate(base, tokenizer, prompts, max_new_tokens=8)
    after = generate(run.result.model, tokenizer, prompts, max_new_tokens=8)
    assert before != after
    expected = [Sample(*texts) for texts in zip(prompts, before, after, strict=True)]
    assert run.result.samples == expected
    written = json.loads((run.result.output_dir / "samples.json").read_text())
    assert [Sample(**row) for row in written] == expected
    assert all(text in run.printed for text in (*before, *after))


def test_what_a_run_prints(run):
    _, result, _, printed = run
    inputs = prepare(run.config)
    trainable = 2 * 4 * ((32 + 64) + (32 + 32) + (48 + 32))  # layers, rank, q_proj + v_proj + down_proj
    frozen = load_file(Path(run.config.model.path) / "model.safetensors")
    total = trainable + sum(tensor.size for tensor in frozen.values())
    assert f"trainable  {trainable:,} of {total:,} parameters" in printed
    assert f"{inputs.documents.train_stats.documents} documents of 30 rows" in printed
    assert "attention  xla (chosen automatically; not triton: " in printed
    assert "4 rows = 2 a device x 2 accumulated x 1 devices: 256 tokens" in printed
    losses = [row["eval_loss"] for row in result.metrics if "eval_loss" in row]
    assert f"step 2: eval_loss {losses[1]:.4f}" in printed
    assert f"held-out loss {losses[0]:.3f} -> {losses[-1]:.3f}" in printed
    assert f"{result.tokens_per_second:,.0f} tokens/s" in printed
    assert str(result.output_dir / "adapter") in printed


def test_a_peak_that_is_not_the_runs_own_is_called_so(run):
    """What a process has used at most never falls."""
    folder = RunFolder(run.result.output_dir)
    for earlier, said in ((5, False), (9, True)):
        result = dataclasses.replace(
            run.result, peak_memory_bytes=9 * 2**30, earlier_peak_memory_bytes=earlier * 2**30
        )
        line = _closing_line(result, folder, run.config)
        assert "peak memory 9.00G" in line and ("before the run's first step" in line) == said


def test_attention_that_cannot_serve_is_refused_before_anything_is_loaded(quick_config):
    config = quick_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="cudnn"))
    with pytest.raises(UserError, match="model.attention: .*'cudnn' cannot serve: .*; set it to auto"):
        prepare(config)


def test_the_bound_on_segments_counts_the_padding(quick_config):
    assert prepare(quick_config(data={"max_segments": 7})).max_segments == 8
    assert prepare(quick_config(data={"max_segments": 7, "packing": False})).max_segments == 2


def test_tensorboard_gets_the_metrics(run):
    pytest.importorskip("tensorboardX", reason="tensorboard is an optional tracker")
    files = list((run.result.output_dir / "tensorboard").glob("events.*"))
    written = b"".join(file.read_bytes() for file in files)
    assert written.count(b"eval_loss") == 4 and written.count(b"grad_norm") == 6


# --- full mode ---

ANSWERS = {
    "hello": "thanks, you are welcome",
    "What is the capital of France?": "The capital of France is Paris.",
    "Who jumps?": "The quick brown fox jumps over the lazy dog.",
}


@pytest.mark.slow
def test_full_mode_learns_answers_and_where_they_end(quick_config, one_layer_folder, write_rows, tmp_path):
    """From config.json alone. The tokenizer pads with EOS, and yet the EOS of each answer is learnt."""
    folder = tmp_path / "model"
    shutil.copytree(one_layer_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    rows = [{"instruction": asked, "output": answered} for asked, answered in ANSWERS.items()]
    config = quick_config(
        model={"path": str(folder)},
        data={"path": write_rows(rows, "answers.jsonl")},
        train={
            "mode": "full",
            "init": "random",
            "per_device_train_batch_size": 4,
            "max_steps": 60,
            "learning_rate": 1e-2,
        },
        output={"logging_steps": 40, "sample_prompts": list(ANSWERS), "sample_max_new_tokens": 48},
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    with contextlib.closing(training_batches(prepare(config), None)) as batches:
        batch = next(batches).arrays
    ends = np.asarray(batch["targets"] == tokenizer.eos_token_id) & np.asarray(batch["weights"] == 1)
    documents = np.asarray(batch["segment_ids"].max(axis=-1)).sum()
    assert ends.sum() == documents >= 3

    result = fit(config)
    assert {sample.prompt: sample.after for sample in result.samples} == ANSWERS
    assert all(sample.before != sample.after for sample in result.samples)
    assert [row["step"] for row in result.metrics] == [1, 40, 60]

    written = result.output_dir / "model"
    assert not (result.output_dir / "adapter").exists()
    loaded = load(written, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, 350, (2, 9))
    np.testing.assert_array_equal(loaded(tokens), result.model(tokens))
    answers = generate(loaded, load_tokenizer(written), list(ANSWERS), max_new_tokens=48)
    assert answers == list(ANSWERS.values())


# --- packing, evaluation at the end, a config from a file ---


@pytest.mark.slow
def test_packing_changes_the_rows_but_not_the_loss(quick_config, numbered, tmp_path):
    path = numbered(range(8))
    results = []
    for packing in (True, False):
        config = quick_config(
            data={"path": path, "packing": packing, "eval_path": path},
            train={"per_device_train_batch_size": 8, "max_steps": -1, "num_train_epochs": 1},
            output={"output_dir": str(tmp_path / str(packing))},
        )
        save_config(config, tmp_path / "config.yaml")
        with recorded_compilations() as events:
            results.append(fit(tmp_path / "config.yaml"))
        # Without eval_steps, evaluation comes after the last step; its program is there before the first.
        assert events[events.index(STARTED) :] == [STARTED] and "jit(evaluate)" in events
        assert ["eval_loss" in row for row in results[-1].metrics] == [False, True]
    packed, separate = ([row for row in result.metrics] for result in results)
    assert packed[0]["target_tokens"] == separate[0]["target_tokens"] > 0
    assert packed[0]["loss"] == pytest.approx(separate[0]["loss"], rel=1e-5)
    assert packed[0]["grad_norm"] == pytest.approx(separate[0]["grad_norm"], rel=1e-5)
    assert packed[1]["eval_loss"] == pytest.approx(separate[1]["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("packing, epochs, steps", [(False, 1, 4), (False, 3, 11), (True, 1, 2)])
def test_steps_of_epochs(packing, epochs, steps, quick_config, write_rows):
    """Seven documents an epoch, two rows a step: one document on a row, or two."""
    config = quick_config(
        data={
            "path": write_rows([{"prompt": "hello ", "completion": "thanks"}] * 7, "short.jsonl"),
            "packing": packing,
            "max_segments": 2,
        },
        train={"per_device_train_batch_size": 2, "max_steps": -1, "num_train_epochs": epochs},
    )
    inputs = prepare(config)
    assert inputs.total_steps == steps
    with contextlib.closing(training_batches(inputs, None)) as batches:
        assert len(list(batches)) == steps


# --- before anything is written ---


def test_a_dry_run_shows_config_data_and_mask(quick_config, numbered, capsys):
    config = quick_config(data={"path": numbered([1, 2]), "packing": False})
    text = dry_run(config)
    settings, statistics, row = text.split("\n\n")
    assert yaml.safe_load(settings) == as_plain(config)
    assert "2 documents of 2 rows" in statistics
    assert f"steps  {config.train.max_steps}" in statistics
    shown = [
        f"<|im_start|>user\n{question(number)}<|im_end|>\n<|im_start|>assistant\n⟦{answer(number)}<|im_end|>⟧\n"
        for number in (1, 2)
    ]
    assert row.split("--- document 1\n")[1] in shown
    assert not Path(config.output.output_dir).exists()


def test_a_tracker_that_is_not_installed(quick_config, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name)
    )
    config = quick_config(output={"report_to": ["wandb"]})
    for run in (fit, dry_run):
        with pytest.raises(UserError, match=r"output.report_to: wandb .* pip install 'lorajax\[tracking\]'"):
            run(config)
    assert not Path(config.output.output_dir).exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"output": {"output_dir": "/proc/run"}}, "output.output_dir: /proc/run cannot be written"),
        (
            {"train": {"resume_from_checkpoint": str(Path(__file__).parent)}},
            r"/training: not a checkpoint \(train.resume_from_checkpoint\)",
        ),
        (
            {"output": {"sample_prompts": ["hello", "hello " * 60], "sample_max_new_tokens": 80}},
            "output.sample_prompts, output.sample_max_new_tokens: prompt 2: .* over the model's context of",
        ),
    ],
    ids=["folder", "checkpoint", "prompts"],
)
def test_a_dry_run_refuses_what_a_run_does(change, message, quick_config):
    for run in (dry_run, fit):
        with pytest.raises(UserError, match=message):
            run(quick_config(**change))


def test_a_dry_run_refuses_another_runs_checkpoint(quick_config, tmp_path):
    config = quick_config(train={"resume_from_checkpoint": "auto"})
    identity = prepare(config).identity()
    for step, position in enumerate((identity, identity | {"train.seed": 7}), 1):
        folder = tmp_path / "run" / "checkpoints" / str(step) / "position"
        folder.mkdir(parents=True)
        (folder / "metadata").write_text(json.dumps({"step": step, "data": {}, "identity": position}))
        if step == 1:
            assert "The first row" in dry_run(config)
    with pytest.raises(
        UserError, match="checkpoints/2 is of another run, .*: train.seed was 7, now it is 42"
    ):
        dry_run(config)


EMPTY_MARKS = (
    "{% for message in messages %}{% generation %}{% endgeneration %}{{ message['content'] }}{% endfor %}"
)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            "small model",
            "the tokenizer has 350 tokens, but the model only 300 embeddings; set model.tokenizer",
        ),
        ({"data": {"max_length": 129}}, "data.max_length is 129, but the model's context is 128 tokens"),
        ({"train": {"warmup_steps": 5}}, r"train.warmup_steps \(5\) is more than train.max_steps \(4\)"),
        (
            {"train": {"warmup_steps": 5, "max_steps": -1, "per_device_train_batch_size": 24}},
            "train.warmup_steps is 5, but the run has 1 steps; lower it",
        ),
        ("no rows", r"data.path: .*empty.jsonl holds no rows"),
        ("no targets", r"data.path: every label is masked: none of the 24 rows"),
        ({"data": {"path": "no/such/folder/rows.jsonl"}}, "data.path: .*rows.jsonl"),
        ({"lora": {"target_modules": ("query",)}}, "lora.target_modules: no linear layer is named query"),
        ({"data": {"eval_fraction": 1.5}}, "data.eval_fraction must be at least 0 and below 1"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused(
    change, message, quick_config, write_llama, make_tokenizer, tmp_path
):
    if change == "small model":
        folder = write_llama(tmp_path / "small", vocab_size=300, num_hidden_layers=1)
        make_tokenizer().save_pretrained(str(folder))
        change = {"model": {"path": str(folder)}}
    elif change == "no rows":
        (tmp_path / "empty.jsonl").write_text("")
        change = {"data": {"path": str(tmp_path / "empty.jsonl")}}
    elif change == "no targets":
        (tmp_path / "marks.jinja").write_text(EMPTY_MARKS)
        change = {"data": {"chat_template": str(tmp_path / "marks.jinja")}}
    config = quick_config(**change)
    with pytest.raises(UserError, match=message):
        fit(config)
    assert not Path(config.output.output_dir).exists()


def test_missing_weights_are_found_before_anything_is_compiled(
    quick_config, write_llama, make_tokenizer, tmp_path
):
    folder = write_llama(tmp_path / "model", num_hidden_layers=1)
    make_tokenizer().save_pretrained(str(folder))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with recorded_compilations() as events, pytest.raises(UserError, match=r"up_proj\.weight"):
        fit(quick_config(model={"path": str(folder)}))
    assert "jit(step)" not in events
