"""NF4 against bitsandbytes, against the NumPy definition, and against values recorded from bitsandbytes."""

import copy
import dataclasses
import functools
import hashlib
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from lorajax_kernels.device import Device, split_over
from lorajax_kernels.nf4 import (
    NF4Weight,
    choose_nf4,
    dequantize_nf4,
    nf4_implementations,
    nf4_linear,
    quantize_nf4,
    reference,
    triton,
    xla,
)

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
ARRAYS = ("packed", "absmax", "absmax2", "absmax_code", "offset")
# Whole blocks, more than one group of them, parts of blocks within rows, an odd number of elements.
WEIGHTS = (
    ((4, 96), jnp.bfloat16),
    ((104, 320), jnp.float32),
    ((5, 30), jnp.float16),
    ((3, 7), jnp.float32),
)


def weight(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 0.02, dtype)


def boundary_blocks():
    """float32 [n, 64]: elements that absmax scales to a threshold, give or take an ulp."""
    rows = []
    for absmax in np.random.default_rng(0).uniform(1, 2, 40).astype(np.float32):
        near = (reference.THRESHOLDS * absmax).astype(np.float32)
        row = [np.nextafter(near, np.float32(-9)), near, np.nextafter(near, np.float32(9)), [absmax] * 19]
        rows.append(np.concatenate(row))
    return np.array(rows, np.float32)


def special_blocks():
    """float32 [7, 64]: zeros, constants, thresholds and their neighbours, subnormal values."""
    signs = np.where(np.arange(64) % 2, 1, -1)
    thresholds = np.concatenate([reference.THRESHOLDS] * 4 + [np.ones(4)]).astype(np.float32)
    thresholds[15:30] = np.nextafter(thresholds[:15], np.float32(9))
    thresholds[30:45] = np.nextafter(thresholds[:15], np.float32(-9))
    constant = np.full(64, 0.375)
    rows = [0 * constant, 0.0 * signs, constant, -8 * constant, 7e-3 * signs, thresholds, 3e-39 * signs]
    return np.array(rows, np.float32)


dequantized = jax.jit(dequantize_nf4, static_argnames=("dtype", "implementation"))


@jax.jit
def dequantized_in_all_ways(q):
    """By both implementations to each dtype, of one compiled program."""
    return [
        dequantize_nf4(q, dtype, implementation=name) for dtype in DTYPES for name in ("xla", "reference")
    ]


def bits(x):
    """So that -0 differs from 0, and NaN equals itself."""
    x = np.asarray(x)
    return x.view(f"u{x.itemsize}")


def indices(packed):
    packed = np.asarray(packed).reshape(-1)
    return np.stack([packed >> 4, packed & 15], -1).reshape(-1)


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(bits(found), bits(expected))


def assert_same_arrays(q, expected):
    for name in ARRAYS:
        if name in expected:
            assert_same_bits(getattr(q, name), np.asarray(expected[name]))
        else:
            assert getattr(q, name) is None


def arrays_of(q):
    return {name: getattr(q, name) for name in ARRAYS if getattr(q, name) is not None}


# --- the definition


def assert_follows_definition(w):
    """quantize_nf4(w) with and without double quantisation; given its offset, which is checked first."""
    expected = reference.reference_quantize(np.asarray(w))
    assert_same_arrays(quantize_nf4(w), expected)
    q = quantize_nf4(w, double_quant=True)
    mean = np.float32(expected["absmax"].mean(dtype=np.float64))
    np.testing.assert_array_max_ulp(np.asarray(q.offset), mean, 1)
    nested = reference.reference_quantize_absmax(expected["absmax"], np.asarray(q.offset))
    assert_same_arrays(q, expected | nested | {"offset": q.offset})


@pytest.mark.parametrize(("shape", "dtype"), WEIGHTS)
def test_quantize_equals_reference(shape, dtype):
    w = weight(shape, dtype)
    assert_follows_definition(w)
    q = quantize_nf4(w, double_quant=True)
    assert (q.shape, q.dtype, q.double_quant) == (shape, dtype, True)


