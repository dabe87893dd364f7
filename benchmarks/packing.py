"""Short samples padded against packed: target tokens/s and memory of whole runs, same model, same samples.

    python benchmarks/packing.py --data pydoc_explain.jsonl --tokenizer FOLDER --out result.json
    python benchmarks/packing.py --data lorajax/assets/quickstart.jsonl --tokenizer lorajax/assets/tiny \\
        --model tiny --budget none --documents 200 --padded 4,8 --packed 1,2 --out result.json  # on a CPU

Of a JSONL file, --documents samples of at most 768 tokens are learnt once: one on a row of 768 tokens, in
batches of 5, 10, 20 and 40 rows, and packed on rows of 3840 tokens, in batches of 1, 2, 4 and 8. Every case
is a run of lorajax.fit, on random weights at the shapes of train_step.py, within the same memory budget.
Rates are sums over the rows of metrics.jsonl, without the first steps and the last, whose batch may be part
empty. All programs are compiled first, --jobs at a time; then each case runs alone, in a process of its own.

The goal: the best packed batch reaches 1.3 times the target tokens/s of the best padded one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from environment import cores, environment
from processes import last_json
from train_step import WARM_UP, cache_folder, hf_config, is_refused, prepare_machine, use_cache

if TYPE_CHECKING:
    from lorajax.config import Config

LENGTHS = {"padded": 768, "packed": 3840}
GOAL = 1.3
PACKAGES = ("lorajax", "jax", "jaxlib", "flax", "optax", "grain")

# (task, case) -> what a process of its own reports of it.
Child = Callable[[str, "Case"], dict[str, Any]]


class Case(NamedTuple):
    """padded or packed, and rows of a batch."""

    kind: str
    rows: int

    @classmethod
    def of(cls, text: str) -> Case:
        kind, rows = text.split(",")
        return cls(kind, int(rows))

    def __str__(self) -> str:
        return f"{self.kind},{self.rows}"


class Work(NamedTuple):
    """The folder of what all cases share."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def samples(self) -> Path:
        return self.folder / "samples.jsonl"

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    @property
    def run(self) -> Path:
        return self.folder / "run"


def config_of(case: Case, work: Work, arguments: argparse.Namespace) -> Config:
    import jax

    from lorajax.config import load_config

    settings = {
        "model.path": work.model,
        "model.tokenizer": arguments.tokenizer,
        "model.dtype": "float32" if jax.default_backend() == "cpu" else "bfloat16",
        "data.path": work.samples,
        "data.max_length": LENGTHS[case.kind],
        "data.packing": json.dumps(case.kind == "packed"),
        "data.cache_dir": work.tokens,
        "train.per_device_train_batch_size": case.rows,
        "memory.checkpointing": arguments.checkpointing,
        "output.output_dir": work.run,
        "output.overwrite_output_dir": "true",
    } | ({} if arguments.budget == "none" else {"memory.budget": arguments.budget})
    return load_config(None, [f"--{key}={value}" for key, value in settings.items()])


