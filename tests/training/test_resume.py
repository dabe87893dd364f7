"""A run that is stopped, killed, or out of disk, and goes on: it ends as one left alone, bit for bit."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from lorajax.command import run_command
from lorajax.config import Config
from lorajax.training import fit
from lorajax.training import step as step_module
from lorajax.training.checkpoints import Checkpoints, steps
from lorajax.training.metrics import read_metrics
from lorajax.training.progress import Progress
from lorajax.training.signals import StopRequest

SERVER = Path(__file__).with_name("train_server.py")


def resumed(config: Config, checkpoint: str | Path = "auto") -> Config:
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, resume_from_checkpoint=str(checkpoint))
    )


def into(config: Config, folder: str | Path) -> Config:
    return dataclasses.replace(config, output=dataclasses.replace(config.output, output_dir=str(folder)))


def weights(folder: Path) -> bytes:
    """What a complete run has learnt, as bytes."""
    [file] = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    return file.read_bytes()


@pytest.fixture
def stop_in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """stop_in_step(n): SIGTERM reaches this process while step n runs."""

    def arm(number: int) -> None:
        started = Progress.step_started

        def started_and_stopped(self: Progress, step: int, *rest) -> None:
            started(self, step, *rest)
            if step == number:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Progress, "step_started", started_and_stopped)

    return arm


@pytest.fixture
def held_by_restores(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """held_by_restores(): a list of the bytes that arrays take, beyond today's, as a state is restored."""
    module = sys.modules["lorajax.training.fit"]

    def held() -> int:
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    def arm() -> list[int]:
        before, found, restore = held(), [], module.restore_state

        def restore_state(*arguments):
            found.append(held() - before)
            return restore(*arguments)

        monkeypatch.setattr(module, "restore_state", restore_state)
        return found

    return arm


# Packing, shuffling and several epochs are at work in all of them. grain packs 64 rows at once, those of 16
# steps: step 7 is among the first of them, and the runs end among the next.
RUNS = {
    "lora": {
        "lora": {"dropout": 0.2},
        "train": {
            "gradient_accumulation_steps": 2,
            "max_steps": 20,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 3,
            "eval_steps": 3,
        },
    },
    "full": {
        "train": {
            "mode": "full",
            "gradient_accumulation_steps": 2,
            "max_steps": -1,
            "num_train_epochs": 12,
            "learning_rate": 1e-3,
            "eval_steps": 3,
        },
    },
    "float16": {
        "model": {"dtype": "float16"},
        "lora": {"dropout": 0.2, "target_modules": ["q_proj", "down_proj"]},
        "train": {"per_device_train_batch_size": 4, "max_steps": 20},
    },
}


