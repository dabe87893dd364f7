"""A gated MLP with adapters as one op: its backward kernel, and the op beside those that it is made of."""

import dataclasses
import functools
import re
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lorajax_kernels import swiglu
from lorajax_kernels.device import Implementation
from lorajax_kernels.lora import (
    Adapter,
    gradient,
    lora_linears,
    lora_mlp,
    reference_lora_linears,
    swiglu_lora_linear,
)
from lorajax_kernels.lora import triton as host
from lorajax_kernels.lora.triton import MLP_TILING, JoinTiling, Tiling, triton_mlp_backward
from lorajax_kernels.lora.xla import xla_hidden_and_b, xla_mlp_backward
from lorajax_kernels.nf4 import quantize_nf4

IN, F, OUT = 24, 70, 17
KEYS = tuple(jax.random.split(jax.random.key(0), 3))
SMALL = Tiling(rows=16, columns=32, programs=4, num_warps=4, num_stages=2)


def normal(*shape, dtype=jnp.float32, seed=0):
    random = np.random.default_rng([seed, *shape])
    return jnp.asarray(random.standard_normal(shape).astype(dtype))


def layers(ranks=(4, 4, 4), bias=True, dropout=0.0, nf4=False):
    """(weights, adapters, biases) of gate, up and the layer after them."""
    shapes = ((F, IN), (F, IN), (OUT, F))
    weights = [normal(*shape, seed=i) / shape[1] ** 0.5 for i, shape in enumerate(shapes)]
    if nf4:
        weights = list(map(jax.jit(quantize_nf4), weights))
    adapters = [
        rank
        and Adapter(
            normal(rank, width, seed=i) / width**0.5, normal(out, rank, seed=i), 0.5 + i, dropout, KEYS[i]
        )
        for i, (rank, (out, width)) in enumerate(zip(ranks, shapes, strict=True))
    ]
    return weights, adapters, [normal(out) if bias else None for out, _ in shapes]


def composed(x, weights, adapters, *, biases, **options):
    gate, up = lora_linears(x, weights[:2], adapters[:2], biases=biases[:2], **options)
    return swiglu_lora_linear(gate, up, weights[2], adapters[2], bias=biases[2], **options)


def reference(x, weights, adapters, *, biases):
    gate, up = reference_lora_linears(x, weights[:2], adapters[:2], biases=biases[:2])
    return reference_lora_linears(swiglu(gate, up), weights[2:], adapters[2:], biases=biases[2:])[0]


def both_passes(function, x, weights, adapters, biases):
    """y, and the gradients of x and of each a, b and bias, of one compiled program."""

    @jax.jit
    def run(x, ab, biases, weights, dy):
        def forward(x, ab, biases):
            trained = [
                pair and dataclasses.replace(adapter, a=pair[0], b=pair[1])
                for adapter, pair in zip(adapters, ab, strict=True)
            ]
            return function(x, weights, trained, biases=biases)

        y, vjp = jax.vjp(forward, x, ab, biases)
        return y, *vjp(dy)

    ab = [adapter and (adapter.a, adapter.b) for adapter in adapters]
    found = run(x, ab, biases, weights, normal(*x.shape[:-1], OUT, dtype=x.dtype, seed=5))
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(found)}


