"""What a step is predicted to take of a GPU, beside what it takes: peak_bytes_in_use.

    python benchmarks/prediction.py --jobs 6 --out result.json
    python benchmarks/prediction.py 1b:4,2x2,2048,full,32,1 8b:2,8,512,none,8,4 --out result.json

Each argument is MODEL,BATCH,LENGTH,CHECKPOINTING,RANK,SEGMENTS: the first four as in train_step.py, the rank
of the adapters, and the documents on a row; without arguments they are CASES. bfloat16, adapters on all
projections, AdamW, random tokens, every one a target. For each case three figures:

    elsewhere  compiled for this kind of GPU as if it were not here (lorajax.memory.elsewhere)
    planned    compiled on the GPU: what a run checks its plan against
    peak       peak_bytes_in_use after some steps, in a process of its own, for it never falls

The goal is that no prediction is more than 1% under the peak or 5% over it. Memory is not timing: with --jobs
several cases share the GPU, each with its part of it. --target names the GPU to compile for, where it is not
the one at hand. On a CPU, whose peak is that of the whole process, nothing is compared.

    python benchmarks/prediction.py --target h200 --only-elsewhere --jobs 2 --out elsewhere.json
    python benchmarks/prediction.py --elsewhere elsewhere.json --jobs 6 --out result.json

make the predictions that need no GPU where there is none, and spare the GPU's machine them; those of auto,
whose layout is chosen there, are made there. The result is written after each case; --resume goes on from it,
where it is of the same commit and GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from environment import environment, known_rows
from processes import last_json
from train_step import Case as StepCase
from train_step import config_of, hf_config, machine_at_hand, model_folder, random_batch

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from lorajax.training.weights import Weights

CASE = "MODEL,BATCH,LENGTH,CHECKPOINTING,RANK,SEGMENTS"
# Deep models first: they compile for longest.
CASES = (
    "1b,8,2048,auto@8GiB,32,4",
    "1b,2,2048,none,32,1",
    "1b,4,2048,full,32,4",
    "1b,4,2048,offload,32,1",
    "8b:3,8,2048,auto@6GiB,32,1",
    "8b:3,1,512,none,32,1",
    "8b:3,2,2048,none,32,1",
    "8b:2,8,512,none,64,4",
    "8b:2,2x2,4096,none,8,1",
    "8b:2,1,8192,none,32,4",
    "8b:3,4,2048,full,32,4",
    "8b:2,4x1,4096,full,64,1",
    "8b:2,2,8192,full,32,1",
    "8b:3,4,2048,offload,32,1",
    "8b:2,2x2,4096,offload,8,4",
    "8b:3,4,2048,block_middle=save+gate=offload,32,1",
    "1b:4,1,512,none,8,1",
    "1b:4,4,512,none,32,4",
    "1b:4,16,512,none,32,4",
    "1b:4,4,2048,none,32,1",
    "1b:4,8,2048,none,64,8",
    "1b:4,2x2,2048,none,32,1",
    "1b:4,4x1,4096,none,32,2",
    "1b:4,2,8192,none,32,1",
    "1b:4,2,8192,none,8,16",
    "1b:4,1,512,full,32,1",
    "1b:4,16,512,full,8,4",
    "1b:4,8,2048,full,32,8",
    "1b:4,2x2,4096,full,64,1",
    "1b:4,4,8192,full,32,4",
    "1b:4,4,512,offload,32,1",
    "1b:4,8,2048,offload,32,1",
    "1b:4,4x1,8192,offload,8,4",
    "1b:4,2,8192,offload,64,1",
    "1b:4,8,2048,gate=save+up=save,32,1",
    "1b:4,8,2048,block_input=offload+gate=offload+up=offload,32,4",
    "1b:4,2x2,4096,query=save+attention_output=save+attention_lse=save,8,4",
)
STEPS = 3
MOST_UNDER, MOST_OVER = 0.01, 0.05
# Threads share the parser of settings.
ONE_AT_A_TIME = threading.Lock()
# Of a GPU; the rest is left to what each process takes besides JAX' allocator.
SHARED = 0.9
PREDICTIONS = ("elsewhere", "planned")
PACKAGES = ("lorajax", "jax", "jaxlib", "jax-triton", "flax", "optax", "nvidia-cudnn-cu13")


class Case(NamedTuple):
    """What an argument says."""

    step: StepCase
    rank: int
    segments: int

    @classmethod
    def of(cls, text: str) -> Case:
        step, rank, segments = text.rsplit(",", 2)
        return cls(StepCase.of(f"{step},auto"), int(rank), int(segments))


# --- in a process of its own ---


def measure(case: Case) -> dict[str, Any]:
    """What the step of a case takes by XLA's analysis, and what it has taken after some steps."""
    import jax

    from lorajax.memory.machine import claim_gpu_memory
    from lorajax.memory.plan import outline_of
    from lorajax.memory.policy import Policy
    from lorajax.sharding import data_mesh
    from lorajax.training.inputs import RunShape
    from lorajax.training.metrics import peak_memory_bytes
    from lorajax.training.planning import planned
    from lorajax.training.program import compile_planned, first_state
    from lorajax.training.weights import split_weights

    with model_folder(case.step.model) as folder:
        config = config_of(case.step, case.segments, folder, lora__rank=case.rank)
        claim_gpu_memory(config.memory.budget)
        model = outline_of(config)
    run, plan = RunShape(config=config, mesh=data_mesh(), total_steps=1000), None
    if config.memory.checkpointing == "auto":
        plan, run = planned(run, model)
    run, program, plan = compile_planned(run, plan, model)
    _, trainable, frozen = split_weights(model, "lora")
    frozen = filled(frozen, run.mesh)
    state = first_state(run, filled(trainable, run.mesh))
    batch = random_batch(run, model.options.vocab_size, case.segments)
    before = peak_memory_bytes()
    for _ in range(STEPS):
        state, metrics = program.step(state, frozen, batch)
    jax.block_until_ready(metrics)
    kept = run.layout.checkpointing
    return {
        "planned": program.memory.total,
        "peak": peak_memory_bytes(),
        "peak_before_steps": before,
        "host": program.memory.host,
        "rows": run.layout.rows,
        "mlp_chunks": run.layout.mlp_chunks,
        "kept": kept.as_plain() if isinstance(kept, Policy) else kept,
    }