@pytest.fixture
def run(quick_config) -> Callable[[str], Config]:
    """run(kind): the config of one of RUNS."""

    def make(kind: str) -> Config:
        output = {"save_steps": 4, "save_total_limit": 10}
        evaluated = "eval_steps" in RUNS[kind]["train"]
        return quick_config(data={"eval_fraction": 0.2 * evaluated}, output=output, **RUNS[kind])

    return make


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_was_stopped_goes_on_exactly(
    kind, run, exact_metrics, stop_in_step, held_by_restores, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(step_module, "_GROWTH_STEPS", 6)  # so that float16's loss scale changes several times
    alone = fit(into(run(kind), tmp_path / "alone"))
    expected = exact_metrics(alone.output_dir)
    assert alone.steps >= 18
    if kind == "float16":
        assert len({row["loss_scale"] for row in expected if "loss" in row}) >= 3

    stop_in_step(7)
    stopped = fit(run(kind))
    assert (stopped.stopped_by, stopped.steps) == (signal.SIGTERM, 7)
    assert steps(stopped.output_dir / "checkpoints") == [4, 7]
    assert not (stopped.output_dir / "adapter").exists() and not (stopped.output_dir / "model").exists()
    assert exact_metrics(stopped.output_dir) == [row for row in expected if row["step"] <= 7]
    assert "stopped by SIGTERM after step 7: its checkpoint is in" in capsys.readouterr().out

    restores = held_by_restores()
    complete = fit(resumed(run(kind)))
    assert (complete.stopped_by, complete.steps) == (None, alone.steps)
    # What the checkpoint's state takes the place of has gone by then.
    assert len(restores) == 1 and (kind != "full" or restores[0] < len(weights(alone.output_dir)) / 2)
    assert exact_metrics(complete.output_dir) == expected
    assert weights(complete.output_dir) == weights(alone.output_dir)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", (0.0, 0.2))
def test_another_layout_is_named_where_dropout_depends_on_it(dropout, quick_config, stop_in_step, caplog):
    config = quick_config(lora={"dropout": dropout}, train={"max_steps": 3})
    stop_in_step(2)
    fit(config)
    cut = dataclasses.replace(config, memory=dataclasses.replace(config.memory, mlp_chunks=2))
    with caplog.at_level(logging.WARNING, "lorajax"):
        assert fit(resumed(cut)).steps == 3
    said = [message for message in caplog.messages if "dropout" in message]
    assert len(said) == (dropout > 0) and all("1 rows in 1 parts, this one" in one for one in said)


@pytest.mark.slow
def test_a_run_goes_on_from_its_last_checkpoint_an_older_one_and_none(
    run, exact_metrics, monkeypatch, capsys
):
    config = run("lora")
    complete = fit(config)
    expected, adapter = exact_metrics(complete.output_dir), weights(complete.output_dir)
    checkpoints, outcome = complete.output_dir / "checkpoints", complete.output_dir / "adapter"
    assert steps(checkpoints) == [4, 8, 12, 16, 20]

    # Killed after its last step, before the adapter was written.
    shutil.rmtree(outcome)
    again = fit(resumed(config))
    assert (again.steps, again.seconds) == (20, 0.0)
    assert exact_metrics(complete.output_dir) == expected
    assert weights(complete.output_dir) == adapter

    # From an older checkpoint, and killed as soon as the later ones are dropped.
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys.modules["lorajax.training.fit"], "truncate_metrics", interrupted)
        fit(resumed(config, checkpoints / "8"))
    assert "deleted the checkpoints of later steps: 12, 16, 20" in capsys.readouterr().out
    assert steps(checkpoints) == [4, 8]
    fit(resumed(config))
    assert f"going on from {checkpoints / '8'}, step 8" in capsys.readouterr().out
    assert exact_metrics(complete.output_dir) == expected
    assert weights(complete.output_dir) == adapter
    assert steps(checkpoints) == [4, 8, 12, 16, 20]

    # Killed in step 3: no checkpoint yet, but an evaluation and half a row.
    shutil.rmtree(outcome)
    shutil.rmtree(checkpoints)
    metrics = complete.output_dir / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(rows[:3]) + rows[3][:20])
    fit(resumed(config))
    assert exact_metrics(complete.output_dir) == expected
    assert weights(complete.output_dir) == adapter
    assert [row["step"] for row in expected[:5]] == [0, 1, 2, 3, 3]


