"""The plan of a run on this machine."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp
from lorajax_kernels import choose_attention
from lorajax_kernels.attention.cudnn import workspace_bytes
from lorajax_kernels.device import Device, current_device

from lorajax.config import Config, OutputConfig, load_config, parse_size, validate
from lorajax.data import chat_template, check_length, load_tokenizer
from lorajax.errors import UserError
from lorajax.generation import Answering, answering_memory, bucket, power_of_two
from lorajax.memory.analysis import Memory, gib
from lorajax.memory.costs import answering_bytes
from lorajax.memory.elsewhere import Variant, compile_elsewhere
from lorajax.memory.machine import (
    CONTEXT_BYTES,
    SLACK,
    claim_gpu_memory,
    gpu_limit,
    host_limit,
    machine_rates,
    offloads,
)
from lorajax.memory.plan import (
    Plan,
    accepted,
    check_offload,
    choose_again,
    evaluates,
    make_plan,
    outline_of,
    problem_of,
    settle,
)
from lorajax.memory.policy import Layout
from lorajax.memory.refusal import at_least, refused_evaluation
from lorajax.memory.targets import TARGETS, Target, find_target
from lorajax.models.checkpoint import resolve
from lorajax.models.decoder import Decoder
from lorajax.sharding import data_mesh
from lorajax.training.inputs import RunShape, max_segments
from lorajax.training.program import compile_planned, use_compilation_cache, with_evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

R = TypeVar("R", bound=RunShape)

_log = logging.getLogger("lorajax")

# Sample prompts that are answered at a time, at most.
ANSWERED_AT_ONCE = 8
# Of a prompt whose tokenizer need not be here: few bytes a token, and what a chat template puts around it.
_BYTES_A_TOKEN, _TEMPLATE_TOKENS = 2, 32
# Taken for the host memory of a machine that is not here.
_HOST_ELSEWHERE = 64 * 2**30


def plan_memory(
    config: Config | str | os.PathLike[str],
    device: str = "auto",
    *,
    compiles: bool = True,
    estimated: Callable[[Plan], None] | None = None,
) -> Plan:
    """Plan a run's memory without its weights or data.

    Args:
        config: the run's, or the path of its YAML file; of the model its configuration alone is read, and its
            tokenizer if that is here.
        device: "auto": the GPU at hand, as a run in this process would have it; or a name of
            lorajax.memory.targets, which need not be here.
        compiles: compile the step that is chosen, to know what it takes; otherwise estimate it.
        estimated: called with the plan before anything is compiled.

    Raises:
        UserError: something that the run does does not fit, or nothing would; the device is unknown, there is
            no GPU at hand, or JAX' CUDA plugin, which compiles for a GPU that is not here, is not installed.
    """
    if not isinstance(config, Config):
        config = load_config(config)
    validate(config)
    if device != "auto":
        return _plan_elsewhere(config, find_target(device), compiles, estimated)
    # As a run does, before JAX starts.
    claim_gpu_memory(config.memory.budget)
    use_compilation_cache()
    return _plan_here(config, compiles, estimated)


def _plan_here(config: Config, compiles: bool, estimated: Callable[[Plan], None] | None) -> Plan:
    budget = gpu_limit(config.memory.budget)
    if budget is None:
        raise UserError(f"there is no GPU at hand; name one with --device: {', '.join(TARGETS)}")
    model = _checked_outline(config)
    plan, run = _planned_for(budget, RunShape(config=config, mesh=data_mesh(), total_steps=1000), model)
    if not compiles:
        plan = _estimated_evaluation(plan)
        return accepted(_estimated_answers(plan, config.output, model)[0])
    if estimated is not None:
        estimated(plan)
    _, _, settled = compile_planned(run, plan, model, evaluates=evaluates(config))
    assert settled is not None
    if not config.output.sample_prompts:
        return settled
    tokenizer = _tokenizer(config)
    if tokenizer is None:
        return _estimated_answers(settled, config.output, model)[0]
    return plan_answers(settled, config.output, tokenizer, model)[0]


def _plan_elsewhere(
    config: Config, target: Target, compiles: bool, estimated: Callable[[Plan], None] | None
) -> Plan:
    model = _checked_outline(config)
    memory, most = config.memory, int((target.memory - CONTEXT_BYTES) * (1 - SLACK))
    budget = most if memory.budget is None else min(most, parse_size(memory.budget))
    _note_a_larger_budget(memory.budget, budget)
    plan = make_plan(
        problem_of(
            config,
            model,
            rates=target.rates,
            offloads=True,
            attention=_attention_bytes(config, model, target.device),
            answering=_answering_bytes(config.output, model),
        ),
        config,
        device=target.device,
        budget=budget,
        host_budget=_HOST_ELSEWHERE if memory.host_budget is None else parse_size(memory.host_budget),
        ceilings=(most, None),
    )
    plan, at_once = _estimated_answers(plan, config.output, model)
    if not compiles:
        return accepted(_estimated_evaluation(plan))
    if estimated is not None:
        estimated(plan)

    @functools.cache
    def evaluation(rows: int, mlp_chunks: int) -> Memory:
        # Nothing is kept from layer to layer, so that a few take as much as all.
        layout, layers = Layout(rows, "none", mlp_chunks), min(8, len(model.layers))
        return compile_elsewhere(config, target, Variant(layout, num_layers=layers, evaluates=True))

    def compiled(layout: Layout) -> tuple[None, Memory]:
        step = compile_elsewhere(config, target, Variant(layout))
        if evaluates(config):
            return None, with_evaluation(step, evaluation(layout.rows, layout.mlp_chunks))
        return None, step

    plan, _ = settle(plan, compiled)
    if evaluates(config):
        layout = plan.chosen.layout
        plan = plan.beside("evaluation", evaluation(layout.rows, layout.mlp_chunks).temporaries)
    if config.output.sample_prompts:

        def answering(at_once: int) -> int:
            variant = Variant(plan.chosen.layout, answering=_answering(config.output, at_once))
            return compile_elsewhere(config, target, variant).temporaries

        plan, _ = _answered(plan, config.output, answering, at_once)
    return plan


def _note_a_larger_budget(asked: str | None, there_is: int) -> None:
    if asked is not None and parse_size(asked) > there_is:
        _log.warning("memory.budget is %s, the GPU has %s for it", asked, gib(there_is))


def _checked_outline(config: Config) -> Decoder:
    """The model, if it takes the rows and answers that the config asks for."""
    model = outline_of(config)
    new, context = config.output.sample_max_new_tokens, model.options.context_length
    check_length(config.data, context)
    if config.output.sample_prompts and new >= context:
        raise UserError(
            f"output.sample_max_new_tokens is {new}, but the model's context is {context} tokens; lower it"
        )
    return model


def _estimated_evaluation(plan: Plan) -> Plan:
    """With what it is expected to take, where nothing is to be compiled; of the layouts that it fits with.

    Raises:
        UserError: it does not fit.
    """
    problem = plan.problem
    if problem is None or problem.evaluation is None:
        return plan
    some = [
        option for option in plan.options if plan.fixed + problem.evaluating(option.layout) <= plan.budget
    ]
    if plan.asked == "auto" and some:
        plan = choose_again(dataclasses.replace(plan, options=some))
    taken = problem.evaluating(plan.chosen.layout)
    plan = accepted(plan).beside("evaluation", taken)
    if plan.others["evaluation"] > plan.budget:
        raise UserError(refused_evaluation(plan, taken))
    return plan


def _tokenizer(config: Config) -> PreTrainedTokenizerFast | None:
    """As a run has it; None: only the model's shapes are here."""
    try:
        path = config.model.tokenizer or resolve(config.model.path, weights=False)
        tokenizer = load_tokenizer(path)
    except UserError:
        return None
    tokenizer.chat_template = chat_template(tokenizer, config.data.chat_template)
    return tokenizer