def filled(shapes: Weights, mesh: Mesh) -> Weights:
    """Small random numbers, made on the host, so that the GPU has seen no more than the arrays themselves."""
    import jax

    from lorajax.sharding import replicated

    numbers = np.random.default_rng(0).normal(0, 0.02, 2**20)
    return {
        name: jax.device_put(np.resize(numbers.astype(leaf.dtype), leaf.shape), replicated(mesh))
        for name, leaf in shapes.items()
    }


# --- all cases ---


def predict_elsewhere(case: Case, target: str, measured: Future[dict[str, Any]]) -> dict[str, Any]:
    """What the step takes, compiled as if the GPU were not here; of auto, what was chosen there."""
    from lorajax.memory.elsewhere import Variant, compile_variants
    from lorajax.memory.policy import Layout, Policy
    from lorajax.memory.targets import find_target

    with model_folder(case.step.model) as folder:
        try:
            with ONE_AT_A_TIME:
                config = config_of(case.step, case.segments, folder, lora__rank=case.rank)
            layout = Layout(config.train.per_device_train_batch_size, config.memory.checkpointing)
            if config.memory.checkpointing == "auto":
                row = measured.result()
                if "error" in row:
                    return {"elsewhere_error": "there is no layout to compile"}
                kept = row["kept"]
                kept = Policy.from_plain(kept) if "layers" in kept else kept
                layout = Layout(row["rows"], kept, row["mlp_chunks"])
            [found] = compile_variants(config, find_target(target), [Variant(layout)])
        except Exception as error:  # whatever it is, the other cases go on
            return {"elsewhere_error": str(error)}
    return {"elsewhere_error": found.error} if hasattr(found, "error") else {"elsewhere": found.total}


def rows_of(
    cases: Sequence[str], jobs: int, target: str | None, known: dict[str, Any], compares: bool
) -> Iterator[dict[str, Any]]:
    """The rows of the cases in their order, so many at a time on the GPU, and as many compiled beside it.

    Args:
        known: case -> what predict_elsewhere gave for it.
    """
    with ThreadPoolExecutor(jobs) as on_device, ThreadPoolExecutor(jobs) as beside:
        measured = [on_device.submit(last_json, __file__, [case, "--here"]) for case in cases]
        elsewhere = [
            beside.submit(predict_elsewhere, Case.of(case), target, row)
            if target and case not in known
            else None
            for case, row in zip(cases, measured, strict=True)
        ]
        for case, here, there in zip(cases, measured, elsewhere, strict=True):
            row = {"case": case, **here.result(), **(there.result() if there else known.get(case, {}))}
            if compares and "peak" in row:
                row |= {f"{name}_off": off(row, name) for name in PREDICTIONS if name in row}
            print(json.dumps({name: value for name, value in row.items() if name != "kept"}), flush=True)
            yield row


def only_elsewhere(cases: Sequence[str], jobs: int, target: str) -> dict[str, Any]:
    """case -> what predict_elsewhere gives for it, where that needs no GPU."""
    chosen = [case for case in cases if Case.of(case).step.checkpointing != "auto"]
    with ThreadPoolExecutor(jobs) as pool:
        nothing: Future[dict[str, Any]] = Future()
        found = pool.map(lambda case: predict_elsewhere(Case.of(case), target, nothing), chosen)
        return dict(zip(chosen, found, strict=True))


