"""The training step alone, on random weights at the shapes of known models: time, tokens/s, memory.

    python benchmarks/train_step.py 1b,8,2048,none,xla 1b,8,2048,none,cudnn --out result.json

Each argument is MODEL,BATCH,LENGTH,CHECKPOINTING,ATTENTION, or that and a dropout of adapters; MODEL is 1b
or 8b (Llama 3.2 1B and Llama 3.1 8B with a tied head) or tiny; 8b:8 has 8 layers only. BATCH is a number of
rows, or 4x2: four micro-batches of two rows. CHECKPOINTING is a preset, what is planned within a budget
(auto@5.06GiB), or what is done with activations, the rest being recomputed: gate=save+block_input=offload.
LoRA of rank 32 on all projections, bfloat16 (float32 on a CPU), AdamW, random tokens, every one a target;
--segments puts that many equal documents on a row. The program is that of lorajax.train. Each case runs in a
process of its own, so that its peak memory is its own. Steps are queued as in a run, STEPS at a time, or
fewer where they would take longer than ROUND_SECONDS; the median is of ROUNDS such runs.

    python benchmarks/train_step.py CASE CASE ... --jobs 8 --cache FOLDER --out result.json

compiles all cases first, eight side by side and without weights, and then times them one after the other:
`compiled_anew` is the number of programs that a case did not find in the cache, `longest_parts` what the
largest of its programs took to trace, to lower, and to compile or to load. While many compile, XLA times
ways to multiply on a GPU that others use too, and may keep a slower one: take --jobs 1, or none, for figures
that are held against a limit. --compile-only stops after the first phase, or with --again after it has been
gone through twice: cold and, in new processes, with what is in the cache by then.

    python benchmarks/train_step.py 8b,4,4096,full,auto 8b,4,4096,offload,auto --alternate 5 --out result.json

prepares all cases in one process, which holds the weights of a model once, and times them in turns, every
other time in the opposite order: for differences smaller than the drift from one process to the next. A row
has the milliseconds of all rounds, and the ratio of its median to that of the first case. Its memory is that
of the compiled program; peak_gib is null, because a peak would be that of all cases together.

    python benchmarks/train_step.py CASE --here --profile --out result.json

has the kernels that a step is made of, longest first. They start one by one then, not as a CUDA graph.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from environment import environment
from processes import Room, last_json

if TYPE_CHECKING:
    from lorajax.config import Config
    from lorajax.memory.plan import Plan
    from lorajax.models.decoder import Decoder
    from lorajax.training.inputs import RunShape
    from lorajax.training.program import Program
    from lorajax.training.step import Batch, StepMetrics, TrainState
    from lorajax.training.weights import Weights

SHAPES: dict[str, dict[str, int]] = {
    "1b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64
    ),
    "8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, head_dim=128
    ),
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16
    ),
}
WARM_UP, STEPS, ROUNDS = 3, 10, 3
ROUND_SECONDS, FEWEST_STEPS = 5.0, 3
# Of a process, beside what JAX takes of a GPU.
CONTEXT_GIB = 1.0
PACKAGES = ("lorajax", "jax", "jaxlib", "flax", "optax")

# What JAX reports of its compilation cache, counted; nothing where there is none.
_CACHE_EVENTS: Counter[str] = Counter()
_NOT_FOUND = "/jax/compilation_cache/cache_misses"
# Parts of compiling as JAX reports them, and the longest of each: that of the step.
_PARTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile or load",
}
_LONGEST: dict[str, float] = {}


def hf_config(name: str) -> dict[str, Any]:
    """config.json of a model: a name of SHAPES, or NAME:LAYERS."""
    shape, _, layers = name.partition(":")
    tiny = shape == "tiny"
    return (
        SHAPES[shape]
        | ({"num_hidden_layers": int(layers)} if layers else {})
        | {
            "model_type": "llama",
            "num_key_value_heads": 2 if tiny else 8,
            "vocab_size": 1024 if tiny else 128256,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        }
    )


class Case(NamedTuple):
    """MODEL,BATCH,LENGTH,CHECKPOINTING,ATTENTION[,DROPOUT]; budget: what follows an @ in CHECKPOINTING."""

    model: str
    micro_batches: int
    rows: int
    length: int
    checkpointing: str
    budget: str | None
    attention: str
    dropout: float = 0.0

    @classmethod
    def of(cls, text: str) -> Case:
        model, batch, length, checkpointing, attention, *dropout = text.split(",")
        micro_batches, rows = batch.split("x") if "x" in batch else ("1", batch)
        checkpointing, _, budget = checkpointing.partition("@")
        if "=" in checkpointing:
            checkpointing = json.dumps(dict(pair.split("=") for pair in checkpointing.split("+")))
        return cls(
            model,
            int(micro_batches),
            int(rows),
            int(length),
            checkpointing,
            budget or None,
            attention,
            *map(float, dropout),
        )


@dataclass
class Prepared:
    """A case that is compiled; `state`, `frozen` and `batch` are None where it is only compiled."""

    case: Case
    segments: int
    run: RunShape
    program: Program
    plan: Plan | None
    compile_seconds: float
    longest_parts: dict[str, float]
    compiled_anew: int | None
    state: TrainState | None = None
    frozen: Weights | None = None
    batch: Batch | None = None
    metrics: StepMetrics | None = None

    def run_steps(self, steps: int) -> float:
        """Queue so many steps and wait for them; seconds of one."""
        import jax

        assert self.state is not None and self.frozen is not None and self.batch is not None
        began = time.perf_counter()
        for _ in range(steps):
            self.state, self.metrics = self.program.step(self.state, self.frozen, self.batch)
        jax.block_until_ready(self.metrics)
        return (time.perf_counter() - began) / steps

    def warm_up(self, round_seconds: float) -> int:
        """Run the first steps; how many are to be queued at a time from now on."""
        self.run_steps(WARM_UP - 1)
        return min(STEPS, max(FEWEST_STEPS, round(round_seconds / self.run_steps(1))))

    def about(self) -> dict[str, Any]:
        """What is known without running it."""
        import jax

        memory = self.program.memory
        return {
            "model": self.case.model,
            "batch": self.run.layout.rows,
            "micro_batches": self.run.micro_batches,
            "length": self.case.length,
            "segments": self.segments,
            "checkpointing": self.case.checkpointing,
            "budget": self.case.budget,
            "plan": self.plan and self.plan.lines(),
            "attention": self.case.attention,
            "planned_gib": round(memory.total / 2**30, 2),
            "temporary_gib": round(memory.temporaries / 2**30, 2),
            "host_gib": round(memory.host / 2**30, 2),
            "compile_seconds": round(self.compile_seconds, 1),
            "longest_parts": self.longest_parts,
            "compiled_anew": self.compiled_anew,
            "device": jax.local_devices()[0].device_kind,
        }

    def row(self, seconds: Sequence[float], steps: int, *, peak: int | None) -> dict[str, Any]:
        """What `about` tells and what was measured.

        Args:
            seconds: of a step, in each round.
            steps: of a round.
            peak: bytes; None: not known of this case alone.
        """
        assert self.metrics is not None
        median = statistics.median(seconds)
        return self.about() | {
            "ms": round(1e3 * median, 2),
            "slowest_ms": round(1e3 * max(seconds), 2),
            "steps": steps * len(seconds),
            "tokens_per_second": round(self.run.rows_per_step * self.case.length / median),
            "peak_gib": None if peak is None else round(peak / 2**30, 2),
            "loss": round(float(self.metrics.loss), 4),
        }


def prepare(text: str, segments: int, *, runs: bool = True) -> Prepared:
    """Compile a case, as lorajax.train does; GPU memory has to be claimed before.

    Args:
        runs: False: it is compiled, and there are no weights.
    """
    import jax

    from lorajax.lora.adapter import add_lora, outline_lora
    from lorajax.memory.plan import outline_of
    from lorajax.sharding import data_mesh
    from lorajax.training.inputs import RunShape
    from lorajax.training.planning import planned
    from lorajax.training.program import compile_planned, first_state
    from lorajax.training.weights import split_weights

    case = Case.of(text)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    with model_folder(case.model) as folder:
        config = config_of(case, segments, folder, model__dtype=dtype)
        outline = outline_of(config)
    run = RunShape(config=config, mesh=data_mesh(), total_steps=1000)
    plan, run = planned(run, outline)
    _LONGEST.clear()
    began, not_found = time.perf_counter(), _CACHE_EVENTS[_NOT_FOUND]
    run, program, plan = compile_planned(run, plan, outline)
    prepared = Prepared(
        case,
        segments,
        run,
        program,
        plan,
        compile_seconds=time.perf_counter() - began,
        longest_parts={name: round(seconds, 1) for name, seconds in _LONGEST.items()},
        compiled_anew=_CACHE_EVENTS[_NOT_FOUND] - not_found if _CACHE_EVENTS else None,
    )
    if runs:
        model = random_model(case.model, config.model.dtype)
        add_lora(model, config.lora, seed=0)
        _, trainable, prepared.frozen = split_weights(model, "lora")
        outline_lora(model, config.lora)  # its own are gone from the GPU, as in a run
        prepared.state = first_state(run, trainable)
        prepared.batch = random_batch(run, outline.options.vocab_size, segments)
    return prepared


@contextlib.contextmanager
def model_folder(name: str) -> Iterator[str]:
    """A folder with config.json alone."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf_config(name)))
        yield folder


