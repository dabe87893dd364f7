"""The layer loop, and how each layer's activations are kept for the backward pass.

Layers run one after the other, each with its own weights; nothing is stacked, so no weight is ever copied.
What a layer keeps on the GPU, keeps in host memory or makes again is its policy (policy.py); the presets are

| checkpointing | kept on the GPU per layer | kept on the host | recomputed in the backward pass |
|---|---|---|---|
| none    | every named activation   | nothing         | what has no name |
| full    | the layer's input [B,T,D] | nothing        | the layer |
| offload | nothing (last layer: its input, lora_hidden) | the layer's input and gradient | the layer |

All layers are in one custom_vjp. A layer is traced once, together with what its backward pass
reads, into a list of equations. The forward pass evaluates what the output and the kept activations need, the
backward pass what is missing of what it reads, starting from the kept ones.

XLA schedules a program as a whole: left alone, it merges what the backward pass computes again with what the
forward pass has computed, and copies to and from the host when it likes, for all layers early or each at the
last moment. Optimization barriers tie both to the computation, one layer at a time:

    forward, layer i     its activations go to the host while it runs and the next ones do, and layer
                         i + copy_span waits for the copies: then nothing needs them on the GPU, and their
                         memory is free.
    backward, layer i    those of layer i - copy_span come back while layer i is computed again and
                         differentiated. They start no earlier than that, and layer i - copy_span does not
                         start before they are there. Nothing is left to come back while the first layer's
                         turn lasts, so gradients that wait in host memory do, as many as there is room for
                         in place of a layer's activations, and the others thereafter.

So what is on the GPU of offloaded activations is that of copy_span + 1 layers at most, whatever the number of
layers, and each copy has copy_span layers to hide behind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal, Var
from jaxtyping import Array, Float

from lorajax.memory.policy import Checkpointing, LayerPolicy, Policy

# (block, index of the layer, x) -> output.
Layer = Callable[[Any, Any, Array], Array]
# The arrays of a block.
Leaves = Sequence[Array]


def run_layers(
    layer: Layer,
    blocks: Sequence[Any],
    x: Float[Array, "B T D"],
    *,
    checkpointing: Checkpointing | None,
) -> Float[Array, "B T D"]:
    """Apply `layer(block, index, x)` for each block in order.

    Args:
        layer: a pure function of its arguments and of arrays that it closes over; those are constants. The
            index is an int32 scalar where there are gradients, else an int.
        blocks: one nnx module per layer.
        x: input of the first layer.
        checkpointing: what is kept, see the table above (rematerialisation: Chen et al., 2016); None: a plain
            loop, of which JAX keeps what it likes.

    Raises:
        ValueError: as Policy.of.
    """
    if checkpointing is None:
        for index, block in enumerate(blocks):
            x = layer(block, index, x)
        return x
    policy = Policy.of(checkpointing, len(blocks))
    split = [nnx.split(block) for block in blocks]
    leaves = [jax.tree.flatten(state) for _, state in split]
    kinds = [_Kind(graph, tree) for (graph, _), (_, tree) in zip(split, leaves, strict=True)]
    return _with_policy(layer, kinds, policy)([own for own, _ in leaves], x)


class _Kind(NamedTuple):
    """The structure of a block without its arrays; layers of one kind are traced once."""

    graph: Any
    tree: Any

    def merge(self, leaves: Leaves) -> Any:
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))


def _with_policy(
    layer: Layer, kinds: Sequence[_Kind], policy: Policy
) -> Callable[[Sequence[Leaves], Array], Array]:
    """(leaves of each layer, x) -> output of the last, with the backward pass that the policy describes."""

    @jax.custom_vjp
    def run(leaves: Any, x: Array) -> Array:
        blocks = [kind.merge(own) for kind, own in zip(kinds, leaves, strict=True)]
        return run_layers(layer, blocks, x, checkpointing=None)

    def forward(leaves: Any, x: Any) -> tuple[Array, Any]:
        trained = [tuple(leaf.perturbed for leaf in own) for own in leaves]
        leaves, x = [[leaf.value for leaf in own] for own in leaves], x.value
        traces = _trace_kinds(layer, kinds, leaves, x, trained)
        kept: list[_Kept] = []
        for index, (trace, own) in enumerate(zip(traces, leaves, strict=True)):
            # Together: otherwise what is made of the leaves alone is made for all layers before the first.
            x, own = jax.lax.optimization_barrier((x, own))
            last = index + 1 == len(kinds)
            y, values, on_host = trace.forward(own, index, x, policy.layers[index], may_offload=not last)
            kept.append(_Kept.of(values, on_host))
            y = kept[index].settled_with(y)
            x = y
            if index + 1 >= policy.copy_span:
                x = kept[index + 1 - policy.copy_span].tied_to(x)
        return x, (Static((traces, [own.on_host for own in kept])), leaves, [own.values for own in kept])

    def backward(residuals: Any, dy: Any) -> tuple[Any, Array | None]:
        static, leaves, values = residuals
        traces, on_host = static.value
        if isinstance(dy, jax.custom_derivatives.SymbolicZero):
            return [[None] * len(own) for own in leaves], None
        kept = [_Kept(*pair) for pair in zip(values, on_host, strict=True)]
        gradients: list[_Kept] = []
        # How far copies back have come: from this layer on they have been started.
        started = len(kept)
        for index in reversed(range(len(kept))):
            while started > max(index - policy.copy_span, 0):
                started -= 1
                dy = kept[started].start_back(dy)
            if index == 0:
                room = policy.copy_span * max(each.travelling_bytes for each in kept)
                sizes = itertools.accumulate(each.travelling_bytes for each in gradients)
                returned = sum(size <= room for size in sizes)
                for away in gradients[:returned]:
                    dy = away.start_back(dy)
            # The leaves too: otherwise what is made of them alone is kept from the forward pass.
            own, here, dy = jax.lax.optimization_barrier((leaves[index], kept[index].values, dy))
            gradient, dy = traces[index].backward(own, index, here, policy.layers[index], dy)
            # That of the first layer stays: it is the last that is made.
            waits = policy.layers[index].gradient_away and index > 0
            # The adapters' gradients now: XLA likes to make them all at the end, from inputs that it keeps.
            gradient, dy = jax.lax.optimization_barrier((gradient, dy))
            gradients.append(_Kept.of(gradient, [waits] * len(gradient)))
            if index:
                dy = kept[index - 1].tied_to(dy)
            if len(gradients) > policy.copy_span:
                dy = gradients[-1 - policy.copy_span].tied_to(dy)
        # Behind the first layer's gradient, if it has one: dy may be of no use to anyone.
        first = gradients[-1]
        for away in gradients[returned:-1]:
            if first.values:
                first.values[0] = away.start_back(first.values[0])
            else:
                dy = away.start_back(dy)
        found = zip(traces, reversed(gradients), strict=True)
        return [trace.as_leaves(each.values) for trace, each in found], dy

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


@dataclass
class _Kept:
    """What is kept of a layer, and which of it goes to the host."""

    values: list[Array]
    on_host: Sequence[bool]

    @classmethod
    def of(cls, values: Iterable[Array], on_host: Sequence[bool]) -> _Kept:
        """Copies to the host start as soon as a value is there."""
        return cls(
            [
                jax.device_put(value, jax.memory.Space.Host) if away else value
                for value, away in zip(values, on_host, strict=True)
            ],
            on_host,
        )

    def settled_with(self, y: Array) -> Array:
        """y, which is there when what stays on the GPU is.

        Otherwise XLA may keep what a value is the sum of, to add it again where it is read.
        """
        staying = [value for value, away in zip(self.values, self.on_host, strict=True) if not away]
        y, staying = jax.lax.optimization_barrier((y, staying))
        self._replace(staying, away=False)
        return y

    @property
    def travelling(self) -> list[Array]:
        return [value for value, away in zip(self.values, self.on_host, strict=True) if away]

    @property
    def travelling_bytes(self) -> int:
        return sum(value.size * value.dtype.itemsize for value in self.travelling)

    def _replace(self, new: Iterable[Array], *, away: bool) -> None:
        coming = iter(new)
        self.values = [
            next(coming) if is_away == away else value
            for value, is_away in zip(self.values, self.on_host, strict=True)
        ]

    def tied_to(self, x: Array) -> Array:
        """x, which waits until the copies have arrived."""
        if not any(self.on_host):
            return x
        arrived, x = jax.lax.optimization_barrier((self.travelling, x))
        self._replace(arrived, away=True)
        return x

    def start_back(self, dy: Array) -> Array:
        """Fetch what is on the host, once dy is there; gives dy."""
        if not any(self.on_host):
            return dy
        away, dy = jax.lax.optimization_barrier((self.travelling, dy))
        back = [jax.device_put(value, jax.memory.Space.Device) for value in away]
        self._replace(back, away=True)
        return dy


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Static:
    """What goes from the forward to the backward pass beside arrays."""

    value: Any


def _trace_kinds(
    layer: Layer,
    kinds: Sequence[_Kind],
    leaves: Sequence[Leaves],
    x: Array,
    trained: Sequence[tuple[bool, ...]],
) -> list[_Trace]:
    """A trace for each layer; those that differ in nothing but values share one."""
    known: dict[Any, _Trace] = {}
    traces = []
    for kind, own, chosen in zip(kinds, leaves, trained, strict=True):
        key = kind, chosen, tuple((leaf.shape, leaf.dtype) for leaf in own)
        if key not in known:
            known[key] = _Trace.of(layer, kind, own, x, chosen)
        traces.append(known[key])
    return traces


@dataclass(frozen=True)
class _Trace:
    """A layer and what its backward pass reads, as equations: (leaves, index, x) -> (output, residuals).

    Both passes are functions that are compiled into one program with what calls them, but traced and lowered
    once for all layers that keep the same.

    Attributes:
        equations: in the order in which they run.
        constants: what the layer closes over.
        inputs: variables of the constants, of leaves, index and x.
        output: the layer's.
        residuals: what the backward pass reads, all but arrays of the weights among them computed.
        pullback: tree of the function from the output's cotangent to those of the trained leaves and of x,
            its leaves being the residuals.
        trained: for each leaf, whether it is differentiated.
        named: the activations that have a name and that residuals are made from, each with its name.
        functions: of each pass, by the names of what is kept, as far as they have been needed.
    """

    equations: Sequence[Any]
    constants: Sequence[Array]
    inputs: Sequence[Var]
    output: Any
    residuals: Sequence[Any]
    pullback: Any
    trained: tuple[bool, ...]
    named: Sequence[tuple[str, Var]]
    functions: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, layer: Layer, kind: _Kind, own: Leaves, x: Array, trained: tuple[bool, ...]) -> _Trace:
        places = [place for place, is_trained in enumerate(trained) if is_trained]
        pullback = None

        def forward(own: Leaves, index: Array, x: Array) -> tuple[Array, list[Array]]:
            def run(chosen: Leaves, x: Array) -> Array:
                leaves = list(own)
                for place, leaf in zip(places, chosen, strict=True):
                    leaves[place] = leaf
                return layer(kind.merge(leaves), index, x)

            nonlocal pullback
            y, function = jax.vjp(run, [own[place] for place in places], x)
            residuals, pullback = jax.tree.flatten(function)
            return y, residuals

        jaxpr = jax.make_jaxpr(forward)(own, jnp.int32(0), x)
        output, *residuals = jaxpr.jaxpr.outvars
        needed = {variable for eqn in _needed(jaxpr.jaxpr.eqns, (), residuals) for variable in eqn.outvars}
        names = [(eqn.params["name"], eqn.outvars[0]) for eqn in jaxpr.jaxpr.eqns if _is_name(eqn)]
        return cls(
            equations=jaxpr.jaxpr.eqns,
            constants=jaxpr.consts,
            inputs=[*jaxpr.jaxpr.constvars, *jaxpr.jaxpr.invars],
            output=output,
            residuals=residuals,
            pullback=pullback,
            trained=trained,
            named=[(name, variable) for name, variable in names if variable in needed],
        )

    def forward(
        self, own: Leaves, index: int, x: Array, policy: LayerPolicy, *, may_offload: bool
    ) -> tuple[Array, list[Array], list[bool]]:
        """The output, the kept activations, and for each of these whether it is to go to the host."""
        kept = self._kept(policy)

        def forward(*inputs: Array) -> tuple[Array, list[Array]]:
            wanted = [self.output, *(variable for _, variable in kept)]
            y, *values = _evaluate(self.equations, self._known(inputs), wanted)
            return y, values

        y, values = self._once(forward, policy)(*self.constants, *own, jnp.int32(index), x)
        names = ["block_input", *(name for name, _ in kept)]
        return y, [x, *values], [may_offload and name in policy.offloaded for name in names]

    def backward(
        self, own: Leaves, index: int, kept: Sequence[Array], policy: LayerPolicy, dy: Array
    ) -> tuple[list[Array], Array]:
        """Cotangents of the trained leaves and of x; `kept` as from forward."""

        def backward(dy: Array, values: Sequence[Array], *inputs: Array) -> tuple[list[Array], Array]:
            variables = [variable for _, variable in self._kept(policy)]
            known = self._known(inputs) | dict(zip(variables, values, strict=True))
            pullback = jax.tree.unflatten(self.pullback, _evaluate(self.equations, known, self.residuals))
            return pullback(dy)

        x, *values = kept
        inputs = (*self.constants, *own, jnp.int32(index), x)
        return self._once(backward, policy)(dy, values, *inputs)

    def as_leaves(self, gradient: Sequence[Array]) -> list[Array | None]:
        """A cotangent for each leaf, None where it is not trained; `gradient` as from the backward pass."""
        coming = iter(gradient)
        return [next(coming) if is_trained else None for is_trained in self.trained]

    def _once(self, function: Callable[..., Any], policy: LayerPolicy) -> Callable[..., Any]:
        """The function, or that of a layer before, of the same name, that keeps the same."""
        return self.functions.setdefault(
            (function.__name__, policy.saved | policy.offloaded), jax.jit(function)
        )

    def _known(self, inputs: Sequence[Array]) -> dict[Var, Any]:
        return dict(zip(self.inputs, inputs, strict=True))

    def _kept(self, policy: LayerPolicy) -> list[tuple[str, Var]]:
        """The activations that the policy keeps, without the block's input."""
        names = policy.saved | policy.offloaded
        return [(name, variable) for name, variable in self.named if name in names]


