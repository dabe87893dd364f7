"""The layer loop: every policy gives the gradients of a plain loop, and keeps what it says."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal
from lorajax_kernels import nf4_linear, quantize_nf4

from lorajax.memory.layers import run_layers
from lorajax.memory.policy import EVERYTHING, LayerPolicy, Policy

LAYERS, BATCH, LENGTH, WIDTH, INNER = 5, 2, 3, 4, 6
FLOAT32 = jax.lax.Precision.HIGHEST


class Gated(nnx.Module):
    """x + (tanh(x W_gate) * (x W_up)) W_down, with a frozen W_up and names for its activations."""

    def __init__(self, index: int, *, scaled: bool):
        keys = jax.random.split(jax.random.key(index), 3)
        self.gate = nnx.Param(0.3 * jax.random.normal(keys[0], (WIDTH, INNER)))
        self.up = nnx.Variable(0.3 * jax.random.normal(keys[1], (WIDTH, INNER)))
        self.down = nnx.Param(0.3 * jax.random.normal(keys[2], (INNER, WIDTH)))
        self.scale = 0.5 if scaled else 1.0  # makes another kind of layer

    def __call__(self, x, closed_over):
        gate = checkpoint_name(jnp.matmul(x, self.gate[...], precision=FLOAT32), "gate")
        up = checkpoint_name(jnp.matmul(x * closed_over, self.up[...], precision=FLOAT32), "up")
        middle = checkpoint_name(jnp.tanh(gate) * up * self.scale, "block_middle")
        return x + jnp.matmul(middle, self.down[...], precision=FLOAT32)


def blocks():
    return [Gated(index, scaled=index == 2) for index in range(LAYERS)]


def split_arrays():
    x = jax.random.normal(jax.random.key(7), (BATCH, LENGTH, WIDTH))
    graph, trained, frozen = nnx.split(nnx.List(blocks()), nnx.Param, ...)
    return graph, trained, frozen, x


@pytest.fixture(scope="module")
def arrays():
    return split_arrays()


@pytest.fixture
def float64():
    """Programs that differ in what they keep round differently, and by how much depends on the CPU."""
    with jax.enable_x64(True):
        yield


def assert_equal(found, expected):
    """But for rounding in float64."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * float(jnp.abs(b).max()))


def program(graph, checkpointing):
    """(trained, frozen, x) -> gradients of the trained leaves and of x."""

    def loss(trained, frozen, x):
        factor = 1 + jnp.mean(jax.tree.leaves(frozen)[0]) ** 2  # closed over by the layers

        def layer(block, index, x):
            return block(x, factor) * (1 + 0.1 * index)

        y = run_layers(layer, nnx.merge(graph, trained, frozen), x, checkpointing=checkpointing)
        return jnp.sum(jnp.sin(y))

    return jax.grad(loss, argnums=(0, 2))


NAMED = LayerPolicy.of({"block_input": "offload", "gate": "save", "block_middle": "offload"})
POLICIES = {
    "none": "none",
    "full": "full",
    "offload": "offload",
    "save gate": {"gate": "save"},
    "offload gate and up": {"gate": "offload", "up": "offload"},
    "a name that no layer has": {"query": "save", "block_input": "offload"},
    "all kinds": Policy((LayerPolicy.of({"up": "save"}), NAMED, EVERYTHING, NAMED, EVERYTHING)),
    "gradients": {"block_input": "offload", "gradient": "offload"},
    "copies over two layers": Policy((NAMED,) * LAYERS, copy_span=2),
    "copies over more layers than there are": Policy((NAMED,) * LAYERS, copy_span=9),
}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_gives_the_gradients_of_a_plain_loop(name, float64):
    graph, *values = split_arrays()
    expected = jax.jit(program(graph, None))(*values)
    assert_equal(jax.jit(program(graph, POLICIES[name]))(*values), expected)


