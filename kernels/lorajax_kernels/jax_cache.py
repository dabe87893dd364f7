"""Small results in files beside the programs in JAX' compilation cache, for processes to come."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax


def load(kind: str, key: str) -> Any:
    """What `store` was given for this key; None where there is nothing, or nothing sound."""
    path = _path(kind, key)
    try:
        return None if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def store(kind: str, key: str, value: Any) -> None:
    """Keep a value for a key, if there is a folder to keep it in and the value can be JSON.

    Args:
        kind: name of a folder within the cache's.
        key: all that the value depends on.
    """
    path = _path(kind, key)
    if path is None:
        return
    try:
        text = json.dumps(value)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except (OSError, TypeError):
        pass  # made again next time


def _path(kind: str, key: str) -> Path | None:
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder or "://" in folder:
        return None
    return Path(folder) / kind / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
