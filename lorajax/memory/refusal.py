"""Why a run does not fit, and which settings do."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lorajax.memory.analysis import gib
from lorajax.memory.planner import BATCH_BYTES, Estimate, Problem, estimate, estimates
from lorajax.memory.policy import MADE_IN_CHUNKS, PRESETS, Checkpointing, Policy

if TYPE_CHECKING:
    from lorajax.memory.plan import Plan

_GIB, _MIB = 2**30, 2**20
# Tokens of the shortest rows that are offered where longer ones do not fit.
_SHORTEST = 16
# What a compiled step may take more than is estimated, where none has been compiled yet: this share of it,
# but at least so many bytes, because small programs are off by more.
_MARGIN, _LEAST_MARGIN = 0.03, 2**26
# Share of the memory from which on the tokens of a step are what there is too much of.
_MANY_TOKENS = 0.05
_AUTO = "--memory.checkpointing auto"


def refusal(plan: Plan) -> str:
    """Why the chosen layout cannot run, and what can; and what is known to be better on that GPU."""
    return "\n".join(filter(None, (_refusal(plan), plan.advice)))


def _refusal(plan: Plan) -> str:
    fixed = sum(plan.options[0].device[:3])
    lines = offers(plan)
    if fixed > plan.budget:
        why = (
            f"weights, adapters, optimizer and batch alone take {gib(fixed)} of {plan.device}, the budget is "
            f"{gib(plan.budget)}"
        )
        otherwise = "take a larger GPU, or take a smaller model"
        if (batch := BATCH_BYTES * plan.tokens) > _MANY_TOKENS * plan.budget:
            otherwise = (
                f"the {plan.tokens:,} tokens of a step take {gib(batch)} of that: lower "
                "train.per_device_train_batch_size or train.gradient_accumulation_steps"
            )
        return _with_offers(why, lines, otherwise)
    why = _nothing_fits(plan) if plan.asked == "auto" else _does_not_fit(plan)
    return _with_offers(why, lines)


def _with_offers(
    why: str, lines: list[str], otherwise: str = "lower data.max_length, or take a smaller model"
) -> str:
    return "\n".join([f"{why}. What fits:", *lines]) if lines else f"{why}; {otherwise}"


def refused_evaluation(plan: Plan, taken: int) -> str:
    """Why a run that would fit cannot be evaluated, which takes so many bytes beside weights and state."""
    why = (
        f"an evaluation takes {gib(taken)} beside weights and state ({gib(plan.fixed)}), the budget is "
        f"{gib(plan.budget)}"
    )
    return _with_offers(why, offers(plan))


def _does_not_fit(plan: Plan) -> str:
    """What was asked for."""
    how = "estimated" if plan.compiled is None else "compiled"
    taken, host = f"{gib(plan.taken)} of {plan.device} ({how})", f"{gib(plan.chosen.host)} of host memory"
    if plan.taken > plan.budget:
        taken += f", {'which has' if plan.has_whole_gpu else 'over memory.budget,'} {gib(plan.budget)}"
    if plan.chosen.host > plan.host_budget:
        host += f", over memory.host_budget, {gib(plan.host_budget)}"
    step = f"{taken} and {host}" if plan.chosen.host else taken
    return f"memory.checkpointing {spelled(plan.asked)}: a step takes {step}"


def _nothing_fits(plan: Plan) -> str:
    """By which budget."""
    smallest, least_host = _smallest(plan)
    if least_host is None:
        short = "the GPU is too small" if plan.has_whole_gpu else "memory.budget is short"
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
    found: list[str] = []
    for line in itertools.chain(
        _other_policies(plan),
        _larger_budgets(plan),
        _shorter_rows(plan),
    ):
        if line not in found:
            found.append(line)
        if len(found) == count:
            break
    return found


def _offer(plan: Plan, option: Estimate, flags: str) -> str:
    host = f" and {gib(option.host)} of host memory" if option.host else ""
    speed = plan.tokens_per_second(option)
    return f"  {gib(plan.size(option))}{host}, about {speed:,.0f} tokens/s: {flags}"


def _other_policies(plan: Plan) -> Iterator[str]:
    """Auto, then the fastest for the rows of a micro-batch that are asked for."""
    if plan.asked == "auto":
        return
    best = next(filter(plan.fits, map(_guarded(plan), plan.options)), None)
    if best is not None:
        yield _offer(plan, best, _AUTO)
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
    """For what is asked for, and with auto for the smallest layouts."""
    guarded = _guarded(plan)
    if plan.asked != "auto":
        yield from _raising(plan, guarded(plan.chosen))
    for option in _smallest(plan):
        if option is not None:
            yield from _raising(plan, guarded(option), *_auto(plan))


def _auto(plan: Plan) -> list[str]:
    """What has to be set to have auto."""
    return [] if plan.asked == "auto" else [_AUTO]


def _raising(plan: Plan, option: Estimate, *others: str) -> Iterator[str]:
    """An option with the budgets that it needs, if there is as much."""
    if flags := _raised(plan, option):
        yield _offer(plan, option, " ".join([*others, flags]))


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
        flags.append(f"--memory.{setting} {at_least(size * share)}")
        unknown += [where] * (ceiling is None)
    caveat = f" (where {' and '.join(unknown)} can give it)" if unknown else ""
    return f"{' '.join(flags)}{caveat}"


def _shorter_rows(plan: Plan) -> Iterator[str]:
    """Half, a quarter, ... of the tokens, as far as that fits: for what is asked for, then with auto.

    Then, with auto, those for which a budget has to be raised too.
    """
    fits, raisable = _could_fit(plan, plan.budget), _could_fit(plan, plan.ceilings[0])
    raised: list[str] = []
    for asked in [plan.asked] if plan.asked == "auto" else [plan.asked, "auto"]:
        if not (fits or (raisable and asked == "auto")):
            continue
        others = _auto(plan) if asked == "auto" else []
        for length, there, guarded, found in _shortened(plan, asked):
            options, flags = list(map(guarded, found)), [*others, f"--data.max_length {length}"]
            if best := next(filter(there.fits, options), None):
                yield _offer(there, best, " ".join(flags))
            elif asked == "auto":
                raised += _raising(there, min(options, key=there.size), *flags)
            if not fits:  # and will not with shorter rows
                yield from raised
                raised.clear()
    yield from raised


def _could_fit(plan: Plan, most: int | None) -> bool:
    """Whether weights and adapters do, with the margin; None is no limit."""
    if plan.problem is None:
        return False
    return most is None or _with_margin(plan, sum(plan.problem.fixed[:2])) <= most


def _shortened(
    plan: Plan, asked: Checkpointing
) -> Iterator[tuple[int, Plan, Callable[[Estimate], Estimate], list[Estimate]]]:
    """Half, a quarter, ... of the tokens, the plan for that, and what could be chosen in it."""
    problem, chosen = plan.problem, plan.chosen.layout
    assert problem is not None  # see _could_fit
    length = whole = problem.length
    while (length := length // 2) >= _SHORTEST:
        shorter = problem.shortened(length)
        there = replace(plan, tokens=plan.tokens * length // whole, sizes={})
        found = (
            estimates(shorter)
            if asked == "auto"
            else [estimate(shorter, chosen._replace(checkpointing=asked))]
        )
        yield length, there, _corrections(plan, shorter), found


def _guarded(plan: Plan) -> Callable[[Estimate], Estimate]:
    """For options of the plan: with a margin until something is compiled, and as large as an evaluation."""

    def guarded(option: Estimate) -> Estimate:
        return _grown(plan, plan.problem, option, plan.size(option))

    return guarded


def _corrections(plan: Plan, problem: Problem | None = None) -> Callable[[Estimate], Estimate]:
    """For new estimates, of the plan's problem or one of shorter rows.

    They are off by a share of what that of the chosen layout was; where that took more than was estimated, by
    all of it: what was not thought of may not depend on the rows. Until something is compiled, by a margin.
    """
    assert plan.problem is not None
    there = problem or plan.problem
    share = there.length / plan.problem.length
    before, chosen = estimate(plan.problem, plan.chosen.layout), plan.chosen
    off = chosen.device.total - before.device.total
    away = chosen.host / before.host if before.host else 1.0

    def corrected(option: Estimate) -> Estimate:
        scaled = int(off * option.layout.rows / chosen.layout.rows * share)
        size = option.device.total + (max(scaled, off) if off > 0 else scaled)
        return _grown(plan, there, option, size, away)

    return corrected


def _grown(plan: Plan, problem: Problem | None, option: Estimate, step: int, away: float = 1.0) -> Estimate:
    """An option whose step takes so many bytes, as large as what a run of it needs, evaluations and answers
    included."""
    if problem is not None:
        beside = max(problem.evaluating(option.layout), problem.answering)
        step = max(step, sum(option.device[:3]) + beside)
    return option.corrected(_with_margin(plan, step) - option.device.total, away)


def _with_margin(plan: Plan, size: int) -> int:
    return size if plan.sizes else size + max(int(_MARGIN * size), _LEAST_MARGIN)


def spelled(asked: Checkpointing) -> str:
    """As a command line takes it."""
    if isinstance(asked, str):
        return asked
    assert not isinstance(asked, Policy)
    actions = {name: action for name, action in asked.items() if (name, action) != ("block_input", "save")}
    return shlex.quote("{" + ", ".join(f"{name}: {action}" for name, action in actions.items()) + "}")


def at_least(size: int) -> str:
    """A size, rounded up, as settings take it."""
    return f"{math.ceil(100 * size / _GIB) / 100:.2f}GiB" if size >= _GIB else f"{math.ceil(size / _MIB)}MiB"