def prepare(work: Work, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write samples and model, and fill the caches that the cases would otherwise fill all at once."""
    from lorajax.data import load_documents, load_tokenizer
    from lorajax.models.checkpoint import initialise, save_merged

    device = prepare_machine()["device"]
    tokenizer = load_tokenizer(arguments.tokenizer)
    write_samples(arguments.data, arguments.documents, tokenizer, work)
    work.model.mkdir(exist_ok=True)
    shape = hf_config(arguments.model)
    shape["vocab_size"] = max(shape["vocab_size"], len(tokenizer))
    (work.model / "config.json").write_text(json.dumps(shape))
    config = config_of(Case("padded", 1), work, arguments)
    model = initialise(work.model, dtype=config.model.dtype, seed=0)
    save_merged(model, work.model)
    # As each run loads them: the tokens of the samples are cached now.
    loaded = load_documents(
        config.data, tokenizer, context_length=None, seed=0, eos_ids=model.eos_token_ids
    ).train_stats
    return {
        "documents": loaded.documents,
        "tokens": loaded.tokens,
        "target_tokens": loaded.target_tokens,
        "device": device,
    }


def write_samples(data: str, count: int, tokenizer: Any, work: Work) -> None:
    """A random choice of the samples that fit a padded row whole, in their order."""
    from lorajax.config import DataConfig
    from lorajax.data import load_documents

    lines = [line for line in Path(data).read_text(encoding="utf-8").split("\n") if line.strip()]
    # With every token a target no row is left out: a document for each line.
    config = DataConfig(
        path=os.path.abspath(data),
        max_length=2**30,
        train_on_prompt=True,
        cache_dir=str(work.tokens),
    )
    documents = load_documents(config, tokenizer, context_length=None, seed=0).train
    lengths = documents.lengths.tolist()
    short = [line for line, length in zip(lines, lengths, strict=True) if length <= LENGTHS["padded"]]
    chosen = sorted(random.Random(0).sample(range(len(short)), min(count, len(short))))
    work.samples.write_text("".join(f"{short[index]}\n" for index in chosen), encoding="utf-8")


def compile_alone(case: Case, work: Work, arguments: argparse.Namespace) -> dict[str, Any]:
    """The program of a run, compiled beside others, without weights; what it takes."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    from lorajax.memory.machine import claim_gpu_memory
    from lorajax.training.inputs import prepare as inputs_of
    from lorajax.training.planning import planned
    from lorajax.training.program import compile_planned

    claim_gpu_memory(None if arguments.budget == "none" else arguments.budget)
    inputs = inputs_of(config_of(case, work, arguments))
    plan, inputs = planned(inputs, inputs.outline)
    inputs, program, plan = compile_planned(inputs, plan, inputs.outline)
    return {
        "batch": inputs.layout.rows,
        "micro_batches": inputs.micro_batches,
        "fill_rate": round(inputs.packing.fill_rate, 4),
        "plan": plan and plan.lines(),
        "planned_gib": round(program.memory.total / 2**30, 2),
        "host_gib": round(program.memory.host / 2**30, 2),
    }


def run(case: Case, work: Work, arguments: argparse.Namespace) -> dict[str, Any]:
    """lorajax.fit in this process, and its rates."""
    from lorajax.memory.machine import claim_gpu_memory
    from lorajax.training.fit import fit

    claim_gpu_memory(None if arguments.budget == "none" else arguments.budget)
    result = fit(config_of(case, work, arguments))
    every = [row for row in result.metrics if "loss" in row]
    rows = every[WARM_UP:-1]
    if not rows:
        raise ValueError(f"{len(every)} steps are too few to leave out the first {WARM_UP} and the last")
    seconds = sum(row["step_seconds"] for row in rows)
    places = len(rows) * case.rows * LENGTHS[case.kind]
    return {
        "target_tokens_per_second": round(sum(row["target_tokens"] for row in rows) / seconds),
        "tokens_per_second": round(sum(row["tokens"] for row in rows) / seconds),
        "places_per_second": round(places / seconds),
        "ms": round(1e3 * statistics.median(row["step_seconds"] for row in rows), 2),
        "steps": len(rows),
        "learnt": sum(row["target_tokens"] for row in every),
        "peak_gib": round(result.peak_memory_bytes / 2**30, 2),
        "loss": round(every[-1]["loss"], 4),
    }


def measure(cases: list[Case], jobs: int, cache: str, child: Child) -> Iterator[dict[str, Any]]:
    """Rows of the cases in their order, once all are compiled."""
    with ThreadPoolExecutor(jobs) as pool:
        compiled = list(pool.map(lambda case: child("compile", case), cases))
    for case, about in zip(cases, compiled, strict=True):
        row = {"case": str(case), "kind": case.kind, "rows": case.rows, "length": LENGTHS[case.kind]}
        if is_refused(about):
            yield row | about
            continue
        steps = compiled_steps(cache)
        about.pop("error", None)
        ran = child("run", case)
        yield row | about | ran | {"compiled_anew": compiled_steps(cache) - steps}


def compiled_steps(cache: str) -> int:
    """Training steps in the compilation cache."""
    return len(list(Path(cache).glob("jit_step-*-cache")))


def compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best of each kind, and how much faster the packed one is."""
    best: dict[str, Any] = {}
    for row in rows:
        rate = row.get("target_tokens_per_second", 0)
        if rate and rate > best.get(row["kind"], {}).get("target_tokens_per_second", 0):
            best[row["kind"]] = row
    short = {
        kind: {key: row[key] for key in ("rows", "target_tokens_per_second", "peak_gib")}
        for kind, row in best.items()
    }
    if len(best) < len(LENGTHS):
        return {"best": short, "ratio": None, "reached": False}
    ratio = best["packed"]["target_tokens_per_second"] / best["padded"]["target_tokens_per_second"]
    return {"best": short, "ratio": round(ratio, 3), "reached": ratio >= GOAL}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments_of_command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", required=True, help="JSONL file of samples")
    parser.add_argument("--tokenizer", required=True, help="folder in Hugging Face layout")
    parser.add_argument("--model", default="1b", help="as in train_step.py")
    parser.add_argument("--documents", type=int, default=2000, help="samples that are learnt")
    parser.add_argument("--padded", type=numbers, default=[5, 10, 20, 40], help="rows of batches: 5,10")
    parser.add_argument("--packed", type=numbers, default=[1, 2, 4, 8], help="rows of batches: 1,2")
    parser.add_argument("--checkpointing", default="auto", help="memory.checkpointing of all cases")
    parser.add_argument("--budget", default="19.5GiB", help="memory.budget of all cases; none: no budget")
    parser.add_argument("--cache", metavar="FOLDER", help="of compiled programs; none: for this run alone")
    parser.add_argument("--jobs", type=int, default=max(cores() // 2, 1), help="that compile at a time")
    parser.add_argument("--out", help="JSON file for the result")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--here", choices=("prepare", "compile", "run"), help="one task, in this process")
    parser.add_argument("--work", help="with --here: folder that prepare fills")
    parser.add_argument("--case", type=Case.of, help="with --here: such as packed,4")
    return parser.parse_args()


def in_this_process(arguments: argparse.Namespace) -> dict[str, Any]:
    work = Work(Path(arguments.work))
    if arguments.here == "prepare":
        return prepare(work, arguments)
    use_cache(arguments.cache)
    return (compile_alone if arguments.here == "compile" else run)(arguments.case, work, arguments)


def main() -> None:
    arguments = arguments_of_command()
    if arguments.here:
        print(json.dumps(in_this_process(arguments)))
        return
    with cache_folder(arguments.cache) as cache, tempfile.TemporaryDirectory() as work:

        def child(task: str, case: Case | None = None) -> dict[str, Any]:
            options = ["--cache", cache, "--work", work, *(["--case", str(case)] if case else [])]
            return last_json(__file__, [*sys.argv[1:], "--here", task, *options])

        prepared = child("prepare")
        if "error" in prepared:
            raise SystemExit(prepared["error"])
        head = {
            "benchmark": "packing",
            **environment(*PACKAGES, commit=arguments.commit),
            "model": arguments.model,
            "data": Path(arguments.data).name,
            "checkpointing": arguments.checkpointing,
            "budget": arguments.budget,
            **prepared,
        }
        rows: list[dict[str, Any]] = []
        cases = [Case(kind, number) for kind in LENGTHS for number in getattr(arguments, kind)]
        for row in measure(cases, arguments.jobs, cache, child):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if arguments.out:
                record = head | compared(rows) | {"cases": rows}
                Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(compared(rows), indent=2))


if __name__ == "__main__":
    main()