@pytest.mark.parametrize("blocks", (special_blocks, boundary_blocks))
def test_quantize_equals_reference_at_special_values(blocks):
    assert_follows_definition(blocks())


def test_elements_are_multiplied_by_the_reciprocal():
    w = boundary_blocks()
    divided = (w / np.abs(w).max(1, keepdims=True))[..., None] > reference.THRESHOLDS
    index = indices(quantize_nf4(w).packed).reshape(w.shape)
    assert 0 < (index != divided.sum(-1)).sum() < w.size / 10


def test_an_inexact_reciprocal_changes_no_bfloat16_weight():
    """All ratios of two bfloat16 numbers up to 1 that are not nearest to 0, with a reciprocal one ulp off."""
    absmax = (np.arange(128, 256) / 128).astype(np.float32)
    numerators = np.concatenate([absmax * np.float32(2.0**-e) for e in range(6)])
    numerators = np.concatenate([numerators, -numerators])
    exact = (np.float32(1) / absmax).view(np.int32)

    def index(ulps):
        scaled = numerators * (exact + np.int32(ulps)).view(np.float32)[:, None]
        return sum((scaled > threshold).astype(np.int32) for threshold in reference.THRESHOLDS)

    possible = np.abs(numerators) <= absmax[:, None]
    assert np.array_equal(index(-1)[possible], index(0)[possible])
    assert np.array_equal(index(1)[possible], index(0)[possible])


def searched(x):
    """The index of the kernels' binary search in DYNAMIC_CODE."""
    code = reference.DYNAMIC_CODE
    low, at, high = 0, 127, 255
    for step in (64, 32, 16, 8, 4, 2, 1):
        low, at, high = (at, at + step, high) if x > code[at] else (low, at - step, at)
    if x > code[at]:
        return high if x > (code[at] + code[high]) * np.float32(0.5) else at
    return low if x < (code[low] + code[at]) * np.float32(0.5) else at


def test_absmax_gets_the_index_that_the_kernels_find():
    code = reference.DYNAMIC_CODE
    halfway = (code[:-1] + code[1:]) / np.float32(2)
    ulp_off = [np.nextafter(halfway, np.float32(end)) for end in (-2, 2)]
    for x in (code, halfway, *ulp_off):
        x = np.append(x, np.float32(1))[-256:]  # one group, scaled by 1
        expected = [searched(value) for value in x]
        nested = reference.reference_quantize_absmax(x, np.float32(0))
        assert nested["absmax"].tolist() == expected
        assert (x[:, None] > xla.DYNAMIC_THRESHOLDS).sum(1).tolist() == expected


def test_values_are_the_published_ones():
    published = """
        -1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
        -0.18477343022823334 -0.09105003625154495 0 0.07958029955625534 0.16093020141124725
        0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1
    """
    np.testing.assert_array_equal(reference.CODE, np.array(published.split(), np.float32))
    halfway = (reference.CODE[:-1] + reference.CODE[1:]) / np.float32(2)
    np.testing.assert_array_max_ulp(reference.THRESHOLDS, halfway, 1)
    code = reference.DYNAMIC_CODE
    assert code.shape == (256,) and (np.diff(code) > 0).all()
    np.testing.assert_allclose(code[[0, 126, 127, 128, 255]], [-0.99296875, -5.5e-7, 0, 5.5e-7, 1], rtol=1e-6)
    # 42 of these would be other floats without the fused multiply-add.
    assert hashlib.sha256(code.tobytes()).hexdigest().startswith("e732639a65f497b4")


