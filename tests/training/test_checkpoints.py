"""Checkpoints: what is in them, how many there are, and what is said of those that cannot be used."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorajax.config import Config, TrainConfig
from lorajax.errors import UserError
from lorajax.sharding import data_mesh, replicated, shapes
from lorajax.training import checkpoints as checkpoints_module
from lorajax.training import fit
from lorajax.training.checkpoints import (
    Checkpoints,
    Position,
    delete_after,
    read_position,
    restore_state,
    steps,
)
from lorajax.training.fit import _position
from lorajax.training.inputs import prepare
from lorajax.training.optimizer import adamw, learning_rate_schedule
from lorajax.training.step import LossScale, TrainState, init_state


def make_state(rank: int = 2, *, seed: int = 0, columns: int = 3, dtype: str = "float32") -> TrainState:
    """A state of a small adapter; every leaf is random, so that no two are alike."""
    train = TrainConfig()
    shapes = {"layer.lora_a": (rank, columns), "layer.lora_b": (5, rank)}
    trainable = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    optimizer = adamw(train, learning_rate_schedule(train, 10))
    state = init_state(trainable, optimizer, seed=seed, dtype=dtype, tokens_per_step=128)
    rng = np.random.default_rng(seed)
    random = [jnp.asarray(rng.uniform(1, 1000, leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(state)]
    return jax.tree.unflatten(jax.tree.structure(state), random)


def bits(state: TrainState) -> list[tuple[str, bytes]]:
    """Dtype and bytes of every leaf."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    return [(str(array.dtype), array.tobytes()) for array in arrays]


def position(step: int) -> Position:
    return Position(
        step, {"next": step, "nested": {"order": [3, 1, 2]}}, {"train.seed": 42, "lora.alpha": 8.0}
    )


def save(folder: Path, *numbers: int, keep: int = 10, state: TrainState | None = None) -> None:
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step in numbers:
            checkpoints.save(state or make_state(seed=step), position(step))


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = make_state(seed=3, dtype="float16")
    state = state._replace(loss_scale=LossScale(jnp.float32(2.0**-7), jnp.int32(123)))
    save(tmp_path, 7, state=state)
    assert read_position(tmp_path / "7") == position(7)
    restored = restore_state(tmp_path / "7", make_state(seed=4))
    assert bits(restored) == bits(state) != bits(make_state(seed=4))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    like = shapes(make_state(), replicated(data_mesh()))
    assert bits(restore_state(tmp_path / "7", like)) == bits(state)


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    # Of some size, so that the write is still going on when the next step overwrites the buffers.
    state = make_state(rank=64, columns=20_000)
    step = jax.jit(
        lambda state: state._replace(trainable=jax.tree.map(lambda leaf: leaf + 1, state.trainable)),
        donate_argnums=0,
    )
    expected = {}
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        for number in range(1, 4):
            state = step(state)
            expected[number] = bits(state)
            checkpoints.save(state, position(number))
            for _ in range(5):
                state = step(state)
    like = make_state(rank=64, columns=20_000)
    for number, leaves in expected.items():
        assert bits(restore_state(tmp_path / str(number), like)) == leaves


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(keep, tmp_path):
    save(tmp_path, 2, 4, 10, 12, keep=keep)
    assert steps(tmp_path) == [2, 4, 10, 12][-keep:]
    # What another process left counts too, and so does one that was killed while it deleted.
    shutil.rmtree(tmp_path / str(steps(tmp_path)[0]) / "state")
    save(tmp_path, 14, keep=keep)
    assert steps(tmp_path) == [2, 4, 10, 12, 14][-keep:]
    assert sorted(os.listdir(tmp_path)) == sorted(map(str, steps(tmp_path)))


def test_later_checkpoints_go_newest_first_and_never_by_halves(tmp_path, monkeypatch):
    save(tmp_path, 1, 2, 3, 4)

    def killed(folder: Path) -> None:
        (folder / "state" / "_METADATA").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints_module.shutil, "rmtree", killed)
        delete_after(tmp_path, 2)
    assert steps(tmp_path) == [1, 2, 3]
    assert delete_after(tmp_path, 2) == [3]
    save(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "3"]  # the half of 4 is cleared away


