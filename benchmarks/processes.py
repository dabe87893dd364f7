"""Runs in processes of their own, so that none finds the memory or the programs of another."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
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
