"""Triton attention: interpreted against the dense float32 reference, and compiled for GPUs not at hand."""

import dataclasses
import functools
import re
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from lorajax_kernels import attention
from lorajax_kernels.attention import triton as host
from lorajax_kernels.attention.problem import Problem
from lorajax_kernels.attention.triton import (
    Blocks,
    KernelBlocks,
    kernel_blocks,
    query_parts,
    triton_attention,
)
from lorajax_kernels.device import Device

# One token; segments within a block, over the edges of blocks and over several blocks; padding.
SEGMENT_IDS = np.stack([np.repeat([1, 2, 3, 4, 0], [1, 24, 1, 43, 11]), np.repeat([1, 2], [10, 70])])
T = SEGMENT_IDS.shape[1]


def small(queries, keys, split):
    """Blocks for short rows; the backward kernels have those of the forward kernel turned round."""
    forward = Blocks(queries=queries, keys=keys, warps=4, stages=2, split=split)
    backward = Blocks(queries=keys, keys=queries, warps=4, stages=2, split=split)
    return KernelBlocks(forward=forward, dq=backward, dkv=backward)


WIDE, TALL = small(16, 32, split=False), small(32, 16, split=True)
EVEN = small(16, 16, split=False)


# Pairs that are masked may overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def interpreter(run_on_cpu):
    """The kernels of triton_attention run in Triton's interpreter."""
    run_on_cpu(host.__name__, "lorajax_kernels.attention.triton_kernels")


def qkv(heads, kv_heads, head_dim=16, dtype=jnp.float32, batch=2, length=T, seed=0):
    """Random q, k, v and cotangent of the output."""
    random = np.random.default_rng(seed)
    shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)


@functools.partial(jax.jit, static_argnums=0)
def forward_and_gradients(function, q, k, v, cotangent, segment_ids):
    """[output, dq, dk, dv] of one compiled program."""
    out, vjp = jax.vjp(lambda q, k, v: function(q, k, v, segment_ids), q, k, v)
    return [out, *vjp(cotangent)]


def fused(blocks, **options):
    settings = {"scale": 0.25, "window": None, "softcap": None, "max_segments": None, "parts": 1}
    return functools.partial(triton_attention, blocks=blocks, **(settings | options))


def dense(**options):
    return functools.partial(attention, implementation="reference", **({"scale": 0.25} | options))


def assert_close(found, expected, tolerance):
    """Largest difference relative to the largest value, array by array."""
    for name, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all(), name
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "blocks", "options"),
    (
        (3, 3, 16, WIDE, {}),
        (9, 3, 24, TALL, {}),
        (8, 1, 16, EVEN, {"window": 20}),
        (1, 1, 24, WIDE, {"window": 2, "softcap": 2.0}),
        (1, 1, 16, TALL, {"window": 33, "softcap": 1.0, "scale": 0.7}),
        (1, 1, 16, EVEN, {"window": 2**31 - 1, "scale": -0.3}),
    ),
)
def test_equals_reference(interpreter, heads, kv_heads, head_dim, blocks, options):
    arrays = qkv(heads, kv_heads, head_dim)
    found = forward_and_gradients(fused(blocks, **options), *arrays, SEGMENT_IDS)
    assert_close(found, forward_and_gradients(dense(**options), *arrays, SEGMENT_IDS), 1e-5)


@pytest.mark.parametrize(("parts", "blocks"), ((2, WIDE), (2, TALL), (4, EVEN)))
def test_query_heads_shared_out_over_programs(interpreter, parts, blocks):
    arrays = qkv(8, 2, head_dim=24)
    found = forward_and_gradients(fused(blocks, parts=parts, window=20), *arrays, SEGMENT_IDS)
    assert_close(found, forward_and_gradients(dense(window=20), *arrays, SEGMENT_IDS), 1e-5)