def test_bytes_are_those_recorded_from_bitsandbytes():
    w = (np.arange(128).reshape(2, 64) * 37 % 128 - 60) / 64 * [[1], [0.03125]]
    q = quantize_nf4(jnp.asarray(w, jnp.bfloat16))
    assert np.asarray(q.packed).tobytes().hex() == (
        "03ae27d04ae27d14bf28d15bf28e15cf39e16cf39e16c04ae27d04ae27d14bf2"
        "8d15bf38e15cf39e16cf39e16c04ae27d14ae27d15bf28d15bf38e16cf39e16c"
    )
    assert q.absmax.tolist() == [1.03125, 0.03271484375]
    assert dequantized(q)[0, :4].tolist() == [-1.03125, -0.408203125, 0.25390625, 0.74609375]


def test_a_block_of_zeros_is_zero():
    w = np.zeros((2, 64), np.float32)
    q = quantize_nf4(w)
    assert q.absmax.tolist() == [0, 0] and set(q.packed.tolist()) == {0}
    assert not np.any(dequantized(q))
    assert not np.any(dequantized(quantize_nf4(w, True)))


def test_a_nan_is_not_lost():
    w = np.ones((2, 64), np.float32)
    w[1, 3] = np.nan
    q = quantize_nf4(w)
    assert np.isnan(dequantized(q)).all(1).tolist() == [False, True]


@pytest.mark.parametrize("double_quant", (False, True))
@pytest.mark.parametrize(("shape", "dtype"), WEIGHTS)
def test_implementations_dequantize_alike(shape, dtype, double_quant):
    q = quantize_nf4(weight(shape, dtype), double_quant)
    index = indices(q.packed)[: math.prod(shape)]
    scale = np.asarray(q.absmax)
    if double_quant:
        product = np.asarray(q.absmax_code)[scale] * np.repeat(q.absmax2, 256)[: scale.size]
        scale = product + np.asarray(q.offset)
    expected = (reference.CODE[index] * np.repeat(scale, 64)[: index.size]).reshape(shape)
    for found in dequantized_in_all_ways(q):
        assert_same_bits(found, expected.astype(found.dtype))


def test_dequantized_is_close():
    w = weight((64, 256))
    for double_quant in (False, True):
        error = dequantized(quantize_nf4(w, double_quant)) - w
        assert 0.05 < jnp.linalg.norm(error) / jnp.linalg.norm(w) < 0.12


# --- bitsandbytes


@pytest.fixture(scope="module")
def bitsandbytes():
    pytest.importorskip("torch", reason="bitsandbytes needs torch")
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


def quantized_by(bitsandbytes, w, double_quant=False):
    """bitsandbytes' (packed, QuantState) of an array."""
    import torch

    w = torch.tensor(np.asarray(w, np.float32)).to(getattr(torch, np.asarray(w).dtype.name))
    return bitsandbytes.quantize_4bit(w, quant_type="nf4", compress_statistics=double_quant)


def dequantized_by(bitsandbytes, packed, state, dtype):
    """As one row: on a CPU, rows that end within a block get wrong absmax. And not compiled by torch."""
    import torch

    row = copy.copy(state)
    row.dtype, row.shape = getattr(torch, jnp.dtype(dtype).name), torch.Size((1, math.prod(state.shape)))
    with torch.compiler.set_stance("force_eager"):
        w = bitsandbytes.dequantize_4bit(packed, row)
    return w.float().numpy().astype(dtype).reshape(state.shape)


@pytest.mark.parametrize(("shape", "dtype"), WEIGHTS)
def test_equals_bitsandbytes(bitsandbytes, shape, dtype):
    w = weight(shape, dtype)
    packed, state = quantized_by(bitsandbytes, w)
    q = quantize_nf4(w)
    assert_same_arrays(q, {"packed": packed.numpy().reshape(-1), "absmax": state.absmax.numpy()})
    imported = NF4Weight.from_bitsandbytes(packed, state.as_dict())
    assert jax.tree.structure(imported) == jax.tree.structure(q)
    for found in dequantized_in_all_ways(imported):
        assert_same_bits(found, dequantized_by(bitsandbytes, packed, state, found.dtype))


