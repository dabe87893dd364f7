"""What a compiled function spends its time on: kernels by name, as the GPU's profiler saw them."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def kernel_times(call: Callable[[], Any], calls: int = 3) -> list[dict[str, Any]]:
    """Kernels of one call, longest first; a list of {"ms", "count", "kernel", "op", "source"}.

    Kernels are put together that differ in numbers only: the same operation in each layer. With command
    buffers XLA has graphs in place of kernels (XLA_FLAGS=--xla_gpu_enable_command_buffer=).

    Args:
        call: runs the function; what it returns is waited for.
        calls: how many are profiled; the figures are of one, in milliseconds.
    """
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(call())
        [trace] = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(trace))
        totals: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for plane in data.planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    stats = {str(name): value for name, value in event.stats}
                    key = (
                        _without_numbers(event.name)[:120],
                        _without_numbers(str(stats.get("hlo_op", ""))),
                        _without_numbers(str(stats.get("name", stats.get("tf_op", "")))),
                    )
                    totals[key].append(event.duration_ns)
    rows = [
        {
            "ms": round(sum(each) / calls / 1e6, 3),
            "count": round(len(each) / calls, 1),
            "kernel": kernel,
            "op": op,
            "source": source,
        }
        for (kernel, op, source), each in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=[._\[])\d+|\d+$", "", name)