@pytest.mark.parametrize("segment_ids", (np.ones(72, np.int32), np.arange(72)), ids=("one", "one-token"))
@pytest.mark.parametrize("blocks", (WIDE, TALL), ids=("wide", "tall"))
def test_one_segment_and_segments_of_one_token(interpreter, blocks, segment_ids):
    arrays = qkv(2, 1, batch=1, length=72)
    found = forward_and_gradients(fused(blocks), *arrays, segment_ids[None])
    if segment_ids[-1] > 1:
        np.testing.assert_array_equal(found[0], jnp.repeat(arrays[2], 2, axis=2))  # the output is v
        np.testing.assert_allclose(found[1], 0, atol=1e-5)
        np.testing.assert_allclose(found[2], 0, atol=1e-5)
    else:
        assert_close(found, forward_and_gradients(dense(), *arrays, segment_ids[None]), 1e-5)


@pytest.mark.parametrize("parts", (1, 2))
def test_half_precision_is_close_to_float32_reference(interpreter, parts):
    arrays = [x[:1] for x in qkv(2, 1, dtype=jnp.float16)]
    segment_ids = SEGMENT_IDS[:1]
    found = forward_and_gradients(fused(WIDE, parts=parts, softcap=20.0), *arrays, segment_ids)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.float16)}
    wide = [x.astype(jnp.float32) for x in arrays]
    assert_close(found, forward_and_gradients(dense(softcap=20.0), *wide, segment_ids), 1e-2)


@pytest.mark.parametrize("parts", (1, 2))
def test_gradients_of_scores_beyond_float16_do_not_overflow(interpreter, parts):
    """dq and dk fit float16, what they are made of fits it only once it is scaled."""
    q, k, v, dout = (x[:1] for x in qkv(2, 1, dtype=jnp.float16))
    arrays, segment_ids, scale = (q, k, 200 * v, 200 * dout), SEGMENT_IDS[:1], 1 / 16
    wide = [x.astype(jnp.float32) for x in arrays]
    expected = forward_and_gradients(dense(scale=scale), *wide, segment_ids)
    largest = max(float(jnp.abs(x).max()) for x in expected[1:])
    assert largest < float(jnp.finfo(jnp.float16).max) < largest / scale
    found = forward_and_gradients(fused(WIDE, parts=parts, scale=scale), *arrays, segment_ids)
    assert_close(found, expected, 1e-2)


@pytest.mark.parametrize("scale", (1.0, -1.0))
def test_scores_beyond_float16_do_not_overflow(interpreter, scale):
    q, k, v, _ = (x[:1, :32] for x in qkv(2, 1, dtype=jnp.float16))
    arrays = 300 * q, 300 * k, v  # scores ~ 1e6
    found = fused(EVEN, scale=scale)(*arrays, SEGMENT_IDS[:1, :32])
    expected = dense(scale=scale)(*(x.astype(jnp.float32) for x in arrays), SEGMENT_IDS[:1, :32])
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=1e-2)


@pytest.mark.parametrize("blocks", (WIDE, TALL), ids=("wide", "tall"))
def test_changing_one_segment_leaves_the_others_bit_for_bit(interpreter, blocks):
    row = SEGMENT_IDS[:1]
    before, other = ([x[:1] for x in qkv(2, 1, seed=seed)] for seed in (0, 1))
    expected = forward_and_gradients(fused(blocks), *before, row)
    changed = row == 2
    after = [jnp.where(changed[..., None, None], 100 * b, a) for a, b in zip(before, other, strict=True)]
    for a, b in zip(forward_and_gradients(fused(blocks), *after, row), expected, strict=True):
        assert np.any(a[changed] != b[changed])
        np.testing.assert_array_equal(a[~changed], b[~changed])


def test_packed_equals_separate(interpreter):
    arrays = [x[:1] for x in qkv(2, 1)]
    packed = forward_and_gradients(fused(TALL), *arrays, SEGMENT_IDS[:1])
    piece = np.flatnonzero(SEGMENT_IDS[0] == 4)
    document = [x[:, piece] for x in arrays]
    separate = forward_and_gradients(dense(), *document, np.ones((1, len(piece)), np.int32))
    assert_close([x[:, piece] for x in packed], separate, 1e-5)


