"""Random runs within random budgets: whether every plan that was accepted also runs, to the end.

    python benchmarks/no_surprise.py --draws 20 --seed 0 --jobs 6 --out result.json
    python benchmarks/no_surprise.py --cpu  # two tiny draws without a budget, to see that it works

Each draw is a Llama of random shape and weights, data, settings, and a memory.budget between what the weights
take and about what a step takes that keeps every activation. lorajax.fit trains it in a process of its own,
in which JAX' allocator has the budget, and 2.6% and 64 MiB to divide it: 10 steps on rows that are as long as
they may be, evaluation, answers to prompts before and after, and a checkpoint half-way. What comes of it:

    ran       to the end, with all that it should leave behind
    refused   when it was planned, before the first step
    failed    anything else, above all an out-of-memory error

The goal is that none fails, and that half of them run at least. A draw follows from its seed and number, and
can be repeated with --here NUMBER; the result is written after each, and --resume goes on from it, where it
is of the same commit, GPU and seed. --jobs runs several side by side on one GPU: a budget is at most LARGEST.
A peak is what the allocator has given away; rather than keep less than 128 MiB, it gives all that it has.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import environment, known_rows
from processes import last_json
from train_step import machine_at_hand

STEPS = 10
# Most parameters of a model, so that it compiles soon, and bytes of a budget.
MOST_PARAMETERS = 600_000_000
LARGEST = 10 * 2**30
# Tokens of a step.
TOKENS = (2048, 32768)
# Bytes of logits that the loss makes at a time.
LOGITS_CHUNK = 2**28
RUNS_AT_LEAST = 0.5
# JAX' own limits of its allocator, under which lorajax would set none.
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
PACKAGES = ("lorajax", "jax", "jaxlib", "jax-triton", "flax", "optax", "orbax-checkpoint", "transformers")


@dataclass(frozen=True)
class Draw:
    """A run.

    Attributes:
        model: contents of config.json.
        settings: of lorajax, by section.key; files are not among them.
        budget: memory.budget in bytes; None: none.
        prompts: sample prompts.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    budget: int | None
    prompts: list[str]


def draw(seed: int, number: int, tiny: bool) -> Draw:
    """Of a seed and a number; too large ones are drawn again.

    Args:
        tiny: for a CPU, without a budget.
    """
    dice = random.Random(f"{seed}, {number}")
    while True:
        model, settings = draw_model(dice, tiny), draw_settings(dice, tiny)
        prompts = [words(dice, dice.randint(10, 1000)) for _ in range(dice.randint(1, 8))]
        parameters = sum(map(math.prod, tensor_shapes(model).values()))
        least, most = weights_and_everything(model, settings)
        budget = int(least + dice.random() * (most - least))
        tokens = settings["data.max_length"] * rows(settings)
        if tiny:
            return Draw(model, settings, None, prompts)
        if parameters <= MOST_PARAMETERS and most <= LARGEST and TOKENS[0] <= tokens <= TOKENS[1]:
            return Draw(model, settings, budget, prompts)


def draw_model(dice: random.Random, tiny: bool) -> dict[str, Any]:
    """A config.json."""
    hidden = 64 if tiny else dice.choice((512, 768, 1024, 1280, 1536, 2048))
    heads_of_a_key = dice.choice((1, 2, 4, 8))
    kv_heads = dice.choice((1, 2) if tiny else (1, 2, 4, 8))
    llama3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    scaling = {"rope_type": "llama3", "original_max_position_embeddings": 2048, **llama3}
    return {
        "model_type": "llama",
        "vocab_size": 4096 if tiny else dice.choice((4096, 32001, 49152, 50257, 128256)),
        "hidden_size": hidden,
        "intermediate_size": 64 * round(dice.uniform(1.5, 4.5) * hidden / 64),
        "num_hidden_layers": dice.randint(1, 2) if tiny else dice.randint(2, 8),
        "num_attention_heads": heads_of_a_key * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16 if tiny else dice.choice((64, 128)),
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rope_scaling": scaling if dice.random() < 0.25 else None,
        "attention_bias": dice.random() < 0.25,
        "mlp_bias": dice.random() < 0.25,
        "tie_word_embeddings": dice.random() < 0.5,
    }


def draw_settings(dice: random.Random, tiny: bool) -> dict[str, Any]:
    """What the run does, and how."""
    shortest, longest = (64, 128) if tiny else (256, 4096)
    return {
        "model.dtype": "float32" if tiny else "bfloat16",
        "lora.rank": dice.choice((8, 16, 32, 64)),
        "lora.dropout": dice.choice((0.0, 0.05)),
        "data.max_length": round(math.exp(dice.uniform(math.log(shortest), math.log(longest)))),
        "data.packing": dice.random() < 0.75,
        "data.max_segments": dice.choice((4, 32)),
        "data.overlong": dice.choice(("truncate", "split")),
        "train.per_device_train_batch_size": 2 if tiny else dice.randint(1, 16),
        "train.gradient_accumulation_steps": dice.choice((1, 2, 4)),
        "train.max_steps": STEPS,
        "train.eval_steps": STEPS // 2,
        "memory.checkpointing": "auto",
        "output.save_steps": STEPS // 2,
        "output.sample_max_new_tokens": 16 if tiny else dice.choice((16, 64, 256)),
    }