def assert_close(found, expected, tolerance):
    """Norm of the difference relative to the norm, array by array."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves_with_path(expected), strict=True)
    for a, (path, b) in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype
        error = np.linalg.norm(np.float64(a) - np.float64(b)) / np.linalg.norm(np.float64(b))
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


@pytest.fixture
def implement(monkeypatch):
    """implement(kernels): make them what "auto" takes, for layers of any width."""

    def set_up(kernels):
        monkeypatch.setattr(gradient, "MIN_OUT", 10)
        known = (Implementation("only", lambda problem, device: None, kernels),)
        monkeypatch.setattr("lorajax_kernels.lora._IMPLEMENTATIONS", known)

    return set_up


@pytest.mark.parametrize(
    ("rows", "width", "rank", "programs", "dtype"),
    (
        (48, 64, 16, 1, jnp.float32),  # whole blocks, one program for all rows of a strip
        (50, 70, 3, 7, jnp.float32),  # parts of blocks, several strips and pieces
        (5, 20, 20, 132, jnp.float32),  # less than a block, more programs than there is work
        (40, 40, 40, 4, jnp.float32),  # a rank for which strips are narrower
        (50, 70, 8, 4, jnp.float16),
    ),
)
def test_triton_equals_xla(run_on_cpu, rows, width, rank, programs, dtype):
    run_on_cpu(host.__name__, "lorajax_kernels.lora.triton_kernels")
    dh, gate, up = (normal(rows, width, dtype=dtype, seed=seed) for seed in range(3))
    u, du = normal(rows, 2 * rank + 5, dtype=dtype), normal(rows, rank, dtype=dtype, seed=1)
    bs = [normal(width, rank, seed=seed) for seed in range(2)]
    own = {"columns": (slice(1, 1 + rank), slice(3 + rank, 3 + 2 * rank)), "scales": (0.5, 2.0)}
    arguments = (dh, gate, up, u, du, bs)
    expected = xla_mlp_backward(*arguments, **own)
    found = triton_mlp_backward(*arguments, **own, tiling=dataclasses.replace(SMALL, programs=programs))
    assert_close(found, expected, 1e-6 if dtype == jnp.float32 else 1e-3)


@pytest.mark.parametrize("arrangement", ("joined", "added"))
@pytest.mark.parametrize("kernels", ("xla", "triton"))
@pytest.mark.parametrize("options", ({}, {"ranks": (8, 8, 8), "bias": False, "nf4": True}))
def test_one_kernel_between_the_products_equals_the_reference(
    run_on_cpu, implement, monkeypatch, kernels, arrangement, options
):
    run_on_cpu(host.__name__, "lorajax_kernels.lora.triton_kernels")
    monkeypatch.setattr(host, "TILING", SMALL)
    monkeypatch.setattr(host, "MLP_TILING", SMALL)
    monkeypatch.setattr(host, "JOIN_TILING", JoinTiling(16, 16, 4, 2))
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return {"xla": xla_mlp_backward, "triton": triton_mlp_backward}[kernels](*arguments, **options)

    small = {"xla": gradient.Kernels(xla_hidden_and_b), "triton": gradient.TRITON_MLP}[kernels]
    implement(small._replace(mlp_backward=counted))
    one_op = functools.partial(lora_mlp, arrangement=arrangement, trainable_bias=True)
    arguments = (normal(2, 20, IN, seed=9), *layers(**options))
    assert_close(both_passes(one_op, *arguments), both_passes(reference, *arguments), 1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "options",
    (
        {"ranks": (4, 4, 3)},
        {"ranks": (4, None, 4)},
        {"ranks": (None, None, None)},
        {"ranks": (65, 65, 65)},
        {"dropout": 0.5},
        {"min_out": F + 1},
    ),
)
def test_what_the_kernel_does_not_serve_is_made_one_by_one(implement, monkeypatch, options):
    implement(gradient.XLA._replace(mlp_backward=lambda *_, **__: pytest.fail("called")))
    min_out = options.get("min_out", 10)
    monkeypatch.setattr(gradient, "MIN_OUT", min_out)
    layer_options = {name: value for name, value in options.items() if name != "min_out"}
    both_passes(lora_mlp, normal(8, IN), *layers(**layer_options))


@pytest.mark.parametrize("arrangement", ("joined", "added"))
@pytest.mark.parametrize(
    "options",
    ({}, {"dropout": 0.5, "bias": False}, {"ranks": (3, None, 4)}, {"ranks": (3, 4, None)}, {"nf4": True}),
)
def test_without_a_kernel_it_is_the_ops_it_is_made_of(options, arrangement):
    """Bit for bit."""
    own = {"arrangement": arrangement, "trainable_bias": True}
    arguments = (normal(2, 20, IN, seed=9), *layers(**options))
    found = both_passes(functools.partial(lora_mlp, **own), *arguments)
    expected = both_passes(functools.partial(composed, **own), *arguments)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("fused", (False, True))
def test_saving_what_has_a_name_leaves_nothing_to_recompute(implement, fused):
    implement(gradient.XLA._replace(mlp_backward=xla_mlp_backward if fused else None))
    x, (weights, adapters, _) = normal(48, IN), layers(dropout=0.0)

    def products(policy):
        @functools.partial(jax.checkpoint, policy=policy)
        def loss(x, adapters):
            return jnp.sum(lora_mlp(x, weights, adapters, arrangement="joined"))

        step = jax.jit(jax.value_and_grad(loss, (0, 1), allow_int=True))
        return step.lower(x, adapters).as_text().count("dot_general")

    policies = jax.checkpoint_policies
    least = products(policies.everything_saveable)
    assert products(policies.save_only_these_names("lora_hidden", "gate", "up")) == least
    assert products(policies.save_only_these_names("lora_hidden", "gate")) == least + 1
    # u and gate and up, and with h of them the other u.
    assert products(policies.nothing_saveable) == least + 4


def test_residuals_are_arguments_hidden_activations_gate_and_up():
    x, (weights, adapters, biases) = normal(48, IN), layers()
    _, vjp = jax.vjp(lambda x: lora_mlp(x, weights, adapters, biases=biases), x)
    rows = sorted(leaf.shape[1] for leaf in jax.tree.leaves(vjp) if leaf.shape[:1] == (48,))
    assert rows == [8, 8, IN, F, F]


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"x": jnp.zeros((2, IN), jnp.int32)}, "x must be .* got int32"),
        ({"adapters": [None]}, "adapters must be those of gate, up and the layer after them, got 1"),
        ({"biases": [None] * 2}, "biases must be those of gate, up and the layer after them, got 2"),
        ({1: jnp.zeros((F + 1, IN))}, r"weights\[1\] must be \(70, 24\) to fit weights\[0\], got \(71, 24\)"),
        ({2: jnp.zeros((OUT, IN))}, r"weights\[2\] must be \[out, in=70\] to fit gate and up, got shape"),
        ({"arrangement": "best"}, "unknown arrangement 'best'"),
    ),
)
def test_arguments_that_do_not_fit_are_named(change, message):
    weights, _, _ = layers()
    weights = [change.get(i, weight) for i, weight in enumerate(weights)]
    arguments = {"x": jnp.zeros((2, IN)), "weights": weights, "adapters": [None] * 3}
    arguments |= {name: value for name, value in change.items() if isinstance(name, str)}
    with pytest.raises(ValueError, match=f"lora_mlp: {message}"):
        lora_mlp(**arguments)


def compiled_for(compile_kernel, name, capability, rank, tiling):
    from lorajax_kernels.lora import triton_kernels

    kernel = getattr(triton_kernels, name)
    pointers = {argument: "*bf16" for argument in kernel.arg_names if argument.endswith("_ptr")}
    wide = ("gate_b_ptr", "up_b_ptr", "gate_db_ptr", "up_db_ptr", "da_ptr")
    block_r = max(rank, 16)
    strip, per_program, _ = tiling.cut(16384, 8192, block_r)
    constants = {
        "F": 8192,
        "RANK": rank,
        "U_WIDTH": 2 * rank,
        "GATE_START": 0,
        "UP_START": rank,
        "GATE_SCALE": 0.5,
        "UP_SCALE": 0.5,
        "BLOCKS_PER_PROGRAM": per_program,
        "BLOCK_ROWS": tiling.rows,
        "BLOCK_F": strip,
        "BLOCK_R": block_r,
    }
    types = pointers | dict.fromkeys(wide, "*fp32") | {"rows": "i32"}
    return compile_kernel(kernel, capability, types, constants, tiling.num_warps, tiling.num_stages)


def registers_and_stack(cubin):
    """Of a thread, the stack in bytes: it holds the registers that did not fit."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize(
    ("name", "rank"),
    (("mlp_backward_kernel", 8), ("mlp_backward_kernel", 32), ("mlp_backward_kernel_for_0_3", 32)),
)
def test_triton_compiles_without_a_gpu(compile_kernel, name, rank, capability):
    compiled = compiled_for(compile_kernel, name, capability, rank, MLP_TILING)
    ptx = compiled.asm["ptx"]
    assert "mma" in ptx and "v4.b32" in ptx  # 16 bytes a thread at a time
    assert compiled.metadata.shared <= {80: 163, 90: 227}[capability] * 1024
    assert registers_and_stack(compiled.asm["cubin"])[1] == 0
