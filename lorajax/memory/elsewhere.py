"""Compile a run's step for a GPU that is not here, to see what memory it takes; no weights are read.

XLA compiles for a GPU that is described to it; that takes JAX' CUDA plugin, but no driver and none of CUDA's
libraries. The plugin is loaded in a process of its own, which this module is too: as a program, it reads
requests from a JSON file and writes a line of JSON for each as soon as it is compiled.

What differs from the GPU's own program: kernels of libraries are stood in for by calls of the same operands,
results and workspace (lorajax_kernels.device.assume), and ways to multiply are not timed. cuBLAS makes the
products here and there. In 35 of 37 cases for an H200 the program that is compiled elsewhere takes at most
8 KB less than the GPU's own, in the others within 1.9 MB (benchmarks/results/prediction-h200.json).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorajax.config import Config, load_config, save_config
from lorajax.errors import UserError
from lorajax.memory.analysis import Memory
from lorajax.memory.policy import Layout, Policy
from lorajax.memory.targets import Target, find_target

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from lorajax.generation import Answering
    from lorajax.training.inputs import RunShape
    from lorajax.training.step import TrainState
    from lorajax.training.weights import Weights

# JAX' plugins, the one that JAX prefers first, and the wheels with the assembler of their CUDA.
_PLUGINS = {"jax-cuda13-plugin": "nvidia-cuda-nvcc", "jax-cuda12-plugin": "nvidia-cuda-nvcc-cu12"}
# Where XLA looks for them too.
_TOOLKITS = ("/usr/local/cuda", "/opt/cuda")
_REMEDY = "pip install 'lorajax[plan]'"


class Variant(NamedTuple):
    """One way to compile a config's step.

    Attributes:
        layout: rows of a micro-batch, and what layers keep.
        num_layers: of a shallower model; None: all.
        micro_batches: of a step; None: as many as the config's rows make.
        evaluates: compile the evaluation of a micro-batch in place of the step.
        answering: compile what answers prompts in place of the step.
    """

    layout: Layout
    num_layers: int | None = None
    micro_batches: int | None = None
    evaluates: bool = False
    answering: Answering | None = None


@dataclass(frozen=True)
class Compiled(Memory):
    """What a program takes of one GPU.

    Attributes:
        seconds: that compiling took, on this machine.
    """

    seconds: float


@dataclass(frozen=True)
class Failed:
    """A variant that cannot be compiled, and why."""

    error: str


def compile_elsewhere(config: Config, target: Target, variant: Variant, *, timeout: float = 1800) -> Compiled:
    """Compile the training step of a config for a GPU.

    Args:
        config: the run's; the data is not read, and of the model its configuration alone.
        timeout: in seconds.

    Raises:
        UserError: the plugin cannot be used, or the step cannot be compiled.
    """
    variants = compile_variants(config, target, [variant], timeout=timeout)
    with contextlib.closing(variants):
        found = next(variants)
    if isinstance(found, Failed):
        raise UserError(f"compiling for {target.name} failed: {found.error}")
    return found


def compile_variants(
    config: Config, target: Target, variants: Sequence[Variant], *, timeout: float = 1800
) -> Generator[Compiled | Failed, None, None]:
    """Compile a config's training step in several ways, one after the other.

    Args:
        config: the run's; the data is not read, and of the model its configuration alone.
        timeout: in seconds, for all of them.

    Yields:
        What each takes, in the order of the variants, each as soon as it is known.

    Raises:
        UserError: JAX' CUDA plugin cannot be used, or the process that compiles ends early.
    """
    _check_plugin()
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+b") as log:
        save_config(config, Path(folder) / "config.yaml")
        requests = Path(folder) / "requests.json"
        requests.write_text(json.dumps([_request(folder, target, each) for each in variants]))
        worker = subprocess.Popen(
            [sys.executable, "-m", "lorajax.memory.elsewhere", str(requests)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment_there(),
        )
        timer = threading.Timer(timeout, worker.kill)
        timer.start()
        try:
            assert worker.stdout is not None
            for _ in variants:
                line = worker.stdout.readline()
                if not line:
                    late = timer.finished.is_set()
                    reason = f"took more than {timeout:.0f} s" if late else f"failed: {_end(worker, log)}"
                    raise UserError(f"compiling for {target.name} {reason}")
                answer = json.loads(line)
                yield Failed(**answer) if "error" in answer else Compiled(**answer)
        finally:
            timer.cancel()
            worker.kill()
            worker.communicate()


def _check_plugin() -> None:
    found = {name: version for name in _PLUGINS if (version := _version(name)) is not None}
    if not found:
        raise UserError(
            f"compiling for a GPU that is not here needs JAX' CUDA plugin, which needs no GPU: {_REMEDY}"
        )
    name, version = next(iter(found.items()))
    if version != (jaxlib := _version("jaxlib")):
        raise UserError(f"{name} {version} does not fit jaxlib {jaxlib}, they must be equal: {_REMEDY}")
    toolkits = any(Path(toolkit, "bin", "ptxas").exists() for toolkit in _TOOLKITS)
    if _version(_PLUGINS[name]) is None and shutil.which("ptxas") is None and not toolkits:
        raise UserError(f"compiling for a GPU needs CUDA's assembler, ptxas: {_REMEDY}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment_there() -> dict[str, str]:
    """Of a process that compiles for a GPU that is not here."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # Ways to multiply cannot be timed there. The user's flags, which change the program, hold.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0",
    }


