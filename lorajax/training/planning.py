"""The plan of a run on this machine."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from lorajax_kernels.device import current_device

from lorajax.config import Config, parse_size
from lorajax.errors import UserError
from lorajax.memory.elsewhere import compile_elsewhere
from lorajax.memory.machine import (
    CONTEXT_BYTES,
    SLACK,
    gpu_limit,
    host_limit,
    machine_rates,
    offloads,
)
from lorajax.memory.plan import Plan, make_plan, outline_of, problem_of, settle
from lorajax.memory.policy import Layout
from lorajax.memory.targets import TARGETS, Target, find_target
from lorajax.models.decoder import Decoder
from lorajax.sharding import data_mesh, replicated, shapes
from lorajax.training.inputs import RunShape
from lorajax.training.program import compile_planned, state_shapes
from lorajax.training.weights import split_weights

R = TypeVar("R", bound=RunShape)

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
        graph, trainable, frozen = split_weights(model, config.train.mode)
        state, place = state_shapes(run, trainable), replicated(run.mesh)
        _, _, plan = compile_planned(run, plan, graph, state, shapes(frozen, place))
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
        device=target.kind,
        budget=budget,
        host_budget=_HOST_ELSEWHERE if host is None else parse_size(host),
    )
    if not compiles:
        return plan

    def compiled(layout: Layout) -> tuple[None, int]:
        return None, compile_elsewhere(config, target, layout).total

    return settle(plan, compiled, may_choose=config.memory.checkpointing == "auto")[0]


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
        layout = Layout(config.train.per_device_train_batch_size, "none")
        return None, dataclasses.replace(run, planned=layout)
    problem = problem_of(config, model, rates=machine_rates(), offloads=offloads())
    plan = make_plan(
        problem,
        config,
        device=current_device().kind,
        budget=budget,
        host_budget=host_limit(memory.host_budget),
    )
    return plan, dataclasses.replace(run, planned=plan.chosen.layout)