@pytest.mark.parametrize(("shape", "dtype"), WEIGHTS)
def test_equals_bitsandbytes_with_double_quantisation(bitsandbytes, shape, dtype):
    w = weight(shape, dtype)
    packed, state = quantized_by(bitsandbytes, w, double_quant=True)
    q = quantize_nf4(w, double_quant=True)
    imported = NF4Weight.from_bitsandbytes(packed, state.as_dict(packed=True))
    assert jax.tree.structure(imported) == jax.tree.structure(q)
    assert_same_bits(q.packed, imported.packed)
    np.testing.assert_array_max_ulp(np.asarray(q.offset), imported.offset, 2)
    np.testing.assert_allclose(q.absmax2, imported.absmax2, rtol=1e-6, atol=2 * np.spacing(imported.offset))
    np.testing.assert_array_max_ulp(np.asarray(q.absmax_code), imported.absmax_code, 2)
    # On a CPU bitsandbytes finds the nearest value through a table of steps, and misses it near the middle.
    steps = np.abs(np.asarray(q.absmax, int) - imported.absmax)
    assert steps.max() <= 1 and steps.mean() < 0.01
    for found in dequantized_in_all_ways(imported):
        assert_same_bits(found, dequantized_by(bitsandbytes, packed, state, found.dtype))


def test_differs_from_bitsandbytes_on_a_cpu_where_that_leaves_its_kernels(bitsandbytes):
    w = special_blocks()[:6]
    packed, state = quantized_by(bitsandbytes, w)
    q = quantize_nf4(w)
    assert_same_bits(q.absmax, state.absmax.numpy())
    np.testing.assert_array_equal(
        dequantized(q)[:5], dequantized_by(bitsandbytes, packed, state, jnp.float32)[:5]
    )
    theirs, ours = indices(packed.numpy()).reshape(w.shape), indices(q.packed).reshape(w.shape)
    assert set(theirs[:2].flat) == {7} and set(ours[:2].flat) == {0}  # of zeros
    np.testing.assert_array_equal(ours[2:5], theirs[2:5])
    halfway = (reference.CODE[:-1] + reference.CODE[1:]) / np.float32(2)
    assert np.flatnonzero(halfway != reference.THRESHOLDS).tolist() == [0, 8, 12, 14]
    np.testing.assert_array_equal(theirs[5], (w[5, :, None] > halfway).sum(-1))
    np.testing.assert_array_equal(ours[5], (w[5, :, None] > reference.THRESHOLDS).sum(-1))


# --- importing


def state_of(q):
    """QuantState.as_dict() of a weight."""
    state = {
        "quant_type": "nf4",
        "absmax": q.absmax,
        "blocksize": 64,
        "quant_map": reference.CODE,
        "dtype": q.dtype.name,
        "shape": q.shape,
    }
    nested = {
        "nested_absmax": q.absmax2,
        "nested_blocksize": 256,
        "nested_quant_map": q.absmax_code,
        "nested_dtype": "float32",
        "nested_offset": None if q.offset is None else float(q.offset),
    }
    return state | (nested if q.double_quant else {})


def packed_state(state):
    """The same as a checkpoint has it."""
    arrays = {key: value for key, value in state.items() if hasattr(value, "ndim")}
    rest = json.dumps({key: value for key, value in state.items() if key not in arrays})
    return arrays | {"quant_state.bitsandbytes__nf4": np.frombuffer(rest.encode(), np.uint8)}


@pytest.mark.parametrize("double_quant", (False, True))
def test_imports_what_bitsandbytes_stores(double_quant):
    q = quantize_nf4(weight((6, 128), jnp.float16), double_quant)
    flat = np.asarray(q.packed)
    for state in (state_of(q), packed_state(state_of(q))):
        for packed in (flat, flat.reshape(-1, 1), flat.view(ml_dtypes.bfloat16).reshape(-1, 1)):
            imported = NF4Weight.from_bitsandbytes(packed, state)
            assert jax.tree.structure(imported) == jax.tree.structure(q)
            assert_same_arrays(imported, arrays_of(q))


