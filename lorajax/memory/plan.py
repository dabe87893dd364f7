"""The plan of a run: what it is expected to take and to reach, and what else there was."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx
from lorajax_kernels.device import Device

from lorajax.config import Config
from lorajax.errors import UserError
from lorajax.lora.adapter import outline_lora
from lorajax.memory.analysis import Memory, gib
from lorajax.memory.costs import Rates, evaluating_bytes, workload
from lorajax.memory.planner import (
    BATCH_BYTES,
    Estimate,
    Problem,
    estimate,
    estimates,
    micro_batch_counts,
    unbeaten,
)
from lorajax.memory.policy import ACTIVATIONS, GRADIENT, Checkpointing, Layout, Policy
from lorajax.memory.refusal import refusal
from lorajax.models.checkpoint import outline
from lorajax.models.decoder import Decoder, LoRAParam

T = TypeVar("T")

_log = logging.getLogger("lorajax")

_GIB = 2**30
# Of a step's time: what a faster layout must promise for it to be compiled where one that fits is at hand.
_WORTH = 0.02
# Layouts that are compiled for a plan, at most, once one fits.
_MOST_COMPILED = 3
# By what share of the budget the smallest option may be over it, by its estimate, and is compiled nonetheless
# before a run is refused.
_DOUBT = 0.1
# AdamW keeps two moments of each trainable parameter.
_MOMENTS = 2


def outline_of(config: Config, path: str | Path | None = None) -> Decoder:
    """The model of a run with what is trained of it, shapes in place of arrays; no weights are read.

    Args:
        path: of the model where it is known; None: the config's.

    Raises:
        UserError: as lorajax.models.checkpoint.outline and lorajax.lora.adapter.select_targets.
    """
    full = config.train.mode == "full"
    model = outline(
        config.model.path if path is None else path,
        dtype=config.model.dtype,
        param_dtype="float32" if full else None,
        attention=config.model.attention,
    )
    if not full:
        outline_lora(model, config.lora)
    return model


def problem_of(
    config: Config,
    model: Decoder,
    *,
    rates: Rates,
    offloads: bool,
    context: int | None = None,
    attention: int = 0,
    answering: int = 0,
) -> Problem:
    """What a run has to be planned for.

    Args:
        config: the run's.
        model: with its adapter; arrays may be shapes, see outline_of.
        rates: of the machine.
        offloads: whether activations can go to host memory.
        context: tokens of the document that a token is in, on average; None: a whole row.
        attention: see Workload.
        answering: see Problem.
    """
    train, length = config.train, config.data.max_length
    trained = LoRAParam if train.mode == "lora" else nnx.Param
    _, trainable, frozen = nnx.split(model, trained, ...)  # type: ignore[misc]
    count = sum(leaf.size for leaf in _leaves(trainable))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in _leaves(frozen))
    in_layers = sum(leaf.size for layer in model.layers for leaf in _leaves(nnx.state(layer, trained)))
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    batch = BATCH_BYTES * rows * length
    return Problem(
        workload=lambda rows: workload(
            model,
            weights=weights,
            trainable=count,
            rows=rows,
            length=length,
            context=length if context is None else context,
            attention=attention,
            outside=count - in_layers,
        ),
        rates=rates,
        rows=rows,
        fixed=(weights, 4 * count, 4 * _MOMENTS * count + batch),
        offloads=offloads,
        micro_batches=micro_batch_counts(rows),
        mlp_chunks=config.memory.mlp_chunks,
        evaluation=functools.partial(_evaluation_bytes, model) if evaluates(config) else None,
        answering=answering,
    )


def evaluates(config: Config) -> bool:
    """Whether a run has samples to be evaluated on."""
    return config.data.eval_path is not None or config.data.eval_fraction > 0


def _evaluation_bytes(model: Decoder, layout: Layout, length: int) -> int:
    """Estimated, beside weights and state."""
    return evaluating_bytes(
        model.options,
        itemsize=model.dtype.itemsize,
        rows=layout.rows,
        length=length,
        mlp_chunks=layout.mlp_chunks,
    )


def _leaves(state: nnx.State) -> list:
    return [variable.get_value() for variable in nnx.to_flat_state(state).leaves]


@dataclass(frozen=True)
class Plan:
    """A choice among layouts that fits a budget.

    Attributes:
        device: name of the GPU.
        budget: bytes that one GPU has for it.
        host_budget: bytes of host memory for one GPU's activations.
        tokens: of a step on one device.
        options: what could be chosen, fastest first; none is beaten in time and memory at once.
        chosen: one of them, or what the config asks for.
        sizes: bytes of what has been compiled, as XLA's analysis has them; the options are corrected by them.
        others: bytes of a GPU, weights and state included, while a run does something else than a step.
        advice: what else would be better on that GPU; None: nothing that is known.
        asked: memory.checkpointing.
        problem: what is planned; None: not known, and nothing else is estimated for a refusal.
        ceilings: bytes to which budget and host_budget can be raised; None: not known.
        devices: GPUs that share memory.host_budget.
    """

    device: str
    budget: int
    host_budget: int
    tokens: int
    options: Sequence[Estimate]
    chosen: Estimate
    sizes: Mapping[Layout, int] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)
    advice: str | None = None
    asked: Checkpointing = "auto"
    problem: Problem | None = None
    ceilings: tuple[int | None, int | None] = (None, None)
    devices: int = 1

    @property
    def fixed(self) -> int:
        """Bytes of weights, adapters and optimizer, which are there all the time."""
        return sum(self.chosen.device[:3])

    @property
    def has_whole_gpu(self) -> bool:
        """Whether the budget cannot be raised."""
        return self.ceilings[0] is not None and self.budget >= self.ceilings[0]

    @property
    def compiled(self) -> int | None:
        """Bytes of the chosen one's compiled step; None: it is not compiled."""
        return self.sizes.get(self.chosen.layout)

    @property
    def taken(self) -> int:
        """Bytes of a GPU that the chosen layout takes, as well as that is known."""
        return self.size(self.chosen)

    @property
    def most(self) -> int:
        """Bytes of a GPU at any time of the run."""
        return max(self.taken, *self.others.values(), self.fixed)

    def size(self, option: Estimate) -> int:
        """Bytes of a GPU, by its compiled step where there is one."""
        return self.sizes.get(option.layout, option.device.total)

    def fits(self, option: Estimate) -> bool:
        return not self.exceeded(option)

    def exceeded(self, option: Estimate) -> str:
        """Which budget an option is over, as tables say it; empty: it fits."""
        words = ("", "over the host's"), ("over the budget", "over both")
        return words[self.size(option) > self.budget][option.host > self.host_budget]

    def tokens_per_second(self, option: Estimate) -> float:
        """On one device."""
        return self.tokens / option.seconds

    def checked(self, memory: Memory) -> Plan:
        """With what the chosen layout's compiled step takes.

        By as much as the estimate was off, other options of as many rows move; those of other micro-batches,
        which no compiled step is nearer to, by as much in proportion to their rows. Host memory moves in
        proportion to itself.
        """
        chosen = self.chosen
        rows = chosen.layout.rows
        off = memory.total - chosen.device.total
        away = memory.host / chosen.host if chosen.host else 1.0
        known = {layout.rows for layout in self.sizes} - {rows}

        def corrected(option: Estimate) -> Estimate:
            if option.layout == chosen.layout:
                return found
            if option.layout in self.sizes or option.layout.rows in known:
                return option
            return option.corrected(off * option.layout.rows // rows, away)

        found = replace(chosen.corrected(off), host=memory.host)
        return replace(
            self,
            chosen=found,
            options=[corrected(option) for option in self.options],
            sizes={**self.sizes, chosen.layout: memory.total},
        )

    def beside(self, name: str, taken: int) -> Plan:
        """With what something else than a step takes beside weights and state, in bytes."""
        return replace(self, others={**self.others, name: self.fixed + taken})

    def lines(self) -> dict[str, str]:
        """What was chosen, what it takes and reaches, and what each activation becomes."""
        chosen, device = self.chosen, self.chosen.device
        policy = chosen.layout.checkpointing
        assert isinstance(policy, Policy)
        how = "estimated" if self.compiled is None else "compiled"
        parts = ", ".join(f"{name} {gib(size)}" for name, size in zip(device._fields, device, strict=True))
        over = f", {self.exceeded(chosen)}" if not self.fits(chosen) else ""
        times = {"checkpoint": self.fixed, **self.others}
        return {
            "plan": f"{chosen.micro_batches} x {chosen.layout.rows} rows on {self.device}: about "
            f"{self.tokens_per_second(chosen):,.0f} tokens/s a GPU",
            "GPU memory": f"{gib(self.taken)} of {gib(self.budget)} ({how}{over}): {parts}",
            "host memory": "none to offload to"
            if self.problem is not None and not self.problem.offloads
            else f"{gib(chosen.host)} of {gib(self.host_budget)}",
            "other times": ", ".join(f"{name} {gib(size)}" for name, size in times.items()),
            **describe(policy),
            **({"MLP": _in_parts(chosen.layout)} if chosen.layout.mlp_chunks > 1 else {}),
            **({"advice": self.advice} if self.advice is not None else {}),
        }

    def table(self) -> str:
        """The lines, one below the other."""
        return table(self.lines())

    def frontier(self, count: int = 12) -> str:
        """The options as a table: memory against speed, from the largest to the smallest."""
        shown = self.shown(count)
        marks = [
            ", ".join(filter(None, ("chosen" if option == self.chosen else "", self.exceeded(option))))
            for option in shown
        ]
        width = max(map(len, marks))
        rows = [f"     GPU     host  micro-batches   tokens/s a GPU  {'':<{width}}  kept"]
        for option, mark in zip(shown, marks, strict=True):
            rows.append(
                f"{gib(self.size(option)):>8} {gib(option.host):>8}  {option.micro_batches:>5} x "
                f"{option.layout.rows:<5}  {self.tokens_per_second(option):>14,.0f}  {mark:<{width}}  "
                f"{summary(option.layout)}"
            )
        return "\n".join(rows)

    def shown(self, count: int) -> list[Estimate]:
        """At most so many options, the chosen one among them, from the largest to the smallest.

        Half of them fit, where there are as many; what does not fit shows what more memory would bring.
        """
        inside = front(option for option in (*self.options, self.chosen) if self.fits(option))
        beyond = [option for option in front(self.options) if not self.fits(option)]
        first = [self.chosen]
        some = count - 1 - min(len(beyond), count - 1 - min(len(inside), count // 2))
        inside = thinned([option for option in inside if option != self.chosen], some)
        beyond = thinned([option for option in beyond if option != self.chosen], count - 1 - len(inside))
        return sorted(first + inside + beyond, key=self.size, reverse=True)

    def plot(self, path: str | Path) -> None:
        """Draw the frontier, memory against tokens/s, with the budget and the choice.

        Raises:
            UserError: as check_picture.
        """
        check_picture(path)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()

        colours = {"": "tab:blue", "over the budget": "silver", "over the host's": "tab:orange"}
        for over in dict.fromkeys([*colours, *map(self.exceeded, self.options)]):
            some = [option for option in self.options if self.exceeded(option) == over]
            points = [(self.size(option) / _GIB, self.tokens_per_second(option)) for option in some]
            if points:
                colour = colours.get(over, "wheat")
                axes.plot(*zip(*points, strict=True), ".", markersize=3, color=colour, label=over or "fits")
        chosen = self.taken / _GIB, self.tokens_per_second(self.chosen)
        axes.plot(*chosen, "o", color="tab:red", label="chosen")
        axes.axvline(self.budget / _GIB, color="gray", linestyle="--", label="budget")
        axes.set(xlabel="GPU memory [GiB]", ylabel="tokens/s on one GPU", title=self.device, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        figure.savefig(path, dpi=120)


def check_picture(path: str | Path) -> None:
    """Whether a picture can be drawn there.

    Raises:
        UserError: there is no such folder, the file's kind is unknown, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a picture needs matplotlib: pip install 'lorajax[plan]'") from None

    path, kinds = Path(path), Figure().canvas.get_supported_filetypes()
    if path.is_dir():
        raise UserError(f"{path} cannot be drawn: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be drawn: there is no folder {path.parent}; make it first")
    if path.suffix[1:].lower() not in kinds:
        raise UserError(f"{path} cannot be drawn: it must end in one of {', '.join(kinds)}")


def make_plan(
    problem: Problem,
    config: Config,
    *,
    device: Device,
    budget: int,
    host_budget: int,
    ceilings: tuple[int | None, int | None] = (None, None),
    devices: int = 1,
) -> Plan:
    """The fastest layout that fits, or the one that the config asks for, whether it fits or not.

    Args:
        ceilings, devices: see Plan.

    Raises:
        UserError: nothing fits.
    """
    options = estimates(problem)
    length, asked = config.data.max_length, config.memory.checkpointing
    plan = Plan(
        device.kind,
        budget,
        host_budget,
        problem.rows * length,
        options,
        options[0],
        advice=_advice(config.model.dtype, device),
        asked=asked,
        problem=problem,
        ceilings=ceilings,
        devices=devices,
    )
    if asked == "auto":
        return choose_again(plan)
    check_offload(asked, offloads=problem.offloads, kind=device.kind)
    rows = config.train.per_device_train_batch_size
    plan = replace(plan, chosen=estimate(problem, Layout(rows, asked, config.memory.mlp_chunks or 1)))
    if sum(problem.fixed) > budget:
        raise UserError(refusal(plan))
    return plan


def check_offload(asked: Checkpointing, *, offloads: bool, kind: str) -> None:
    """Whether a device can do what memory.checkpointing asks for.

    Raises:
        UserError: it asks to offload, and there is nothing to offload to.
    """
    if asked != "auto" and not offloads and Policy.of(asked, 1).offloads:
        raise UserError(
            f"memory.checkpointing is {asked}, but {kind} has no pinned host memory to offload to; set it to "
            "auto, full or none"
        )


def _advice(dtype: str, device: Device) -> str | None:
    """About the dtype."""
    if dtype == "bfloat16" and device.half_dtype == jnp.float16:
        return f"{device.kind} has units for float16 and none for bfloat16: set model.dtype to float16"
    return None


def choose_again(plan: Plan) -> Plan:
    """The plan with the fastest option that fits.

    Raises:
        UserError: none fits.
    """
    chosen = next((option for option in plan.options if plan.fits(option)), None)
    if chosen is None:
        raise UserError(refusal(plan))
    return replace(plan, chosen=chosen)


def accepted(plan: Plan) -> Plan:
    """The plan, if what is chosen fits.

    Raises:
        UserError: it does not.
    """
    if not plan.fits(plan.chosen):
        raise UserError(refusal(plan))
    return plan


def settle(plan: Plan, compiled: Callable[[Layout], tuple[T, Memory]]) -> tuple[Plan, T]:
    """Compile what is chosen, and with auto choose again where it does not fit, or leaves much of the memory.

    Args:
        compiled: layout -> (its program, what it takes).

    Returns:
        The plan with what its choice takes, and the program of that.

    Raises:
        UserError: the layout does not fit and no other may be chosen, or nothing fits.
    """
    programs: dict[Layout, T] = {}
    best: Estimate | None = None
    while True:
        estimated = plan.chosen.device.total
        program, memory = compiled(plan.chosen.layout)
        plan = plan.checked(memory)
        _log.info("%s takes %s, estimated %s", summary(plan.chosen.layout), gib(memory.total), gib(estimated))
        if plan.asked != "auto":
            return accepted(plan), program
        if plan.fits(plan.chosen) and (best is None or plan.chosen.seconds < best.seconds):
            best, programs = plan.chosen, {plan.chosen.layout: program}
        if not any(map(plan.fits, plan.options)) and (doubtful := _doubtful(plan)) is not None:
            plan = replace(plan, chosen=doubtful)
            continue
        plan = choose_again(plan)
        if best is not None and (
            len(plan.sizes) >= _MOST_COMPILED or plan.chosen.seconds > (1 - _WORTH) * best.seconds
        ):
            return replace(plan, chosen=best), programs[best.layout]


def _doubtful(plan: Plan) -> Estimate | None:
    """The smallest option that may yet fit: it is not compiled, and over the budget by less than estimates
    are off."""
    most = (1 + _DOUBT) * plan.budget
    uncompiled = (option for option in plan.options if option.layout not in plan.sizes)
    near = [option for option in uncompiled if plan.size(option) <= most and option.host <= plan.host_budget]
    return min(near, key=plan.size, default=None) if len(plan.sizes) < _MOST_COMPILED else None


def describe(policy: Policy) -> dict[str, str]:
    """ "saved", "offloaded", "recomputed" -> names of activations, and in how many layers."""
    layers = len(policy.layers)
    if layers == 1:
        policy = policy.as_run
    if policy.keeps_everything:
        return {"saved": "every activation"}
    words: dict[str, list[str]] = {"saved": [], "offloaded": [], "recomputed": []}
    for name in ACTIVATIONS:
        away = sum(name in layer.offloaded for layer in policy.layers)
        saved = sum(name in layer.saved for layer in policy.layers)
        for word, number in (("saved", saved), ("offloaded", away), ("recomputed", layers - saved - away)):
            if number:
                words[word].append(name if number == layers else f"{name} ({number} of {layers} layers)")
    if any(layer.gradient_away for layer in policy.layers):
        words["offloaded"].append(GRADIENT)
    found = {word: ", ".join(names) for word, names in words.items() if names}
    if policy.layers[-1].offloaded:
        found["offloaded"] += "; the last layer's stay on the GPU"
    return found


def summary(layout: Layout) -> str:
    """In a few words."""
    policy = layout.checkpointing
    if layout.mlp_chunks > 1:
        return f"{summary(layout._replace(mlp_chunks=1))}, MLP {_in_parts(layout)}"
    if not isinstance(policy, Policy):
        return str(policy)
    policy = policy.as_run
    if policy.keeps_everything:
        return "everything"
    names = [name for name in ACTIVATIONS if name not in ("lora_hidden", "attention_lse")]
    share = {
        name: sum(name in layer.saved or name in layer.offloaded for layer in policy.layers) for name in names
    }
    away = {name: sum(name in layer.offloaded for layer in policy.layers) for name in names}
    total = len(policy.layers) * (len(names) - 1)
    kept = sum(share.values()) - share["block_input"]
    away[GRADIENT] = sum(layer.gradient_away for layer in policy.layers)
    travelling = [f"{name} {number}" for name, number in away.items() if number]
    text = f"{100 * kept / total:.0f}% of named activations"
    return text + (f", offloaded: {', '.join(travelling)}" if travelling else "")


def _in_parts(layout: Layout) -> str:
    return f"in {layout.mlp_chunks} parts of a row"


def front(options: Iterable[Estimate]) -> list[Estimate]:
    """Those that no smaller one beats in time, from the largest to the smallest."""
    return unbeaten(options, lambda option: (option.seconds, option.device.total, 0))


def thinned(options: Sequence[Estimate], count: int) -> list[Estimate]:
    """So many of them: the ends, then what is furthest in memory from those that are taken."""
    if len(options) <= count:
        return list(options)
    sizes = [option.device.total for option in options]
    taken = [0, len(options) - 1][:count]
    while len(taken) < count:
        left = set(range(len(options))).difference(taken)
        taken.append(max(left, key=lambda one: min(abs(sizes[one] - sizes[other]) for other in taken)))
    return [options[one] for one in sorted(taken)]


def table(lines: Mapping[str, str]) -> str:
    """Names and what they stand for, one below the other."""
    width = max(map(len, lines))
    return "\n".join(f"{name:>{width}}  {text}" for name, text in lines.items())
