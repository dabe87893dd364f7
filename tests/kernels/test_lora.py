"""Linear layers with adapters: what they compute, against the float32 formula, and what they leave out."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lorajax_kernels import rms_norm, swiglu
from lorajax_kernels.device import Device, Implementation
from lorajax_kernels.lora import (
    ARRANGEMENTS,
    Adapter,
    choose_lora,
    dropout,
    gradient,
    lora_implementations,
    lora_linear,
    lora_linears,
    reference_lora_linears,
    swiglu_lora_linear,
    triton_dropout,
)
from lorajax_kernels.lora import triton as host
from lorajax_kernels.lora.products import should_join
from lorajax_kernels.lora.triton import (
    COPIED,
    COPY_WARPS,
    MOST_COLUMNS,
    SUM_WARPS,
    SUMMED_ROWS,
    TILING,
    Columns,
    JoinTiling,
    Tiling,
    join_tiling,
    triton_hidden_and_b,
    triton_hidden_and_joined,
    triton_hidden_sums,
    triton_operands,
    triton_swiglu_backward,
)
from lorajax_kernels.lora.xla import xla_hidden_and_b
from lorajax_kernels.nf4 import NF4Weight, dequantize_nf4, quantize_nf4

IN = 33
# Three layers of their own sizes and ranks; the second has no adapter, the first and the last a bias.
OUTS, RANKS, BIASES = (17, 20, 9), (3, None, 4), (True, False, True)
KEYS = tuple(jax.random.split(jax.random.key(0), 3))
quantize = jax.jit(quantize_nf4)


def normal(*shape, dtype=jnp.float32, seed=0, scale=1.0):
    random = np.random.default_rng([seed, *shape])
    return jnp.asarray((scale * random.standard_normal(shape)).astype(dtype))


def layers(dtype=jnp.float32, outs=OUTS, ranks=RANKS, biases=BIASES, width=IN, dropout=0.0):
    """(weights, adapters, biases) with outputs of about 1; each adapter has a scale of its own."""
    small = width**-0.5
    weights = [normal(out, width, dtype=dtype, seed=i, scale=small) for i, out in enumerate(outs)]
    adapters = [
        rank
        and Adapter(
            normal(rank, width, seed=i, scale=small),
            normal(out, rank, seed=i),
            scale=0.5 + i,
            dropout=dropout,
            key=KEYS[i] if dropout else None,
        )
        for i, (out, rank) in enumerate(zip(outs, ranks, strict=True))
    ]
    return weights, adapters, [normal(out) if has else None for out, has in zip(outs, biases, strict=True)]


def trained(adapters, ab):
    """The adapters with these a and b."""
    return [
        adapter and dataclasses.replace(adapter, a=pair[0], b=pair[1])
        for adapter, pair in zip(adapters, ab, strict=True)
    ]


def outputs_and_gradients(function, x, weights, adapters, biases, dys):
    """By name: each output, dx, and the gradients of each a, b and bias, of one compiled program."""

    @jax.jit
    def run(x, ab, biases, weights, dys):
        def forward(x, ab, biases):
            return function(x, weights, trained(adapters, ab), biases=biases)

        ys, vjp = jax.vjp(forward, x, ab, biases)
        return ys, *vjp(dys)

    ab = [adapter and (adapter.a, adapter.b) for adapter in adapters]
    ys, dx, dab, dbiases = run(x, ab, biases, weights, dys)
    names = {"y": ys, "dx": dx, "dab": dab, "dbias": dbiases}
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(names)}


def cotangents(x, weights):
    return tuple(normal(*x.shape[:-1], weight.shape[0], dtype=x.dtype, seed=5) for weight in weights)


def assert_close(found, expected, tolerance):
    """Norm of the difference relative to the norm, array by array."""
    assert found.keys() == expected.keys()
    for name in found:
        a, b = np.asarray(found[name], np.float64), np.asarray(expected[name], np.float64)
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
        assert a.shape == b.shape and error <= tolerance, f"{name}: {error:.1e}"


def arranged(arrangement, **options):
    return functools.partial(lora_linears, arrangement=arrangement, **options)


def test_reference_is_the_formula():
    x = normal(2, 5, IN)
    weights, adapters, biases = layers()
    found = jax.jit(reference_lora_linears)(x, weights, adapters, biases=biases)
    x, (weights, biases) = np.asarray(x, np.float64), jax.tree.map(np.float64, (weights, biases))
    for y, weight, adapter, bias in zip(found, weights, adapters, biases, strict=True):
        expected = x @ weight.T + (0 if bias is None else bias)
        if adapter is not None:
            expected += adapter.scale * x @ np.float64(adapter.a).T @ np.float64(adapter.b).T
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arrangement", "options"),
    (
        ("joined", {}),
        ("added", {}),
        ("added", {"dropout": 0.4}),
        ("joined", {"ranks": (8, 5, 11), "biases": (False, False, False)}),
        ("auto", {"ranks": (None, None, None)}),
    ),
)
def test_equals_reference(arrangement, options):
    x = normal(2, 7, IN)
    weights, adapters, biases = layers(**options)
    arguments = x, weights, adapters, biases, cotangents(x, weights)
    found = outputs_and_gradients(arranged(arrangement, trainable_bias=True), *arguments)
    assert_close(found, outputs_and_gradients(reference_lora_linears, *arguments), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arrangement", "dtype", "weight_dtype"),
    (
        ("joined", jnp.bfloat16, jnp.bfloat16),
        ("added", jnp.bfloat16, jnp.float32),
        ("added", jnp.float16, jnp.float16),
    ),
)
def test_half_precision_is_close_to_float32(arrangement, dtype, weight_dtype):
    x = normal(64, IN, dtype=dtype)
    weights, adapters, biases = layers(weight_dtype)
    dys = cotangents(x, weights)
    found = outputs_and_gradients(
        arranged(arrangement, trainable_bias=True), x, weights, adapters, biases, dys
    )
    kinds = {name.split("'")[1]: leaf.dtype for name, leaf in found.items()}
    assert kinds == {"y": dtype, "dx": dtype, "dab": jnp.float32, "dbias": jnp.float32}
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), (x, weights, dys))
    expected = outputs_and_gradients(reference_lora_linears, *wide[:2], adapters, biases, wide[2])
    assert_close(found, expected, 1e-2)


def test_sums_in_float32():
    """1 + 2^-12 many times: sums that were float16 would lose it."""
    width = 4096
    x = jnp.ones((3, width), jnp.float16)
    a = jnp.full((2, width), 2.0**-12).at[:, 0].set(1.0)
    b = jnp.full((5, 2), 0.5)
    y = jax.jit(lora_linear)(x, jnp.zeros((5, width), jnp.float16), a, b)
    np.testing.assert_allclose(y, np.full((3, 5), 1 + 4095 / 4096), rtol=2e-3)


@pytest.mark.parametrize("shape", ((IN,), (2, 3, 4, IN), (0, IN)))
def test_one_layer_with_any_leading_axes(shape):
    x = normal(*shape)
    [weight], [adapter], [bias] = layers(outs=(17,), ranks=(3,), biases=(True,))
    run = jax.jit(lora_linear, static_argnames="scale")
    y = run(x, weight, adapter.a, adapter.b, scale=adapter.scale, bias=bias)
    assert y.shape == (*shape[:-1], 17)
    expected = np.asarray(x) @ np.asarray(weight + adapter.scale * adapter.b @ adapter.a).T + bias
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trainable_bias", (False, True))
def test_weights_are_constants_and_biases_unless_trained(trainable_bias):
    x = normal(6, IN)
    weights, adapters, biases = layers()

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(weights, biases):
        ys = lora_linears(x, weights, adapters, biases=biases, trainable_bias=trainable_bias)
        return sum(map(jnp.sum, ys))

    dweights, dbiases = gradients(weights, biases)
    assert not any(map(np.any, dweights))
    for dbias in filter(lambda dbias: dbias is not None, dbiases):
        np.testing.assert_array_equal(dbias, 6.0 * trainable_bias)


def kept(key, rate, shape):
    """What a layer's dropout keeps of x, seen through an adapter that is the identity."""
    width = shape[-1]
    weight, one = jnp.zeros((width, width)), jnp.eye(width)
    y = jax.jit(lora_linear, static_argnames="dropout")(
        jnp.ones(shape), weight, one, one, dropout=rate, key=key
    )
    y = np.asarray(y)
    mask = y != 0
    np.testing.assert_allclose(y[mask], 1 / (1 - rate), rtol=1e-5)
    return mask


