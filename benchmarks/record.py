"""All that is recorded of a GPU, by one command: the results of benchmarks/results, and a short table last.

    python benchmarks/record.py --folder results --data rows.jsonl --smollm2 FOLDER --unsloth "python3 PEER"
    python benchmarks/record.py --folder results --only train_step_1b kernels --minutes 9

TASKS are the benchmarks and the tests that need a GPU, each with the minutes after which it is stopped. They
run one after the other, or, where --gpus names several, as many side by side, each with its share of the
cores. NAME.json holds a result, NAME.log what was printed. A task whose input is not given says so:

    --data       JSONL of samples to train on, as for packing.py
    --smollm2    folder of SmolLM2-135M-Instruct in Hugging Face layout
    --unsloth    command that takes cases such as 1b,8,2048,0,0 and prints a line of JSON for each
    --elsewhere  what prediction.py --only-elsewhere has written, which spares the GPU's machine that
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

HERE = Path(__file__).parent
INPUTS = ("data", "smollm2", "unsloth", "elsewhere")


class Task(NamedTuple):
    """A benchmark, or tests.

    Attributes:
        minutes: after which it is stopped.
        command: a script of this folder, which takes --out and --commit, and its arguments; or pytest.
            {data} and the like are inputs, {cache} is a folder for programs, {folder} that of the results.
        optional: inputs that it can do without -> what they add to the command.
        fraction: of the GPU's memory for JAX; None: as JAX and lorajax choose.
    """

    minutes: float
    command: str
    optional: Mapping[str, str] = {}
    fraction: float | None = None


def _beside(cases: str) -> dict[str, str]:
    return {"unsloth": f"--beside '{{unsloth}} {cases}'"}


_IN_TURNS = "--alternate 5 --jobs 1 --cache {cache}"
_SMOLLM2 = "{configs}/smollm2_135m.yaml --model.path {smollm2} --data.path {data}"

# Long ones first, so that GPUs side by side are done at about the same time.
TASKS = {
    "auto_choice": Task(9, "auto_choice.py --cache {cache}"),
    "no_surprise": Task(9, "no_surprise.py --draws 20 --jobs 10"),
    "train_step_8b": Task(
        8,
        "train_step.py 8b,4,4096,auto@19.6GiB,auto 8b,4,4096,auto@75GiB,auto --jobs 1 --cache {cache}",
        _beside("8b,4,4096,u,0 8b,4,4096,0,0"),
    ),
    "kernels": Task(9, "kernels.py"),
    "prediction": Task(6, "prediction.py --jobs 6", {"elsewhere": "--elsewhere {elsewhere}"}),
    "short_sequences": Task(9, "short_sequences.py --plot {folder}/short_sequences.png --cache {cache}"),
    "tests": Task(6, "pytest -q -n 4 --dist=load {tests}/gpu", fraction=0.2),
    "packing": Task(
        6,
        "packing.py --documents 1000 --padded 10,20,40 --packed 1,2 --data {data} --tokenizer {smollm2}"
        " --cache {cache}",
    ),
    "train_step_1b": Task(
        6,
        "train_step.py 1b,8,2048,auto@5.06GiB,auto 1b,8,2048,auto@19.5GiB,auto --jobs 1 --cache {cache}",
        _beside("1b,8,2048,0,0 1b,8,2048,u,0"),
    ),
    "attention_losses": Task(4, f"attention_losses.py {_SMOLLM2}"),
    "smollm2_135m": Task(4, f"finetune.py {_SMOLLM2}"),
    "offload_8b": Task(4, f"train_step.py 8b,4,4096,full,auto 8b,4,4096,offload,auto {_IN_TURNS}"),
    # In no other's folder: what is compiled first is compiled cold.
    "compile": Task(
        6,
        "train_step.py 8b,4,4096,offload,auto 8b:80,4,4096,offload,auto 8b:8,4,4096,offload,auto"
        " 8b:16,4,4096,offload,auto 8b,4,4096,auto@19.6GiB,auto --compile-only --again --cache {cache}/cold",
    ),
    "profile_8b": Task(3, "train_step.py 8b,4,4096,auto@75GiB,auto --here --profile"),
    "profile_1b": Task(3, "train_step.py 1b,8,2048,auto@19.5GiB,auto --here --profile"),
    "offload_1b": Task(3, f"train_step.py 1b,8,2048,full,auto 1b,8,2048,offload,auto {_IN_TURNS}"),
    "tests_2_to_the_31": Task(3, "pytest -q -n 0 {tests}/gpu -k 2_to_the_31", fraction=0.9),
}


@dataclass(frozen=True)
class Outcome:
    """What came of a task: a line of the table."""

    name: str
    outcome: str
    seconds: float = 0.0
    figures: str = ""


def command(task: Task, inputs: Mapping[str, str], out: Path, commit: str | None) -> list[str]:
    """Of a task, with paths from anywhere.

    Raises:
        KeyError: the input that is missing.
    """
    text = " ".join([task.command, *(extra for name, extra in task.optional.items() if name in inputs)])
    script, *arguments = (part.format_map(inputs) for part in shlex.split(text))
    if script == "pytest":
        return [sys.executable, "-m", "pytest", *arguments]
    named = [f"--commit={commit}"] if commit else []
    return [sys.executable, str(HERE / script), *arguments, f"--out={out}", *named]


def run(
    name: str,
    inputs: Mapping[str, str],
    commit: str | None,
    *,
    seconds: float,
    place: Sequence[str],
    gpu: str,
) -> Outcome:
    """One task, stopped after `seconds` at the latest.

    Args:
        place: what its command is put behind, to have its share of the cores.
    """
    task, folder = TASKS[name], Path(inputs["folder"])
    out = folder / f"{name}.json"
    try:
        found = [*place, *command(task, inputs, out, commit)]
    except KeyError as missing:
        return Outcome(name, f"needs --{missing.args[0]}")
    out.unlink(missing_ok=True)  # of a run before
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
    if task.fraction is not None:
        environment["XLA_CLIENT_MEM_FRACTION"] = str(task.fraction)
    began = time.monotonic()
    with (folder / f"{name}.log").open("wb") as log:
        worker = subprocess.Popen(
            found, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = worker.wait(min(60 * task.minutes, seconds))
            outcome = "done" if status == 0 else f"failed, {status}"
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            outcome = "stopped"
    return Outcome(name, outcome, time.monotonic() - began, figures(out, folder / f"{name}.log"))


def figures(out: Path, log: Path) -> str:
    """Of a result, in a few words; of what has none, or half of one, the last line that was printed."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = json.loads(out.read_text(encoding="utf-8"))
        return SUMMARIES[record["benchmark"]](record)
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line[:200] for line in reversed(lines) if line), "")