@pytest.mark.parametrize("split", (False, True))
def test_blocks_that_share_no_visible_pair_are_not_visited(interpreter, split):
    """NaN spreads from any block that is visited, masked or not."""
    segment_ids = np.repeat([1, 2], [24, 40])[None]  # both own a part of the block 16..31
    run = functools.partial(forward_and_gradients, fused(small(16, 16, split)))
    q, k, v, cotangent = qkv(1, 1, batch=1, length=64)

    def poisoned(x, start, stop):
        return x.at[:, start:stop].set(jnp.nan)

    out, dq, _, _ = run(q, poisoned(k, 0, 16), poisoned(v, 0, 16), cotangent, segment_ids)
    assert np.isfinite(out[:, 32:]).all() and np.isfinite(dq[:, 32:]).all()
    _, _, dk, dv = run(poisoned(q, 32, 64), k, v, poisoned(cotangent, 32, 64), segment_ids)
    assert np.isfinite(dk[:, :16]).all() and np.isfinite(dv[:, :16]).all()
    # What is visited and masked does show.
    out, _, _, dv = run(q, k, poisoned(v, 16, 24), poisoned(cotangent, 24, 32), segment_ids)
    assert np.isnan(out[:, 32:]).all() and np.isnan(dv[:, :16]).all()


@pytest.fixture
def launched(monkeypatch):
    """launched(function, *arrays): its jaxpr, in which every kernel is one equation named "launch"."""
    pytest.importorskip("triton", reason="Triton is not installed")
    launch = Primitive("launch")
    launch.multiple_results = True
    launch.def_abstract_eval(lambda *_, out, **__: [jax.core.ShapedArray(x.shape, x.dtype) for x in out])

    def pretend(kernel, *operands, out_shape, **_):
        arrays = [x for x in operands if not isinstance(x, int)]
        return launch.bind(*arrays, kernel=kernel.__name__, out=out_shape)

    monkeypatch.setattr(host, "triton_call", pretend)
    return lambda function, *arrays: jax.make_jaxpr(function)(*arrays).jaxpr


def kernels(jaxpr):
    """Names of the kernels in a jaxpr and in those inside it."""
    found = [equation.params["kernel"] for equation in jaxpr.eqns if equation.primitive.name == "launch"]
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                found += kernels(value)
    return sorted(found)


ONCE = ["dkv_kernel", "dq_kernel", "forward_kernel"]


