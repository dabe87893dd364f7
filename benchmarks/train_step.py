"""The training step alone, on random weights at the shapes of known models: time, tokens/s, memory.

    python benchmarks/train_step.py 1b,8,2048,none,xla 1b,8,2048,none,cudnn --out result.json

Each argument is MODEL,BATCH,LENGTH,CHECKPOINTING,ATTENTION; MODEL is 1b or 8b (Llama 3.2 1B and Llama 3.1 8B
with a tied head) or tiny. BATCH is a number of rows, or 4x2: four micro-batches of two rows. CHECKPOINTING is
a preset, what is planned within a budget (auto@5.06GiB), or what is done with activations, the rest being
recomputed: gate=save+block_input=offload. LoRA of rank 32 on all projections, bfloat16 (float32 on a CPU),
AdamW, random tokens, every one a target; --segments puts that many equal documents on a row. The program is
that of lorajax.train. Each case runs in a process of its own, so that its peak memory is its own. Steps are
queued as in a run, STEPS at a time; the median is of ROUNDS such runs. The kernels that a step is made of:

    export XLA_FLAGS=--xla_gpu_enable_command_buffer=
    python benchmarks/train_step.py CASE --here --profile kernels.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import environment
from processes import last_json

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


def hf_config(name: str) -> dict[str, Any]:
    tiny = name == "tiny"
    return SHAPES[name] | {
        "model_type": "llama",
        "num_key_value_heads": 2 if tiny else 8,
        "vocab_size": 1024 if tiny else 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    }


def measure(case: str, segments: int, profile: str | None) -> dict[str, Any]:
    """One case, in this process; `profile` names a file for the kernels of a step."""
    import jax
    import numpy as np

    from lorajax.config import load_config
    from lorajax.lora.adapter import add_lora
    from lorajax.memory.machine import claim_gpu_memory
    from lorajax.models.checkpoint import initialise
    from lorajax.sharding import data_mesh, rows
    from lorajax.training.inputs import RunShape
    from lorajax.training.metrics import peak_memory_bytes
    from lorajax.training.planning import planned
    from lorajax.training.program import compile_planned, first_state
    from lorajax.training.weights import split_weights

    name, batch, length, checkpointing, attention = case.split(",")
    micro_batches, rows_each = batch.split("x") if "x" in batch else ("1", batch)
    checkpointing, _, budget = checkpointing.partition("@")
    claim_gpu_memory(budget or None)
    if "=" in checkpointing:
        checkpointing = json.dumps(dict(pair.split("=") for pair in checkpointing.split("+")))
    settings = {
        "model.dtype": "float32" if jax.default_backend() == "cpu" else "bfloat16",
        "model.attention": attention,
        "data.path": "random.jsonl",
        "data.max_length": length,
        "data.max_segments": str(segments),
        "train.per_device_train_batch_size": rows_each,
        "train.gradient_accumulation_steps": micro_batches,
        "memory.checkpointing": checkpointing,
        "output.output_dir": "unused",
    } | ({"memory.budget": budget} if budget else {})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf_config(name)))
        config = load_config(None, [f"--{k}={v}" for k, v in (settings | {"model.path": folder}).items()])
        model = initialise(folder, dtype=config.model.dtype, attention=attention, seed=0)
    add_lora(model, config.lora, seed=0)
    vocab = model.options.vocab_size
    shape = (int(micro_batches), int(rows_each) * jax.device_count(), int(length))
    run = RunShape(config=config, mesh=data_mesh(), total_steps=1000)
    random = np.random.default_rng(0)
    ids, place = np.divmod(np.arange(shape[2]), -(-shape[2] // segments))
    arrays = {
        "tokens": random.integers(0, vocab, shape, dtype=np.int32),
        "targets": random.integers(0, vocab, shape, dtype=np.int32),
        "segment_ids": np.broadcast_to(ids + 1, shape).astype(np.int32),
        "positions": np.broadcast_to(place, shape).astype(np.int32),
        "weights": np.ones(shape, np.float32),
    }
    plan, run = planned(run, model)
    graph, trainable, frozen = split_weights(model, "lora")
    del model
    state = first_state(run, trainable)
    began = time.perf_counter()
    run, program, plan = compile_planned(run, plan, graph, state, frozen)
    compiled = time.perf_counter() - began
    shape = (run.micro_batches, run.rows_per_micro_batch, int(length))
    on_devices = jax.device_put(
        {name: array.reshape(shape) for name, array in arrays.items()}, rows(run.mesh)
    )

    def run_steps(steps: int) -> Any:
        nonlocal state
        for _ in range(steps):
            state, metrics = program.step(state, frozen, on_devices)
        return jax.block_until_ready(metrics)

    metrics = run_steps(WARM_UP)
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        metrics = run_steps(STEPS)
        seconds.append((time.perf_counter() - began) / STEPS)
    median = statistics.median(seconds)
    if profile:
        from kernel_times import kernel_times

        times = kernel_times(lambda: run_steps(1))
        Path(profile).write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")
    return {
        "model": name,
        "batch": run.layout.rows,
        "micro_batches": run.micro_batches,
        "length": int(length),
        "segments": segments,
        "checkpointing": checkpointing,
        "budget": budget or None,
        "plan": plan and plan.lines(),
        "attention": attention,
        "ms": round(1e3 * median, 2),
        "slowest_ms": round(1e3 * max(seconds), 2),
        "tokens_per_second": round(math.prod(shape) / median),
        "peak_gib": round(peak_memory_bytes() / 2**30, 2),
        "planned_gib": round(program.memory.total / 2**30, 2),
        "temporary_gib": round(program.memory.temporaries / 2**30, 2),
        "host_gib": round(program.memory.host / 2**30, 2),
        "compile_seconds": round(compiled, 1),
        "loss": round(float(metrics.loss), 4),
        "device": jax.local_devices()[0].device_kind,
    }


def in_process_of_its_own(case: str, segments: int) -> dict[str, Any]:
    row = last_json(__file__, [case, "--segments", str(segments), "--here"])
    return {"case": case, "segments": segments, **row} if "error" in row else row


def lines_of_json(command: str) -> list[dict[str, Any]]:
    """What another library's script reports of itself on this machine."""
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    records = [{"command": command, "exit_code": done.returncode, **record} for record in found or [{}]]
    for record in records:
        print(json.dumps(record), flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("cases", nargs="+", metavar="MODEL,BATCH,LENGTH,CHECKPOINTING,ATTENTION")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="COMMAND",
        help="run afterwards, from the same folder; its lines of JSON are recorded as they are",
    )
    parser.add_argument("--segments", type=int, default=1, help="documents on a row")
    parser.add_argument("--out", help="JSON file for the result")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--profile", help="JSON file for the kernels of a step, with --here")
    parser.add_argument("--here", action="store_true", help="the first case alone, in this process")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.cases[0], arguments.segments, arguments.profile)))
        return
    rows = []
    for case in arguments.cases:
        rows.append(in_process_of_its_own(case, arguments.segments))
        print(json.dumps(rows[-1]), flush=True)
    beside = [record for command in arguments.beside for record in lines_of_json(command)]
    if arguments.out:
        packages = ("lorajax", "jax", "jaxlib", "flax", "optax")
        record = {
            "benchmark": "train_step",
            **environment(*packages, commit=arguments.commit),
            "steps": STEPS * ROUNDS,
            "rows": rows,
            "beside": beside,
        }
        Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
