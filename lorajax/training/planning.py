"""The plan of a run on this machine."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from lorajax_kernels.device import current_device

from lorajax.errors import UserError
from lorajax.memory.machine import gpu_limit, host_limit, machine_rates, offloads
from lorajax.memory.plan import Plan, make_plan, problem_of
from lorajax.memory.policy import Layout
from lorajax.models.decoder import Decoder
from lorajax.training.inputs import RunShape

R = TypeVar("R", bound=RunShape)


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