def test_saving_the_named_residuals_avoids_a_second_forward_pass(launched):
    q, k, v, _ = qkv(4, 2, batch=1)

    def gradient(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        inner = jax.checkpoint(lambda *x: fused(EVEN, window=20)(*x, SEGMENT_IDS[:1]), policy=policy)
        return jax.grad(lambda *x: jnp.sum(jnp.square(inner(*x))), (0, 1, 2))

    assert kernels(launched(gradient("attention_output", "attention_lse"), q, k, v)) == ONCE
    everything = gradient("attention_output", "attention_lse", "segment_bounds")
    jaxpr = str(launched(everything, q, k, v))
    assert jaxpr.count("cummax") == jaxpr.count("cummin") == 1
    for names in ((), ("attention_output",), ("attention_lse",)):
        assert kernels(launched(gradient(*names), q, k, v)) == [*ONCE, "forward_kernel"]


def test_arrays_reach_the_kernels_as_they_are(launched):
    arrays = qkv(4, 2, dtype=jnp.bfloat16, batch=1, length=48)

    def function(q, k, v, cotangent):
        return jax.vjp(lambda *x: fused(EVEN)(*x, SEGMENT_IDS[:1, :48]), q, k, v)[1](cotangent)

    jaxpr = launched(function, *arrays)
    assert kernels(jaxpr) == ONCE
    touching = [e for e in jaxpr.eqns if any(x.aval.ndim == 4 for x in (*e.invars, *e.outvars))]
    assert {e.primitive.name for e in touching} == {"launch", "name"}


@pytest.mark.parametrize(("multiprocessors", "parts"), ((2, 1), (3, 2), (4, 2), (5, 4), (None, 4)))
def test_the_devices_multiprocessors_decide_the_parts(launched, monkeypatch, multiprocessors, parts):
    device = Device("a GPU", (9, 0), multiprocessors=multiprocessors)
    monkeypatch.setattr(host, "current_device", lambda: device)
    *arrays, cotangent = qkv(8, 2, dtype=jnp.bfloat16, batch=1, length=48)  # 3 blocks of keys of 2 heads

    def function(*arrays):
        attend = fused(EVEN, parts=None)
        return jax.vjp(lambda *x: attend(*x, SEGMENT_IDS[:1, :48]), *arrays)[1](cotangent)

    jaxpr = launched(function, *arrays)
    assert [x.aval.str_short() for x in jaxpr.outvars] == [
        "bfloat16[1,48,8,16]",
        *["bfloat16[1,48,2,16]"] * 2,
    ]
    (dkv,) = (e for e in jaxpr.eqns if e.params.get("kernel") == "dkv_kernel")
    dtype = jnp.bfloat16 if parts == 1 else jnp.float32
    assert [(x.aval.shape, x.aval.dtype) for x in dkv.outvars] == [((1, 48, 2 * parts, 16), dtype)] * 2


@pytest.mark.parametrize("multiprocessors", (1, 40, 108, 132, 170))
def test_parts_double_until_there_are_programs_enough(multiprocessors):
    enough = 3 * multiprocessors
    for group in range(1, 65):
        assert query_parts(enough, group, multiprocessors) == 1
        for programs in range(1, enough, 7):
            parts = query_parts(programs, group, multiprocessors)
            assert group % parts == 0 and parts & (parts - 1) == 0
            assert parts == 1 or programs * parts < 2 * enough
            assert programs * parts >= enough or group % (2 * parts)
    assert query_parts(256, 4, 132) == 2  # a row of 2048 tokens, 8 key heads and blocks of 64 keys on an H100


def test_parts_must_divide_the_query_heads():
    arrays = qkv(6, 2, batch=1, length=16)
    with pytest.raises(ValueError, match="3 query heads of a key head do not make 2 parts"):
        fused(EVEN, parts=2)(*arrays[:3], SEGMENT_IDS[:1, :16])


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype"),
    (
        (80, 64, "bf16"),
        (80, 80, "fp16"),
        (80, 96, "bf16"),
        (80, 128, "bf16"),
        (80, 256, "fp16"),
        (86, 128, "fp16"),
        (89, 256, "bf16"),
        (90, 64, "fp16"),
        (90, 80, "bf16"),
        (90, 96, "fp16"),
        (90, 128, "bf16"),
        (90, 256, "fp16"),
        (100, 256, "bf16"),
    ),
)
def test_the_table_compiles_to_matrix_instructions_within_memory(compile_kernel, capability, head_dim, dtype):
    for name in ("forward", "dq", "dkv"):
        check_compiled(compile_kernel, name, capability, head_dim, dtype)


@pytest.mark.parametrize("capability", (80, 90))
def test_capped_scores_compile_likewise(compile_kernel, capability):
    for name in ("forward", "dq", "dkv"):
        check_compiled(compile_kernel, name, capability, 128, "bf16", softcap=30.0)


@pytest.mark.parametrize("capability", (80, 90))
def test_shared_out_query_heads_compile_likewise(compile_kernel, capability):
    check_compiled(compile_kernel, "dkv", capability, 128, "bf16", parts=2)


