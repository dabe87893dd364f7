"""A run from beginning to end: the loop, readable from top to bottom."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorajax.config import Config, as_plain, load_config, validate
from lorajax.errors import UserError
from lorajax.generation import generate
from lorajax.lora.peft import save_adapter
from lorajax.memory.analysis import gib
from lorajax.memory.machine import claim_gpu_memory
from lorajax.memory.plan import Plan
from lorajax.models.checkpoint import check_weights, initialise, load, save_merged
from lorajax.models.decoder import Decoder
from lorajax.training.banner import banner, dry_run_text
from lorajax.training.checkpoints import (
    Checkpoints,
    Position,
    delete_after,
    read_position,
    restore_state,
    steps,
)
from lorajax.training.folder import RunFolder, check_folder, prepare_folder
from lorajax.training.inputs import Inputs, evaluation_batches, prepare, training_batches
from lorajax.training.metrics import (
    MetricsLog,
    check_trackers,
    open_trackers,
    peak_memory_bytes,
    read_metrics,
    truncate_metrics,
)
from lorajax.training.planning import ANSWERED_AT_ONCE, plan_answers, planned
from lorajax.training.program import (
    Program,
    compile_planned,
    first_state,
    state_shapes,
    use_compilation_cache,
)
from lorajax.training.progress import NotFinite, Progress, Totals
from lorajax.training.signals import StopRequest
from lorajax.training.step import TrainState
from lorajax.training.weights import (
    Weights,
    count,
    delete_adapters,
    give_back_adapters,
    merge_weights,
    split_weights,
)

_log = logging.getLogger("lorajax")

# In a checkpoint, beside the identity: see Inputs.drawn_by.
_DRAWN_BY = "rows at once and parts of an MLP"


@dataclass(frozen=True)
class Sample:
    """A prompt's answer before and after training."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        model: the trained model.
        output_dir: the run's folder.
        steps: optimizer steps made in all, those before a resume included.
        metrics: the rows of metrics.jsonl.
        samples: the answers to output.sample_prompts.
        seconds: spent in this process' training steps.
        tokens_per_second: of them, padding not counted; 0 where there were none.
        peak_memory_bytes: of the first GPU, or, on a CPU, of the process.
        earlier_peak_memory_bytes: what that was before the weights were read. It never falls, so a run whose
            peak is no higher took less: an earlier run of the process took as much, or the measuring of the
            GPU's rates, which is done once.
        planned_memory_bytes: the most that the compiled programs take of a GPU; None where there is nothing
            to train, or on a CPU.
        stopped_by: the signal that ended the run early; None: it is complete.
    """

    model: Decoder
    output_dir: Path
    steps: int
    metrics: list[dict[str, Any]]
    samples: list[Sample]
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    earlier_peak_memory_bytes: int
    planned_memory_bytes: int | None
    stopped_by: signal.Signals | None


def fit(config: Config | str | os.PathLike[str]) -> Result:
    """Fine-tune a model as a config says, and write the run's folder.

    SIGINT and SIGTERM, in the main thread, end the run after the step that is running, with a checkpoint; a
    second one interrupts it at once.

    Args:
        config: the settings, or the path of a YAML file that holds them.

    Raises:
        UserError: something the config names cannot be used, the loss is no number, or a checkpoint cannot
            be written. What was written before stays.
    """
    if not isinstance(config, Config):
        config = load_config(config)
    validate(config)
    claim_gpu_memory(config.memory.budget)
    use_compilation_cache()
    check_trackers(config.output.report_to)
    checkpoint = check_folder(config)
    inputs = prepare(config)
    identity = inputs.identity()
    position = None if checkpoint is None else _position(checkpoint, identity, inputs.total_steps)
    if config.train.init != "random":
        check_weights(inputs.model_path, inputs.outline, quantization=config.model.quantization)
    ready = _compile(inputs, done=0 if position is None else position.step)
    inputs, earlier_peak = ready.inputs, peak_memory_bytes()
    model = _load_model(inputs)
    before = _answers(inputs, model, ready.answered_at_once)
    graph, trainable, frozen = split_weights(model, config.train.mode)
    if config.train.mode == "lora":
        delete_adapters(model)
    del model  # a full one's weights are the first step's
    if checkpoint is None:
        state = first_state(inputs, trainable)
    else:
        like = state_shapes(inputs, trainable)
        trainable = {}  # their memory is what the checkpoint's take
        state = restore_state(checkpoint, like)
    del trainable

    folder = prepare_folder(config, checkpoint)
    if position is None:
        folder.metrics.unlink(missing_ok=True)
    else:
        print(f"going on from {checkpoint}, step {position.step}")
        # The checkpoints first: a kill in between must not leave one whose metrics are gone.
        if dropped := delete_after(folder.checkpoints, position.step):
            print(f"deleted the checkpoints of later steps: {', '.join(map(str, dropped))}")
        truncate_metrics(folder.metrics, position.step)

    try:
        done = _train(ready, folder, state, frozen, position, identity)
    except NotFinite as error:
        raise UserError(f"{error}; {_what_is_kept(folder)}") from None
    del state

    model = merge_weights(graph, done.trainable, frozen)
    give_back_adapters(model)
    samples: list[Sample] = []
    if done.stopped_by is None:
        texts = zip(
            config.output.sample_prompts, before, _answers(inputs, model, ready.answered_at_once), strict=True
        )
        samples = [Sample(*answers) for answers in texts]
        _write_outcome(inputs, folder, model, samples)
    result = Result(
        model=model,
        output_dir=folder.path,
        steps=done.step,
        metrics=read_metrics(folder.metrics),
        samples=samples,
        seconds=done.totals.seconds,
        tokens_per_second=done.totals.tokens / done.totals.seconds if done.totals.seconds else 0.0,
        peak_memory_bytes=peak_memory_bytes(),
        earlier_peak_memory_bytes=earlier_peak,
        planned_memory_bytes=done.planned,
        stopped_by=done.stopped_by,
    )
    print(_closing_line(result, folder, config))
    return result


def dry_run(config: Config) -> str:
    """What `fit` would do, as text: the resolved config, the data's statistics, the first row with its mask.

    Raises:
        UserError: as `fit`, but for what is wrong with the weights, and what has to do with the GPU.
    """
    validate(config)
    check_trackers(config.output.report_to)
    checkpoint = check_folder(config)
    inputs = prepare(config)
    if checkpoint is not None:
        _position(checkpoint, inputs.identity(), inputs.total_steps)
    return dry_run_text(inputs)


class _Ready(NamedTuple):
    """Before the weights are read: what the run goes over, and how.

    Attributes:
        program: None: there is nothing left to train.
        plan: None where memory is not planned.
        answered_at_once: sample prompts.
        seconds: that compiling took.
    """

    inputs: Inputs
    program: Program | None
    plan: Plan | None
    answered_at_once: int
    seconds: float


def _compile(inputs: Inputs, *, done: int) -> _Ready:
    """Plan and compile, while the GPU is empty; `done`: steps that were made before."""
    began = time.perf_counter()
    plan, inputs = planned(inputs, inputs.outline)
    program, at_once = None, ANSWERED_AT_ONCE
    if done < inputs.total_steps:
        evaluates = inputs.documents.eval is not None
        inputs, program, plan = compile_planned(inputs, plan, inputs.outline, evaluates=evaluates)
    output = inputs.config.output
    if plan is not None and output.sample_prompts:
        plan, at_once = plan_answers(plan, output, inputs.tokenizer, inputs.outline)
    return _Ready(inputs, program, plan, at_once, time.perf_counter() - began)


class _Trained(NamedTuple):
    """Of the loop: what it trained, steps made, totals, the signal that ended it early, bytes of the plan."""

    trainable: Weights
    step: int
    totals: Totals
    stopped_by: signal.Signals | None
    planned: int | None


def _train(
    ready: _Ready,
    folder: RunFolder,
    state: TrainState,
    frozen: Weights,
    position: Position | None,
    identity: dict[str, Any],
) -> _Trained:
    """The loop; `identity` is what its checkpoints say of the run.

    A step is started before the metrics of the one before it are read, and its batch is made while the device
    is busy. What is logged up to a step is written before that step's checkpoint.
    """
    inputs, program, plan = ready.inputs, ready.program, ready.plan
    config, total = inputs.config, inputs.total_steps
    train, output = config.train, config.output
    step = 0 if position is None else position.step
    if program is None:
        return _Trained(state.trainable, step, Totals(), None, None)
    if position is not None:
        _note_other_masks(position, inputs)
    with contextlib.ExitStack() as stack:
        trainable = count(state.trainable)
        total_parameters = trainable + count(frozen)
        print(banner(inputs, plan, trainable=trainable, total=total_parameters, memory=program.memory))
        print(f"compiled in {ready.seconds:.1f} s", flush=True)
        batches = training_batches(inputs, None if position is None else position.data)
        stack.enter_context(contextlib.closing(batches))
        batch = next(batches)

        trackers = open_trackers(output.report_to, folder.path, as_plain(config))
        log = stack.enter_context(contextlib.closing(MetricsLog(folder.metrics, trackers)))
        scaled = config.model.dtype == "float16"
        progress = Progress(log, start=step, total=total, logging_steps=output.logging_steps, scaled=scaled)
        stack.enter_context(contextlib.closing(progress))
        # Outermost, so that no signal ends the process while the last checkpoint is written.
        stop = stack.enter_context(StopRequest())
        checkpoints = stack.enter_context(Checkpoints(folder.checkpoints, keep=output.save_total_limit))
        evaluate = _evaluator(inputs, program, frozen, progress)
        if step == 0 and train.eval_steps > 0:
            evaluate(step, state)
        progress.restart_clock()
        while True:
            step += 1
            state, metrics = program.step(state, frozen, batch.arrays)
            progress.step_started(step, metrics, batch.tokens, batch.target_tokens)
            last = step == total or stop.signal is not None
            evaluates = step == total or _due(step, train.eval_steps)
            saves = last or _due(step, output.save_steps)
            if evaluates or saves:
                progress.flush()
                if evaluates:
                    evaluate(step, state)
                if saves:
                    described = {**identity, _DRAWN_BY: inputs.drawn_by}
                    checkpoints.save(state, Position(step, batch.position, described))
                progress.restart_clock()
            if last:
                break
            batch = next(batches)
    stopped_by = None if step == total else stop.signal
    return _Trained(state.trainable, step, progress.totals, stopped_by, None if plan is None else plan.most)


def _note_other_masks(position: Position, inputs: Inputs) -> None:
    """Say so where dropout does not go on as in a run that was never stopped."""
    before = position.identity.get(_DRAWN_BY, inputs.drawn_by)
    if inputs.config.lora.dropout and before != inputs.drawn_by:
        _log.warning(
            "the checkpoint's run had MLPs that take %d rows in %d parts, this one %d in %d: from here "
            "dropout's masks are others than it would have had",
            *before,
            *inputs.drawn_by,
        )


def _load_model(inputs: Inputs) -> Decoder:
    config = inputs.config
    model, train = config.model, config.train
    if train.init == "random":
        return initialise(
            inputs.model_path,
            dtype=model.dtype,
            param_dtype="float32",
            attention=model.attention,
            seed=train.seed,
        )
    full = train.mode == "full"
    return load(
        inputs.model_path,
        lora=None if full else config.lora,
        dtype=model.dtype,
        quantization=model.quantization,
        attention=model.attention,
        param_dtype="float32" if full else None,
        seed=train.seed,
    )


def _position(checkpoint: Path, identity: dict[str, Any], total_steps: int) -> Position:
    """The position in a checkpoint, if the run of this identity can go on from there exactly."""
    position = read_position(checkpoint)
    differing = [
        f"{name} was {before}, now it is {value}"
        for name, value in identity.items()
        # An older lorajax wrote less of it.
        if (before := position.identity.get(name, value)) != value
    ]
    if differing:
        raise UserError(
            f"{checkpoint} is of another run, which this one cannot go on: {'; '.join(differing)}"
        )
    if position.step > total_steps:
        raise UserError(
            f"{checkpoint} stands at step {position.step}, but this run has only {total_steps} steps; "
            "raise train.max_steps"
        )
    return position


def _what_is_kept(folder: RunFolder) -> str:
    kept = steps(folder.checkpoints)
    if not kept:
        return "there is no checkpoint yet (output.save_steps)"
    return f"the last good checkpoint is {folder.checkpoints / str(kept[-1])}"


def _evaluator(
    inputs: Inputs, program: Program, frozen: Weights, progress: Progress
) -> Callable[[int, TrainState], None]:
    """evaluate(step, state): writes the loss on the held-out documents; does nothing where there are none."""
    summed = program.evaluate

    def evaluate(step: int, state: TrainState) -> None:
        if summed is None:
            return
        began, losses, targets = time.perf_counter(), [], 0
        for batch, _, target_tokens in evaluation_batches(inputs):
            losses.append(summed(state.trainable, frozen, batch))
            targets += target_tokens
        loss = float(np.sum(np.asarray(losses, np.float64))) / targets
        progress.evaluated(step, loss, targets, time.perf_counter() - began)

    return evaluate


def _answers(inputs: Inputs, model: Decoder, at_once: int) -> list[str]:
    output = inputs.config.output
    return generate(
        model,
        inputs.tokenizer,
        output.sample_prompts,
        max_new_tokens=output.sample_max_new_tokens,
        batch_size=at_once,
    )


def _write_outcome(inputs: Inputs, folder: RunFolder, model: Decoder, samples: list[Sample]) -> None:
    if inputs.config.train.mode == "lora":
        save_adapter(model, folder.adapter, base_model=inputs.config.model.path)
    else:
        save_merged(model, folder.model)
        inputs.tokenizer.save_pretrained(str(folder.model))
    if samples:
        rows = [vars(sample) for sample in samples]
        folder.samples.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for sample in samples:
            print(f"\n> {sample.prompt}\n--- before\n{sample.before}\n--- after\n{sample.after}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _closing_line(result: Result, folder: RunFolder, config: Config) -> str:
    if result.stopped_by is not None:
        return (
            f"\nstopped by {result.stopped_by.name} after step {result.steps}: its checkpoint is in "
            f"{folder.checkpoints}; go on with --train.resume_from_checkpoint auto"
        )
    losses = [row["loss"] for row in result.metrics if "loss" in row]
    held_out = [row["eval_loss"] for row in result.metrics if "eval_loss" in row]
    parts = [f"{result.steps} steps"]
    if result.seconds:
        parts.append(f"{result.seconds:.1f} s of training, {result.tokens_per_second:,.0f} tokens/s")
    for name, values in (("loss", losses), ("held-out loss", held_out)):
        if values:
            first_and_last = values if len(values) == 1 else (values[0], values[-1])
            parts.append(f"{name} {' -> '.join(f'{value:.3f}' for value in first_and_last)}")
    planned = "" if result.planned_memory_bytes is None else f", planned {gib(result.planned_memory_bytes)}"
    peak = f"peak memory {gib(result.peak_memory_bytes)}{planned}"
    if result.peak_memory_bytes <= result.earlier_peak_memory_bytes:
        peak += " (the process had reached this peak before the run's first step)"
    parts.append(peak)
    where = folder.adapter if config.train.mode == "lora" else folder.model
    return f"\n{'; '.join(parts)}\nwritten to {where}"