def test_imports_torch_weights_of_any_storage():
    """bfloat16 is what bitsandbytes' FSDP runs store, in a Parameter."""
    torch = pytest.importorskip("torch")
    q = quantize_nf4(weight((6, 128)))
    packed = torch.from_numpy(np.array(q.packed))
    for storage in (torch.uint8, torch.float16, torch.bfloat16, torch.float32):
        stored = torch.nn.Parameter(
            packed.view(storage).reshape(-1, 1), requires_grad=storage.is_floating_point
        )
        np.testing.assert_array_equal(NF4Weight.from_bitsandbytes(stored, state_of(q)).packed, q.packed)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"dtype": "half-ish"}, "dtype must name a dtype, got 'half-ish'"),
        ({"quant_type": "fp4"}, "quant_type must be nf4, got fp4"),
        ({"blocksize": 128}, "blocksize must be 64, got 128"),
        ({"nested_blocksize": 128}, "nested_blocksize must be 256, got 128"),
        ({"nested_dtype": "float16"}, "nested_dtype must be float32, got float16"),
        ({"quant_map": reference.CODE[::-1]}, "quant_map does not hold the 16 values of NF4"),
        ({"shape": None}, r"must be \[out, in\], got shape \(\)"),
        ({"shape": (2, 3, 128)}, r"must be \[out, in\], got shape \(2, 3, 128\)"),
        (
            {"shape": (7, 128)},
            r"packed must be uint8 \(448,\) for a weight of shape \(7, 128\), got uint8 \(384,\)",
        ),
        ({"nested_quant_map": reference.CODE}, r"absmax_code must be float32 \(256,\)"),
    ),
)
def test_refuses_what_is_not_such_a_weight(change, message):
    q = quantize_nf4(weight((6, 128)), double_quant=True)
    for form in (dict, packed_state):
        with pytest.raises(ValueError, match=f"from_bitsandbytes: .*{message}"):
            NF4Weight.from_bitsandbytes(q.packed, form(state_of(q) | change))


# --- the pytree


@pytest.mark.parametrize("double_quant", (False, True))
def test_is_a_pytree(double_quant):
    q = quantize_nf4(weight((6, 128)), double_quant)
    leaves, tree = jax.tree.flatten(q)
    assert len(leaves) == (5 if double_quant else 2)
    again = jax.tree.unflatten(tree, leaves)
    assert (again.shape, again.dtype) == ((6, 128), jnp.float32)
    assert q.nbytes == 384 + (12 + 4 + 1024 + 4 if double_quant else 48)
    shapes = jax.eval_shape(functools.partial(quantize_nf4, double_quant=double_quant), jnp.zeros((6, 128)))
    assert jax.tree.structure(shapes) == tree and shapes.nbytes == q.nbytes
    jitted = jax.jit(quantize_nf4, static_argnums=1)(weight((6, 128)), double_quant)
    assert_same_arrays(jitted, arrays_of(q))