def _request(folder: str, target: Target, variant: Variant) -> dict[str, Any]:
    policy = variant.layout.checkpointing
    return {
        "config": str(Path(folder) / "config.yaml"),
        "target": target.name,
        "rows": variant.layout.rows,
        "checkpointing": policy.as_plain() if isinstance(policy, Policy) else policy,
        "mlp_chunks": variant.layout.mlp_chunks,
        "num_layers": variant.num_layers,
        "micro_batches": variant.micro_batches,
        "evaluates": variant.evaluates,
        "answering": variant.answering,
    }


def _end(worker: subprocess.Popen, log: Any) -> str:
    """The last thing that a process had to say."""
    status = worker.wait()
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else f"its process ended with {status}"


def main() -> None:
    """Answer the requests in a file."""
    # Libraries print where they like; what the caller reads holds answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for request in json.loads(Path(sys.argv[1]).read_text()):
        found: Compiled | Failed
        try:
            found = _compile(request)
        except Exception as error:  # whatever XLA or JAX raise, the next may compile
            found = Failed((str(error).strip() or repr(error)).splitlines()[0])
        print(json.dumps(dataclasses.asdict(found)), file=answers, flush=True)


def _compile(request: dict[str, Any]) -> Compiled:
    from lorajax_kernels.device import assume

    from lorajax.generation import Answering, compiled_answering_memory
    from lorajax.training.program import compile_evaluation, compile_step

    config = load_config(request["config"])
    target = find_target(request["target"])
    checkpointing = _checkpointing(request["checkpointing"])
    layout = Layout(request["rows"], checkpointing, request["mlp_chunks"])
    if (micro_batches := request.get("micro_batches")) is not None:
        train = dataclasses.replace(
            config.train,
            per_device_train_batch_size=layout.rows,
            gradient_accumulation_steps=micro_batches,
        )
        config = dataclasses.replace(config, train=train)
    with assume(target.device):
        began = time.perf_counter()
        if request["answering"] is not None:
            model, mesh = _outline(config, request["num_layers"]), _mesh_there(target)
            answering = Answering(*request["answering"])
            memory = Memory(0, compiled_answering_memory(model, answering, mesh, eos_tokens=1), 0)
        else:
            arguments = arguments_there(config, target, layout, request["num_layers"])
            if request["evaluates"]:
                _, memory = compile_evaluation(*arguments)
            else:
                memory = compile_step(*arguments).memory
    return Compiled(**dataclasses.asdict(memory), seconds=round(time.perf_counter() - began, 1))


def arguments_there(
    config: Config, target: Target, layout: Layout, num_layers: int | None = None
) -> tuple[RunShape, Any, TrainState, Weights]:
    """What compile_step and compile_evaluation take, for a GPU that is not here; to be called under `assume`.

    Args:
        num_layers: of a shallower model; None: all.

    Raises:
        UserError: the rows cannot be cut so, or there are not so many layers.
    """
    from lorajax.sharding import replicated, shapes
    from lorajax.training.inputs import RunShape
    from lorajax.training.program import state_shapes
    from lorajax.training.weights import split_weights

    mesh = _mesh_there(target)
    run = RunShape(config=config, mesh=mesh, total_steps=1000, planned=layout)
    if run.micro_batches * layout.rows != run.rows_per_device:
        raise UserError(f"{run.rows_per_device} rows cannot be cut into micro-batches of {layout.rows}")
    graph, trainable, frozen = split_weights(_outline(config, num_layers), config.train.mode)
    return run, graph, state_shapes(run, trainable), shapes(frozen, replicated(mesh))


def _mesh_there(target: Target) -> Mesh:
    """Of one GPU that is not here."""
    from jax.experimental import topologies

    from lorajax.sharding import DATA_AXIS

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=target.config, topology="1x1x1"
    )
    return topologies.make_mesh(topology, (1,), (DATA_AXIS,))


def _checkpointing(plain: Any) -> Any:
    return Policy.from_plain(plain) if isinstance(plain, dict) and "layers" in plain else plain


def _outline(config: Config, num_layers: int | None) -> Any:
    """The model with its adapter, shapes in place of arrays, cut to its first layers."""
    from flax import nnx

    from lorajax.memory.plan import outline_of

    model = outline_of(config)
    if num_layers is not None:
        if not 1 <= num_layers <= len(model.layers):
            raise UserError(f"the model has {len(model.layers)} layers, not {num_layers}")
        model.layers = nnx.List(model.layers[:num_layers])
        model.options = dataclasses.replace(model.options, num_layers=num_layers)
    return model


if __name__ == "__main__":
    main()
