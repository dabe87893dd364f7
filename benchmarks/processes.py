"""Runs in processes of their own, so that none finds the memory or the programs of another."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

# Characters of an error.
MOST_TOLD = 1500


def last_json(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The object that a Python script prints on its last line, or {"error": why there is none}."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    *_, last = ["", *re.split(r"^(?=[\w.]*(?:Error|Exception)\b)", done.stderr, flags=re.MULTILINE)[1:]]
    return {"error": last.strip()[:MOST_TOLD] or done.stderr[-MOST_TOLD:]}


class Room:
    """Memory that processes share: who asks for a part of it waits until that is free."""

    def __init__(self, size: float) -> None:
        self._size = self._free = size
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, size: float) -> Iterator[None]:
        """More than there is: all of it."""
        size = min(size, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()
