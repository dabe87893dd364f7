"""The compiled programs of a run, each compiled once, before its first use."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from lorajax_kernels.device import split_over

from lorajax.data.cache import user_cache_folder
from lorajax.memory.analysis import Memory, compile_lowered, memory_of
from lorajax.memory.plan import Plan, settle
from lorajax.memory.policy import Layout
from lorajax.models.decoder import Decoder
from lorajax.sharding import replicated, rows, shapes
from lorajax.training.inputs import RunShape
from lorajax.training.optimizer import adamw, learning_rate_schedule
from lorajax.training.step import Batch, StepMetrics, TrainState, init_state, loss_sum, make_train_step
from lorajax.training.weights import Weights, merge_weights, split_weights

R = TypeVar("R", bound=RunShape)


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless jax_compilation_cache_dir says otherwise."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(user_cache_folder() / "xla"))


Evaluation = Callable[[Weights, Weights, Batch], Float[Array, ""]]


@dataclass(frozen=True)
class Program:
    """What a run does with a batch, compiled.

    Attributes:
        step: (state, frozen, batch) -> (state, metrics); the state that goes in is gone afterwards.
        memory: the most that it takes, evaluation included.
        evaluate: (trainable, frozen, batch [1, B, T]) -> summed loss of the batch; None: not asked for.
        evaluation: what that takes beside a step's state.
    """

    step: Callable[[TrainState, Weights, Batch], tuple[TrainState, StepMetrics]]
    memory: Memory
    evaluate: Evaluation | None = None
    evaluation: Memory | None = None


def first_state(run: RunShape, trainable: Weights) -> TrainState:
    """The state before the first step, on the devices; it owns `trainable`."""
    return jax.device_put(_first_state(run, trainable), replicated(run.mesh))


def state_shapes(run: RunShape, trainable: Weights) -> TrainState:
    """`first_state`, shapes in place of arrays."""
    state = jax.eval_shape(lambda trainable: _first_state(run, trainable), trainable)
    return shapes(state, replicated(run.mesh))


def _first_state(run: RunShape, trainable: Weights) -> TrainState:
    config = run.config
    return init_state(
        trainable,
        adamw(config.train, learning_rate_schedule(config.train, run.total_steps)),
        seed=config.train.seed,
        dtype=config.model.dtype,
        tokens_per_step=run.rows_per_step * config.data.max_length,
    )


_OPTIONS: dict[str, Any] = {
    # Where products share an operand and are small, XLA would copy their weights side by side to make one
    # of them, in every micro-batch: at 2048 tokens of a 1B model 67 MB for gate and up in each layer, 2% of
    # a step.
    "xla_gpu_dot_merger_threshold_mb": 0,
    # Copies to and from the host that may be under way. XLA would have two, and a layer that keeps more
    # there would start the third when it needs it.
    "xla_gpu_experimental_parallel_async_compute_limit": 64,
    # Per cent of the GPU's memory that XLA believes to have. It counts what is in host memory as well, and
    # would make again what there is room for: 3% of the kernels' time of an 8B step with 4.7 GiB there.
    "xla_gpu_memory_limit_slop_factor": 10_000,
    # Products are cuBLAS'. Triton's are no faster in our steps, each is timed in many ways first, and a
    # program that is compiled without a GPU, where nothing can be timed, would not be the one that runs.
    "xla_gpu_enable_triton_gemm": False,
}


def compile_step(run: RunShape, graph: Any, state: TrainState, frozen: Weights) -> Program:
    """Compile the training step for these shapes, and the run's batch.

    Args:
        graph: of split_weights.
        state, frozen: arrays, or their shapes with their shardings.
    """
    config = run.config
    schedule = learning_rate_schedule(config.train, run.total_steps)
    full = config.train.mode == "full"
    step = make_train_step(
        graph,
        adamw(config.train, schedule),
        schedule,
        mesh=run.mesh,
        checkpointing=run.layout.checkpointing,
        mlp_chunks=run.layout.mlp_chunks,
        max_segments=run.max_segments,
        dropout=not full and config.lora.dropout > 0,
        train_head=full,
        scale_loss=config.model.dtype == "float16",
    )
    jitted = jax.jit(step, donate_argnums=0, out_shardings=replicated(run.mesh))
    compiled = compile_lowered(jitted.lower(state, frozen, batch_shapes(run)), _OPTIONS)
    return Program(compiled, memory_of(compiled))


def compile_planned(
    run: R, plan: Plan | None, model: Decoder, *, evaluates: bool = False
) -> tuple[R, Program, Plan | None]:
    """Compile the step of a plan, and plan again while XLA finds that it takes more than there is.

    To be called before the weights are on the device: XLA times ways to multiply in the memory that is free.

    Args:
        plan: None where memory is not planned: the run's layout is the config's then.
        model: with its adapter; arrays may be shapes.
        evaluates: compile the evaluation too.

    Returns:
        The run with the layout that was compiled, its step, and the plan with what the step takes.

    Raises:
        UserError: the layout that the config asks for does not fit, or nothing does.
    """
    graph, trainable, frozen = split_weights(model, run.config.train.mode)
    state, frozen = state_shapes(run, trainable), shapes(frozen, replicated(run.mesh))

    @functools.cache
    def evaluation(rows: int, mlp_chunks: int) -> tuple[Evaluation, Memory]:
        """Of micro-batches of so many rows; nothing else of a layout changes it."""
        layout = run.layout._replace(rows=rows, mlp_chunks=mlp_chunks)
        return compile_evaluation(dataclasses.replace(run, planned=layout), graph, state, frozen)

    def compiled(layout: Layout) -> tuple[Program, Memory]:
        program = compile_step(dataclasses.replace(run, planned=layout), graph, state, frozen)
        if evaluates:
            evaluate, memory = evaluation(layout.rows, layout.mlp_chunks)
            program = Program(program.step, with_evaluation(program.memory, memory), evaluate, memory)
        return program, program.memory

    if plan is None:
        return run, compiled(run.layout)[0], None
    plan, program = settle(plan, compiled)
    if program.evaluation is not None:
        plan = plan.beside("evaluation", program.evaluation.temporaries)
    return dataclasses.replace(run, planned=plan.chosen.layout), program, plan


def with_evaluation(step: Memory, evaluation: Memory) -> Memory:
    """The most that either takes."""
    return dataclasses.replace(step, temporaries=max(step.temporaries, evaluation.temporaries))


def batch_shapes(run: RunShape, *, micro_batches: int | None = None) -> Batch:
    """A step's batch, shapes in place of arrays."""
    count = run.micro_batches if micro_batches is None else micro_batches
    shape, split = (count, run.rows_per_micro_batch, run.config.data.max_length), rows(run.mesh)
    dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32)
    dtypes["weights"] = jnp.float32
    batch: Any = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, dtype in dtypes.items()}
    return batch


def compile_evaluation(
    run: RunShape, graph: Any, state: TrainState, frozen: Weights
) -> tuple[Evaluation, Memory]:
    """Compile the summed loss of a micro-batch, and say what it takes beside a step's state.

    Args: as in compile_step.
    """

    def evaluate(trainable: Weights, frozen: Weights, batch: Batch) -> Array:
        model = merge_weights(graph, trainable, frozen)
        first = {name: array[0] for name, array in batch.items()}
        with split_over(run.mesh.size):
            return loss_sum(
                model,
                first,
                mesh=run.mesh,
                mlp_chunks=run.layout.mlp_chunks,
                max_segments=run.max_segments,
            )

    batch = batch_shapes(run, micro_batches=1)
    compiled = compile_lowered(jax.jit(evaluate).lower(state.trainable, frozen, batch), _OPTIONS)
    return compiled, memory_of(compiled)
