"""The plan of a run on this machine."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from lorajax_kernels.device import current_device

from lorajax.config import Config, parse_size
from lorajax.errors import UserError
from lorajax.generation import answering_memory
from lorajax.memory.costs import answering_bytes
from lorajax.memory.elsewhere import Variant, compile_elsewhere
from lorajax.memory.machine import (
    CONTEXT_BYTES,
    SLACK,
    gpu_limit,
    host_limit,
    machine_rates,
    offloads,
)
from lorajax.memory.plan import Plan, gib, make_plan, outline_of, problem_of, settle
from lorajax.memory.policy import Layout
from lorajax.memory.targets import TARGETS, Target, find_target
from lorajax.models.decoder import Decoder
from lorajax.sharding import data_mesh
from lorajax.training.inputs import Inputs, RunShape
from lorajax.training.program import compile_planned

R = TypeVar("R", bound=RunShape)

# Sample prompts that are answered at a time, at most.
ANSWERED_AT_ONCE = 8
# Of a prompt whose tokenizer need not be here: few bytes a token, and what a chat template puts around it.
_BYTES_A_TOKEN, _TEMPLATE_TOKENS = 2, 32
# Taken for the host memory of a machine that is not here.
_HOST_ELSEWHERE = 64 * 2**30


def plan_memory(config: Config, device: str = "auto", *, compiles: bool = True) -> Plan:
    """Plan a run's memory without its weights or data.

    Args:
        config: the run's; of the model its configuration alone is read.
        device: "auto": the GPU at hand; or a name of lorajax.memory.targets, which need not be here.
        compiles: compile the step that is chosen, to know what it takes; otherwise estimate it.

    Raises:
        UserError: nothing fits, the device is unknown, there is no GPU at hand, or JAX' CUDA plugin, which
            compiles for a GPU that is not here, is not installed.
    """
    model = outline_of(config)
    if device != "auto":
        return _plan_elsewhere(config, model, find_target(device), compiles)
    plan, run = planned(RunShape(config=config, mesh=data_mesh(), total_steps=1000), model)
    if plan is None:
        raise UserError(f"there is no GPU at hand; name one with --device: {', '.join(TARGETS)}")
    if compiles:
        _, _, plan = compile_planned(run, plan, model)
        assert plan is not None
    return plan


def _plan_elsewhere(config: Config, model: Decoder, target: Target, compiles: bool) -> Plan:
    budget = int((target.memory - CONTEXT_BYTES) * (1 - SLACK))
    if config.memory.budget is not None:
        budget = min(budget, parse_size(config.memory.budget))
    host = config.memory.host_budget
    plan = make_plan(
        problem_of(config, model, rates=target.rates, offloads=True),
        config,
        device=target.device,
        budget=budget,
        host_budget=_HOST_ELSEWHERE if host is None else parse_size(host),
    )
    if not compiles:
        return plan

    def compiled(layout: Layout) -> tuple[None, int]:
        return None, compile_elsewhere(config, target, Variant(layout)).total

    plan, _ = settle(plan, compiled, may_choose=config.memory.checkpointing == "auto")
    if config.data.eval_path is not None or config.data.eval_fraction > 0:
        # Nothing is kept from layer to layer, so that two take as much as all.
        variant = Variant(plan.chosen.layout._replace(checkpointing="none"), num_layers=2, evaluates=True)
        found = compile_elsewhere(config, target, variant)
        plan = plan.beside("evaluation", found.temporaries)
    if prompts := config.output.sample_prompts:
        longest = max(len(prompt.encode()) for prompt in prompts) // _BYTES_A_TOKEN + _TEMPLATE_TOKENS
        plan = plan.beside(
            "generation",
            answering_bytes(
                model.options,
                itemsize=model.dtype.itemsize,
                rows=min(len(prompts), ANSWERED_AT_ONCE),
                prompt=longest,
                new=config.output.sample_max_new_tokens,
            ),
        )
    return plan


def plan_answers(plan: Plan, inputs: Inputs, model: Decoder) -> tuple[Plan, int]:
    """How many of output.sample_prompts are answered at a time, so that they fit beside weights and state.

    Returns:
        The plan with what that takes, and the number.

    Raises:
        UserError: not even one prompt's answer fits.
    """
    output, at_once = inputs.config.output, ANSWERED_AT_ONCE
    while True:
        taken = answering_memory(
            model,
            inputs.tokenizer,
            output.sample_prompts,
            max_new_tokens=output.sample_max_new_tokens,
            batch_size=at_once,
        )
        plan = plan.beside("generation", taken)
        if plan.others["generation"] <= plan.budget:
            return plan, at_once
        if at_once == 1:
            raise UserError(
                f"answering output.sample_prompts takes {gib(taken)} beside weights and state "
                f"({gib(plan.fixed)}), the budget is {gib(plan.budget)}; shorten them, lower "
                "output.sample_max_new_tokens, or raise memory.budget"
            )
        at_once //= 2


def planned(run: R, model: Decoder) -> tuple[Plan | None, R]:
    """How the run goes over its rows, before its weights are read.

    On a CPU, whose memory is the host's, nothing is planned: "auto" keeps every activation there.

    Args:
        model: with its adapter; arrays may be shapes.

    Raises:
        UserError: nothing fits, or what the config asks for cannot be had here.
    """
    config = run.config
    memory = config.memory
    budget = gpu_limit(memory.budget)
    if budget is None:
        if memory.budget is not None:
            raise UserError("memory.budget is for GPUs, and there is none; set it to null")
        if memory.checkpointing != "auto":
            return None, run
        layout = Layout(config.train.per_device_train_batch_size, "none", memory.mlp_chunks or 1)
        return None, dataclasses.replace(run, planned=layout)
    problem = problem_of(config, model, rates=machine_rates(), offloads=offloads(), context=run.context)
    plan = make_plan(
        problem,
        config,
        device=current_device(),
        budget=budget,
        host_budget=host_limit(memory.host_budget),
    )
    return plan, dataclasses.replace(run, planned=plan.chosen.layout)
