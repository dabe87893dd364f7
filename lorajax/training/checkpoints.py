"""Checkpoints of a run: the train state, and where the run stands in its data.

Written by orbax' CheckpointManager, its stable API: the newer one still lives under `experimental`. A
checkpoint is written in the background to a temporary folder that is renamed when it is whole, so a run that
is killed never leaves half of one, and the oldest goes only when the newest is there.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from lorajax.errors import UserError
from lorajax.training.step import TrainState

_STATE, _POSITION = "state", "position"


class Position(NamedTuple):
    """Where a run stands, besides its arrays.

    Attributes:
        step: steps made.
        data: state of the data iterator, JSON-serialisable.
        identity: what must be the same for the run to go on exactly, JSON-serialisable (settings by key).
    """

    step: int
    data: dict[str, Any]
    identity: dict[str, Any]


class Checkpoints:
    """The checkpoints in one folder, `folder/STEP` each.

    Use as a context: leaving it waits for the last write.
    """

    def __init__(self, folder: Path, *, keep: int):
        self._folder = folder
        self._pending: int | None = None
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True, create=True, enable_async_checkpointing=True
            ),
            item_names=(_STATE, _POSITION),
        )

    def __enter__(self) -> Checkpoints:
        logging.getLogger("absl").addFilter(_not_from_orbax)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except UserError:
            if error is None:
                raise
        finally:
            self._manager.close()
            logging.getLogger("absl").removeFilter(_not_from_orbax)

    def save(self, state: TrainState, position: Position) -> None:
        """Start writing a checkpoint; the state may be donated as soon as this returns.

        Raises:
            UserError: this or the previous checkpoint could not be written.
        """
        self.wait()
        self._pending = position.step
        try:
            self._manager.save(
                position.step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(_leaves(state)), position=ocp.args.JsonSave(position._asdict())
                ),
                force=True,
            )
        except Exception as error:
            raise self._failure(error) from error

    def wait(self) -> None:
        """Wait until the last checkpoint is whole.

        Raises:
            UserError: it could not be written.
        """
        if self._pending is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error
        self._pending = None

    def _failure(self, error: Exception) -> UserError:
        step, self._pending = self._pending, None
        kept = [str(self._folder / str(other)) for other in steps(self._folder) if other != step]
        where = f"the newest whole one is {kept[-1]}" if kept else "there is no earlier one"
        return UserError(
            f"{self._folder / str(step)}: the checkpoint could not be written ({_cause(error)}); {where}. "
            "Make room, then go on with --train.resume_from_checkpoint auto"
        )


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdigit())


def read_position(checkpoint: Path) -> Position:
    """The position in a checkpoint.

    Raises:
        UserError: there is no readable checkpoint.
    """
    if not (checkpoint / _POSITION).is_dir():
        raise UserError(
            f"{checkpoint}: not a checkpoint (train.resume_from_checkpoint); a run's are RUN/checkpoints/STEP"
        )
    try:
        return Position(**ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(checkpoint / _POSITION))
    except Exception as error:
        raise UserError(f"{checkpoint}: the checkpoint cannot be read: {_cause(error)}") from error


def restore_state(checkpoint: Path, like: TrainState) -> TrainState:
    """The train state in a checkpoint.

    Args:
        like: a state of the same structure, shapes, dtypes and shardings; shapes will do in place of arrays.

    Raises:
        UserError: it cannot be read, or is of another structure.
    """
    leaves, folder = _leaves(like), checkpoint / _STATE
    try:
        stored = {
            name: array.shape for name, array in ocp.PyTreeCheckpointHandler().metadata(folder).tree.items()
        }
        differing = _differing(stored, {name: leaf.shape for name, leaf in leaves.items()})
        if not differing:
            restored = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
                folder, item=leaves, restore_args=ocp.checkpoint_utils.construct_restore_args(leaves)
            )
    except Exception as error:
        raise UserError(f"{checkpoint}: the checkpoint cannot be read: {_cause(error)}") from error
    if differing:
        more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"{checkpoint} does not fit this run's model and settings: {'; '.join(differing[:4])}{more}"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in leaves])


def delete_after(folder: Path, step: int) -> list[int]:
    """Delete the checkpoints of later steps, newest first; gives their steps."""
    later = [other for other in steps(folder) if other > step]
    for other in reversed(later):
        # Under another name first, so that a kill leaves no half of a checkpoint; orbax clears up after it.
        doomed = (folder / str(other)).rename(folder / f"{other}{ocp.utils.TMP_DIR_SUFFIX}")
        shutil.rmtree(doomed)
    return later


def _leaves(state: TrainState) -> dict[str, jax.Array]:
    """The state's arrays by readable names, so that a checkpoint does not depend on optax' classes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _differing(stored: dict[str, tuple[int, ...]], needed: dict[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with the shapes of stored arrays, a sentence each."""
    wrong = [
        f"{name} has shape {stored[name]}, not {shape}" if name in stored else f"{name} is missing"
        for name, shape in needed.items()
        if stored.get(name) != shape
    ]
    return wrong + [f"{name} is not part of it" for name in stored if name not in needed]


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """False for orbax' own account of a failed write, pages of traceback: our error says it in a line."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _cause(error: BaseException) -> str:
    """What the operating system refused, else the first line of the innermost error."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    if number := re.search(r"os_error_code='(\d+)'", str(error)):  # an error of tensorstore
        return os.strerror(int(number[1]))
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