def test_no_folder_holds_no_checkpoints(tmp_path):
    assert steps(tmp_path / "missing") == []
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "4").write_text("a file")
    assert steps(tmp_path) == []


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """full_disk(step): the write of that checkpoint fails, when all but its last name is written."""

    def arm(step: int) -> None:
        rename = os.rename

        def failing(source: os.PathLike[str], target: os.PathLike[str]) -> None:
            if Path(target).name == str(step):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            rename(source, target)

        monkeypatch.setattr(os, "rename", failing)

    return arm


def test_a_checkpoint_that_cannot_be_written_is_reported_by_the_next(tmp_path, full_disk):
    save(tmp_path, 1, 2)
    full_disk(3)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(make_state(), position(3))
        with pytest.raises(UserError) as error:
            checkpoints.save(make_state(), position(4))
    assert str(error.value) == (
        f"{tmp_path / '3'}: the checkpoint could not be written (No space left on device); the newest whole "
        f"one is {tmp_path / '2'}. Make room, then go on with --train.resume_from_checkpoint auto"
    )
    assert steps(tmp_path) == [1, 2]  # no old one goes for one that is not there


def test_the_last_checkpoint_is_waited_for(tmp_path, full_disk):
    full_disk(3)
    with pytest.raises(UserError, match=r"/3: the checkpoint could not .*; there is no earlier one\. Make"):
        save(tmp_path, 3)


def test_an_error_is_not_hidden_by_one_of_the_checkpoints(tmp_path, full_disk):
    full_disk(3)
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(make_state(), position(3))
        raise ZeroDivisionError


def test_orbax_leaves_the_account_of_a_failed_write_to_the_error(tmp_path, full_disk, caplog):
    full_disk(3)
    with pytest.raises(UserError):
        save(tmp_path, 3)
    assert caplog.records == []
    logging.getLogger("absl").error("of somebody else")
    assert [record.getMessage() for record in caplog.records] == ["of somebody else"]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    save(tmp_path / "checkpoints", 1)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "1" / "state"):
        with pytest.raises(UserError) as error:
            read_position(path)
        assert str(error.value) == (
            f"{path}: not a checkpoint (train.resume_from_checkpoint); a run's are RUN/checkpoints/STEP"
        )


@pytest.mark.parametrize("damage", ["position/metadata", "state/_METADATA", "state/manifest.ocdbt"])
def test_a_damaged_checkpoint_is_refused(damage, tmp_path):
    save(tmp_path, 1)
    (tmp_path / "1" / damage).write_bytes(b"{")
    with pytest.raises(UserError, match="1: the checkpoint cannot be read: "):
        read_position(tmp_path / "1")
        restore_state(tmp_path / "1", make_state())


def test_a_checkpoint_of_another_structure_is_refused_with_all_that_differs(tmp_path):
    save(tmp_path, 1)
    state = make_state(rank=4)
    other = {"head.weight": jnp.zeros((2, 2)), "layer.lora_a": state.trainable["layer.lora_a"]}
    with pytest.raises(UserError) as error:
        restore_state(tmp_path / "1", state._replace(trainable=other))
    assert str(error.value) == (
        f"{tmp_path / '1'} does not fit this run's model and settings: "
        "trainable/head.weight is missing; "
        "trainable/layer.lora_a has shape (2, 3), not (4, 3); "
        "opt_state/1/mu/layer.lora_a has shape (2, 3), not (4, 3); "
        "opt_state/1/mu/layer.lora_b has shape (5, 2), not (5, 4); and 3 more"
    )
    less = {"layer.lora_a": make_state().trainable["layer.lora_a"]}
    with pytest.raises(UserError, match=r"settings: trainable/layer\.lora_b is not part of it$"):
        restore_state(tmp_path / "1", make_state()._replace(trainable=less))


CONTENTS = ("the training documents (CRC-32)", "the model's weights (fingerprint)")


def forget_contents(checkpoint: Path) -> None:
    """Make it one of a lorajax that knew data by their numbers alone, and no model."""
    file = checkpoint / "position" / "metadata"
    written = json.loads(file.read_text())
    for name in CONTENTS:
        del written["identity"][name]
    file.write_text(json.dumps(written))


