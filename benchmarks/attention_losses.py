"""The first losses of a run through each attention implementation: whether they learn alike.

    python benchmarks/attention_losses.py configs/smollm2_135m.yaml --out result.json --data.path ROWS ...

What follows --out FILE goes to the config, as on the command line of lorajax.train; --steps is its
train.max_steps. Each run is a process of its own, and an implementation that cannot serve is listed with the
reason. --float32 adds a run in float32: in half precision the rounding of all else keeps each loss some way
from it, so that two paths that are both right may be twice as far apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environment import environment, shown_settings
from processes import last_json

IMPLEMENTATIONS = ("cudnn", "triton", "xla")
FLOAT32 = "xla, float32"


def train(config_file: str, steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """One run, in this process."""
    import jax

    from lorajax.config import load_config
    from lorajax.training.fit import fit

    with tempfile.TemporaryDirectory() as folder:
        own = {
            "train.max_steps": steps,
            "output.output_dir": Path(folder) / "run",
            "output.logging_steps": 1,
            "output.sample_prompts": [],
        }
        config = load_config(config_file, [*overrides, *(f"--{key}={value}" for key, value in own.items())])
        result = fit(config)
    return {
        "losses": [round(row["loss"], 6) for row in result.metrics if "loss" in row],
        "device": f"{jax.device_count()} x {jax.local_devices()[0].device_kind}",
        "settings": shown_settings(config),
    }


def differences(losses: dict[str, list[float]]) -> dict[str, float]:
    """Of any two runs, the largest at one step."""
    return {
        f"{one} - {other}": round(max(abs(a - b) for a, b in zip(losses[one], losses[other], strict=True)), 6)
        for one, other in itertools.combinations(losses, 2)
    }


def summary(config: str, runs: dict[str, Any], refused: dict[str, str], commit: str | None) -> dict[str, Any]:
    """The result, of the runs so far."""
    first = next(iter(runs.values()))
    losses = {name: run["losses"] for name, run in runs.items()}
    apart = differences(losses)
    packages = ("lorajax", "jax", "jaxlib", "jax-triton", "triton", "flax", "optax", "transformers")
    return {
        "benchmark": "attention_losses",
        "config": Path(config).name,
        **environment(*packages, commit=commit),
        "device": first["device"],
        "settings": first["settings"] | {"model": first["settings"]["model"] | {"attention": "each"}},
        "losses": losses,
        "refused": refused,
        "differences": apart,
        "largest_difference": max((d for pair, d in apart.items() if FLOAT32 not in pair), default=None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="YAML file, as for lorajax.train")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", help="JSON file for the result")
    goal.add_argument("--here", action="store_true", help="one run, as the config says, in this process")
    parser.add_argument("--steps", type=int, default=20, help="losses to record")
    parser.add_argument("--float32", action="store_true", help="one run more, in float32 through xla")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    arguments, overrides = parser.parse_known_args()
    if arguments.here:
        print(json.dumps(train(arguments.config, arguments.steps, overrides)))
        return
    chosen = {name: [f"--model.attention={name}"] for name in IMPLEMENTATIONS}
    if arguments.float32:
        chosen[FLOAT32] = ["--model.attention=xla", "--model.dtype=float32"]
    runs: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name, options in chosen.items():
        command = [arguments.config, "--here", f"--steps={arguments.steps}", *overrides, *options]
        run = last_json(__file__, command)
        if "error" in run:
            refused[name] = run["error"]
        else:
            runs[name] = run
        print(name, run.get("error") or run["losses"], flush=True)
        # After each, so that a run that takes too long does not take those before it along.
        if runs:
            record = summary(arguments.config, runs, refused, arguments.commit)
            Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not runs:
        sys.exit("none could serve")
    print("largest difference:", record["largest_difference"], record["differences"])


if __name__ == "__main__":
    main()
