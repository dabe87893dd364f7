"""What a run reports while it runs: metrics.jsonl, trackers, and how much memory it has used."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from lorajax.errors import UserError


class Tracker(Protocol):
    """A place that metrics go to besides metrics.jsonl."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """metrics.jsonl, one object per line, written through at once; trackers get the same values."""

    def __init__(self, path: Path, trackers: Sequence[Tracker] = ()):
        self._path, self._trackers = path, trackers
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self._path}: the row of step {row['step']} could not be written ({error.strerror}). Make "
                "room, then go on with --train.resume_from_checkpoint auto"
            ) from error
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        for tracker in self._trackers:
            tracker.log(values, row["step"])

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written was reported when it was written
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows


def truncate_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the rows after a step, for a run that goes on from there; gives the rows that stay."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)
    return rows


def check_trackers(names: Sequence[str]) -> None:
    """Raise a UserError for a tracker of output.report_to whose package is not installed."""
    for name in names:
        package = _TRACKERS[name].package
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"output.report_to: {name} needs {package}, which is not installed: "
                "pip install 'lorajax[tracking]'"
            )


def open_trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of output.report_to; config is what they show as the run's settings."""
    return [_TRACKERS[name](folder, config) for name in names]


class _TensorBoard:
    package = "tensorboardX"

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    package = "wandb"

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import wandb

        self._run = wandb.init(dir=str(folder), name=folder.name, config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _WandB}


def peak_memory_bytes() -> int:
    """Most memory used so far: of the first GPU, or, on a CPU, of this process.

    Of a GPU it is what JAX' allocator has given away. Rather than keep less than 128 MiB, it gives all that
    it has: with a small memory.budget the peak may be that much over what is planned.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