def _is_name(equation: Any) -> bool:
    """Whether all that an equation does is to give a name (jax.ad_checkpoint.checkpoint_name)."""
    return equation.primitive.name == "name"


def _needed(equations: Sequence[Any], known: Container[Var], wanted: Iterable[Any]) -> list[Any]:
    """The equations that make the wanted variables from known ones, the last first."""
    needed: set[Var] = set()
    steps = []

    def need(atoms: Iterable[Any]) -> None:
        needed.update(atom for atom in atoms if not isinstance(atom, Literal) and atom not in known)

    need(wanted)
    for equation in reversed(equations):
        if not needed.isdisjoint(equation.outvars):
            steps.append(equation)
            need(equation.invars)
    return steps


def _evaluate(equations: Sequence[Any], known: Mapping[Var, Any], wanted: Sequence[Any]) -> list[Any]:
    """Values of variables, made from known ones by the equations that they need."""
    values = dict(known)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in reversed(_needed(equations, known, wanted)):
        parameters = equation.primitive.get_bind_params(equation.params)
        with equation.ctx.manager:
            results = equation.primitive.bind(*map(read, equation.invars), **parameters)
        results = results if equation.primitive.multiple_results else [results]
        for variable, result in zip(equation.outvars, results, strict=True):
            values.setdefault(variable, result)
    return [read(atom) for atom in wanted]
