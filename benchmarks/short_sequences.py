"""Short rows in ever larger batches: peak memory and tokens/s of each way to keep activations.

    python benchmarks/short_sequences.py --budget 16GiB --out result.json --plot result.png
    python benchmarks/short_sequences.py --draw result.json --plot result.png  # measure nothing

Steps as in train_step.py, on rows of 512 tokens, in batches of 1, 2, 4 ... 256 rows: everything kept (none),
layers computed again (full), their inputs in host memory (offload), and what is planned for a budget (auto).
A policy is left out of larger batches once one does not fit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from environment import environment
from train_step import in_process_of_its_own

POLICIES = ("none", "full", "offload", "auto")
LENGTH, LARGEST = 512, 256
PACKAGES = ("lorajax", "jax", "jaxlib", "flax", "optax")


def measure(model: str, budget: str, length: int, largest: int) -> list[dict[str, Any]]:
    rows = []
    for policy in POLICIES:
        batch = 1
        while batch <= largest:
            kept = f"auto@{budget}" if policy == "auto" else policy
            row = in_process_of_its_own(f"{model},{batch},{length},{kept},auto", 1)
            rows.append({"policy": policy, "rows": batch, **row})
            print(json.dumps(rows[-1]), flush=True)
            if "error" in row:
                break
            batch *= 2
    return rows


def draw(record: dict[str, Any], path: str) -> None:
    """Peak memory and speed over the number of rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    for policy in POLICIES:
        rows = [row for row in record["rows"] if row["policy"] == policy and "error" not in row]
        batches = [row["rows"] for row in rows]
        memory.plot(batches, [row["peak_gib"] for row in rows], "o-", label=policy)
        speed.plot(batches, [row["tokens_per_second"] for row in rows], "o-", label=policy)
    for axes, label in ((memory, "peak memory [GiB]"), (speed, "tokens/s")):
        axes.set_xscale("log", base=2)
        axes.set(xlabel=f"rows of {record['length']} tokens", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{record['model']} on {record['device']}, budget of auto: {record['budget']}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", help="JSON file for the result")
    goal.add_argument("--draw", metavar="FILE", help="a result to draw")
    parser.add_argument("--model", default="1b", help="as in train_step.py")
    parser.add_argument("--budget", default="16GiB", help="memory.budget of auto")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a row")
    parser.add_argument("--largest", type=int, default=LARGEST, help="rows of the largest batch")
    parser.add_argument("--plot", metavar="FILE", help="draw the result")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    arguments = parser.parse_args()
    if arguments.draw:
        record = json.loads(Path(arguments.draw).read_text(encoding="utf-8"))
    else:
        rows = measure(arguments.model, arguments.budget, arguments.length, arguments.largest)
        record = {
            "benchmark": "short_sequences",
            **environment(*PACKAGES, commit=arguments.commit),
            "model": arguments.model,
            "length": arguments.length,
            "budget": arguments.budget,
            "device": next((row["device"] for row in rows if "device" in row), None),
            "rows": rows,
        }
        Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if arguments.plot:
        draw(record, arguments.plot)


if __name__ == "__main__":
    main()