def known_elsewhere(path: str, commit: str | None, target: str | None) -> dict[str, Any]:
    """What only_elsewhere has left in a file, of the same commit and for the same GPU."""
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    if commit is None or (record["commit"], record["target"]) != (commit, target):
        raise SystemExit(f"{path} is of commit {record['commit']} for {record['target']}")
    return record["elsewhere"]


def off(row: dict[str, Any], name: str) -> float:
    """How far a prediction is from the peak, as a share of that; negative: it is under."""
    return round(row[name] / row["peak"] - 1, 5)


def summary(rows: Sequence[dict[str, Any]], name: str, cases: int) -> dict[str, Any]:
    """The worst of a prediction, and whether it is as good as it should be in every one of so many cases."""
    found = [row[f"{name}_off"] for row in rows if f"{name}_off" in row]
    if not found:
        return {"cases": 0, "most_under": None, "most_over": None, "holds": None}
    good = min(found) >= -MOST_UNDER and max(found) <= MOST_OVER
    return {
        "cases": len(found),
        "most_under": min(0.0, *found),
        "most_over": max(0.0, *found),
        "holds": good and len(found) == cases,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """GiB of each case, and how far the predictions are from the peak."""

    def gib(row: dict[str, Any], name: str) -> str:
        return f"{row[name] / 2**30:9.3f}" if name in row else f"{'-':>9}"

    def percent(row: dict[str, Any], name: str) -> str:
        return f"{100 * row[f'{name}_off']:+7.2f}%" if f"{name}_off" in row else f"{'-':>8}"

    width = max(len(row["case"]) for row in rows)
    lines = [f"{'case, GiB':{width}} elsewhere   planned      peak   elsewhere  planned  off the peak"]
    for row in rows:
        sizes = " ".join(gib(row, name) for name in (*PREDICTIONS, "peak"))
        shares = " ".join(percent(row, name) for name in PREDICTIONS)
        problem = row.get("error") or row.get("elsewhere_error") or ""
        lines.append(f"{row['case']:{width}} {sizes}    {shares}  {problem}".rstrip())
    return "\n".join(lines)


def find_name(kind: str) -> str | None:
    """The name under which lorajax knows a kind of GPU."""
    from lorajax.memory.targets import target_of_kind

    target = target_of_kind(kind)
    return None if target is None else target.name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("cases", nargs="*", default=CASES, metavar=CASE)
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--target", help="GPU to compile for elsewhere, such as h200; default: that at hand")
    parser.add_argument("--out", help="JSON file for the result")
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--here", action="store_true", help="the first case alone, in this process")
    parser.add_argument("--only-elsewhere", action="store_true", help="what needs no GPU, for --target")
    parser.add_argument("--elsewhere", metavar="FILE", help="that --only-elsewhere has written")
    arguments = parser.parse_args()
    if arguments.resume and not arguments.out:
        parser.error("--resume needs --out")
    if arguments.here:
        print(json.dumps(measure(Case.of(arguments.cases[0]))))
        return
    for case in arguments.cases:
        try:
            hf_config(Case.of(case).step.model)
        except (KeyError, ValueError):
            parser.error(f"{case}: it is not {CASE}")
    about = environment(*PACKAGES, commit=arguments.commit)
    if arguments.only_elsewhere:
        if not (arguments.target and arguments.out):
            parser.error("--only-elsewhere needs --target and --out")
        found = only_elsewhere(arguments.cases, arguments.jobs, arguments.target)
        record = {"target": arguments.target, **about, "elsewhere": found}
        Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    device = machine_at_hand()["device"]
    compares = device != "cpu"
    if arguments.jobs > 1:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", f"{SHARED / arguments.jobs:.4f}")
    target = arguments.target or find_name(device)
    elsewhere = {}
    if arguments.elsewhere:
        elsewhere = known_elsewhere(arguments.elsewhere, about["commit"], target)
    head = {
        "benchmark": "prediction",
        **about,
        "device": device,
        "target": target,
        "goal": f"at most {MOST_UNDER:.0%} under the peak, at most {MOST_OVER:.0%} over it",
        "unit": "bytes; ..._off: share of the peak",
        **({} if compares else {"note": "no GPU: the peak is the process', and nothing is compared with it"}),
    }
    cases = list(arguments.cases)
    known = known_rows(Path(arguments.out), head) if arguments.resume else []
    rows = [row for row in known if row["case"] in cases]
    missing = [case for case in cases if case not in {row["case"] for row in rows}]
    for row in rows_of(missing, arguments.jobs, target, elsewhere, compares):
        rows.append(row)
        record = head | {
            "failed": sum("error" in row or "elsewhere_error" in row for row in rows),
            **{name: summary(rows, name, len(cases)) for name in PREDICTIONS},
            "rows": rows,
        }
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    for name in PREDICTIONS:
        print(f"{name}: {json.dumps(summary(rows, name, len(cases)))}")


if __name__ == "__main__":
    main()