def config_of(case: Case, segments: int, folder: str, **settings: Any) -> Config:
    """Of a run of the model in a folder; settings by section__key, such as lora__rank."""
    from lorajax.config import load_config

    given = {
        "model.path": folder,
        "model.attention": case.attention,
        "data.path": "random.jsonl",
        "data.max_length": case.length,
        "data.max_segments": segments,
        "train.per_device_train_batch_size": case.rows,
        "train.gradient_accumulation_steps": case.micro_batches,
        "memory.checkpointing": case.checkpointing,
        "lora.dropout": case.dropout,
        "output.output_dir": "unused",
    } | ({"memory.budget": case.budget} if case.budget else {})
    given |= {name.replace("__", "."): value for name, value in settings.items()}
    return load_config(None, [f"--{key}={value}" for key, value in given.items()])


@functools.cache
def random_model(name: str, dtype: str) -> Decoder:
    """The process' one copy of a model's weights, which all its cases share."""
    from lorajax.models.checkpoint import initialise

    with model_folder(name) as folder:
        return initialise(folder, dtype=dtype, seed=0)


def random_batch(run: RunShape, vocab: int, segments: int) -> Batch:
    """A step's batch on the devices: the same tokens for every layout of the same rows."""
    import jax
    import numpy as np

    from lorajax.sharding import rows

    length = run.config.data.max_length
    shape = (run.micro_batches, run.rows_per_micro_batch, length)
    random = np.random.default_rng(0)
    ids, place = np.divmod(np.arange(length), -(-length // segments))
    batch = {
        "tokens": random.integers(0, vocab, shape, dtype=np.int32),
        "targets": random.integers(0, vocab, shape, dtype=np.int32),
        "segment_ids": np.broadcast_to(ids + 1, shape).astype(np.int32),
        "positions": np.broadcast_to(place, shape).astype(np.int32),
        "weights": np.ones(shape, np.float32),
    }
    return jax.device_put(batch, rows(run.mesh))


def use_cache(folder: str) -> None:
    """Keep compiled programs, the small ones too, in a folder, and count those that it lacks."""
    import jax

    jax.config.update("jax_compilation_cache_dir", os.path.abspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.monitoring.register_event_listener(lambda event, **_: _CACHE_EVENTS.update([event]))
    jax.monitoring.register_event_duration_secs_listener(_note_part)


def _note_part(event: str, duration_secs: float, **_: str | int) -> None:
    if name := _PARTS.get(event):
        _LONGEST[name] = max(_LONGEST.get(name, 0.0), duration_secs)


def measure(case: str, segments: int, *, profile: bool) -> dict[str, Any]:
    """One case, in this process; `profile`: with the kernels of a step."""
    from lorajax.memory.machine import claim_gpu_memory
    from lorajax.training.metrics import peak_memory_bytes

    if profile:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    claim_gpu_memory(Case.of(case).budget)
    prepared = prepare(case, segments)
    steps = prepared.warm_up(ROUND_SECONDS)
    seconds = [prepared.run_steps(steps) for _ in range(ROUNDS)]
    row = prepared.row(seconds, steps, peak=peak_memory_bytes())
    if profile:
        from kernel_times import kernel_times

        row["kernels"] = kernel_times(lambda: prepared.run_steps(1))
    return row


def compile_alone(case: str, segments: int, share: str | None, *, runs: bool) -> dict[str, Any]:
    """Compile one case in this process, beside others that do so too.

    Args:
        share: of the GPU that a case without a budget of its own may plan for; None: what is free now.
        runs: run some steps too, for its peak.
    """
    from lorajax.memory.machine import claim_gpu_memory
    from lorajax.training.metrics import peak_memory_bytes

    budget = Case.of(case).budget
    if not (runs and budget):
        # A plan depends on how much JAX may take: it may take as much as when it runs, but takes what it
        # needs. Within a budget it takes all at once, as when it runs: piece by piece, what is free would be
        # in several places, none of them as large as what a step needs.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if share is not None and budget is None:
        os.environ["XLA_CLIENT_MEM_FRACTION"] = share
    claim_gpu_memory(budget)
    prepared = prepare(case, segments, runs=runs)
    if not runs:
        return prepared.about()
    prepared.run_steps(WARM_UP)
    return prepared.about() | {"peak_gib": round(peak_memory_bytes() / 2**30, 2)}


def measure_alternately(
    cases: Sequence[str], segments: int, rounds: int, round_seconds: float
) -> list[dict[str, Any]]:
    """All cases in this process, in turns."""
    from lorajax.memory.machine import claim_gpu_memory

    claim_gpu_memory(None)
    prepared = [prepare(case, segments) for case in cases]
    steps = [each.warm_up(round_seconds) for each in prepared]
    seconds: list[list[float]] = [[] for _ in cases]
    for number in range(rounds):
        indices = range(len(cases))
        for index in reversed(indices) if number % 2 else indices:
            seconds[index].append(prepared[index].run_steps(steps[index]))
    first = statistics.median(seconds[0])
    return [
        {"case": case, **each.row(times, count, peak=None)}
        | {
            "rounds_ms": [round(1e3 * one, 2) for one in times],
            "ratio": round(statistics.median(times) / first, 4),
        }
        for case, each, times, count in zip(cases, prepared, seconds, steps, strict=True)
    ]


@functools.cache
def machine_at_hand() -> dict[str, Any]:
    """{"device": its kind, "gpu_share": what may be claimed, "gpu_gib": how much that is}.

    The rates of a GPU are known from now on.
    In a process of its own, which leaves the GPU free again, and before others use it.
    """
    found = last_json(__file__, ["--machine"])
    if "error" in found:
        raise SystemExit(found["error"])
    return found


def prepare_machine() -> dict[str, Any]:
    """`machine_at_hand`, in this process."""
    import jax

    from lorajax.memory.machine import claim_gpu_memory, gpu_limit, machine_rates

    claim_gpu_memory(None)
    if jax.default_backend() == "gpu":
        machine_rates()
    share = os.environ.get("XLA_CLIENT_MEM_FRACTION")
    limit = gpu_limit(None)
    return {
        "device": jax.local_devices()[0].device_kind,
        "gpu_share": share,
        "gpu_gib": limit and limit / 2**30,
    }


def in_process_of_its_own(case: str, segments: int, *options: str) -> dict[str, Any]:
    """A case's row, which is {"case", "segments", "error"} where it fails; options as on the command line."""
    row = last_json(__file__, [case, "--segments", str(segments), "--here", *options])
    return {"case": case, "segments": segments, **row}


def compile_side_by_side(
    cases: Sequence[str], segments: int, *, cache: str, jobs: int, peaks: bool = False
) -> dict[str, dict[str, Any]]:
    """Fill a compilation cache, each case in a process of its own; case -> its row without times.

    Args:
        cache: folder.
        jobs: processes at a time.
        peaks: once all are compiled, those that can be run also run for some steps in another process, whose
            peak is then that of the steps. As many at a time as fit by their plans.
    """
    from lorajax.memory.machine import allocated

    if not cases:
        return {}
    options, limit = _options_of_compiling(cache)
    room = Room(limit or 0.0)
    began = time.perf_counter()

    def run(case: str, row: dict[str, Any]) -> dict[str, Any]:
        if is_refused(row):
            return row
        # What compile_alone lets it take.
        budget = row.get("budget")
        gib = allocated(budget) / 2**30 if budget else row.get("planned_gib", math.inf)
        with room.taken(gib + CONTEXT_GIB):
            return in_process_of_its_own(case, segments, *options, "--peak")

    with ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(lambda case: in_process_of_its_own(case, segments, *options), cases))
        print(f"compiled {len(cases)} cases in {time.perf_counter() - began:.0f} s", flush=True)
        if peaks:
            rows = list(pool.map(run, cases, rows))
            print(f"ran them, {time.perf_counter() - began:.0f} s", flush=True)
    return dict(zip(cases, rows, strict=True))


def _options_of_compiling(cache: str) -> tuple[list[str], float | None]:
    """For processes side by side, and the GiB that they share, if that is known."""
    machine = machine_at_hand()
    share = machine["gpu_share"]
    options = ["--cache", cache, "--compile-only", *(["--gpu-share", share] if share else [])]
    return options, machine["gpu_gib"]


def measure_in_turn(
    cases: Sequence[str], segments: int, *, cache: str | None = None, jobs: int = 0
) -> Iterator[dict[str, Any]]:
    """Rows of the cases in their order, each timed in a process of its own.

    Args:
        cache: folder of compiled programs; None: none.
        jobs: how many are compiled side by side beforehand; a case that does not fit is not tried again.
    """
    compiled = {}
    if jobs:
        assert cache is not None
        compiled = compile_side_by_side(cases, segments, cache=cache, jobs=jobs)
    options = ["--cache", cache] if cache else []
    for case in cases:
        row = compiled.get(case, {})
        yield row if is_refused(row) else in_process_of_its_own(case, segments, *options)


def measure_together(
    cases: Sequence[str], segments: int, rounds: int, *, cache: str, round_seconds: float
) -> list[dict[str, Any]]:
    """measure_alternately in a process of its own, which leaves the GPU free again."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        options = [f"--segments={segments}", f"--alternate={rounds}", f"--cache={cache}", f"--out={out}"]
        options.append(f"--round-seconds={round_seconds}")
        subprocess.run([sys.executable, __file__, *cases, *options], stdout=subprocess.DEVNULL, check=True)
        return json.loads(out.read_text(encoding="utf-8"))["rows"]


def is_refused(row: dict[str, Any]) -> bool:
    """Whether lorajax itself says that a case cannot be run."""
    return "UserError" in row.get("error", "")


@contextlib.contextmanager
def cache_folder(named: str | None) -> Iterator[str]:
    """The folder that is named, or one for the time being."""
    if named:
        yield os.path.abspath(named)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield folder


def lines_of_json(command: str) -> list[dict[str, Any]]:
    """What another library's script reports of itself on this machine."""
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    records = [{"command": command, "exit_code": done.returncode, **record} for record in found or [{}]]
    for record in records:
        print(json.dumps(record), flush=True)
    return records


def arguments_of_command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("cases", nargs="*", metavar="MODEL,BATCH,LENGTH,CHECKPOINTING,ATTENTION")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="COMMAND",
        help="run afterwards, from the same folder; its lines of JSON are recorded as they are",
    )
    parser.add_argument("--segments", type=int, default=1, help="documents on a row")
    parser.add_argument("--alternate", type=int, metavar="N", help="in one process, N rounds in turns")
    parser.add_argument(
        "--round-seconds", type=float, default=ROUND_SECONDS, help="with --alternate: of a round at most"
    )
    parser.add_argument("--cache", metavar="FOLDER", help="of compiled programs; made where it is missing")
    parser.add_argument(
        "--jobs", type=int, default=0, help="compile so many cases at a time, before any runs"
    )
    parser.add_argument("--compile-only", action="store_true", help="run nothing")
    parser.add_argument("--again", action="store_true", help="with --compile-only: twice")
    parser.add_argument("--out", help="JSON file for the result")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--profile", action="store_true", help="the kernels of a step, with --here")
    parser.add_argument("--here", action="store_true", help="the first case alone, in this process")
    parser.add_argument("--gpu-share", help="with --compile-only --here: see compile_alone")
    parser.add_argument("--peak", action="store_true", help="with --compile-only --here: see compile_alone")
    parser.add_argument("--machine", action="store_true", help="see machine_at_hand")
    arguments = parser.parse_args()
    if not arguments.cases and not arguments.machine:
        parser.error("name a case")
    if arguments.compile_only and not arguments.cache:
        parser.error("--compile-only needs --cache, or what it compiles is lost")
    return arguments


def in_this_process(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.machine:
        return prepare_machine()
    if arguments.cache:
        use_cache(arguments.cache)
    if arguments.compile_only:
        return compile_alone(arguments.cases[0], arguments.segments, arguments.gpu_share, runs=arguments.peak)
    return measure(arguments.cases[0], arguments.segments, profile=arguments.profile)


def rows_of(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    cases, segments, jobs = arguments.cases, arguments.segments, arguments.jobs
    with contextlib.ExitStack() as stack:
        cache = arguments.cache
        if cache or jobs:
            cache = stack.enter_context(cache_folder(cache))
        if arguments.compile_only:
            for again in range(2 if arguments.again else 1):
                compiled = compile_side_by_side(cases, segments, cache=cache, jobs=max(jobs, 1))
                yield from ({**row, "again": bool(again)} for row in compiled.values())
        elif arguments.alternate:
            if jobs:
                compile_side_by_side(list(dict.fromkeys(cases)), segments, cache=cache, jobs=jobs)
            if cache:
                use_cache(cache)
            yield from measure_alternately(cases, segments, arguments.alternate, arguments.round_seconds)
        else:
            yield from measure_in_turn(cases, segments, cache=cache, jobs=jobs)


def main() -> None:
    arguments = arguments_of_command()
    if arguments.here or arguments.machine:
        row = in_this_process(arguments)
        print(json.dumps(row))
        rows = [{"case": ",".join(arguments.cases), "segments": arguments.segments, **row}]
    else:
        rows = []
        for row in rows_of(arguments):
            rows.append(row)
            print(json.dumps(row), flush=True)
    beside = [record for command in arguments.beside for record in lines_of_json(command)]
    if arguments.out:
        record = {
            "benchmark": "train_step",
            **environment(*PACKAGES, commit=arguments.commit),
            "rows": rows,
            "beside": beside,
        }
        Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
