"""The step time of memory.checkpointing auto beside the best of many layouts, measured by brute force.

    python benchmarks/auto_choice.py --models 1b,8,2048 --cache FOLDER --out result.json --resume
    python benchmarks/auto_choice.py --models tiny,4,64 --budgets none --out result.json  # on a CPU

Each of --models is MODEL,ROWS,LENGTH as in train_step.py, and has the layouts of GRID: micro-batches times
what layers keep. Each layout, and auto planned for each budget of BUDGETS or --budgets, is compiled first,
--jobs at a time; then all of a model are timed in turns in one process, as with train_step.py --alternate. A
point is a model and a budget: the best layout that is planned to take no more than the budget, and how much
longer a step of auto takes.

The goal: a step of auto takes at most 3% longer than that of the best layout, at six points or more.

The result is written after each model; --resume goes on from it, where it is of the same commit and GPU.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from environment import cores, environment, known_rows
from train_step import PACKAGES, cache_folder, compile_side_by_side, measure_together

_ATTENTION = ("query", "key", "value", "attention_output", "attention_lse", "block_middle", "lora_hidden")
_GATES = ("gate", "up", "lora_hidden")


def _kept(*saved: str, offloaded: tuple[str, ...] = ()) -> str:
    away = [f"{name}=offload" for name in offloaded]
    return "+".join([f"{name}=save" for name in dict.fromkeys(saved) if name not in offloaded] + away)


GATES = _kept(*_GATES)
ALL_BUT_GATES = _kept(*_ATTENTION)
INPUT_AWAY = _kept(*_ATTENTION, *_GATES, offloaded=("block_input",))
GATE_AWAY = _kept(*_ATTENTION, *_GATES, offloaded=("block_input", "gate"))

# Micro-batches of a step -> what layers keep.
GRID = {
    1: ("none", "full", "offload", GATES, ALL_BUT_GATES, INPUT_AWAY, GATE_AWAY),
    2: ("none", ALL_BUT_GATES),
    4: ("none", INPUT_AWAY),
    8: ("none", INPUT_AWAY),
}
BUDGETS = {
    "1b,8,2048": ("4.5GiB", "7GiB", "11GiB"),
    "8b:4,4,4096": ("4.8GiB", "6.5GiB", "8.8GiB"),
}
MOST = 1.03
ROUNDS, ROUND_SECONDS = 3, 1.0

# Case of train_step.py -> its row.
Rows = dict[str, dict[str, Any]]


def layouts(model: str) -> list[str]:
    """The cases that auto is held against."""
    name, rows, length = model.split(",")
    return [
        f"{name},{count}x{int(rows) // count},{length},{kept},auto"
        for count, policies in GRID.items()
        if int(rows) % count == 0
        for kept in policies
    ]


def auto(model: str, budget: str) -> str:
    """The case that is planned for a budget; "none" is none."""
    return f"{model},auto{'' if budget == 'none' else f'@{budget}'},auto"


def points(rows: Rows) -> list[dict[str, Any]]:
    """One for each case of auto whose layouts have all been measured."""
    found = []
    for case, row in rows.items():
        name, batch, length, kept, _ = case.split(",")
        model = f"{name},{batch},{length}"
        if kept.startswith("auto") and rows.keys() >= set(layouts(model)):
            about = {"model": model, "budget": kept.partition("@")[2] or None}
            found.append(about | compared(row, [rows[each] for each in layouts(model)]))
    return found


def compared(chosen: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of auto beside the best of those within its budget."""
    from lorajax.config import parse_size

    if "error" in chosen:
        return {"error": chosen["error"], "reached": False}
    budget = chosen["budget"]
    most = math.inf if budget is None else parse_size(budget) / 2**30
    fitting = [row for row in others if "error" not in row and row["planned_gib"] <= most]
    best = min(fitting, key=lambda row: row["ms"], default=None)
    ratio = chosen["ms"] / best["ms"] if best else None
    within = chosen["planned_gib"] <= most
    return {
        "auto": shown(chosen),
        "best": best and shown(best),
        "layouts": len(fitting),
        "ratio": ratio and round(ratio, 4),
        "within_budget": within,
        "reached": within and (ratio is None or ratio <= MOST),
    }


def shown(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("case", "batch", "micro_batches", "ms", "planned_gib", "host_gib")}


def one_device(rows: Rows) -> str | None:
    """The GPU that all were measured on."""
    devices = {row["device"] for row in rows.values() if "device" in row}
    if len(devices) > 1:
        raise SystemExit(f"measured on {' and '.join(sorted(devices))}: give another --out for each")
    return next(iter(devices), None)


def result(about: dict[str, Any], rows: Rows) -> dict[str, Any]:
    found = points(rows)
    return {
        "benchmark": "auto_choice",
        **about,
        "device": one_device(rows),
        "points": found,
        "reached": sum(each["reached"] for each in found),
        "rows": list(rows.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", default=list(BUDGETS), metavar="MODEL,ROWS,LENGTH")
    parser.add_argument("--budgets", nargs="+", help="of each of these models; none: as much as there is")
    parser.add_argument("--cache", metavar="FOLDER", help="of compiled programs; none: for this run alone")
    parser.add_argument("--jobs", type=int, default=max(cores() // 2, 1), help="that compile at a time")
    parser.add_argument("--out", required=True, help="JSON file for the result")
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    arguments = parser.parse_args()
    if missing := [model for model in arguments.models if not arguments.budgets and model not in BUDGETS]:
        parser.error(f"--budgets for {', '.join(missing)}")
    about, out = environment(*PACKAGES, commit=arguments.commit), Path(arguments.out)
    rows = {row["case"]: row for row in known_rows(out, about)} if arguments.resume else {}
    with cache_folder(arguments.cache) as cache:
        for model in arguments.models:
            budgets = arguments.budgets or BUDGETS[model]
            cases = [*layouts(model), *(auto(model, budget) for budget in budgets)]
            if rows.keys() >= set(cases):
                continue
            compiled = compile_side_by_side(cases, 1, cache=cache, jobs=arguments.jobs)
            rows |= {case: row for case, row in compiled.items() if "error" in row}
            ready = [case for case in cases if "error" not in compiled[case]]
            for row in measure_together(ready, 1, ROUNDS, cache=cache, round_seconds=ROUND_SECONDS):
                rows[row["case"]] = row
                print(json.dumps(row), flush=True)
            # After each, so that a run that is cut short keeps what it has measured.
            out.write_text(json.dumps(result(about, rows), indent=2) + "\n", encoding="utf-8")
    for each in points(rows):
        print(json.dumps(each))


if __name__ == "__main__":
    main()
