"""Runs in processes of their own, so that none finds the memory or the programs of another."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def last_json(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The object that a Python script prints on its last line, or {"error": why there is none}."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return {"error": errors[-1][:300] if errors else done.stderr[-300:]}