def test_dropout_is_the_formula_with_each_layers_own_mask():
    """Forward and gradients, x' two uses apart: a mask that differed between the passes would show."""
    rate, x = 0.4, normal(3, 7, IN)
    weights, adapters, biases = layers(dropout=rate, ranks=(3, 2, 4))
    masks = [kept(adapter.key, rate, x.shape) for adapter in adapters]
    assert all((masks[i] != masks[j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))

    def formula(x, weights, adapters, *, biases):
        return tuple(
            jnp.einsum("bti,oi->bto", x, weight)
            + (0 if bias is None else bias)
            + adapter.scale * (mask / (1 - rate) * x @ adapter.a.T) @ adapter.b.T
            for weight, adapter, bias, mask in zip(weights, adapters, biases, masks, strict=True)
        )

    arguments = x, weights, adapters, biases, cotangents(x, weights)
    found = outputs_and_gradients(arranged("auto", trainable_bias=True), *arguments)
    assert_close(found, outputs_and_gradients(formula, *arguments), 1e-5)


@pytest.mark.parametrize("rate", (0.05, 0.5))
def test_masks_are_as_good_as_random(rate):
    """Shares of what is kept, and of what two masks keep both, are those of independent draws."""
    shape = 256, 384

    def mask(key):
        return np.asarray(dropout.kept(dropout.seed_of(adapter_of(key, rate)), shape))

    keys = [*map(jax.random.key, range(8)), *jax.random.split(jax.random.key(0), 8)]
    keys.append(jax.random.key(8, impl="rbg"))
    masks = [mask(key) for key in keys]
    np.testing.assert_array_equal(mask(keys[3]), masks[3])
    shifted = [np.roll(masks[0], shift, axis) for shift in (1, 2, 4, 64) for axis in (0, 1)]
    for first, others in ((masks[0], [*masks[1:], *shifted]), (masks[9], masks[10:])):
        for other in others:
            both, deviation = (1 - rate) ** 2, (rate * (1 - rate) / np.sqrt(first.size))
            covariance = np.mean(first & other) - first.mean() * other.mean()
            assert abs(covariance) < 5 * deviation
            assert np.mean(first & other) == pytest.approx(both, abs=0.02)
    for each in masks:
        of_rows, of_columns = (each.mean(axis) - (1 - rate) for axis in (1, 0))
        for found, count in ((each.mean() - (1 - rate), each.size), (of_rows, 384), (of_columns, 256)):
            assert np.all(np.abs(found) < 5.5 * np.sqrt(rate * (1 - rate) / count))
        for axis in (0, 1):  # and no more uneven than that
            sizes = each.mean(1 - axis).var() * shape[1 - axis] / (rate * (1 - rate))
            assert sizes == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("rate", (0.05, 0.5))
@pytest.mark.parametrize("keys", ("of seeds", "split"))
def test_each_element_is_dropped_by_some_keys(keys, rate):
    """As often as it should be; keys of seeds have a first word of 0."""
    count = 4096
    if keys == "of seeds":
        some = jax.vmap(jax.random.key)(jnp.arange(count))
    else:
        some = jax.random.split(jax.random.key(0), count)
    shares = jax.vmap(lambda key: dropout.kept(dropout.seed_of(adapter_of(key, rate)), (4, 6)))(some).mean(0)
    assert np.all(np.abs(shares - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / count))


def adapter_of(key, rate):
    return Adapter(jnp.zeros((1, 1)), jnp.zeros((1, 1)), 1.0, rate, key)


def test_a_mask_is_few_operations():
    """JAX' own random numbers are 131 for a GPU, and through XLA a layer has some twenty masks to compile."""

    def mask(key):
        return dropout.kept(dropout.seed_of(adapter_of(key, 0.1)), (64, 64))

    text = jax.jit(mask).trace(jax.random.key(0)).lower(lowering_platforms=("cuda",)).as_text()
    arithmetic = re.findall(r"stablehlo\.(?:add|multiply|xor|or|shift_\w+|compare)\b", text)
    assert len(arithmetic) <= 26


def test_all_is_kept_without_a_key():
    assert np.all(dropout.kept(dropout.seed_of(adapter_of(None, 0.5)), (64, 64)))


def test_dropout_of_nearly_all_does_not_overflow_in_float16():
    """x times what makes up for the rest does, as it lies in memory; so does what flows back."""
    x, weight = 100 * normal(64, 512, dtype=jnp.float16), jnp.zeros((8, 512), jnp.float16)
    adapter = Adapter(1e-5 * normal(4, 512, seed=1), normal(8, 4, seed=2), 1.0, 0.999, KEYS[0])
    assert float(jnp.abs(x).max()) / (1 - adapter.dropout) > float(jnp.finfo(jnp.float16).max)
    dy = 40 * normal(64, 8, dtype=jnp.float16, seed=3)

    def results(function):
        """Op by op, each result rounded."""
        (y,), vjp = jax.vjp(lambda x, adapter: function(x, [weight], [adapter]), x, adapter)
        dx, dadapter = vjp((dy,))
        return {"y": y, "dx": dx, "da": dadapter.a, "db": dadapter.b}

    assert_close(results(lora_linears), results(reference_lora_linears), 2e-2)


@pytest.mark.parametrize("first", (0, 7, 2**31 - 5))
def test_dropout_goes_on_from_a_first_row(first):
    whole = Adapter(jnp.zeros((1, 1)), jnp.zeros((1, 1)), 1.0, 0.4, KEYS[0])
    part = dataclasses.replace(whole, first_row=jnp.int32(first))
    start, step, last = (int(word) for word in dropout.seed_of(whole))
    assert dropout.seed_of(part).tolist() == [(start + first * step) % 2**32, step, last]
    if first < 100:
        seen = dropout.kept(dropout.seed_of(whole), (first + 20, 30))[first:]
        np.testing.assert_array_equal(dropout.kept(dropout.seed_of(part), (20, 30)), seen)


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    mask = kept(KEYS[0], 0.25, (2000, 8))
    assert mask.mean() == pytest.approx(0.75, abs=0.02)
    x = normal(5, IN)
    weights, adapters, _ = layers(dropout=0.25)
    off = [adapter and dataclasses.replace(adapter, key=None) for adapter in adapters]
    never = [adapter and dataclasses.replace(adapter, dropout=0.0) for adapter in adapters]
    run = jax.jit(lora_linears)
    for a, b in zip(run(x, weights, off), run(x, weights, never), strict=True):
        np.testing.assert_array_equal(a, b)


def gradient_of_all(function, outer):
    """A function of (x, adapters, weights): the gradients of sum(outer(y)) in the first two."""

    def loss(x, adapters, weights):
        return sum(jnp.sum(outer(y)) for y in function(x, weights, adapters))

    return jax.grad(loss, (0, 1), allow_int=True)


def dots(function, *arguments):
    """Output shapes of the products that are left of a function once it is compiled."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return [tuple(map(int, shape.split(","))) for shape in re.findall(r"= \w+\[([\d,]*)\]\S* dot\(", text)]


@pytest.mark.parametrize("arrangement", ("joined", "added"))
def test_no_product_has_the_shape_of_a_weight(arrangement):
    x, (weights, adapters, _) = normal(48, IN), layers()
    arguments = x, adapters, weights
    forbidden = {shape for weight in weights for shape in (weight.shape, weight.shape[::-1])}
    ours = dots(gradient_of_all(arranged(arrangement), jnp.sin), *arguments)
    assert len(ours) >= 10 and not forbidden & set(ours)

    def with_weights(x, adapters, weights):
        def loss(weights):
            return sum(map(jnp.sum, map(jnp.square, reference_lora_linears(x, weights, adapters))))

        return jax.grad(loss)(weights)

    assert forbidden & set(dots(with_weights, *arguments))  # the measure can see them


# u; y of each layer, twice where its parts are added; du and dB of each adapter; dA; dx, in as many parts.
@pytest.mark.parametrize(
    ("arrangement", "dropout", "expected"),
    (
        ("joined", 0.0, 1 + 3 + 2 + 2 + 1 + 1),
        ("added", 0.0, 1 + 3 + 2 + 2 + 2 + 1 + 4),
        ("joined", 0.5, 2 + 3 + 2 + 2 + 2 + 1 + 2),
        ("added", 0.5, 2 + 3 + 2 + 2 + 2 + 2 + 3 + 2),
    ),
)
def test_number_of_products(arrangement, dropout, expected):
    x, (weights, adapters, _) = normal(48, IN), layers(dropout=dropout)
    gradient = gradient_of_all(arranged(arrangement), jnp.sin)
    text = str(jax.make_jaxpr(gradient)(x, adapters, weights))
    assert text.count("dot_general[") == expected


def test_auto_joins_where_that_moves_less():
    """Narrow x, wide outputs: the forward pass joins, the backward pass does not; the other way round too."""
    for width, outs, expected in (
        (16, (64, 64), 1 + 2 + 2 + 2 + 1 + 3),
        (128, (16, 16), 1 + 4 + 2 + 2 + 1 + 1),
    ):
        x, (weights, adapters, _) = (
            normal(256, width),
            layers(outs=outs, ranks=(4, 4), biases=(False, False), width=width),
        )
        gradient = gradient_of_all(lora_linears, jnp.sin)
        text = str(jax.make_jaxpr(gradient)(x, adapters, weights))
        assert text.count("dot_general[") == expected


@pytest.mark.parametrize(
    ("rows", "k", "out", "terms", "expected"),
    (
        (16384, 2048, 16384, 2, True),  # gate and up of Llama-3.2-1B, forward
        (16384, 16384, 2048, 3, False),  # backward
        (16384, 8192, 2048, 2, False),  # down, forward
        (16384, 2048, 8192, 2, True),  # backward
        (16384, 3072, 2048, 4, True),  # query, key and value, backward
        (8, 2048, 16384, 2, False),  # decoding: a copy of the weights would be most of the work
    ),
)
def test_rule_of_auto(rows, k, out, terms, expected):
    sizes = {"terms": terms, "rows": rows, "k": k, "out": out}
    assert should_join("auto", **sizes) is expected
    assert should_join("joined", **sizes) and not should_join("added", **sizes)


def test_residuals_are_arguments_and_the_hidden_activations():
    x = normal(4, 12, IN, dtype=jnp.bfloat16)
    weights, adapters, _ = layers(jnp.bfloat16, dropout=0.5)
    weights[2] = quantize(weights[2])

    def residuals(x, weights, adapters):
        _, vjp = jax.vjp(lambda x, adapters: lora_linears(x, weights, adapters), x, adapters)
        return jax.tree.leaves(vjp)

    leaves = jax.eval_shape(residuals, x, weights, adapters)
    known = {leaf.shape for leaf in jax.tree.leaves((weights, adapters))}
    others = sorted((leaf.shape, leaf.dtype) for leaf in leaves if leaf.shape not in known)
    assert others == [((48, 8), jnp.bfloat16), ((48, IN), jnp.bfloat16)]  # ranks 3 + 4, filled up; x


def test_saving_the_hidden_activations_leaves_only_outputs_to_recompute():
    x, (weights, adapters, _) = normal(48, IN), layers()

    def products(policy, outer):
        @functools.partial(jax.checkpoint, policy=policy)
        def loss(x, adapters, weights):
            ys = lora_linears(x, weights, adapters, arrangement="joined")
            return sum(jnp.sum(outer(y)) for y in ys)

        # What is lowered has lost what is not used.
        return (
            jax.jit(jax.value_and_grad(loss, (0, 1)))
            .lower(x, adapters, weights)
            .as_text()
            .count("dot_general")
        )

    policies = jax.checkpoint_policies
    named = policies.save_only_these_names("lora_hidden")
    for outer, outputs in ((jnp.sin, 3), (lambda y: y, 0)):  # the gradient of the sine needs them
        least = products(policies.everything_saveable, outer)
        assert products(named, outer) == least + outputs
        assert products(policies.nothing_saveable, outer) == least + outputs + 1  # and x a^T


def test_nf4_equals_its_dense_weight():
    x = normal(2, 5, IN, dtype=jnp.bfloat16)
    weights, adapters, biases = layers(jnp.bfloat16)
    quantised = [*weights[:2], quantize(weights[2])]
    equal = [*weights[:2], jax.jit(dequantize_nf4)(quantised[2])]
    dys = cotangents(x, weights)
    found = outputs_and_gradients(lora_linears, x, quantised, adapters, biases, dys)
    assert_close(found, outputs_and_gradients(lora_linears, x, equal, adapters, biases, dys), 1e-6)


@pytest.mark.parametrize("source", ("nf4", "dropout"))
def test_weights_and_masks_are_made_again_not_kept(source, monkeypatch):
    """A compiler that found the same computation in both passes would keep the result of the first."""
    x, (weights, adapters, _) = normal(48, IN), layers(dropout=0.5 * (source == "dropout"))
    weights = [*weights[:2], quantize(weights[2])] if source == "nf4" else weights

    def kept(seed, shape):
        return jnp.tanh(1.0 * seed[1] * jnp.arange(48 * IN).reshape(shape)) > 0.1

    monkeypatch.setattr(dropout, "kept", kept)  # the real one has no operation of its own
    operation = " gather(" if source == "nf4" else " tanh("

    def number(function):
        return jax.jit(function).lower(x, adapters, weights).compile().as_text().count(operation)

    once = number(lambda x, adapters, weights: lora_linears(x, weights, adapters))
    assert once > 0
    assert number(gradient_of_all(lora_linears, jnp.sin)) == 2 * once


@pytest.mark.parametrize("source", (None, "nf4", "cast", "dropout"))
def test_nothing_is_made_before_it_is_needed(source):
    """What keeps a compiler from it is a barrier in each pass, where there is something to make.

    One more is for dA, which is to be made with dx.
    """
    x, (weights, adapters, _) = normal(48, IN), layers(dropout=0.5 * (source == "dropout"))
    if source in ("nf4", "cast"):
        weights[2] = quantize(weights[2]) if source == "nf4" else weights[2].astype(jnp.bfloat16)
    gradient = jax.make_jaxpr(gradient_of_all(lora_linears, jnp.sin))(x, adapters, weights)
    assert str(gradient).count("optimization_barrier") == (1 if source is None else 3)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"x": jnp.zeros((2, IN), jnp.int32)}, r"x must be \[\.\.\., in\] in float32, .* got int32 of shape"),
        (
            {"x": jnp.zeros((2, IN + 1))},
            r"weights\[0\] must be \[out, in=34\] to fit x, got shape \(17, 33\)",
        ),
        ({"adapters": [None]}, "adapters must be one for each of the 3 weights, got 1"),
        ({"adapters": None}, "adapters must be a sequence, got NoneType"),
        ({"weights": None}, "weights must be a sequence, got NoneType"),
        ({"weights": iter(())}, "weights must be a sequence, got tuple_iterator"),
        (
            {
                "weights": [NF4Weight(jnp.zeros(8, jnp.uint8), jnp.zeros(1), (1, IN), jnp.dtype("float32"))]
                * 3
            },
            r"weights\[0\]'s packed must be uint8 \(17,\) for a weight of shape \(1, 33\), got uint8 \(8,\)",
        ),
        ({"adapters": [(1, 2), None, None]}, r"adapters\[0\] must be an Adapter or None, got tuple"),
        ({"biases": [[1.0], None, None]}, r"biases\[0\] must be an array, got list"),
        ({"adapter": {"first_row": 3}}, r"adapters\[0\]\.first_row must be an array, got int"),
        ({"adapter": {"first_row": jnp.ones(())}}, r"adapters\[0\]\.first_row must be integers, got float32"),
        ({"adapter": {"first_row": jnp.arange(2)}}, r"adapters\[0\]\.first_row must be a scalar, got shape"),
        (
            {"adapter": {"dropout": 0.5, "key": jnp.zeros(3, jnp.uint32)}},
            r"adapters\[0\]\.key must be one key of jax\.random, got uint32 of shape \(3,\)",
        ),
        ({"biases": [None]}, "biases must be one for each of the 3 weights, got 1"),
        ({"biases": [None, None, jnp.zeros(8)]}, r"biases\[2\] must be \[out=9\] to fit weights\[2\], got"),
        ({"weights": [], "adapters": []}, "weights must hold at least one"),
        ({"arrangement": "best"}, "unknown arrangement 'best'; known: auto, joined, added"),
        ({"adapter": {"a": jnp.zeros((3, IN + 1))}}, r"adapters\[0\]\.a must be \[R, in=33\] to fit x, got"),
        ({"adapter": {"b": jnp.zeros((17, 4))}}, r"adapters\[0\]\.b must be \[out=17, R=3\] to fit a, got"),
        ({"adapter": {"dropout": 1.0}}, r"adapters\[0\]\.dropout must be at least 0 and below 1, got 1.0"),
        ({"adapter": {"dropout": "a"}}, r"adapters\[0\]\.dropout must be a number, finite in .* got a"),
        (
            {"adapter": {"scale": float("nan")}},
            r"adapters\[0\]\.scale must be a number, .* got nan",
        ),
        ({"adapter": {"scale": None}}, r"adapters\[0\]\.scale must be a number, .* got None"),
        ({"adapter": {"a": None}}, r"adapters\[0\]\.a must be an array, got NoneType"),
        ({"adapter": {"dropout": 0.5, "key": 3}}, r"adapters\[0\]\.key must be an array, got int"),
        (
            {"adapter": {"dropout": 0.5, "key": jax.random.split(jax.random.key(0), 3)}},
            r"adapters\[0\]\.key must be one key of jax\.random, got key<fry> of shape \(3,\)",
        ),
        (
            {"adapter": {"vector": jnp.zeros(150), "a_start": 0, "b_start": 100}},
            r"adapters\[0\]\.vector has 150 elements, too few for a and b at a_start=0 and b_start=100",
        ),
        (
            {"adapter": {"vector": jnp.zeros(200, jnp.bfloat16)}},
            r"adapters\[0\]\.vector must be float32 \[N\], got bfl",
        ),
        ({"weights": [None] * 3}, r"weights\[0\] must be an array, got NoneType"),
        ({"x": jnp.zeros((2, 0))}, r"x must have features, got shape \(2, 0\)"),
        ({"norm": jnp.zeros(IN)}, r"norm must be \(weight, epsilon\), got "),
        ({"norm": (jnp.zeros(IN, jnp.int32), 1e-5)}, "norm must be floating point, got int32"),
        ({"norm": (jnp.zeros(IN), -1.0)}, "norm's epsilon must be at least 0, got -1.0"),
    ),
)
def test_arguments_that_do_not_fit_are_named(change, message):
    weights, adapters, _ = layers()
    arguments = {"x": jnp.zeros((2, IN)), "weights": weights, "adapters": adapters} | change
    if adapter := arguments.pop("adapter", None):
        arguments["adapters"] = [dataclasses.replace(adapters[0], **adapter), *adapters[1:]]
    with pytest.raises(ValueError, match=f"lora_linears: {message}"):
        lora_linears(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", (0.0, 0.4))
def test_a_norm_before_the_layers_is_that_of_x(dropout):
    """Values, gradients, and that what is normalised is no residual."""
    x, norm = normal(6, IN), (1 + normal(IN, scale=0.1), 1e-5)
    arguments = x, *layers(dropout=dropout), cotangents(x, layers()[0])

    def apart(x, *others, **options):
        return lora_linears(rms_norm(x, norm[0], epsilon=norm[1]), *others, **options)

    found = outputs_and_gradients(functools.partial(lora_linears, norm=norm), *arguments)
    assert_close(found, outputs_and_gradients(apart, *arguments), 1e-6)

    def gradient_of_norm(run):
        def loss(weight):
            return sum(jnp.sum(jnp.sin(y)) for y in run(weight))

        return {"norm": jax.grad(loss)(norm[0])}

    some = layers(dropout=dropout)[:2]
    together = gradient_of_norm(lambda weight: lora_linears(x, *some, norm=(weight, norm[1])))
    separate = gradient_of_norm(lambda weight: lora_linears(rms_norm(x, weight, epsilon=norm[1]), *some))
    assert_close(together, separate, 1e-6)
    weights, adapters, biases = layers()
    pullback = jax.vjp(lambda x: lora_linears(x, weights, adapters, biases=biases, norm=norm), x)[1]
    sized = [leaf for leaf in jax.tree.leaves(pullback) if getattr(leaf, "shape", None) == x.shape]
    assert sized and all(leaf is x or np.array_equal(leaf, x) for leaf in sized)


@pytest.mark.slow
def test_what_flows_back_through_a_norm_of_small_halves_does_not_overflow():
    """The inverse of their root mean square is large, and so is the gradient of x A^T."""
    x, norm = normal(40, IN, scale=1e-3), (1 + normal(IN, scale=0.1), 1e-6)
    weights, adapters, _ = layers()

    def gradient_of_a(dtype, scale):
        def loss(a):
            adapter = dataclasses.replace(adapters[0], a=a, scale=1.0)
            [y] = lora_linears(x.astype(dtype), weights[:1], [adapter], norm=norm)
            return jnp.sum(scale * y.astype(jnp.float32))

        return {"a": jax.grad(loss)(adapters[0].a) / scale}

    assert_close(gradient_of_a(jnp.float16, 500.0), gradient_of_a(jnp.float32, 1.0), 2e-2)


def test_a_norm_has_to_fit_x():
    weights, adapters, _ = layers()
    with pytest.raises(ValueError, match=f"norm must be of \\[in={IN}\\], got shape \\(4,\\)"):
        lora_linears(normal(6, IN), weights, adapters, norm=(normal(4), 1e-5))


def test_arrangements_are_those_that_are_tested():
    assert set(ARRANGEMENTS) == {"auto", "joined", "added"}


@pytest.mark.parametrize(
    ("rows", "out", "rank", "programs"),
    (
        (48, 64, 16, 1),  # whole blocks, one program for all rows
        (50, 70, 3, 4),  # parts of blocks, several strips and pieces
        (5, 20, 20, 132),  # less than a block, more programs than there is work
        (100, 16, 8, 3),
    ),
)
def test_triton_gradients_equal_xla(run_on_cpu, rows, out, rank, programs):
    run_on_cpu(host.__name__, "lorajax_kernels.lora.triton_kernels")
    tiling = Tiling(rows=16, columns=32, programs=programs, num_warps=4, num_stages=2)
    dy, u, b = normal(rows, out), normal(rows, rank + 5, seed=1), normal(out, rank, seed=2)
    adapter, columns = Adapter(jnp.zeros((rank, IN)), b, scale=0.5), slice(3, 3 + rank)
    found = triton_hidden_and_b(dy, u, adapter, columns=columns, tiling=tiling)
    expected_hidden = jnp.einsum("ro,ok->rk", dy, 0.5 * b, precision="highest")
    np.testing.assert_allclose(found[0].sum(0), expected_hidden, rtol=1e-5, atol=1e-5)
    expected, expected_b = xla_hidden_and_b(dy, u, adapter, columns=columns)
    assert expected.shape == (1, rows, rank) and found[0].shape[1:] == (rows, rank)
    np.testing.assert_allclose(found[0].sum(0), expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].shape == expected_b.shape and found[1].dtype == expected_b.dtype
    np.testing.assert_allclose(found[1], expected_b, rtol=1e-5, atol=1e-5)
    vector = jnp.concatenate([jnp.full(16, jnp.nan), b.ravel(), jnp.full(3, jnp.nan)])
    part = dataclasses.replace(adapter, b=jnp.full_like(b, jnp.nan), vector=vector, b_start=16)
    elsewhere = triton_hidden_and_b(dy, u, part, columns=columns, tiling=tiling)
    jax.tree.map(np.testing.assert_array_equal, elsewhere, found)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float16))
@pytest.mark.parametrize("width", (16, 40, 64))
def test_triton_hidden_sums_are_those_of_the_strips(run_on_cpu, monkeypatch, width, dtype):
    run_on_cpu(host.__name__, "lorajax_kernels.lora.triton_kernels")
    monkeypatch.setattr(host, "SUMMED_ROWS", 16)
    sizes = ((4, 3), (1, 8), (7, 5)) if width > 16 else ((3, 16),)
    parts = [normal(strips, 37, rank, dtype=dtype, seed=rank) for strips, rank in sizes]
    inverse = 1 + jnp.abs(normal(37))
    sums = jnp.concatenate([part.astype(jnp.float32).sum(0).astype(dtype) for part in parts], axis=1)
    filled = jnp.pad(sums, ((0, 0), (0, width - sums.shape[1])))
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == jnp.float32 else {"rtol": 2**-10, "atol": 2**-10}
    for scale in (None, inverse):
        found, scaled = triton_hidden_sums(parts, width=width, inverse=scale)
        assert found.shape == filled.shape and found.dtype == dtype
        np.testing.assert_allclose(found.astype(jnp.float32), filled.astype(jnp.float32), **close)
    assert triton_hidden_sums(parts, width=width)[1] is None
    expected = found[:, : sums.shape[1]].astype(jnp.float32) * inverse[:, None]
    np.testing.assert_array_equal(scaled, expected.astype(dtype))


@pytest.mark.parametrize("count", (1, 2, 3))
def test_triton_operands_are_the_adapters_in_their_columns(run_on_cpu, monkeypatch, count):
    run_on_cpu(host.__name__, "lorajax_kernels.lora.triton_kernels")
    monkeypatch.setattr(host, "COPIED", 64)
    adapters = [
        Adapter(normal(rank, 33, seed=rank), normal(out, rank, seed=out), scale=0.5 * rank)
        for rank, out in ((3, 17), (5, 40), (8, 9))[:count]
    ]
    adapters = parts_of_a_vector(adapters)
    columns = [Columns(0, 3), Columns(3, 16), Columns(8, 16)][:count]
    parts = [
        dataclasses.replace(each, a=jnp.full_like(each.a, jnp.nan), b=jnp.full_like(each.b, jnp.nan))
        for each in adapters
    ]
    stacked, found = triton_operands(parts, width=24, columns=columns, dtype=jnp.float32)
    rows = jnp.concatenate([adapter.a for adapter in adapters])
    np.testing.assert_array_equal(stacked, jnp.pad(rows, ((0, 24 - len(rows)), (0, 0))))
    assert len(found) == count
    for s, adapter, own in zip(found, adapters, columns, strict=True):
        around = own.left, own.window - own.left - adapter.rank
        np.testing.assert_array_equal(s, adapter.scale * jnp.pad(adapter.b, ((0, 0), around)))
    alone, nothing = triton_operands(parts, width=24, columns=[], dtype=jnp.float32)
    np.testing.assert_array_equal(alone, stacked)
    assert nothing == []


@pytest.mark.parametrize(("rows", "width", "rank"), ((32, 64, 16), (37, 70, 8), (5, 20, 40)))
def test_triton_hidden_and_joined_are_the_formula(run_on_cpu, rows, width, rank):
    run_on_cpu(host.__name__, "lorajax_kernels.lora.triton_kernels")
    x, a = normal(rows, width), normal(rank, width, seed=1)
    tiling = JoinTiling(rows=16, columns=32, num_warps=4, num_stages=2)
    found = triton_hidden_and_joined(x, a, tiling=tiling)
    u = jnp.einsum("ri,ki->rk", x, a, precision="highest")
    for value, expected in zip(found, (u, jnp.concatenate([x, u], axis=1)), strict=True):
        assert value.shape == expected.shape and value.dtype == expected.dtype
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


def parts_of_a_vector(adapters):
    """The same, but that a and b are to be read of a vector alone, A after A; NaN lies around them."""
    present = [adapter for adapter in adapters if adapter is not None]
    pieces, starts, end = [jnp.full(16, jnp.nan)], {}, 16
    for half in ("a", "b"):
        for adapter in present:
            pieces.append(getattr(adapter, half).ravel())
            starts[id(adapter), half] = end
            end += pieces[-1].size
    vector = jnp.concatenate([*pieces, jnp.full(16, jnp.nan)])
    return [
        adapter
        and dataclasses.replace(
            adapter,
            vector=vector,
            a_start=starts[id(adapter), "a"],
            b_start=starts[id(adapter), "b"],
        )
        for adapter in adapters
    ]


@pytest.mark.parametrize("vectors", ("one", "two", "apart"))
def test_kernels_read_of_a_vector_if_it_is_that_of_all(run_on_cpu, monkeypatch, vectors):
    """What two hold each of its own adapter, one after the other, is none of one of them."""
    run_on_cpu(host.__name__, "lorajax_kernels.lora.triton_kernels")
    calls = []

    def operands(*arguments, **options):
        calls.append(1)
        return triton_operands(*arguments, **options)

    kernels = gradient.TRITON._replace(operands=operands)
    monkeypatch.setattr(
        "lorajax_kernels.lora._IMPLEMENTATIONS",
        (Implementation("triton", lambda problem, device: None, kernels),),
    )
    x, weights = normal(8, IN), [normal(17, IN), normal(9, IN)]
    adapters = parts_of_a_vector(
        [Adapter(normal(3, IN), normal(17, 3)), Adapter(normal(4, IN), normal(9, 4))]
    )
    if vectors == "two":
        first, second = adapters
        assert first.vector is not None
        own = jnp.roll(first.vector, 1).at[:].set(jnp.nan)
        for name in ("a", "b"):
            part, start = getattr(second, name).ravel(), getattr(second, f"{name}_start")
            own = own.at[start : start + part.size].set(part)
        adapters[1] = dataclasses.replace(second, vector=own)
    if vectors == "apart":
        adapters = [dataclasses.replace(adapter, vector=None) for adapter in adapters]
    found = jax.jit(lambda x: lora_linears(x, weights, adapters, arrangement="added"))(x)
    expected = reference_lora_linears(x, weights, adapters)
    for y, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
    assert bool(calls) == (vectors == "one")


# Of three adapters with dropout two drop, at different rates.
@pytest.mark.parametrize("ranks", ((5,), (16, 3), (4, 8, 2)))
@pytest.mark.parametrize("rows, width, programs", ((1, 16, 1), (40, 50, 4), (33, 33, 100)))
def test_triton_dropout_is_the_formula(run_on_cpu, rows, width, programs, ranks):
    run_on_cpu(triton_dropout.__name__, "lorajax_kernels.lora.triton_dropout_kernels")
    tiling = Tiling(rows=16, columns=32, programs=programs, num_warps=4, num_stages=2)
    keys = jax.random.split(jax.random.key(1), 3)
    adapters = [
        Adapter(normal(rank, width, seed=rank), normal(4, rank), 0.5, rate, key)
        for rank, rate, key in zip(ranks, (0.3, 0.5, 0.0), keys, strict=False)
    ]
    all_ranks = sum(ranks)
    x, dx = normal(rows, width), normal(rows, width, seed=1)
    u_width = all_ranks + 5
    a = jnp.pad(jnp.concatenate([adapter.a for adapter in adapters]), ((0, 5), (0, 0)))
    du = normal(rows, u_width, seed=2)
    for (name, *given), more in (
        (("hidden", x, a), (u_width,)),
        (("gradients", x, du), ()),
        (("gradients", x, du[:, :all_ranks]), ()),
        (("added", dx, du, a), ()),
    ):
        found = getattr(triton_dropout.TRITON_DROPPED, name)(*given, adapters, *more, tiling=tiling)
        expected = getattr(dropout.XLA_DROPPED, name)(*given, adapters, *more)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
        jax.tree.map(close, found, expected)


@pytest.mark.parametrize(
    "normed, in_vector, dropout", ((False, False, 0), (True, True, 0), (False, True, 0.4), (True, False, 0.4))
)
@pytest.mark.parametrize("arrangement", ("joined", "added"))
def test_layers_through_triton_equal_the_reference(
    run_on_cpu, monkeypatch, arrangement, normed, in_vector, dropout
):
    run_on_cpu(host.__name__, "lorajax_kernels.lora.triton_kernels")
    run_on_cpu(triton_dropout.__name__, "lorajax_kernels.lora.triton_dropout_kernels")
    monkeypatch.setattr(gradient, "MIN_OUT", 10)  # the last layer is too narrow
    monkeypatch.setattr(host, "TILING", Tiling(16, 16, 3, 4, 2))
    monkeypatch.setattr(host, "join_tiling", lambda rank: JoinTiling(16, 16, 4, 2))
    monkeypatch.setattr(
        "lorajax_kernels.lora._IMPLEMENTATIONS",
        (Implementation("triton", lambda problem, device: None, gradient.TRITON),),
    )
    weights, adapters, biases = layers(dropout=dropout)
    if in_vector:
        adapters = parts_of_a_vector(adapters)
    x = normal(40, IN)
    arguments = x, weights, adapters, biases, cotangents(x, weights)
    norm = (1 + normal(IN, scale=0.1), 1e-5) if normed else None
    found = outputs_and_gradients(arranged(arrangement, trainable_bias=True, norm=norm), *arguments)

    def reference(x, *others, **options):
        x = x if norm is None else rms_norm(x, norm[0], epsilon=norm[1])
        return reference_lora_linears(x, *others, **options)

    assert_close(found, outputs_and_gradients(reference, *arguments), 1e-5)


@pytest.mark.parametrize("capability", (80, 86, 90))
@pytest.mark.parametrize("rank", (8, 32, 128))
def test_triton_compiles_without_a_gpu(compile_kernel, rank, capability):
    from lorajax_kernels.lora.triton_kernels import hidden_and_b_kernel

    pointers = {"dy_ptr": "*bf16", "u_ptr": "*bf16", "b_ptr": "*fp32"}
    block_r = max(rank, 16)
    compiled = compile_kernel(
        hidden_and_b_kernel,
        capability,
        pointers | {"rows": "i32", "hidden_ptr": "*bf16", "db_ptr": "*fp32"},
        {
            "OUT": 8192,
            "RANK": rank,
            "U_WIDTH": 3 * rank,
            "U_START": rank,
            "B_START": 2048 * rank,
            "SCALE": 0.5,
            "BLOCKS_PER_PROGRAM": 32,
            "BLOCK_ROWS": TILING.rows,
            "BLOCK_OUT": TILING.columns * 32 // max(rank, 32),
            "BLOCK_R": block_r,
        },
        TILING.num_warps,
        TILING.num_stages,
    )
    assert "mma" in compiled.asm["ptx"]


# Triton takes a size of 1 for a constant.
@pytest.mark.parametrize("ones", ((), ("rows", "rank_0", "strips_0")))
@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("scaled", (False, True))
def test_triton_hidden_sums_compiles_without_a_gpu(compile_kernel, scaled, capability, ones):
    from lorajax_kernels.lora.triton_kernels import hidden_sums_kernel

    parts, results = (
        dict.fromkeys(names, "*bf16") for names in (("p0_ptr", "p1_ptr", "p2_ptr"), ("all_ptr", "scaled_ptr"))
    )
    sizes = ["rows", *(f"{name}_{i}" for i in range(3) for name in ("strips", "rank")), "ranks", "width"]
    sizes = [name for name in sizes if name not in ones]
    compile_kernel(
        hidden_sums_kernel,
        capability,
        parts | {"inverse_ptr": "*fp32"} | dict.fromkeys(sizes, "i32") | results,
        {"SCALED": scaled, "BLOCK_ROWS": SUMMED_ROWS, "BLOCK_R": 32, "FILLED": 32} | dict.fromkeys(ones, 1),
        SUM_WARPS,
        1,
    )


# rank_2 is 0 where there are two adapters; Triton compiles that as any number, and 1 as a constant.
@pytest.mark.parametrize(
    "rank, capability, ones", ((32, 80, ()), (128, 86, ()), (32, 90, ("rows", "rank_0")), (128, 90, ()))
)
@pytest.mark.parametrize(
    "name",
    (
        "dropped_hidden_kernel",
        "dropped_gradients_kernel",
        "dropped_added_kernel",
        "dropped_added_kernel_for_0_3",
    ),
)
def test_triton_dropout_compiles_without_a_gpu(compile_kernel, name, rank, capability, ones):
    from lorajax_kernels.lora import triton_dropout_kernels

    tiling = triton_dropout.TILING
    pointers = {
        "dropped_hidden_kernel": ("x_ptr", "a_ptr", "seeds_ptr"),
        "dropped_gradients_kernel": ("x_ptr", "du_ptr", "seeds_ptr"),
        "dropped_added_kernel": ("dx_ptr", "du_ptr", "a_ptr", "seeds_ptr"),
        "dropped_added_kernel_for_0_3": ("dx_ptr", "du_ptr", "a_ptr", "seeds_ptr", "_out_ptr"),
    }[name]
    sizes = [size for size in ("rows", "rank_0", "rank_1", "rank_2", "width") if size not in ones]
    result = {
        "dropped_hidden_kernel": {"u_ptr": "*bf16"},
        "dropped_gradients_kernel": {"da_ptr": "*fp32"},
    }.get(name, {})
    own = {
        "dropped_hidden_kernel": {"ADAPTERS": 3, "FILLED": 32},
        "dropped_gradients_kernel": {"BLOCKS_PER_PROGRAM": 8},
        "dropped_added_kernel": {"ADAPTERS": 3},
        "dropped_added_kernel_for_0_3": {"ADAPTERS": 3},
    }[name]
    compiled = compile_kernel(
        getattr(triton_dropout_kernels, name),
        capability,
        dict.fromkeys(pointers, "*bf16") | {"seeds_ptr": "*u32"} | dict.fromkeys(sizes, "i32") | result,
        {"IN": 2048, "BLOCK_ROWS": tiling.rows, "BLOCK_IN": tiling.columns, "BLOCK_R": rank, **own}
        | dict.fromkeys(ones, 1),
        tiling.num_warps,
        tiling.num_stages,
    )
    assert "mma" in compiled.asm["ptx"]


@pytest.mark.parametrize("ones", ((), ("rows", "rank_0", "window_0", "left_1")))
@pytest.mark.parametrize("capability", (80, 90))
def test_triton_operands_compiles_without_a_gpu(compile_kernel, capability, ones):
    from lorajax_kernels.lora.triton_kernels import operands_kernel

    sizes = ["inner", "rows", "start", "width"]
    sizes += [f"{name}_{i}" for i in range(3) for name in ("out", "rank", "start", "left", "window")]
    sizes = [name for name in sizes if name not in ones]
    results = dict.fromkeys(("stacked_ptr", "s0_ptr", "s1_ptr", "s2_ptr"), "*bf16")
    compiled = compile_kernel(
        operands_kernel,
        capability,
        {"vector_ptr": "*fp32"} | dict.fromkeys(sizes, "i32") | results,
        {"SCALE_0": 0.5, "SCALE_1": 0.5, "SCALE_2": 0.5, "BLOCK": COPIED} | dict.fromkeys(ones, 1),
        COPY_WARPS,
        1,
    )
    assert compiled.metadata.shared == 0


@pytest.mark.parametrize("capability", (80, 86, 90))
@pytest.mark.parametrize("rank", (8, 64, 96, MOST_COLUMNS))
def test_triton_hidden_and_joined_compiles_without_a_gpu(compile_kernel, rank, capability):
    from lorajax_kernels.lora.triton_kernels import hidden_and_joined_kernel

    pointers, tiling = ("x_ptr", "a_ptr", "hidden_ptr", "joined_ptr"), join_tiling(rank)
    compiled = compile_kernel(
        hidden_and_joined_kernel,
        capability,
        dict.fromkeys(pointers, "*bf16") | {"rows": "i32"},
        {
            "IN": 2048,
            "RANK": rank,
            "BLOCK_ROWS": tiling.rows,
            "BLOCK_IN": tiling.columns,
            "BLOCK_R": max(16, 1 << (rank - 1).bit_length()),
        },
        tiling.num_warps,
        tiling.num_stages,
    )
    assert "mma" in compiled.asm["ptx"]


def gated(dtype=jnp.float32, dropout=0.0, bias=True, rank=3):
    """gate, up, and one layer: (weight, adapter, bias)."""
    weights, adapters, biases = layers(
        dtype, outs=(17,), ranks=(rank,), biases=(bias,), dropout=dropout, width=IN
    )
    gate, up = (normal(8, 5, IN, dtype=dtype, seed=seed) for seed in (1, 2))
    return gate, up, weights[0], adapters[0], biases[0]


def gated_gradients(function, gate, up, weight, adapter, bias):
    """Output, and gradients of gate, up, a, b and the bias, of one compiled program."""

    @jax.jit
    def run(gate, up, ab, bias, dy):
        def forward(gate, up, ab, bias):
            return function(gate, up, weight, trained([adapter], [ab])[0], bias)

        y, vjp = jax.vjp(forward, gate, up, ab, bias)
        return y, vjp(dy)

    dy = normal(*gate.shape[:-1], weight.shape[0], dtype=gate.dtype, seed=7)
    result = run(gate, up, adapter and (adapter.a, adapter.b), bias, dy)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(result)}


def composed(gate, up, weight, adapter, bias):
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return reference_lora_linears(jax.nn.silu(gate) * up, [weight], [adapter], biases=[bias])[0]


def one_op(gate, up, weight, adapter, bias, **options):
    return swiglu_lora_linear(gate, up, weight, adapter, bias=bias, trainable_bias=True, **options)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("options", ({}, {"dropout": 0.5}, {"bias": False}, {"rank": None}))
def test_layer_after_a_gate_equals_the_reference(options, arrangement):
    arguments = gated(**options)
    found = gated_gradients(functools.partial(one_op, arrangement=arrangement), *arguments)
    assert_close(found, gated_gradients(composed, *arguments), 1e-5)


def test_layer_after_a_gate_keeps_gate_and_up_and_not_their_product():
    gate, up, weight, adapter, bias = gated()
    arguments = (gate, up, adapter.a, adapter.b)
    _, vjp = jax.vjp(
        lambda gate, up, a, b: one_op(gate, up, weight, trained([adapter], [(a, b)])[0], bias), *arguments
    )
    large = [leaf for leaf in jax.tree.leaves(vjp) if leaf.size == gate.size]
    assert len(large) == 2


def test_layer_after_a_gate_with_nf4_equals_its_dense_weight():
    gate, up, _, adapter, bias = gated()
    weight = quantize(normal(17, IN, scale=0.2))
    found = gated_gradients(one_op, gate, up, weight, adapter, bias)
    dense = gated_gradients(one_op, gate, up, dequantize_nf4(weight), adapter, bias)
    assert_close(found, dense, 1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": jnp.zeros((8, 5))}, r"weight must be \[out, in=12\] to fit x, got shape \(8, 5\)"),
        ({"weight": jnp.zeros((8, 12), jnp.uint8)}, "weight must be floating point, got uint8"),
        ({"a": jnp.zeros((2, 5))}, r"a must be \[R, in=12\] to fit x, got shape \(2, 5\)"),
        ({"b": jnp.zeros((8, 3))}, r"b must be \[out=8, R=2\] to fit a, got shape \(8, 3\)"),
        ({"b": jnp.zeros((8, 2), int)}, "b must be floating point, got int32"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"bias": jnp.zeros(3)}, r"bias must be \[out=8\] to fit weight, got shape \(3,\)"),
    ],
)
def test_one_layer_names_its_own_arguments(change, message):
    arguments = {"weight": jnp.zeros((8, 12)), "a": jnp.zeros((2, 12)), "b": jnp.zeros((8, 2))} | change
    with pytest.raises(ValueError, match=f"^lora_linear: {message}"):
        lora_linear(jnp.zeros((4, 12)), **arguments)


def test_the_layer_after_a_gate_names_its_own_arguments():
    gate, a, b = jnp.zeros((4, 12)), jnp.zeros((2, 5)), jnp.zeros((8, 2))
    with pytest.raises(ValueError, match=r"^swiglu_lora_linear: up must be an array, got NoneType"):
        swiglu_lora_linear(gate, None, jnp.zeros((8, 12)), None)
    with pytest.raises(ValueError, match=r"^swiglu_lora_linear: adapter\.a must be \[R, in=12\] to fit gate"):
        swiglu_lora_linear(gate, gate, jnp.zeros((8, 12)), Adapter(a, b, 1.0))


def test_gate_and_up_must_fit():
    gate, up, weight, adapter, bias = gated()
    with pytest.raises(ValueError, match=r"swiglu_lora_linear: up must be float32 of shape \(8, 5, 33\)"):
        one_op(gate, up[:4], weight, adapter, bias)


@pytest.mark.parametrize("elements", (64, 2048))
def test_triton_swiglu_backward_equals_xla(run_on_cpu, monkeypatch, elements):
    run_on_cpu(host.__name__, "lorajax_kernels.lora.triton_kernels")
    monkeypatch.setattr(host, "ELEMENTS", elements)
    dh, gate, up = (normal(40, 33, seed=seed, scale=3.0) for seed in range(3))
    h, vjp = jax.vjp(swiglu, gate, up)
    for a, b in zip(triton_swiglu_backward(dh, gate, up), (*vjp(dh), h), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_layer_after_a_gate_through_triton_equals_the_reference(run_on_cpu, monkeypatch):
    run_on_cpu(host.__name__, "lorajax_kernels.lora.triton_kernels")
    monkeypatch.setattr(gradient, "MIN_OUT", 10)
    monkeypatch.setattr(host, "TILING", Tiling(16, 16, 3, 4, 2))
    monkeypatch.setattr(
        "lorajax_kernels.lora._IMPLEMENTATIONS",
        (Implementation("triton", lambda problem, device: None, gradient.TRITON),),
    )
    arguments = gated()
    assert_close(gated_gradients(one_op, *arguments), gated_gradients(composed, *arguments), 1e-5)


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("name", ("swiglu_backward_kernel", "swiglu_backward_kernel_for_0_3"))
def test_triton_swiglu_backward_compiles_without_a_gpu(compile_kernel, name, capability):
    from lorajax_kernels.lora import triton_kernels

    kernel = getattr(triton_kernels, name)
    pointers = {argument: "*bf16" for argument in kernel.arg_names if argument.endswith("_ptr")}
    constants = {"SIZE": 2**32, "BLOCK": host.ELEMENTS}
    compiled = compile_kernel(kernel, capability, pointers, constants, host.ELEMENT_WARPS, 1)
    assert "v4.b32" in compiled.asm["ptx"]  # 16 bytes a thread at a time


def test_triton_by_name_raises_where_it_has_no_kernel(monkeypatch):
    monkeypatch.setattr(
        "lorajax_kernels.lora._IMPLEMENTATIONS",
        (Implementation("triton", lambda problem, device: None, gradient.TRITON),),
    )
    x, weight = normal(8, IN), normal(1023, IN)
    four = [weight] * 4, [Adapter(normal(3, IN), normal(1023, 3))] * 4
    reason = "of more than 3 adapters its kernels take those of 1024 columns or more"
    with pytest.raises(ValueError, match=f"lora_linears implementation 'triton' cannot serve: {reason}"):
        lora_linears(x, *four, implementation="triton")
    assert len(lora_linears(x, *four)) == 4


@pytest.mark.parametrize(
    ("op", "call"),
    (
        ("lora_linear", lambda x, w, own, **options: lora_linear(x, w, own.a, own.b, **options)),
        ("lora_linears", lambda x, w, own, **options: lora_linears(x, [w], [own], **options)),
        ("swiglu_lora_linear", lambda x, w, own, **options: swiglu_lora_linear(x, x, w, own, **options)),
    ),
)
def test_an_implementation_that_does_not_exist_is_named_with_the_op(op, call):
    own = Adapter(normal(3, IN), normal(8, 3))
    with pytest.raises(ValueError, match=f"^unknown {op} implementation 'foo'; known: auto, mosaic"):
        call(normal(4, IN), normal(8, IN), own, implementation="foo")


def test_choice_follows_device_dtype_and_rank():
    hopper = Device("H200", (9, 0), 91900, no_mosaic="there is none")
    turing = Device("T4", (7, 5), no_triton="it is old")
    assert choose_lora(jnp.bfloat16, 32, device=hopper) == ("triton", {"mosaic": "there is none"})
    assert choose_lora(jnp.float32, 32, device=hopper).name == "xla"
    assert choose_lora(jnp.bfloat16, 256, device=hopper).name == "xla"
    refused = dict.fromkeys(("mosaic", "triton"), "it is old")
    assert choose_lora(jnp.float16, 32, device=turing) == ("xla", refused)
    assert lora_implementations() == ("mosaic", "triton", "xla")
    with pytest.raises(ValueError, match="'triton' cannot serve: it takes ranks up to 128, not 256"):
        choose_lora(jnp.bfloat16, 256, implementation="triton", device=hopper)
