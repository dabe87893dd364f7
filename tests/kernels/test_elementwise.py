"""Elementwise ops against their formulas in float64, and their gradients against differences of these."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lorajax_kernels import geglu, rms_norm, rope, swiglu

erf = np.vectorize(math.erf)


def rms_norm_64(x, weight, epsilon=1e-3):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def rope_64(x, angle):
    """By complex numbers: pair i is x_i + j x_(i + H/2)."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, :, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def swiglu_64(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def geglu_64(gate, up, approximate=True):
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + (np.tanh(inner) if approximate else erf(gate / np.sqrt(2)))) * up


def turned(x, angle):
    return rope(x, jnp.cos(angle), jnp.sin(angle))


# name: the op, its formula, and the shapes of its arguments; those after the first `trained` have no gradient
OPS = {
    "rms_norm": (functools.partial(rms_norm, epsilon=1e-3), rms_norm_64, ((3, 5, 8), (8,)), 2),
    "rope": (turned, rope_64, ((2, 5, 3, 8), (2, 5, 4)), 1),
    "swiglu": (swiglu, swiglu_64, ((3, 5, 8), (3, 5, 8)), 2),
    "geglu": (functools.partial(geglu, approximate=True), geglu_64, ((3, 8), (3, 8)), 2),
    "exact geglu": (
        functools.partial(geglu, approximate=False),
        functools.partial(geglu_64, approximate=False),
        ((3, 8), (3, 8)),
        2,
    ),
}


def arguments(shapes):
    random = np.random.default_rng(0)
    return [2 * random.standard_normal(shape) for shape in shapes]


@pytest.mark.parametrize("name", OPS)
def test_equals_the_formula(name):
    op, formula, shapes, _ = OPS[name]
    given = arguments(shapes)
    found = jax.jit(op)(*(jnp.asarray(x, jnp.float32) for x in given))
    np.testing.assert_allclose(found, formula(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_gradients_are_differences_of_the_formula(name):
    op, formula, shapes, trained = OPS[name]
    given = arguments(shapes)
    out = formula(*given)
    weights = np.random.default_rng(1).standard_normal(out.shape)
    floats = [jnp.asarray(x, jnp.float32) for x in given]
    gradient = jax.jit(jax.grad(lambda *x: jnp.sum(op(*x) * weights), argnums=tuple(range(trained))))
    for i, found in enumerate(gradient(*floats)):
        direction = np.random.default_rng(2).standard_normal(found.shape)
        ends = [[*given[:i], given[i] + step * direction, *given[i + 1 :]] for step in (-1e-5, 1e-5)]
        low, high = ((formula(*end) * weights).sum() for end in ends)
        assert (found * direction).sum() == pytest.approx((high - low) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize("name", OPS)
def test_half_precision_keeps_its_dtype(name, dtype):
    op, formula, shapes, _ = OPS[name]
    given = arguments(shapes)
    # Angles are float32 whatever x is.
    halves = [jnp.asarray(x, jnp.float32 if name == "rope" and i else dtype) for i, x in enumerate(given)]
    found = jax.jit(op)(*halves)
    assert found.dtype == dtype
    expected = formula(*(np.asarray(x, np.float64) for x in halves))
    assert np.linalg.norm(np.asarray(found, np.float64) - expected) <= 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    (
        ("rms_norm", ((), (8,)), r"rms_norm: x must be \[..., D\], got shape \(\)"),
        ("rms_norm", ((4, 8), (3, 4, 8)), r"rms_norm: weight must be \[D=8\] .* got shape \(3, 4, 8\)"),
        ("rms_norm", ((4, 8), (1,)), r"rms_norm: weight must be \[D=8\] .* got shape \(1,\)"),
        ("rms_norm", ((4, 8), (4, 1)), r"rms_norm: weight must be \[D=8\] .* got shape \(4, 1\)"),
        ("rms_norm", ((4, 8), ()), r"rms_norm: weight must be \[D=8\] .* got shape \(\)"),
        ("rope", ((6, 4, 8), (6, 4, 4)), r"rope: x must be \[B, T, N, H\] .* got shape \(6, 4, 8\)"),
        ("rope", ((2, 6, 4, 7), (2, 6, 3)), r"with an even H, got shape \(2, 6, 4, 7\)"),
        ("swiglu", ((4, 8), (8,)), r"swiglu: up must have the shape of gate, \(4, 8\), got \(8,\)"),
        ("swiglu", ((8,), (4, 8)), r"swiglu: up must have the shape of gate, \(8,\), got \(4, 8\)"),
        ("geglu", ((4, 8), (3, 4, 8)), r"geglu: up must have the shape of gate, \(4, 8\), got \(3, 4, 8\)"),
    ),
)
def test_shapes_that_do_not_fit_are_named(name, shapes, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(OPS[name][0], *map(jnp.zeros, shapes))


@pytest.mark.parametrize("shape", ((2, 6, 1), (1, 6, 4), (2, 5, 4), (6, 4), (2, 6, 4, 4)))
@pytest.mark.parametrize("name", ("cos", "sin"))
def test_rope_refuses_angles_that_do_not_fit(name, shape):
    angles = {"cos": jnp.zeros((2, 6, 4)), "sin": jnp.zeros((2, 6, 4))} | {name: jnp.zeros(shape)}
    message = f"rope: {name} must be [B=2, T=6, H/2=4] to fit x, got shape {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        rope(jnp.zeros((2, 6, 3, 8)), **angles)


@pytest.mark.parametrize("name", OPS)
def test_integers_are_refused(name):
    function, _, (first, second), _ = OPS[name]
    with pytest.raises(ValueError, match="(x|gate) must be floating point, got int32"):
        jax.eval_shape(function, jnp.zeros(first, jnp.int32), jnp.zeros(second))


@pytest.mark.parametrize("epsilon", (-1e-5, float("nan"), None))
def test_rms_norm_names_its_epsilon(epsilon):
    with pytest.raises(ValueError, match=f"rms_norm: epsilon must be .* got {epsilon}"):
        rms_norm(jnp.ones((4, 8)), jnp.ones(8), epsilon=epsilon)


def test_rms_norm_of_large_halves_does_not_overflow():
    x = jnp.full((1, 8), 6e4, jnp.float16)
    np.testing.assert_array_equal(rms_norm(x, jnp.ones(8, jnp.float16), epsilon=1e-6), 1)


@pytest.mark.parametrize("name", ("swiglu", "geglu", "exact geglu"))
def test_gates_of_large_halves_have_gradients(name):
    op, formula = OPS[name][:2]
    sizes = np.array([0, 1e-7, 1e-3, 1, 3, 9, 30, 41, 140, 300, 2e3, 3e4, 65504])
    gate = np.concatenate([-sizes[::-1], sizes])
    halves = jnp.asarray(gate, jnp.float16), jnp.ones(gate.shape, jnp.float16)
    out, vjp = jax.vjp(op, *halves)
    d_gate, d_up = vjp(jnp.ones_like(out))
    gate = np.asarray(halves[0], np.float64)
    with np.errstate(over="ignore"):  # of exp in swiglu's formula, which is 0 there
        expected = formula(gate, 1.0)
        slope = (formula(gate + 1e-4, 1.0) - formula(gate - 1e-4, 1.0)) / 2e-4
    for found, wanted in ((out, expected), (d_up, expected), (d_gate, slope)):
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2e-3, atol=1e-3)