def check_compiled(compile_kernel, name, capability, head_dim, dtype, parts=1, softcap=None):
    from lorajax_kernels.attention import triton_kernels

    plan = host._Plan(0.1, softcap, kernel_blocks(divmod(capability, 10), head_dim), parts)
    q, k = (jax.ShapeDtypeStruct((1, 256, heads, head_dim), jnp.bfloat16) for heads in (8, 2))
    kernel = getattr(triton_kernels, f"{name}_kernel")
    settings = host._settings(plan, getattr(plan.blocks, name), q, k)
    compilation = settings.pop("num_warps"), settings.pop("num_stages")
    types = types_of(kernel, dtype)
    if name != "forward":
        settings["SCALE"] = 0.1
    if name == "dkv":
        settings["PARTS"] = parts
        if parts > 1:
            types |= {"dk_ptr": "*fp32", "dv_ptr": "*fp32"}
    compiled = compile_kernel(kernel, capability, types, settings, *compilation)
    ptx = compiled.asm["ptx"]
    assert "cp.async.cg" in ptx  # loads run ahead
    half = {"bf16": "bf16", "fp16": "f16"}[dtype]
    products = {90: rf"wgmma\.\S*\.f32\.{half}\.{half}", 100: r"tcgen05\.mma"}
    product = products.get(capability, rf"mma\.sync\S*\.f32\.{half}\.{half}")
    assert re.search(product, ptx)
    assert spilled(compiled.asm["cubin"]) <= 128, name


def types_of(kernel, dtype):
    """Triton's types of a kernel's arguments."""
    types = {
        "length": "i32",
        "first_ptr": "*i32",
        "end_ptr": "*i32",
        "lse_ptr": "*fp32",
        "delta_ptr": "*fp32",
    }
    halves = {name: f"*{dtype}" for name in kernel.arg_names if name.endswith("_ptr")}
    return {name: kind for name, kind in (halves | types).items() if name in kernel.arg_names}


def spilled(cubin):
    """Bytes of a thread's stack, which hold registers that did not fit."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return max(int(stack) for stack in re.findall(r"STACK:(\d+)", usage))


@pytest.mark.parametrize(
    ("capability", "relative"), (((8, 9), (8, 6)), ((12, 0), (8, 6)), ((10, 0), (9, 0)), ((8, 7), (8, 6)))
)
def test_other_gpus_get_the_blocks_of_a_relative(capability, relative):
    for head_dim, largest in ((8, 64), (64, 64), (80, 128), (136, 256)):
        assert kernel_blocks(capability, head_dim) is kernel_blocks(relative, largest)
    assert kernel_blocks((8, 0), 64) is not kernel_blocks((8, 6), 64)


def test_every_length_that_is_a_multiple_of_128_needs_no_padding():
    for table in host._BLOCKS.values():
        for blocks in (table.forward, table.dq, table.dkv):
            assert 128 % blocks.queries == 128 % blocks.keys == 0


PROBLEM = Problem(
    *(2, 256, 4, 2, 64, jnp.dtype(jnp.bfloat16)), window=5, softcap=2.0, max_segments=None, scale=0.1
)


@pytest.mark.parametrize(
    ("device", "change", "reason"),
    (
        (Device("Ampere", (8, 0)), {}, None),
        (Device("Ada", (8, 9)), {"head_dim": 80, "length": 77, "dtype": jnp.dtype(jnp.float16)}, None),
        (Device("Hopper", (9, 0)), {"head_dim": 256}, None),
        (Device("Hopper", (9, 0), no_triton="no Triton here"), {}, "no Triton here"),
        (Device("Turing", (7, 5)), {}, "it needs compute capability 8.0"),
        (Device("CPU"), {}, "it needs compute capability 8.0"),
        (
            Device("Hopper", (9, 0)),
            {"dtype": jnp.dtype(jnp.float32)},
            "it computes in bfloat16 and float16, not float32",
        ),
        (Device("Hopper", (9, 0)), {"head_dim": 264}, "head_dim must be a multiple of 8 up to 256, not 264"),
        (Device("Hopper", (9, 0)), {"head_dim": 100}, "head_dim must be a multiple of 8 up to 256, not 100"),
    ),
)
def test_why_not_gives_the_reason(device, change, reason):
    assert host.why_not(dataclasses.replace(PROBLEM, **change), device) == reason


def test_blocks_cannot_be_chosen_without_a_gpu():
    arrays = qkv(1, 1, batch=1, length=16)
    with pytest.raises(ValueError, match="no NVIDIA GPU to choose the blocks for"):
        fused(None)(*arrays[:3], SEGMENT_IDS[:1, :16])