def test_other_data_or_another_model_of_the_same_size_are_told_apart(
    quick_config, write_rows, write_llama, make_tokenizer, tmp_path
):
    def asked(answer: str, model: dict | None = None) -> Config:
        path = write_rows([{"prompt": "a", "completion": answer}] * 4, f"{answer}.jsonl")
        return quick_config(data={"path": path}, model=model)

    config = asked("b")
    identity = prepare(config).identity()
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(make_state(), Position(1, {}, identity))
    folder = write_llama(tmp_path / "other", seed=1, num_hidden_layers=1)
    make_tokenizer().save_pretrained(str(folder))
    moved = shutil.copytree(config.model.path, tmp_path / "moved")
    checkpoint, differing = tmp_path / "run" / "checkpoints" / "1", []
    for other in (asked("c"), asked("b", {"path": str(folder)})):
        with pytest.raises(UserError) as error:
            _position(checkpoint, prepare(other).identity(), 4)
        differing.append(str(error.value).removeprefix(f"{checkpoint} is of another run, which this one "))
    for said, name in zip(differing, CONTENTS, strict=True):
        assert re.fullmatch(rf"cannot go on: {re.escape(name)} was \w+, now it is \w+", said)
    assert _position(checkpoint, prepare(asked("b", {"path": str(moved)})).identity(), 4).step == 1
    forget_contents(checkpoint)
    assert _position(checkpoint, prepare(asked("c", {"path": str(folder)})).identity(), 4).step == 1
    # A full run's checkpoint holds all weights.
    full = dataclasses.replace(config, train=dataclasses.replace(config.train, mode="full"))
    assert CONTENTS[1] in identity and CONTENTS[1] not in prepare(full).identity()


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused_with_all_that_differs(quick_config, tmp_path):
    fit(quick_config(output={"save_steps": 2, "save_total_limit": 4}))
    checkpoint = tmp_path / "run" / "checkpoints" / "4"
    resume = {"resume_from_checkpoint": str(checkpoint)}
    changed = quick_config(
        rows=20,
        train=resume | {"seed": 7, "gradient_accumulation_steps": 3},
        lora={"rank": 2, "target_modules": ["q_proj"]},
        data={"max_length": 32},
    )
    with pytest.raises(UserError) as error:
        fit(changed)
    message = str(error.value)
    assert message.startswith(f"{checkpoint} is of another run, which this one cannot go on: ")
    differing = message.removeprefix(f"{checkpoint} is of another run, which this one cannot go on: ")
    assert [part.split(" was ")[0] for part in differing.split("; ")] == [
        "train.seed",
        "train.gradient_accumulation_steps",
        "lora.rank",
        "lora.target_modules",
        "data.max_length",
        "the training documents (number, tokens, target tokens)",
        "the training documents (CRC-32)",
    ]
    assert "train.seed was 42, now it is 7" in message and "lora.rank was 4, now it is 2" in message

    with pytest.raises(
        UserError, match="stands at step 4, but this run has only 3 steps; raise train.max_steps"
    ):
        fit(quick_config(train=resume | {"max_steps": 3}))
    with pytest.raises(UserError, match="there is no folder .*/checkpoints/5"):
        fit(quick_config(train={"resume_from_checkpoint": str(checkpoint.with_name("5"))}))
    with pytest.raises(UserError, match="/run: not a checkpoint"):
        fit(
            dataclasses.replace(
                quick_config(train={"resume_from_checkpoint": str(tmp_path / "run")}),
                output=dataclasses.replace(quick_config().output, output_dir=str(tmp_path / "other")),
            )
        )
    # Nothing of it was lost, and more steps may be made.
    assert steps(checkpoint.parent) == [2, 4]
    assert fit(quick_config(train=resume | {"max_steps": 5})).steps == 5


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(quick_config, write_llama, make_tokenizer, tmp_path):
    fit(quick_config(train={"max_steps": 1}))
    folder = write_llama(tmp_path / "wider", num_hidden_layers=1, intermediate_size=64)
    make_tokenizer().save_pretrained(str(folder))
    wider = quick_config(
        model={"path": str(folder)}, train={"max_steps": 1, "resume_from_checkpoint": "auto"}
    )
    with pytest.raises(UserError, match=r"checkpoints/1 is of another run.*: the model's weights \(finger"):
        fit(wider)
    forget_contents(tmp_path / "run" / "checkpoints" / "1")
    with pytest.raises(UserError, match=r"checkpoints/1 does not fit .* has shape \(2240,\), not \(2432,\)"):
        fit(wider)