def rows(settings: dict[str, Any]) -> int:
    """Of a step."""
    return settings["train.per_device_train_batch_size"] * settings["train.gradient_accumulation_steps"]


def words(dice: random.Random, characters: int) -> str:
    """Text of so many characters; at least a tenth as many tokens, since each word is one or more."""
    text, length = [], 0
    while length < characters:
        text.append("".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(1, 9))))
        length += len(text[-1]) + 1
    return " ".join(text)


def tensor_shapes(model: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the weights, by their names in a Hugging Face folder."""
    hidden, inner, vocab = model["hidden_size"], model["intermediate_size"], model["vocab_size"]
    query, key = (model[f"num_{kind}_heads"] * model["head_dim"] for kind in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    if not model["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    projections = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(model["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
        for name, shape in projections.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if model["mlp_bias" if name.startswith("mlp") else "attention_bias"]:
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
    return shapes


def weights_and_everything(model: dict[str, Any], settings: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the weights, and about those of a step that keeps all activations of all its rows."""
    shapes = tensor_shapes(model)
    weights = 2 * sum(map(math.prod, shapes.values()))
    adapted = sum(sum(shape) for name, shape in shapes.items() if name.endswith("_proj.weight"))
    adapters = settings["lora.rank"] * adapted
    tokens = settings["data.max_length"] * rows(settings)
    widths = [sum(shapes[f"model.layers.0.{name}_proj.weight"]) for name in ("self_attn.q", "self_attn.k")]
    of_a_layer = 2 * tokens * (2 * sum(widths) - 2 * model["hidden_size"] + 2 * model["intermediate_size"])
    workspace = min(2 * tokens * model["vocab_size"], LOGITS_CHUNK) + of_a_layer
    # An adapter's parameter has its value, two moments and a gradient, each of four bytes.
    return weights, weights + 16 * adapters + model["num_hidden_layers"] * of_a_layer + workspace


# --- in a process of its own ---


def run(drawn: Draw, folder: Path) -> dict[str, Any]:
    """What comes of a draw."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "xla")  # compiling takes memory too
    import jax

    from lorajax.errors import UserError
    from lorajax.training.fit import fit

    config = prepare(drawn, folder)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            result = fit(config)
    except UserError as error:
        if "memory." not in str(error) or (folder / "run" / "metrics.jsonl").exists():
            raise  # it is no refusal, or one that came too late
        return {"outcome": "refused", "reason": str(error).splitlines()[0]}
    check(result, drawn)
    banner = dict(line.strip().partition("  ")[::2] for line in printed.getvalue().splitlines())
    kept = ("plan", "saved", "offloaded", "recomputed", "kept")
    return {
        "outcome": "ran",
        "allocator": (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"),
        "planned": result.planned_memory_bytes,
        "peak": result.peak_memory_bytes,
        "layout": {name: banner[name] for name in kept if name in banner},
        "seconds_of_training": round(result.seconds, 1),
    }


def prepare(drawn: Draw, folder: Path) -> Any:
    """Write model and data; gives the lorajax.Config."""
    import lorajax.assets
    from lorajax.config import load_config

    write_model(drawn.model, folder / "model")
    length = drawn.settings["data.max_length"]
    write_documents(folder / "train.jsonl", length, rows(drawn.settings) * STEPS, seed=0)
    write_documents(folder / "eval.jsonl", length, 8, seed=1)
    settings = drawn.settings | {
        "model.path": folder / "model",
        "model.tokenizer": Path(lorajax.assets.__file__).parent / "tiny",
        "data.path": folder / "train.jsonl",
        "data.eval_path": folder / "eval.jsonl",
        "data.cache_dir": folder / "data",
        "output.output_dir": folder / "run",
        "output.sample_prompts": json.dumps(drawn.prompts),
    }
    if drawn.budget is not None:
        settings["memory.budget"] = f"{drawn.budget} B"
    return load_config(None, [f"--{key}={value}" for key, value in settings.items()])


def write_model(model: dict[str, Any], folder: Path) -> None:
    """Random weights in bfloat16, as wide as their inputs ask for; norms are 1."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    # Of a prime number of values, so that no two rows of a matrix are the same.
    normal = np.random.default_rng(0).standard_normal(1_000_003, np.float32)
    tensors = {}
    for name, shape in tensor_shapes(model).items():
        if name.endswith("norm.weight"):
            tensors[name] = np.ones(shape, ml_dtypes.bfloat16)
        else:
            deviation = 1.0 if "embed" in name else model["hidden_size"] ** -0.5
            tensors[name] = np.resize((deviation * normal).astype(ml_dtypes.bfloat16), shape)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_documents(path: Path, length: int, count: int, seed: int) -> None:
    """Of any length up to a row's; every third is longer than a row."""
    dice = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            characters = 10 * length if number % 3 == 0 else dice.randint(8, 4 * length)
            file.write(json.dumps({"text": words(dice, characters)}) + "\n")


def check(result: Any, drawn: Draw) -> None:
    """That a run has done all that it was asked for.

    Raises:
        AssertionError: it has not.
    """
    evaluations = [row["step"] for row in result.metrics if "eval_loss" in row]
    checkpoints = {path.name for path in (result.output_dir / "checkpoints").iterdir()}
    assert result.steps == STEPS, f"{result.steps} steps"
    assert evaluations == [0, STEPS // 2, STEPS], f"evaluations at {evaluations}"
    assert checkpoints >= {str(STEPS // 2), str(STEPS)}, f"checkpoints of {checkpoints}"
    assert len(result.samples) == len(drawn.prompts), f"{len(result.samples)} answers"
    assert (result.output_dir / "adapter" / "adapter_model.safetensors").is_file(), "no adapter"


# --- all draws ---


def outcome(seed: int, number: int, tiny: bool) -> dict[str, Any]:
    """Of a draw, in a process of its own."""
    drawn = draw(seed, number, tiny)
    found = last_json(__file__, [f"--seed={seed}", f"--here={number}", *["--cpu"] * tiny])
    if "error" in found:
        found = {"outcome": "failed", "reason": found["error"]}
    row = {"draw": number, "budget": drawn.budget, **found, "model": drawn.model, "settings": drawn.settings}
    print(line(row), flush=True)
    return row


def line(row: dict[str, Any]) -> str:
    """Of a table: what comes of a draw."""

    def gib(name: str) -> str:
        return f"{row[name] / 2**30:8.3f}" if row.get(name) else f"{'-':>8}"

    model, settings = row["model"], row["settings"]
    batch = ("gradient_accumulation_steps", "per_device_train_batch_size")
    sizes = [*(settings[f"train.{name}"] for name in batch), settings["data.max_length"]]
    return (
        f"{row['draw']:>4} {row['outcome']:>8} {gib('budget')} {gib('planned')} {gib('peak')}  "
        f"{model['num_hidden_layers']} x {model['hidden_size']}, {' x '.join(map(str, sizes))}: "
        f"{row.get('layout', {}).get('plan') or ' '.join(row.get('reason', '').split())[:400]}"
    )


def summary(outcomes: Sequence[dict[str, Any]], draws: int) -> dict[str, Any]:
    """How many ran, were refused or failed, whether that is good enough, and how far plans were off.

    Args:
        draws: how many there are to be.
    """
    count = Counter(row["outcome"] for row in outcomes)
    planned = [row for row in outcomes if row.get("planned")]

    def largest(of: str) -> float | None:
        return max((round(row["peak"] / row[of], 4) for row in planned), default=None)

    return {
        "draws": len(outcomes),
        **{name: count[name] for name in ("ran", "refused", "failed")},
        "holds": len(outcomes) == draws and not count["failed"] and count["ran"] >= RUNS_AT_LEAST * draws,
        "largest_peak_to_plan": largest("planned"),
        "largest_peak_to_budget": largest("budget"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--draws", type=int, help="how many; default: 20, on a CPU 2")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--jobs", type=int, default=1, help="draws at a time")
    parser.add_argument("--cpu", action="store_true", help="tiny models on the CPU, without a budget")
    parser.add_argument("--out", help="JSON file for the result")
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--here", type=int, metavar="NUMBER", help="one draw, in this process")
    arguments = parser.parse_args()
    if arguments.resume and not arguments.out:
        parser.error("--resume needs --out")
    seed, tiny = arguments.seed, arguments.cpu
    if tiny:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if arguments.here is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(draw(seed, arguments.here, tiny), Path(folder))))
        return
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    for name in FRACTIONS:
        os.environ.pop(name, None)
    device = machine_at_hand()["device"]
    draws = arguments.draws or (2 if tiny else 20)
    print(
        "draw  outcome   budget  planned     peak  GiB; layers x width, micro-batches x rows x tokens: plan"
    )
    about = {
        "benchmark": "no_surprise",
        **environment(*PACKAGES, commit=arguments.commit),
        "device": device,
        "seed": seed,
        "asked_for": draws,
        "jobs": arguments.jobs,
        "goal": f"none failed, and at least {RUNS_AT_LEAST:.0%} ran",
        "unit": "bytes; planned and peak: of the whole run",
    }
    known = known_rows(Path(arguments.out), about) if arguments.resume else []
    rows = [row for row in known if row["draw"] < draws]
    missing = sorted(set(range(draws)) - {row["draw"] for row in rows})
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for done in as_completed(pool.submit(outcome, seed, number, tiny) for number in missing):
            rows.append(done.result())
            if arguments.out:
                record = about | summary(rows, draws) | {"rows": rows}
                Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary(rows, draws)))


if __name__ == "__main__":
    main()