def _estimated_answers(plan: Plan, output: OutputConfig, model: Decoder) -> tuple[Plan, int]:
    """As plan_answers, where there is no tokenizer, or nothing is to be compiled."""
    if not output.sample_prompts:
        return plan, ANSWERED_AT_ONCE
    return _answered(plan, output, functools.partial(_answering_bytes, output, model))


def _answering_bytes(output: OutputConfig, model: Decoder, at_once: int = 1) -> int:
    """Estimated, of so many of output.sample_prompts, beside weights and state; 0 without any."""
    if not output.sample_prompts:
        return 0
    rows, prompt, new = _answering(output, at_once)
    return answering_bytes(
        model.options, itemsize=model.dtype.itemsize, rows=rows, prompt=bucket(prompt), new=bucket(new)
    )


def _answering(output: OutputConfig, at_once: int) -> Answering:
    """Of output.sample_prompts, whose tokens are not known."""
    longest = max(len(prompt.encode()) for prompt in output.sample_prompts)
    return Answering(
        rows=min(at_once, power_of_two(len(output.sample_prompts))),
        prompt=longest // _BYTES_A_TOKEN + _TEMPLATE_TOKENS,
        new=output.sample_max_new_tokens,
    )


def plan_answers(
    plan: Plan, output: OutputConfig, tokenizer: PreTrainedTokenizerFast, model: Decoder
) -> tuple[Plan, int]:
    """How many of output.sample_prompts are answered at a time, so that they fit beside weights and state.

    Returns:
        The plan with what that takes, and the number.

    Raises:
        UserError: not even one prompt's answer fits.
    """

    def taken(at_once: int) -> int:
        return answering_memory(
            model,
            tokenizer,
            output.sample_prompts,
            max_new_tokens=output.sample_max_new_tokens,
            batch_size=at_once,
        )

    return _answered(plan, output, taken)