def _steps(record: dict[str, Any]) -> str:
    """Of train_step.py, in any of its ways."""

    def words(row: dict[str, Any]) -> str:
        if "error" in row:
            return row["error"].splitlines()[0][:100]
        if "fw" in row:
            return f"{row['fw']} {row['ck']}: {row['tok_s']:,} tokens/s, {row['peak']} GiB"
        kept = ",".join(row["case"].split(",")[:4])
        if "again" in row:
            return f"{kept}: {'warm' if row['again'] else 'cold'} {row['compile_seconds']} s"
        if "kernels" in row:
            longest = ", ".join(f"{each['ms']} {each['kernel'][:30]}" for each in row["kernels"][:4])
            return f"{kept}: {row['ms']} ms, of which {longest}"
        ratio = f", {row['ratio']} of the first" if "ratio" in row else ""
        return f"{kept}: {row['tokens_per_second']:,} tokens/s, {row['planned_gib']} GiB{ratio}"

    beside = [row for row in record["beside"] if "fw" in row]
    return "; ".join(map(words, [*record["rows"], *beside]))


def _choices(record: dict[str, Any]) -> str:
    ratios = ", ".join(str(each.get("ratio")) for each in record["points"])
    return f"{record['reached']} of {len(record['points'])} points: {ratios}"