@pytest.mark.slow
def test_a_signal_during_the_last_checkpoint_changes_nothing(run, monkeypatch):
    wait, late = Checkpoints.wait, []

    def signalled(self: Checkpoints) -> None:
        if self._pending == 20:
            signal.raise_signal(signal.SIGTERM)
        wait(self)

    monkeypatch.setattr(Checkpoints, "wait", signalled)
    before = signal.signal(signal.SIGTERM, lambda *_: late.append("would have killed it"))
    try:
        complete = fit(run("lora"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (complete.stopped_by, complete.steps, late) == (None, 20, [])
    assert steps(complete.output_dir / "checkpoints")[-1] == 20
    assert weights(complete.output_dir)


def interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_answered_and_the_second_interrupts(second, capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.signal is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal is signal.SIGTERM
        said = "SIGTERM: stopping after this step, with a checkpoint; again: at once, without one"
        assert capfd.readouterr().err.strip() == said
        assert run_command(lambda arguments: signal.raise_signal(second) or 0) == 128 + second
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert capfd.readouterr().err == ""


def test_a_signal_whose_answer_nobody_reads_is_heeded(monkeypatch):
    def closed(*arguments: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", closed)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.signal is signal.SIGTERM


def test_a_run_in_another_thread_leaves_signals_alone():
    seen = []

    def run() -> None:
        with StopRequest() as stop:
            seen.append((stop.signal, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(None, signal.getsignal(signal.SIGTERM))]


# --- from outside: processes that are killed ---


class Attempt(NamedTuple):
    """A process that trains."""

    pid: int
    log: Path


class Trainer:
    """Starts `python -m lorajax.train CONFIG ...` processes, one at a time."""

    def __init__(self, config: Path, model: str, environment: dict[str, str]):
        self._config = config
        self._server = subprocess.Popen(
            [sys.executable, SERVER, model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, folder: Path, *arguments: str) -> Attempt:
        """A run that begins in a folder, or goes on in it."""
        log = folder.with_suffix(".log")
        run = [str(self._config), "--output.output_dir", str(folder)]
        line = [str(log), *run, "--train.resume_from_checkpoint", "auto", *arguments]
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(line) + "\n")
        self._server.stdin.flush()
        return Attempt(self._answer(), log)

    def status(self) -> int:
        """Exit status of the run started last, once it has ended."""
        return self._answer()

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def _answer(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


class Alone(NamedTuple):
    """What a run left alone came to."""

    rows: list[dict]
    weights: bytes


STEPS = 36


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla-of-processes")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "OPENBLAS_NUM_THREADS": "1",  # its threads, which nothing here needs, would not survive a fork
    }


@pytest.fixture(scope="module")
def config_file(one_layer_folder, tmp_path_factory) -> Path:
    """A run with dropout, accumulation, evaluation, and a checkpoint every other step."""
    folder = tmp_path_factory.mktemp("processes")
    words, rng = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"), random.Random(0)
    rows = [
        {"prompt": rng.choice(words), "completion": " ".join(rng.choices(words, k=rng.randint(1, 9)))}
        for _ in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        f"""
model: {{path: {one_layer_folder}, dtype: float32}}
lora: {{rank: 64, dropout: 0.1}}
data: {{path: rows.jsonl, eval_fraction: 0.2, max_length: 64, cache_dir: cache}}
train: {{per_device_train_batch_size: 2, gradient_accumulation_steps: 2, max_steps: {STEPS}, eval_steps: 7}}
memory: {{checkpointing: none}}
output: {{output_dir: run, save_steps: 2}}
"""
    )
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def trainer(config_file, one_layer_folder, environment) -> Iterator[Trainer]:
    trainer = Trainer(config_file, str(one_layer_folder), environment)
    yield trainer
    trainer.close()


@pytest.fixture(scope="module")
def alone(trainer, exact_metrics, tmp_path_factory) -> Alone:
    folder = tmp_path_factory.mktemp("alone") / "run"
    attempt = trainer.start(folder, "--output.save_steps", "0")
    assert trainer.status() == 0, attempt.log.read_text()
    return Alone(exact_metrics(folder), weights(folder))


@pytest.fixture
def assert_as_alone(trainer, alone, exact_metrics):
    """assert_as_alone(folder): the run in it goes on to its end, and ends as one left alone."""

    def check(folder: Path) -> None:
        before = steps(folder / "checkpoints")
        attempt = trainer.start(folder, "--output.save_steps", "0")
        assert trainer.status() == 0, attempt.log.read_text()
        assert exact_metrics(folder) == alone.rows
        assert weights(folder) == alone.weights
        assert sorted(os.listdir(folder / "checkpoints"), key=int) == [str(before[-1]), str(STEPS)]

    return check


def wait_for(what: Callable[[], bool], attempt: Attempt, *, pause: float = 0.003) -> None:
    """Wait until something is so in a run that goes on."""
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline, f"waited in vain\n{attempt.log.read_text()}"
        try:
            os.kill(attempt.pid, 0)
        except ProcessLookupError:
            pytest.fail(f"the run ended before it was to\n{attempt.log.read_text()}")
        time.sleep(pause)


def new_steps(folder: Path) -> Callable[[], int]:
    """Made now, before a run goes on in a folder; afterwards it gives the steps that the run has logged."""
    metrics = folder / "metrics.jsonl"
    start = max(steps(folder / "checkpoints"), default=0)
    # A run that goes on begins with a new file, without the rows after its checkpoint.
    stale = metrics.stat().st_ino if metrics.exists() else None

    def count() -> int:
        if not metrics.exists() or metrics.stat().st_ino == stale:
            return 0
        return max((row["step"] for row in read_metrics(metrics)), default=start) - start

    return count


def unfinished(folder: Path) -> bool:
    """Whether a checkpoint is being written (or was, when the run was killed)."""
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any(not name.isdigit() for name in os.listdir(checkpoints))


KILLS = [
    *["as a checkpoint begins"] * 2,
    *["in a checkpoint"] * 2,
    *["in a step"] * 1,
    *["in the start"] * 1,
]


def wait_for_moment(
    kind: str, rng: random.Random, folder: Path, made: Callable[[], int], attempt: Attempt
) -> None:
    """Wait for a random moment of a kind in KILLS; no more than 6 steps go by."""
    if kind == "in the start":
        latest = time.monotonic() + rng.uniform(0, 2)
        wait_for(lambda: time.monotonic() > latest or made() >= 3, attempt)
    elif kind == "in a step":
        logged = rng.randint(1, 4)
        wait_for(lambda: made() >= logged, attempt)
        time.sleep(rng.uniform(0, 0.05))
    else:
        # The run's first checkpoint has cleared away what the last kill left; from then on, one is its own.
        logged = rng.choice((3, 5))
        wait_for(lambda: made() >= logged, attempt)
        wait_for(lambda: unfinished(folder), attempt, pause=0)
        time.sleep(rng.uniform(0, 0.1) if kind == "in a checkpoint" else 0)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_exactly(trainer, assert_as_alone, tmp_path):
    seed = random.randrange(2**32)
    print("seed of the moments:", seed)
    rng = random.Random(seed)
    folder, in_checkpoint = tmp_path / "run", 0
    for kind in rng.sample(KILLS, len(KILLS)):
        made = new_steps(folder)
        attempt = trainer.start(folder)
        wait_for_moment(kind, rng, folder, made, attempt)
        os.kill(attempt.pid, signal.SIGKILL)
        assert trainer.status() == -signal.SIGKILL
        in_checkpoint += "checkpoint" in kind and unfinished(folder)
        print(f"killed {kind}; checkpoints {steps(folder / 'checkpoints')}, unfinished: {unfinished(folder)}")
    assert in_checkpoint >= 2
    assert_as_alone(folder)


@pytest.mark.slow
def test_sigterm_and_ctrl_c_write_a_checkpoint_and_leave(
    trainer, assert_as_alone, exact_metrics, alone, tmp_path
):
    folder = tmp_path / "run"
    for number in (signal.SIGTERM, signal.SIGINT):
        logged = new_steps(folder)
        attempt = trainer.start(folder, "--output.save_steps", "0")
        wait_for(lambda logged=logged: logged() >= 3, attempt)
        os.kill(attempt.pid, number)
        assert trainer.status() == 128 + number
        stopped = steps(folder / "checkpoints")[-1]
        assert f"stopped by {number.name} after step {stopped}: its checkpoint" in attempt.log.read_text()
        assert exact_metrics(folder) == [row for row in alone.rows if row["step"] <= stopped]
        assert not unfinished(folder) and not (folder / "adapter").exists()
    assert_as_alone(folder)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process' files")
def test_a_full_disk_during_a_checkpoint_keeps_the_last_one(trainer, assert_as_alone, tmp_path):
    folder = tmp_path / "run"
    attempt = trainer.start(folder)
    wait_for(lambda: len(steps(folder / "checkpoints")) > 0, attempt)
    # No file may grow beyond this from here on; the adapter's weights alone are larger.
    resource.prlimit(attempt.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    assert trainer.status() == 2
    [error] = [line for line in attempt.log.read_text().splitlines() if line.startswith("error: ")]
    kept = steps(folder / "checkpoints")[-1]
    assert f"{folder / 'checkpoints' / str(kept + 2)}: the checkpoint could not be written (File too" in error
    assert f"; the newest whole one is {folder / 'checkpoints' / str(kept)}. Make room, then go on" in error
    assert_as_alone(folder)
