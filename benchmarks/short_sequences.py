"""Short rows in ever larger batches: peak memory and tokens/s of each way to keep activations.

    python benchmarks/short_sequences.py --batches 1,4,16,64 --out result.json --plot result.png
    python benchmarks/short_sequences.py --draw result.json --plot result.png  # measure nothing

Steps as in train_step.py, on rows of 512 tokens, in batches of 1, 2, 4 ... 256 rows: everything kept (none),
layers computed again (full), their inputs in host memory (offload), and what is planned for a budget (auto),
which may go over a large batch in several micro-batches. First, --jobs at a time, each case is compiled and
then runs for some steps in a process of its own, which tells its peak; then those that fit are timed in turns
in one process, as with train_step.py --alternate.

The goals, which the result holds the figures against: the peak of auto stays within the budget at each
batch; from the smallest batch to the largest that both can do, the peak of offload grows by less than a tenth
of what that of none grows by; and offload reaches 95% of the tokens/s of full at each batch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from environment import cores, environment
from train_step import (
    PACKAGES,
    cache_folder,
    compile_side_by_side,
    measure_together,
)

POLICIES = ("none", "full", "offload", "auto")
ROUNDS, ROUND_SECONDS = 5, 1.0
LENGTH, BATCHES = 512, (1, 2, 4, 8, 16, 32, 64, 128, 256)
MOST_GROWTH, LEAST_SPEED = 0.1, 0.95

# Policy, then rows of a batch -> what was measured.
Measured = dict[str, dict[int, dict[str, Any]]]


def measure(
    model: str, batches: list[int], length: int, budget: str | None, *, cache: str, jobs: int
) -> list[dict[str, Any]]:
    def case(policy: str, batch: int) -> str:
        kept = f"auto@{budget}" if policy == "auto" and budget else policy
        return f"{model},{batch},{length},{kept},auto"

    cases = {case(policy, batch): (policy, batch) for policy in POLICIES for batch in batches}
    found = compile_side_by_side(list(cases), 1, cache=cache, jobs=jobs, peaks=True)
    fitting = [name for name, row in found.items() if "error" not in row]
    for row in measure_together(fitting, 1, ROUNDS, cache=cache, round_seconds=ROUND_SECONDS):
        found[row["case"]] = row | {"peak_gib": found[row["case"]]["peak_gib"]}
    rows = []
    for name, (policy, batch) in cases.items():
        rows.append({"policy": policy, "rows": batch, **found[name]})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def goals(rows: list[dict[str, Any]], budget: str | None) -> dict[str, Any]:
    """What the result is held against; None: it cannot be told from these rows."""
    found: Measured = {policy: {} for policy in POLICIES}
    for row in rows:
        if "error" not in row:
            found[row["policy"]][row["rows"]] = row
    return {
        "auto_within_budget": within_budget(found["auto"], budget),
        "offload_growth": growth(found, "offload", "none"),
        "offload_speed": speed(found, "offload", "full"),
    }


def within_budget(auto: dict[int, dict[str, Any]], budget: str | None) -> dict[str, Any] | None:
    from lorajax.config import parse_size

    if budget is None or not auto:
        return None
    most, peaks = parse_size(budget) / 2**30, {batch: row["peak_gib"] for batch, row in auto.items()}
    return {"budget_gib": most, "peak_gib": peaks, "reached": max(peaks.values()) <= most}


def growth(found: Measured, policy: str, other: str) -> dict[str, Any] | None:
    """By how much peaks grow with the batch, and the share of one growth in the other."""
    common = sorted(found[policy].keys() & found[other].keys())
    if len(common) < 2:
        return None
    small, large = common[0], common[-1]
    gib = {
        name: round(found[name][large]["peak_gib"] - found[name][small]["peak_gib"], 2)
        for name in (policy, other)
    }
    share = gib[policy] / gib[other] if gib[other] > 0 else None
    return {
        "from_rows": small,
        "to_rows": large,
        "gib": gib,
        "share": share and round(share, 3),
        "reached": share is not None and share < MOST_GROWTH,
    }


def speed(found: Measured, policy: str, other: str) -> dict[str, Any] | None:
    """Tokens/s of one policy over those of another, for each batch."""
    common = sorted(found[policy].keys() & found[other].keys())
    if not common:
        return None
    shares = {
        batch: found[policy][batch]["tokens_per_second"] / found[other][batch]["tokens_per_second"]
        for batch in common
    }
    return {
        "share": {batch: round(share, 3) for batch, share in shares.items()},
        "reached": min(shares.values()) >= LEAST_SPEED,
    }


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


def numbers(text: str) -> list[int]:
    return sorted(int(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", help="JSON file for the result")
    goal.add_argument("--draw", metavar="FILE", help="a result to draw")
    parser.add_argument("--model", default="1b", help="as in train_step.py")
    parser.add_argument("--budget", default="16GiB", help="memory.budget of auto; none: no budget")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a row")
    parser.add_argument("--batches", type=numbers, default=list(BATCHES), help="rows, such as 1,4,16,64")
    parser.add_argument("--cache", metavar="FOLDER", help="of compiled programs; none: for this run alone")
    parser.add_argument("--jobs", type=int, default=max(cores() // 2, 1), help="compile so many")
    parser.add_argument("--plot", metavar="FILE", help="draw the result")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    arguments = parser.parse_args()
    if arguments.draw:
        record = json.loads(Path(arguments.draw).read_text(encoding="utf-8"))
    else:
        budget = None if arguments.budget == "none" else arguments.budget
        with cache_folder(arguments.cache) as cache:
            rows = measure(
                arguments.model,
                arguments.batches,
                arguments.length,
                budget,
                cache=cache,
                jobs=arguments.jobs,
            )
        record = {
            "benchmark": "short_sequences",
            **environment(*PACKAGES, commit=arguments.commit),
            "model": arguments.model,
            "length": arguments.length,
            "budget": budget,
            "device": next((row["device"] for row in rows if "device" in row), None),
            "goals": goals(rows, budget),
            "rows": rows,
        }
        Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(record["goals"], indent=2))
    if arguments.plot:
        draw(record, arguments.plot)


if __name__ == "__main__":
    main()
