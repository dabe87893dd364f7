"""A whole run of lorajax.train, recorded: loss curves, answers before and after, speed, memory.

    python benchmarks/finetune.py configs/smollm2_135m.yaml --out result.json --data.path rows.jsonl ...

What follows --out FILE goes to the config, as on the command line of lorajax.train.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from environment import environment, shown_settings

from lorajax.config import load_config
from lorajax.training.fit import Result, fit


def curve(metrics: list[dict[str, Any]], name: str, every: int) -> dict[int, float]:
    """A column by step: the first and last rows that have it, and those at multiples of `every`."""
    rows = [(row["step"], row[name]) for row in metrics if name in row]
    kept = {rows[0], rows[-1]} | {row for row in rows if row[0] % every == 0} if rows else set()
    return {step: round(value, 4) for step, value in sorted(kept)}


def summary(result: Result, seconds: float) -> dict[str, Any]:
    """The figures of a run; rates leave out the first step, in which the device warms up."""
    rows = [row for row in result.metrics if "loss" in row]
    rates = [row["tokens_per_second"] for row in rows[1:]]
    held_out = {row["step"]: row["eval_loss"] for row in result.metrics if "eval_loss" in row}
    few = min(10, max(len(rows) // 2, 1))
    return {
        "steps": result.steps,
        "seconds_in_all": round(seconds, 1),
        "seconds_of_training": round(result.seconds, 1),
        "median_step_seconds": round(statistics.median(row["step_seconds"] for row in rows[1:]), 4),
        "median_tokens_per_second": round(statistics.median(rates)),
        "mean_tokens_per_second_with_first_step": round(result.tokens_per_second),
        "peak_memory_bytes": result.peak_memory_bytes,
        f"first_{few}_steps_loss": round(statistics.fmean(row["loss"] for row in rows[:few]), 4),
        f"last_{few}_steps_loss": round(statistics.fmean(row["loss"] for row in rows[-few:]), 4),
        "held_out_loss_before": round(held_out[0], 4) if 0 in held_out else None,
        "held_out_loss_after": round(held_out[max(held_out)], 4) if held_out else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="YAML file, as for lorajax.train")
    parser.add_argument("--out", required=True, help="JSON file for the result")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--curve-every", type=int, default=10, help="steps between two points of the curves")
    arguments, overrides = parser.parse_known_args()
    config = load_config(arguments.config, overrides)
    began = time.perf_counter()
    result = fit(config)
    seconds = time.perf_counter() - began
    device = jax.local_devices()[0]
    packages = ("lorajax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
    record = {
        "benchmark": "finetune",
        "config": Path(arguments.config).name,
        **environment(*packages, commit=arguments.commit),
        "device": f"{jax.device_count()} x {device.device_kind}",
        "settings": shown_settings(config),
        "summary": summary(result, seconds),
        "loss": curve(result.metrics, "loss", arguments.curve_every),
        "held_out_loss": curve(result.metrics, "eval_loss", 1),
        "answers": [asdict(sample) for sample in result.samples],
    }
    Path(arguments.out).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(record["summary"], indent=2))


if __name__ == "__main__":
    main()
