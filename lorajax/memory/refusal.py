"""Why a run does not fit, and which settings do."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lorajax.memory.analysis import gib
from lorajax.memory.planner import Estimate, estimate, estimates
from lorajax.memory.policy import MADE_IN_CHUNKS, PRESETS, Checkpointing, Policy

if TYPE_CHECKING:
    from lorajax.memory.plan import Plan

_GIB, _MIB = 2**30, 2**20
# Tokens of the shortest rows that are offered where longer ones do not fit.
_SHORTEST = 16


def refusal(plan: Plan) -> str:
    """Why the chosen layout cannot run, and what can; and what is known to be better on that GPU."""
    return "\n".join(filter(None, (_refusal(plan), plan.advice)))


def _refusal(plan: Plan) -> str:
    fixed = sum(plan.options[0].device[:3])
    if fixed > plan.budget:
        ceiling, least = plan.ceilings[0], plan.size(_smallest(plan)[0])
        larger = "take a larger GPU"
        if ceiling is None or ceiling >= least:
            larger = f"raise memory.budget, to {_at_least(least)} or more"
        return (
            f"weights, adapters and optimizer alone take {gib(fixed)} of {plan.device}, the budget is "
            f"{gib(plan.budget)}; {larger}, or take a smaller model"
        )
    why = _nothing_fits(plan) if plan.asked == "auto" else _does_not_fit(plan)
    lines = offers(plan)
    if not lines:
        return f"{why}; lower data.max_length, or take a smaller model"
    return "\n".join([f"{why}. What fits:", *lines])


def _does_not_fit(plan: Plan) -> str:
    """What was asked for."""
    how = "estimated" if plan.compiled is None else "compiled"
    taken, host = f"{gib(plan.taken)} of {plan.device} ({how})", f"{gib(plan.chosen.host)} of host memory"
    if plan.taken > plan.budget:
        taken += f", over memory.budget, {gib(plan.budget)}"
    if plan.chosen.host > plan.host_budget:
        host += f", over memory.host_budget, {gib(plan.host_budget)}"
    step = f"{taken} and {host}" if plan.chosen.host else taken
    return f"memory.checkpointing {spelled(plan.asked)}: a step takes {step}"


def _nothing_fits(plan: Plan) -> str:
    """By which budget."""
    smallest, least_host = _smallest(plan)
    if least_host is None:
        whole = plan.ceilings[0] is not None and plan.budget >= plan.ceilings[0]
        short = "the GPU is too small" if whole else "memory.budget is short"
        short += ", the smallest layout takes"
        more = f" and {gib(smallest.host)} of host memory" if smallest.host else ""
    else:
        short = "memory.host_budget is short, the smallest layout within it takes"
        more = f", one of {gib(plan.size(least_host))} takes {gib(least_host.host)} of host memory"
    return (
        f"nothing fits {gib(plan.budget)} of {plan.device} and {gib(plan.host_budget)} of host memory: "
        f"{short} {gib(plan.size(smallest))}{more}"
    )


def _smallest(plan: Plan) -> tuple[Estimate, Estimate | None]:
    """The smallest option within the host's budget, and of those within the GPU's, if any, that of least
    host memory."""
    inside = [option for option in plan.options if option.host <= plan.host_budget] or plan.options
    fitting = [option for option in plan.options if plan.size(option) <= plan.budget]
    return min(inside, key=plan.size), min(fitting, key=lambda option: option.host, default=None)


def offers(plan: Plan, count: int = 3) -> list[str]:
    """Settings with which it fits, each with what it takes and reaches: the nearest first."""
    every = itertools.chain(_other_policies(plan), _larger_budgets(plan), _shorter_rows(plan))
    return list(itertools.islice(every, count))


def _offer(plan: Plan, option: Estimate, flags: str) -> str:
    host = f" and {gib(option.host)} of host memory" if option.host else ""
    speed = plan.tokens_per_second(option)
    return f"  {gib(plan.size(option))}{host}, about {speed:,.0f} tokens/s: {flags}"


def _other_policies(plan: Plan) -> Iterator[str]:
    """Auto, then the fastest for the rows of a micro-batch that are asked for."""
    if plan.asked == "auto":
        return
    best = next((option for option in plan.options if plan.fits(option)), None)
    if best is not None:
        yield _offer(plan, best, "--memory.checkpointing auto")
    fitting = [(name, option) for name, option in _named(plan).items() if plan.fits(option)]
    if fitting:
        name, option = min(fitting, key=lambda each: each[1].seconds)
        yield _offer(plan, option, f"--memory.checkpointing {name}")


def _named(plan: Plan) -> dict[str, Estimate]:
    """What a config can ask for by name, for its rows and its parts of an MLP; presets first."""
    problem, asked = plan.problem, plan.chosen.layout
    if problem is None:
        return {}
    policies: list[Checkpointing] = [name for name in PRESETS if name != "offload" or problem.offloads]
    for option in estimates(replace(problem, micro_batches=[problem.rows // asked.rows])):
        policy = option.layout.checkpointing
        assert isinstance(policy, Policy)
        (layer, *others), chunked = set(policy.layers), asked.mlp_chunks > 1
        if not others and policy.copy_span == 1 and not (chunked and layer.keeps(*MADE_IN_CHUNKS)):
            policies.append(layer.actions)
    corrected = _corrections(plan)
    return {
        spelled(policy): corrected(estimate(problem, asked._replace(checkpointing=policy)))
        for policy in policies
    }


def _larger_budgets(plan: Plan) -> Iterator[str]:
    """For what is asked for; with auto for the smallest layouts."""
    for option in (plan.chosen,) if plan.asked != "auto" else _smallest(plan):
        flags = None if option is None else _raised(plan, option)
        if option is not None and flags:
            yield _offer(plan, option, flags)


def _raised(plan: Plan, option: Estimate) -> str | None:
    """Budgets that an option fits; None: there is not as much."""
    flags: list[str] = []
    unknown: list[str] = []
    for size, budget, ceiling, setting, share, where in (
        (plan.size(option), plan.budget, plan.ceilings[0], "budget", 1, "the GPU"),
        (option.host, plan.host_budget, plan.ceilings[1], "host_budget", plan.devices, "the host"),
    ):
        if size <= budget:
            continue
        if ceiling is not None and size > ceiling:
            return None
        flags.append(f"--memory.{setting} {_at_least(size * share)}")
        unknown += [where] * (ceiling is None)
    caveat = f" (where {' and '.join(unknown)} can give it)" if unknown else ""
    return f"{' '.join(flags)}{caveat}"


def _shorter_rows(plan: Plan) -> Iterator[str]:
    """Half, a quarter, ... of the tokens, as far as that fits."""
    problem, asked = plan.problem, plan.chosen.layout
    if problem is None:
        return
    length = whole = problem.workload(1).length
    while (length := length // 2) >= _SHORTEST:
        shorter = problem.shortened(length)
        if plan.asked == "auto":
            found = estimates(shorter)
        else:
            found = [estimate(shorter, asked._replace(checkpointing=plan.asked))]
        there = replace(plan, tokens=plan.tokens * length // whole, sizes={})
        moved = map(_corrections(plan, length / whole), found)
        if best := next(filter(there.fits, moved), None):
            yield _offer(there, best, f"--data.max_length {length}")


def _corrections(plan: Plan, share: float = 1.0) -> Callable[[Estimate], Estimate]:
    """For new estimates: they are off by a share of what that of the chosen layout was.

    Where that took more than was estimated, by all of it: what was not thought of may not depend on the rows.
    """
    assert plan.problem is not None
    before, chosen = estimate(plan.problem, plan.chosen.layout), plan.chosen
    off = chosen.device.total - before.device.total
    away = chosen.host / before.host if before.host else 1.0

    def corrected(option: Estimate) -> Estimate:
        scaled = int(off * option.layout.rows / chosen.layout.rows * share)
        return option.corrected(max(scaled, off) if off > 0 else scaled, away)

    return corrected


def spelled(asked: Checkpointing) -> str:
    """As a command line takes it."""
    if isinstance(asked, str):
        return asked
    assert not isinstance(asked, Policy)
    actions = {name: action for name, action in asked.items() if (name, action) != ("block_input", "save")}
    return shlex.quote("{" + ", ".join(f"{name}: {action}" for name, action in actions.items()) + "}")


def _at_least(size: int) -> str:
    """A size, rounded up, as settings take it."""
    return f"{math.ceil(100 * size / _GIB) / 100:.2f}GiB" if size >= _GIB else f"{math.ceil(size / _MIB)}MiB"
