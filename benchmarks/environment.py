"""What the figures of a benchmark depend on, for the head of its result file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(*packages: str, commit: str | None = None) -> dict[str, Any]:
    """Date, commit, machine, and versions of Python and of these packages.

    Args:
        commit: of the code, where it runs from a copy that git knows nothing of.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit or _commit(),
        "cores": cores(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


# What the rows of one result have in common.
_SAME = ("commit", "device", "seed")


def known_rows(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier result, if there is one, but for those with an "error".

    Args:
        about: the head of the result that is made now.

    Raises:
        SystemExit: the earlier one is of another commit, device or seed, as far as `about` names them.
    """
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    for name in _SAME:
        if name in about and (about[name] is None or record[name] != about[name]):
            raise SystemExit(f"{path}: its {name} is {record[name]}, not {about[name]}: give another --out")
    return [row for row in record["rows"] if "error" not in row]


def shown_settings(config: Any) -> dict[str, Any]:
    """A lorajax.Config as plain values, without `output`, and files and folders by their names alone."""
    from lorajax.config import as_plain

    settings = as_plain(config)
    for section, key in (("model", "path"), ("model", "tokenizer"), ("data", "path"), ("data", "eval_path")):
        if settings[section][key]:
            settings[section][key] = Path(settings[section][key]).name
    del settings["output"]
    return settings


def _commit() -> str | None:
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    folder = Path(__file__).parent
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