@pytest.mark.parametrize("frozen", [0, 2, LAYERS - 1])
def test_a_layer_without_trained_weights_hinders_no_gradient(frozen, float64):
    class Frozen(Gated):
        def __init__(self, index):
            super().__init__(index, scaled=False)
            self.gate, self.down = nnx.Variable(self.gate[...]), nnx.Variable(self.down[...])

    layers = blocks()
    layers[frozen] = Frozen(frozen)
    graph, trained, others = nnx.split(nnx.List(layers), nnx.Param, ...)
    x = jax.random.normal(jax.random.key(7), (BATCH, LENGTH, WIDTH))
    expected, found = (
        jax.jit(program(graph, checkpointing))(trained, others, x)
        for checkpointing in (None, {"gradient": "offload", "gate": "offload"})
    )
    assert_equal(found, expected)
    lowered = jax.jit(program(graph, {"gradient": "offload"})).trace(trained, others, x)
    copies = transfers(lowered.lower(lowering_platforms=("cuda",)).as_text())
    away = LAYERS - 1 - (frozen > 0)
    assert {where: number for (where, _), number in copies.items()} == {"pinned_host": away, "device": away}


def test_weights_in_nf4_are_frozen_weights_like_others():
    """Bytes and scales, which have no gradient; what is trained has that of a plain loop."""

    class Quantised(nnx.Module):
        def __init__(self, index):
            keys = jax.random.split(jax.random.key(index), 3)
            wide, narrow = (64, 16), (16, 64)
            self.up = nnx.Variable(quantize_nf4(jax.random.normal(keys[0], wide)))
            self.down = nnx.Variable(quantize_nf4(jax.random.normal(keys[1], narrow), double_quant=True))
            self.scale = nnx.Param(jax.random.normal(keys[2], (64,)))

        def __call__(self, x):
            up = checkpoint_name(nf4_linear(x, self.up.get_value()), "up")
            return x + nf4_linear(jnp.tanh(up * self.scale[...]), self.down.get_value())

    graph, trained, frozen = nnx.split(nnx.List(map(Quantised, range(3))), nnx.Param, ...)

    def gradients(checkpointing):
        def loss(trained, frozen, x):
            model = nnx.merge(graph, trained, frozen)
            y = run_layers(lambda block, index, x: block(x), model, x, checkpointing=checkpointing)
            return jnp.sum(jnp.sin(y))

        x = jax.random.normal(jax.random.key(7), (1, 4, 16))
        return jax.jit(jax.grad(loss, argnums=(0, 2)))(trained, frozen, x)

    expected = gradients(None)
    for checkpointing in ("none", "full", "offload", {"up": "offload"}):
        for a, b in zip(*map(jax.tree.leaves, (gradients(checkpointing), expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", POLICIES)
def test_no_weight_is_copied_and_nothing_is_stacked(name, arrays):
    """As compiled, for a CPU."""
    graph, *values = arrays
    text = jax.jit(program(graph, POLICIES[name])).lower(*values).compile().as_text()
    made = Counter(re.findall(r"= \w+\[([\d,]*)\]\S* ([a-z-]+)\(", text))
    assert made  # it is read right: products, at the least
    assert not {(shape, "copy") for shape in (f"{WIDTH},{INNER}", f"{INNER},{WIDTH}")} & made.keys()
    stacking = {"dynamic-slice", "dynamic-update-slice", "concatenate", "gather", "scatter"}
    assert not stacking & {op for _, op in made}


def test_the_loop_can_be_scanned_over(float64):
    """As accumulation does it: what a layer closes over belongs to the loop's body."""
    graph, trained, frozen, x = split_arrays()
    xs = jnp.stack([x, 2 * x])

    def gradients(checkpointing):
        step = program(graph, checkpointing)
        return jax.jit(lambda: jax.lax.scan(lambda _, x: (None, step(trained, frozen, x)), None, xs)[1])()

    assert_equal(gradients("offload"), gradients(None))


def lowered(arrays, checkpointing):
    """The program for a GPU, as text, not compiled; what layers share is written out, as XLA begins with."""
    graph, *values = arrays
    with jax.disable_jit():
        traced = jax.jit(program(graph, checkpointing)).trace(*values)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def transfers(text):
    """(where to, shape) -> number."""
    found = re.findall(
        r'@annotate_device_placement.*_xla_buffer_placement = "(\w+)".*-> tensor<(\w+)xf(?:32|64)>', text
    )
    return Counter(found)


def test_the_last_layer_is_never_offloaded(arrays):
    wide, narrow = f"{BATCH}x{LENGTH}x{INNER}", f"{BATCH}x{LENGTH}x{WIDTH}"
    found = transfers(lowered(arrays, {"block_input": "offload", "gate": "offload", "up": "save"}))
    assert found == {
        (where, shape): LAYERS - 1 for where in ("pinned_host", "device") for shape in (wide, narrow)
    }
    assert transfers(lowered(arrays, {"gate": "save"})) == {}


@pytest.mark.parametrize("checkpointing, within", [({"block_input": "offload"}, 0), ({"gate": "offload"}, 1)])
def test_copies_to_the_host_start_as_soon_as_there_is_something_to_copy(checkpointing, within, arrays):
    """Before the layer whose input it is, or after the first of its products: it runs meanwhile."""
    graph, *values = arrays
    with jax.disable_jit():  # see lowered
        equations = jax.make_jaxpr(program(graph, checkpointing))(*values).eqns
    products = {}  # variable -> products that it waits for
    found = []
    for equation in equations:
        inputs = [products.get(each, set()) for each in equation.invars if not isinstance(each, Literal)]
        waits = set().union(*inputs) | ({id(equation)} if equation.primitive.name == "dot_general" else set())
        products |= dict.fromkeys(equation.outvars, waits)
        if equation.primitive.name == "device_put" and "host" in str(equation.params).lower():
            found.append(len(waits))
    assert found == [3 * layer + within for layer in range(LAYERS - 1)]


def test_gradients_wait_on_the_host_where_they_are_offloaded(arrays):
    """But for the first layer's, which is the last that is made."""
    gate_and_down = f"{WIDTH}x{INNER}", f"{INNER}x{WIDTH}"
    found = transfers(lowered(arrays, {"gradient": "offload"}))
    assert found == {
        (where, shape): LAYERS - 1 for where in ("pinned_host", "device") for shape in gate_and_down
    }


@pytest.mark.parametrize(
    "others, early",
    [
        ({}, 0),
        ({"block_input": "offload"}, 0),  # 96 bytes a layer, and a gradient is 192
        ({"gate": "offload"}, 0),  # 144
        ({"gate": "offload", "up": "offload"}, 1),  # 288
        ({"gate": "offload", "up": "offload", "block_input": "offload"}, 2),
    ],
)
def test_gradients_come_back_behind_the_first_layer_where_there_is_room(others, early, arrays):
    """Room is what nothing takes any more there: a layer's offloaded activations."""
    text = lowered(arrays, {"gradient": "offload", **others})
    gate = f"tensor<{WIDTH}x{INNER}xf32>"
    lines = text.splitlines()
    last_product = max(number for number, line in enumerate(lines) if "dot_general" in line)
    back = [number for number, line in enumerate(lines) if '_placement = "device"' in line and gate in line]
    assert len(back) == LAYERS - 1
    assert sum(number < last_product for number in back) == early


@pytest.mark.parametrize(
    "checkpointing, again",
    [
        ("full", 2),  # gate and up; nothing needs the product with W_down
        ({"gate": "save"}, 1),
        ({"gate": "offload", "up": "save"}, 0),
        (Policy((EVERYTHING,) * (LAYERS - 1) + (LayerPolicy.of({}),)), 2 / LAYERS),
    ],
)
def test_what_is_kept_is_not_computed_again(checkpointing, again, arrays):
    """Products of the backward pass: three for the inputs, two for the trained weights."""
    assert lowered(arrays, checkpointing).count("dot_general") == LAYERS * (3 + 3 + 2 + again)


def test_layers_of_one_kind_are_traced_once(arrays):
    graph, *values = arrays
    calls = []

    def loss(trained, frozen, x):
        def layer(block, index, x):
            calls.append(block.scale)
            return block(x, 1.0)

        return jnp.sum(run_layers(layer, nnx.merge(graph, trained, frozen), x, checkpointing="full"))

    program = jax.make_jaxpr(jax.grad(loss))(*values)
    assert sorted(calls) == [0.5, 1.0]
    passes = {
        id(equation.params["jaxpr"].jaxpr)
        for equation in program.eqns
        if equation.params.get("name") in ("forward", "backward")
    }
    assert len(passes) == 4


def test_without_gradients_layers_run_as_they_are(arrays):
    graph, trained, frozen, x = arrays
    model = nnx.merge(graph, trained, frozen)
    run = [
        run_layers(lambda block, index, x: block(x, 1.0), model, x, checkpointing=checkpointing)
        for checkpointing in (None, "offload")
    ]
    np.testing.assert_array_equal(*run)