def _answered(
    plan: Plan, output: OutputConfig, taken: Callable[[int], int], at_once: int = ANSWERED_AT_ONCE
) -> tuple[Plan, int]:
    """With as many prompts at a time as fit; `taken`: their number -> bytes beside weights and state."""
    while True:
        size = taken(at_once)
        plan = plan.beside("generation", size)
        if plan.others["generation"] <= plan.budget:
            return plan, at_once
        if at_once == 1:
            ceiling = plan.ceilings[0]
            needed = plan.others["generation"]
            raised = ""
            if ceiling is None or ceiling >= needed:
                raised = f", or raise memory.budget to {at_least(needed)} or more"
            raise UserError(
                f"answering one of output.sample_prompts takes {gib(size)} beside weights and state "
                f"({gib(plan.fixed)}), the budget is {gib(plan.budget)}; shorten them, or lower "
                f"output.sample_max_new_tokens, which is {output.sample_max_new_tokens}{raised}"
            )
        at_once //= 2


def _attention_bytes(config: Config, model: Decoder, device: Device) -> int:
    """A token, for more than two segments a row: cuDNN's backward pass grows with them."""
    o, length, segments = model.options, config.data.max_length, max_segments(config)
    q, k = (
        jax.ShapeDtypeStruct((1, length, heads, o.head_dim), model.dtype)
        for heads in (o.num_heads, o.num_kv_heads)
    )
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    wanted = config.model.attention
    try:
        choice = choose_attention(q, k, k, ids, max_segments=segments, implementation=wanted, device=device)
    except ValueError:  # is said where the model is made
        return 0
    return workspace_bytes(segments - 2, q.shape, k.shape) // length if choice.name == "cudnn" else 0


def planned(run: R, model: Decoder) -> tuple[Plan | None, R]:
    """How the run goes over its rows, before its weights are read.

    On a CPU, whose memory is the host's, nothing is planned: "auto" keeps every activation there.

    Args:
        model: with its adapter; arrays may be shapes.

    Raises:
        UserError: nothing fits, or what the config asks for cannot be had here.
    """
    memory = run.config.memory
    budget = gpu_limit(memory.budget)
    if budget is not None:
        return _planned_for(budget, run, model)
    if memory.budget is not None:
        raise UserError("memory.budget is for GPUs, and there is none; set it to null")
    check_offload(memory.checkpointing, offloads=offloads(), kind="this machine, which has no GPU,")
    if memory.checkpointing != "auto":
        return None, run
    layout = Layout(run.config.train.per_device_train_batch_size, "none", memory.mlp_chunks or 1)
    return None, dataclasses.replace(run, planned=layout)


def _planned_for(budget: int, run: R, model: Decoder) -> tuple[Plan, R]:
    """`planned` on GPUs that have so many bytes each."""
    config, memory = run.config, run.config.memory
    _note_a_larger_budget(memory.budget, budget)
    device = current_device()
    problem = problem_of(
        config,
        model,
        rates=machine_rates(),
        offloads=offloads(),
        context=run.context,
        attention=_attention_bytes(config, model, device),
        answering=_answering_bytes(config.output, model),
    )
    plan = make_plan(
        problem,
        config,
        device=device,
        budget=budget,
        host_budget=host_limit(memory.host_budget),
        # With a budget JAX' allocator has no more than that.
        ceilings=(budget if memory.budget is None else None, host_limit(None)),
        devices=jax.local_device_count(),
    )
    return plan, dataclasses.replace(run, planned=plan.chosen.layout)