def test_scans_over_stacked_layers():
    layers = [quantize_nf4(weight((6, 64), seed=seed), True) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    _, found = jax.lax.scan(lambda carry, q: (carry, dequantize_nf4(q)), None, stacked)
    assert_same_bits(found, np.stack([dequantized(q) for q in layers]))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from lorajax_kernels.nf4 import dequantize_nf4, quantize_nf4

mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
w = np.random.default_rng(0).normal(size=(256, 128))
q = quantize_nf4(jnp.asarray(w, jnp.bfloat16), double_quant=True)
rows = {"packed", "absmax"}
shardings = jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(mesh, PartitionSpec("x") if path[0].name in rows else PartitionSpec()), q
)
placed = jax.device_put(q, shardings)
program = jax.jit(dequantize_nf4, donate_argnums=0).lower(placed).compile()
assert not any(word in program.as_text() for word in ("all-gather", "all-to-all", "collective-permute"))
w = program(placed)
assert w.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("x")), 2), w.sharding
assert (w == dequantize_nf4(q)).all()
"""


@pytest.mark.slow
def test_rows_are_dequantized_where_they_are():
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- errors and choices


def test_refuses_a_state_that_is_not_whole():
    q = quantize_nf4(weight((6, 128)), double_quant=True)
    for key in ("absmax", "shape", "dtype", "nested_quant_map", "nested_offset"):
        state = state_of(q)
        del state[key]
        with pytest.raises(ValueError, match=f"from_bitsandbytes: the state lacks {key}"):
            NF4Weight.from_bitsandbytes(q.packed, state)


def test_refuses_what_is_no_weight():
    for w, message in (
        (jnp.zeros(64), r"w must be \[out, in\], got shape \(64,\)"),
        (jnp.zeros((0, 64)), r"w must have no axis of length 0, got shape \(0, 64\)"),
        (jnp.zeros((2, 64), jnp.int8), "w must be float32, bfloat16 or float16, got int8"),
        (np.full((2, 64), 1e300), "w must be float32, bfloat16 or float16, got float64"),
        (None, "w must be an array, got NoneType"),
    ):
        with pytest.raises(ValueError, match=f"quantize_nf4: {message}"):
            quantize_nf4(w)
        with pytest.raises(ValueError, match=f"quantize_nf4: {message}"):
            quantize_nf4(w, double_quant=True)


@pytest.mark.parametrize("q", (np.zeros((6, 128), np.float32), [1.0]), ids=("array", "list"))
def test_refuses_what_is_not_in_nf4(q):
    message = f"q must be an NF4Weight, got {type(q).__name__}"
    for op in (dequantize_nf4, functools.partial(nf4_linear, jnp.zeros((2, 128)))):
        with pytest.raises(ValueError, match=message):
            op(q)


@pytest.mark.parametrize(
    ("double_quant", "change", "message"),
    (
        (False, {"packed": jnp.zeros(383, jnp.uint8)}, r"packed must be uint8 \(384,\) .*got uint8 \(383,\)"),
        (False, {"packed": jnp.zeros(384, jnp.int8)}, r"packed must be uint8 \(384,\) .*got int8 \(384,\)"),
        (False, {"absmax": jnp.zeros(12, jnp.uint8)}, r"absmax must be float32 \(12,\) .*got uint8"),
        (True, {"absmax": jnp.zeros(12)}, r"absmax must be uint8 \(12,\) .*got float32"),
        (True, {"absmax2": jnp.zeros(2)}, r"absmax2 must be float32 \(1,\) .*got float32 \(2,\)"),
        (True, {"absmax2": None}, r"absmax2 must be float32 \(1,\) .*got None"),
        (True, {"offset": jnp.zeros(1)}, r"offset must be float32 \(\) .*got float32 \(1,\)"),
        (False, {"shape": (768,)}, r"q must be of a weight \[out, in\], got one of shape \(768,\)"),
        (True, {"shape": (6, 127)}, r"packed must be uint8 \(381,\) for a weight of shape \(6, 127\)"),
    ),
)
def test_refuses_arrays_that_do_not_fit(double_quant, change, message):
    q = dataclasses.replace(quantize_nf4(weight((6, 128)), double_quant), **change)
    with pytest.raises(ValueError, match=f"dequantize_nf4: {message}"):
        dequantize_nf4(q)


def test_refuses_other_arguments():
    q = quantize_nf4(weight((6, 128)))
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got int32"):
        dequantize_nf4(q, jnp.int32)
    with pytest.raises(ValueError, match=r"x must be \[..., in=128\] to fit q, got shape \(2, 6\)"):
        nf4_linear(jnp.zeros((2, 6)), q)
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got half"):
        dequantize_nf4(q, "half-ish")
    with pytest.raises(ValueError, match="nf4_linear: x must be float32, bfloat16 or float16, got int32"):
        nf4_linear(jnp.zeros((2, 128), jnp.int32), q)
    with pytest.raises(ValueError, match="unknown nf4_linear implementation 'fast'"):
        nf4_linear(jnp.zeros((2, 128)), q, implementation="fast")
    with pytest.raises(ValueError, match="unknown dequantize_nf4 implementation 'fast'"):
        dequantize_nf4(q, implementation="fast")


def test_choice_of_implementation():
    whole, part = (jax.eval_shape(quantize_nf4, jnp.zeros(shape)) for shape in ((6, 128), (6, 127)))
    assert set(nf4_implementations()) == {"xla", "triton", "reference"}
    cpu, gpu = Device("a CPU", no_triton="it needs a GPU"), Device("a GPU", (8, 0))
    for q, device in ((whole, cpu), (part, cpu), (part, gpu)):
        assert choose_nf4(q, device=device).name == "xla"
    assert choose_nf4(whole, implementation="triton", device=gpu).name == "triton"
    assert choose_nf4(whole, device=gpu).name == "triton"
    with split_over(4):
        refused = {"triton": "XLA cannot split it over 4 devices"}
        assert choose_nf4(whole, device=gpu) == ("xla", refused)
    with pytest.raises(ValueError, match="'triton' cannot serve: it needs a GPU"):
        choose_nf4(whole, implementation="triton", device=cpu)
    with pytest.raises(ValueError, match=r"whole blocks of 64 elements, a weight of shape \(6, 127\)"):
        choose_nf4(part, implementation="triton", device=gpu)


# --- the Triton kernel


@pytest.mark.parametrize("double_quant", (False, True))
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float16))
def test_triton_equals_xla(run_on_cpu, double_quant, dtype):
    run_on_cpu("lorajax_kernels.nf4.triton", "lorajax_kernels.nf4.triton_kernels")
    for shape in ((1, 64), (104, 320)):  # one program, and several in three groups, the last of them not full
        q = quantize_nf4(weight(shape), double_quant)
        assert_same_bits(
            triton.triton_dequantize(q, jnp.dtype(dtype)), dequantized(q, dtype, implementation="xla")
        )


def test_triton_writes_nothing_beyond_the_weight(interpreted):
    kernels = interpreted("lorajax_kernels.nf4.triton_kernels")
    torch = pytest.importorskip("torch", reason="Triton's interpreter needs torch")
    q = quantize_nf4(weight((3, 64)))
    packed, absmax, code = (torch.tensor(np.asarray(array)) for array in (q.packed, q.absmax, reference.CODE))
    out = torch.full((4 * 64 * 8,), torch.nan)
    constants = {"TOTAL": 24, "NESTED": False, "WORDS": 16}
    kernels.dequantize_kernel[(2,)](packed, code, absmax, absmax, absmax, absmax, out, **constants)
    assert torch.isnan(out).tolist() == [False] * 192 + [True] * (len(out) - 192)


@pytest.mark.parametrize("double_quant", (False, True))
@pytest.mark.parametrize("capability", (80, 90))
def test_triton_compiles_to_wide_accesses(compile_kernel, capability, double_quant):
    from lorajax_kernels.nf4.triton_kernels import dequantize_kernel

    tiling = triton.TILINGS[2]
    types = dict.fromkeys(dequantize_kernel.arg_names[:6], "*fp32") | {
        "packed_ptr": "*u8",
        "out_ptr": "*bf16",
    }
    if double_quant:
        types["absmax_ptr"] = "*u8"
    constants = {"TOTAL": 7340040, "NESTED": double_quant, "WORDS": tiling.words}
    ptx = compile_kernel(dequantize_kernel, capability, types, constants, tiling.num_warps, 1).asm["ptx"]
    stores = [line for line in ptx.splitlines() if "st.global" in line]
    assert stores and all("st.global.v4.b32" in line for line in stores)
    assert "ld.global.v4.b32" in ptx
    assert "fma" not in ptx


# --- nf4_linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ((), (5,), (2, 3)))
def test_linear_equals_a_matmul_with_the_dequantized_weight(rows, dtype):
    q = quantize_nf4(weight((48, 64), jnp.bfloat16), double_quant=True)
    x, dy = weight((*rows, 64), dtype, seed=1), weight((*rows, 48), dtype, seed=2)
    precision = "highest" if dtype == jnp.float32 else None

    @jax.jit
    def both(x, dy):
        w = dequantize_nf4(q, dtype)
        plain = jax.vjp(lambda x: jnp.einsum("...i,oi->...o", x, w, precision=precision), x)
        ours = jax.vjp(lambda x: nf4_linear(x, q), x)
        return [(y, *vjp(dy)) for y, vjp in (ours, plain)]

    for found, expected in zip(*both(x, dy), strict=True):
        assert found.dtype == dtype and found.shape == expected.shape
        tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(
            *(np.asarray(a, np.float32) for a in (found, expected)), rtol=tolerance, atol=tolerance * 1e-3
        )


def test_linear_has_no_gradient_for_the_weight():
    q = quantize_nf4(weight((48, 64)), double_quant=True)
    _, dq = jax.jit(lambda x, q: jax.vjp(nf4_linear, x, q)[1](jnp.ones((2, 48))))(weight((2, 64)), q)
    assert dq.packed.dtype == dq.absmax.dtype == jax.dtypes.float0
    for name in ("absmax2", "absmax_code", "offset"):
        assert getattr(dq, name).dtype == jnp.float32 and not np.any(getattr(dq, name))


LAYERS, WIDTH = 4, 256


def loss(x, layers, linear=nf4_linear):
    """Of LAYERS square layers one after the other."""
    for q in layers:
        x = jnp.tanh(linear(x, q))
    return jnp.sum(x)


def test_linear_keeps_only_the_packed_weight():
    layers = [quantize_nf4(weight((WIDTH, WIDTH), seed=seed)) for seed in range(LAYERS)]
    x = weight((2, WIDTH))

    def kept(linear):
        _, vjp = jax.vjp(lambda x: loss(x, layers, linear), x)
        return [leaf.size for leaf in jax.tree.leaves(vjp)]

    assert max(kept(nf4_linear)) == WIDTH * WIDTH // 2
    assert max(kept(lambda x, q: x @ dequantize_nf4(q).T)) == WIDTH * WIDTH


def test_linear_in_a_scan_takes_the_memory_of_one_weight():
    layers = [quantize_nf4(weight((WIDTH, WIDTH), seed=seed)) for seed in range(LAYERS)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    def temporary_bytes(linear):
        def scanned(x, stacked):
            return jnp.sum(jax.lax.scan(lambda x, q: (jnp.tanh(linear(x, q)), None), x, stacked)[0])

        program = jax.jit(jax.grad(scanned)).lower(weight((2, WIDTH)), stacked).compile()
        return program.memory_analysis().temp_size_in_bytes

    one = WIDTH * WIDTH * 4
    assert temporary_bytes(nf4_linear) < 2.5 * one
    assert temporary_bytes(lambda x, q: x @ dequantize_nf4(q).T) > LAYERS * one


def test_linear_dequantizes_in_each_pass_and_when_it_is_needed():
    """By a barrier each time. XLA for CPUs drops barriers early, so the memory of a program cannot tell."""
    layers = [jax.eval_shape(quantize_nf4, jnp.zeros((WIDTH, WIDTH))) for _ in range(LAYERS)]
    program = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((2, WIDTH), jnp.float32), layers).as_text()
    packed = f"tensor<{WIDTH * WIDTH // 2}xui8>"
    barriers = [line for line in program.splitlines() if "optimization_barrier" in line]
    assert len(barriers) == 2 * LAYERS
    assert all(f"tensor<2x{WIDTH}xf32>" in line and packed in line for line in barriers)