def _kernels(record: dict[str, Any]) -> str:
    """Of each op, in the case where its fastest implementation does worst: that over the bound, or peer."""
    cases: dict[tuple[str, str], float] = {}
    for row in record["rows"]:
        if ratio := row.get("to_bound") or row.get("to_best_peer"):
            case = row["op"], row["case"]
            cases[case] = min(ratio, cases.get(case, ratio))
    worst: dict[str, float] = {}
    for (op, _), ratio in cases.items():
        worst[op] = max(ratio, worst.get(op, ratio))
    return ", ".join(f"{op} {ratio:.2f}" for op, ratio in worst.items())


# Of each benchmark: a result in a few words.
SUMMARIES: dict[str, Callable[[dict[str, Any]], str]] = {
    "train_step": _steps,
    "auto_choice": _choices,
    "kernels": _kernels,
    "short_sequences": lambda record: ", ".join(
        f"{name} {goal['reached']}" for name, goal in record["goals"].items() if goal
    ),
    "packing": lambda record: f"{record['ratio']} times",
    "prediction": lambda record: f"elsewhere {record['elsewhere']}, planned {record['planned']}",
    "no_surprise": lambda record: (
        f"{record['ran']} ran, {record['refused']} refused, {record['failed']} failed"
    ),
    "attention_losses": lambda record: f"at most {record['largest_difference']} apart",
    "finetune": lambda record: (
        f"{record['summary']['median_tokens_per_second']:,} tokens/s,"
        f" held-out {record['summary']['held_out_loss_after']}"
    ),
}


def run_all(
    names: Sequence[str], inputs: Mapping[str, str], commit: str | None, gpus: Sequence[str], seconds: float
) -> list[Outcome]:
    """The tasks in their order, on as many GPUs side by side, as long as there is time."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(len(cores) // len(gpus), 1)
    free: SimpleQueue[tuple[str, list[str]]] = SimpleQueue()
    for index, gpu in enumerate(gpus):
        own = ",".join(map(str, cores[index * share :][:share] or cores))
        free.put((gpu, ["taskset", "-c", own] if len(gpus) > 1 and shutil.which("taskset") else []))
    ends = time.monotonic() + seconds

    def work(name: str) -> Outcome:
        gpu, place = free.get()
        try:
            left = ends - time.monotonic()
            outcome = Outcome(name, "not begun")
            if left > 0:
                outcome = run(name, inputs, commit, seconds=left, place=place, gpu=gpu)
        finally:
            free.put((gpu, place))
        print(f"{outcome.name}: {outcome.outcome}, {outcome.seconds:.0f} s", flush=True)
        return outcome

    with ThreadPoolExecutor(len(gpus)) as pool:
        return list(pool.map(work, names))


def table(outcomes: Sequence[Outcome]) -> str:
    names = max(len(each.name) for each in outcomes)
    ends = max(len(each.outcome) for each in outcomes)
    return "\n".join(
        f"{each.name:{names}}  {each.outcome:{ends}}  {each.seconds:4.0f} s  {each.figures}".rstrip()
        for each in outcomes
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", required=True, help="for results and logs")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument(
        "--gpus",
        default=os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        help="numbers, such as 0,1: a task each at a time; otherwise the first that is visible",
    )
    parser.add_argument("--minutes", type=float, default=120, help="after which all is stopped")
    for name in INPUTS:
        parser.add_argument(f"--{name}", help="see above")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    arguments = parser.parse_args()
    folder = Path(arguments.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    given = {name: getattr(arguments, name) for name in INPUTS if getattr(arguments, name)}
    with tempfile.TemporaryDirectory() as cache:
        places = {
            "folder": folder,
            "cache": cache,
            "configs": HERE.parent / "configs",
            "tests": HERE.parent / "tests",
        }
        inputs = given | {name: str(path) for name, path in places.items()}
        names, gpus = list(dict.fromkeys(arguments.only)), arguments.gpus.split(",")
        outcomes = run_all(names, inputs, arguments.commit, gpus, 60 * arguments.minutes)
    print(table(outcomes))
    sys.exit(any(each.outcome != "done" for each in outcomes))


if __name__ == "__main__":
    main()
