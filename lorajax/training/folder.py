"""The folder of a run, and what may happen to one that is there already."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lorajax.config import Config, save_config
from lorajax.errors import UserError
from lorajax.training import checkpoints


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Of train.mode lora."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """Of train.mode full."""
        return self.path / "model"

    @property
    def samples(self) -> Path:
        return self.path / "samples.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def contents(self) -> list[Path]:
        """What is there of a run."""
        mine = (
            self.config,
            self.metrics,
            self.checkpoints,
            self.adapter,
            self.model,
            self.samples,
            self.tensorboard,
        )
        return [path for path in mine if path.exists()]

    def results(self) -> list[Path]:
        """Those of contents that somebody would miss: a run that failed before its first step has none."""
        return [
            path
            for path in self.contents()
            if path in (self.adapter, self.model)
            or (path == self.metrics and path.stat().st_size)
            or (path == self.checkpoints and checkpoints.steps(path))
        ]


def check_folder(config: Config) -> Path | None:
    """Decide what a run does with its folder; nothing in it changes.

    Returns:
        The checkpoint to go on from; None: start at the beginning.

    Raises:
        UserError: the folder cannot be written, it holds another run that is neither continued nor to be
            replaced, replacing that would delete what this run reads, or the checkpoint to go on from is not
            there.
    """
    folder, resume = RunFolder(Path(config.output.output_dir).absolute()), config.train.resume_from_checkpoint
    _check_writable(folder.path)
    if resume == "auto":
        if there := checkpoints.steps(folder.checkpoints):
            return folder.checkpoints / str(there[-1])
        if outcome := [path.name for path in (folder.adapter, folder.model) if path.exists()]:
            raise UserError(
                f"output.output_dir: {folder.path} holds another run ({outcome[0]}), but no checkpoint to go "
                "on from (train.resume_from_checkpoint auto). To replace it, set "
                "--output.overwrite_output_dir true instead; or choose another folder"
            )
        return None
    checkpoint = Path(resume).absolute() if resume else None
    if checkpoint is not None and not checkpoint.is_dir():
        raise UserError(f"train.resume_from_checkpoint: there is no folder {checkpoint}")
    goes_on_here = checkpoint is not None and checkpoint.resolve().parent == folder.checkpoints.resolve()
    if folder.results() and not goes_on_here and not config.output.overwrite_output_dir:
        raise UserError(
            f"output.output_dir: {folder.path} holds another run ({folder.results()[0].name}). To go on "
            "with it, add --train.resume_from_checkpoint auto; to replace it, --output.overwrite_output_dir "
            "true; or choose another folder"
        )
    if config.output.overwrite_output_dir and not goes_on_here:
        _check_deleted(config, folder)
    return checkpoint


def _check_writable(folder: Path) -> None:
    """Raises a UserError where the folder cannot be written or made; nothing stays of the attempt."""
    try:
        if folder.is_file():
            raise UserError(f"output.output_dir: {folder} is a file")
        there = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=there):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"output.output_dir: {folder} cannot be written: {error.strerror or error}")


def _check_deleted(config: Config, folder: RunFolder) -> None:
    """Raises a UserError where overwriting would delete what the config names."""
    model, data, deleted = config.model, config.data, [path.resolve() for path in folder.contents()]
    read = {
        "model.path": model.path,
        "model.tokenizer": model.tokenizer,
        "data.path": data.path,
        "data.eval_path": data.eval_path,
        "data.chat_template": data.chat_template,
        "train.resume_from_checkpoint": config.train.resume_from_checkpoint,
    }
    for key, value in read.items():
        place = Path(value).expanduser().resolve() if value else None
        # A hub id is no place.
        if place is not None and os.path.exists(place) and not {place, *place.parents}.isdisjoint(deleted):
            raise UserError(
                f"output.overwrite_output_dir would delete {value} ({key}); choose another output.output_dir"
            )


def prepare_folder(config: Config, checkpoint: Path | None) -> RunFolder:
    """Make the folder ready for a run that starts, or goes on from a checkpoint (see check_folder).

    config.yaml is the new one, or, where that cannot be written, the old one.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = RunFolder(Path(config.output.output_dir).absolute())
    goes_on_here = checkpoint is not None and checkpoint.resolve().parent == folder.checkpoints.resolve()
    try:
        if config.output.overwrite_output_dir and not goes_on_here:
            for path in folder.contents():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        folder.path.mkdir(parents=True, exist_ok=True)
        unfinished = folder.config.with_suffix(".tmp")
        save_config(config, unfinished)
        unfinished.replace(folder.config)
    except OSError as error:
        raise _unwritable(folder.path, error) from error
    return folder
