"""The ops on the GPU, on fresh random data: results and gradients against float32, and what programs hold.

NF4 is compared with bitsandbytes, bit for bit, and tensors of more than 2^31 elements with their last rows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lorajax_kernels import (
    Adapter,
    attention,
    attention_implementations,
    cached_attention,
    choose_attention,
    choose_cross_entropy,
    choose_lora,
    cross_entropy_implementations,
    dequantize_nf4,
    geglu,
    linear_cross_entropy,
    lora_implementations,
    lora_linears,
    nf4_linear,
    quantize_nf4,
    rms_norm,
    rope,
    swiglu,
    swiglu_lora_linear,
)
from lorajax_kernels.attention.xla import default_chunk
from lorajax_kernels.device import HOPPER, current_device
from lorajax_kernels.lora import ARRANGEMENTS, reference_lora_linears
from lorajax_kernels.lora.mosaic import TILINGS, mosaic_sum_of_products
from lorajax_kernels.nf4 import NF4Weight, choose_nf4, nf4_implementations
from lorajax_kernels.nf4.reference import DYNAMIC_CODE, reference_quantize_absmax

KERNELS = [name for name in attention_implementations() if name != "reference"]
NF4_KERNELS = [name for name in nf4_implementations() if name != "reference"]
MAX_SEGMENTS = 7
# Segments of every row begin elsewhere; the last one of each is padding.
ROWS = (
    (1, 700, 1, 255, 43, 24),
    (128, 128, 128, 128, 512),
    (1023, 1),
    (333, 1, 1, 1, 300, 200, 188),
)
# Of five segments, in rows of 3840.
LONG_ROWS = (
    (1, 2000, 700, 1100, 39),
    (3000, 1, 1, 500, 338),
    (333, 1024, 1283, 1199, 1),
    (128, 1408, 640, 1280, 384),
)
# Results are rounded once or twice: bfloat16 to 2^-9 of their size at most, float16 to 2^-12.
TOLERANCES = {"float32": 1e-5, "bfloat16": 6e-3, "float16": 8e-4}


def uneven_segments(rows: tuple[tuple[int, ...], ...] = ROWS) -> jax.Array:
    return jnp.asarray(np.stack([np.repeat(np.arange(len(row)), row) for row in rows]), jnp.int32)


def random_arrays(shapes: list[tuple[int, ...]], dtype: jnp.dtype) -> list[jax.Array]:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")  # shown of a test that fails
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def shaped(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def nf4_shapes(out: int, features: int, double_quant: bool = False) -> NF4Weight:
    return jax.eval_shape(functools.partial(quantize_nf4, double_quant=double_quant), shaped(out, features))


def serving(implementation: str, q: jax.Array, k: jax.Array, segment_ids: jax.Array, **options) -> None:
    """Skip the test where the implementation cannot serve, with its reason."""
    try:
        choose_attention(
            q, k, k, segment_ids, max_segments=MAX_SEGMENTS, implementation=implementation, **options
        )
    except ValueError as error:
        pytest.skip(str(error))


def serving_lora(implementation: str) -> None:
    """The same for layers with adapters of rank 32."""
    try:
        choose_lora(jnp.bfloat16, 32, implementation=implementation)
    except ValueError as error:
        pytest.skip(str(error))


def serving_nf4(implementation: str, q: NF4Weight, dtype: str | None = None) -> None:
    """The same for a weight in NF4."""
    try:
        choose_nf4(q, dtype, implementation=implementation)
    except ValueError as error:
        pytest.skip(str(error))


def on_hopper() -> None:
    """Skip the test where less may serve, on other GPUs and with an older JAX."""
    if current_device().compute_capability != HOPPER or jax.__version_info__ < (0, 11):
        pytest.skip("what serves is certain on compute capability 9.0 with JAX 0.11 or later")


def needing(gib: int) -> None:
    """Skip the test where JAX has less GPU memory."""
    if jax.local_devices()[0].memory_stats()["bytes_limit"] < gib * 2**30:
        command = "XLA_CLIENT_MEM_FRACTION=0.9 python -m pytest -n 0 tests/gpu -k 2_to_the_31"
        pytest.skip(f"needs {gib} GiB of GPU memory, as on an H200 by: {command}")


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward_and_gradients(implementation, options, q, k, v, dout, segment_ids):
    options = {"max_segments": MAX_SEGMENTS} | dict(options)

    def attend(q, k, v):
        return attention(q, k, v, segment_ids, implementation=implementation, **options)

    out, vjp = jax.vjp(attend, q, k, v)
    return [out, *vjp(dout)]


@functools.partial(jax.jit, static_argnums=0)
def reference_in_pieces(options, q, k, v, dout, segment_ids):
    """forward_and_gradients of the reference in float32, one key head of one row at a time."""
    batch, length, _, head_dim = q.shape
    kv_heads = k.shape[2]

    def cut(x):  # [B * K, 1, T, heads of a key head, H]
        x = jnp.moveaxis(x.reshape(batch, length, kv_heads, -1, head_dim), 2, 1)
        return x.reshape(batch * kv_heads, 1, length, -1, head_dim)

    def joined(x):
        x = jnp.moveaxis(x.reshape(batch, kv_heads, length, -1, head_dim), 1, 2)
        return x.reshape(batch, length, -1, head_dim)

    def attend(piece):
        *arrays, ids = piece
        return forward_and_gradients("reference", options, *(x.astype(jnp.float32) for x in arrays), ids)

    ids = jnp.repeat(segment_ids, kv_heads, axis=0)[:, None]
    return [joined(x) for x in jax.lax.map(attend, (*map(cut, (q, k, v, dout)), ids))]


def relative(found: jax.Array, expected: jax.Array) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    assert np.isfinite(found).all()  # max() of several errors may pass over a NaN
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check_attention(implementation, heads, head_dim, dtype, options, segment_ids, figure):
    """Both passes against the reference in float32."""
    batch, length = segment_ids.shape
    shapes = [(batch, length, n, head_dim) for n in (heads[0], heads[1], heads[1], heads[0])]
    arrays = random_arrays(shapes, jnp.dtype(dtype))
    serving(implementation, arrays[0], arrays[1], segment_ids, **dict(options))
    found = forward_and_gradients(implementation, options, *arrays, segment_ids)
    expected = reference_in_pieces(options, *arrays, segment_ids)
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    sizes = f"B{batch} T{length} N{heads[0]} K{heads[1]} H{head_dim}"
    case = f"{implementation} {sizes} {dtype} {dict(options) or ''}"
    figure(f"attention, {case}: errors of out, dq, dk, dv", " ".join(f"{error:.1e}" for error in errors))
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    assert max(errors) <= TOLERANCES[dtype]


@pytest.mark.parametrize(
    ("implementation", "dtype", "head_dim", "heads", "window"),
    (
        *(
            (*case, (8, 2), None)
            for case in itertools.product(
                ("cudnn", "triton"), ("bfloat16", "float16"), (64, 80, 96, 128, 256)
            )
        ),
        # Kinds of problems that cuDNN is tried with apart.
        *(("cudnn", "bfloat16", 128, *kind) for kind in (((8, 8), None), ((8, 2), 100), ((8, 8), 100))),
    ),
)
def test_attention_serves_on_hopper(implementation, dtype, head_dim, heads, window):
    """Other tests skip what is refused, and a probe of cuDNN that fails is a refusal."""
    on_hopper()
    q, k = (shaped(2, 1024, n, head_dim, dtype=jnp.dtype(dtype)) for n in heads)
    options = {"window": window, "max_segments": MAX_SEGMENTS, "implementation": implementation}
    choice = choose_attention(q, k, k, shaped(2, 1024, dtype=jnp.int32), **options)
    assert choice.name == implementation


def test_kernels_serve_on_hopper():
    """The same for the other ops, in bfloat16."""
    on_hopper()
    for name in ("mosaic", "triton"):
        assert choose_lora(jnp.bfloat16, 32, implementation=name).name == name
    assert choose_cross_entropy(jnp.bfloat16, implementation="triton").name == "triton"
    assert choose_nf4(nf4_shapes(4096, 14336), implementation="triton").name == "triton"


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "options"),
    (
        ((9, 3), 64, "float32", ()),
        ((8, 8), 64, "bfloat16", ()),
        ((8, 2), 64, "float16", ()),
        ((8, 2), 80, "bfloat16", ()),
        ((9, 3), 96, "bfloat16", ()),
        ((8, 1), 128, "bfloat16", ()),
        ((8, 1), 128, "float16", ()),
        ((4, 2), 256, "bfloat16", ()),
        ((8, 2), 128, "bfloat16", (("window", 100),)),
        ((8, 2), 128, "bfloat16", (("softcap", 5.0),)),
        ((8, 2), 128, "bfloat16", (("window", 100), ("softcap", 5.0))),
        ((8, 2), 128, "bfloat16", (("scale", -0.1),)),
    ),
)
def test_attention_of_uneven_segments(implementation, heads, head_dim, dtype, options, figure):
    check_attention(implementation, heads, head_dim, dtype, options, uneven_segments(), figure)


@pytest.mark.parametrize("implementation", KERNELS)
def test_attention_at_real_size(implementation, figure):
    check_attention(implementation, (32, 8), 128, "bfloat16", (), uneven_segments(LONG_ROWS), figure)


@pytest.mark.parametrize("implementation", KERNELS)
def test_attention_of_a_length_that_is_no_multiple_of_a_block(implementation, figure):
    check_attention(implementation, (8, 2), 64, "bfloat16", (), uneven_segments()[:, :1000], figure)


@pytest.mark.parametrize("implementation", KERNELS)
def test_attention_of_scores_beyond_float16(implementation, figure):
    """Most queries are left with one key; gradients are finite."""
    segment_ids, options = uneven_segments(), (("scale", 1.0),)
    batch, length = segment_ids.shape
    q, k, v, dout = random_arrays([(batch, length, n, 64) for n in (8, 2, 2, 8)], jnp.float16)
    arrays = 60 * q, 60 * k, v, dout
    serving(implementation, q, k, segment_ids, **dict(options))
    own = jnp.sum(arrays[0][:, :, ::4].astype(jnp.float32) * arrays[1], axis=-1)  # of a token with itself
    assert float(jnp.max(own)) > float(jnp.finfo(jnp.float16).max)
    found = forward_and_gradients(implementation, options, *arrays, segment_ids)
    expected = reference_in_pieces(options, *arrays, segment_ids)
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    case = f"attention, {implementation}, float16, large scores"
    figure(f"{case}: errors of out, dq, dk, dv", " ".join(f"{error:.1e}" for error in errors))
    # A float32 of this size has an error that shows where two keys are as close; more so in gradients.
    assert errors[0] <= 1e-2


@pytest.mark.parametrize("implementation", KERNELS)
def test_attention_gradients_of_scores_beyond_float16(implementation, figure):
    """dq and dk fit float16, what they are made of fits it only once it is scaled."""
    segment_ids, options = uneven_segments(), (("scale", 1 / 16),)
    batch, length = segment_ids.shape
    q, k, v, dout = random_arrays([(batch, length, n, 64) for n in (8, 2, 2, 8)], jnp.float16)
    arrays = q, k, 120 * v, 120 * dout
    serving(implementation, q, k, segment_ids)
    expected = reference_in_pieces(options, *arrays, segment_ids)
    largest = max(float(jnp.abs(x).max()) for x in expected)
    assert largest < float(jnp.finfo(jnp.float16).max) < 16 * largest
    found = forward_and_gradients(implementation, options, *arrays, segment_ids)
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    case = f"attention, {implementation}, float16, large scores' gradients"
    figure(f"{case}: errors of out, dq, dk, dv", " ".join(f"{error:.1e}" for error in errors))
    assert max(errors) <= TOLERANCES["float16"]


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_segment_does_not_touch_the_others(implementation):
    """Neither their output nor their gradients."""
    segment_ids = uneven_segments()
    batch, length = segment_ids.shape
    shapes = [(batch, length, n, 128) for n in (8, 2, 2, 8)]
    arrays, others = (random_arrays(shapes, jnp.bfloat16) for _ in range(2))
    serving(implementation, arrays[0], arrays[1], segment_ids)
    changed = np.asarray(segment_ids == 1)
    where = jnp.asarray(changed)[..., None, None]
    poisoned = [jnp.where(where, 100 * a, b) for a, b in zip(others, arrays, strict=True)]
    before, after = (
        [np.asarray(x, np.float32) for x in forward_and_gradients(implementation, (), *given, segment_ids)]
        for given in (arrays, poisoned)
    )
    for name, a, b in zip(("out", "dq", "dk", "dv"), after, before, strict=True):
        assert (a[changed] != b[changed]).any(), name
        if implementation == "cudnn" and name != "out":
            # It may add by atomics: then not even a second run has the same last bits.
            assert relative(a[~changed], b[~changed]) <= 1e-3, name
        else:
            np.testing.assert_array_equal(a[~changed], b[~changed], err_msg=name)


@pytest.mark.parametrize("implementation", KERNELS)
def test_tensors_of_more_than_2_to_the_31_elements(implementation):
    """The last row is compared with itself alone."""
    batch, length, heads, kv_heads, head_dim = 65, 8192, 32, 2, 128
    assert batch * length * heads * head_dim > 2**31
    if implementation == "cudnn":
        shapes = [jax.ShapeDtypeStruct((batch, length, n, head_dim), jnp.bfloat16) for n in (heads, kv_heads)]
        segment_ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        options = {"max_segments": 2, "implementation": "cudnn"}
        with pytest.raises(ValueError, match="32-bit integers"):
            choose_attention(shapes[0], shapes[1], shapes[1], segment_ids, **options)
        return
    needing(60)
    row = jnp.arange(length, dtype=jnp.int32) // (length // 2)
    segment_ids = jnp.broadcast_to(row, (batch, length))
    q, k, v, dout = random_arrays(
        [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)], jnp.bfloat16
    )
    serving(implementation, q, k, segment_ids)
    options = (("max_segments", 2),)
    found = [x[-1:] for x in forward_and_gradients(implementation, options, q, k, v, dout, segment_ids)]
    alone = [x[-1:] for x in (q, k, v, dout)]
    del q, k, v, dout
    expected = forward_and_gradients(implementation, options, *alone, segment_ids[-1:])
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) <= 1e-3


def most_temporaries(implementation: str, batch: int, length: int, heads: int, head_dim: int) -> int:
    """Bytes that both passes on MAX_SEGMENTS segments may hold beside arguments and results."""
    per_query = 4 * batch * length * heads  # a float32 for each query and head
    if implementation == "triton":
        return 4 * per_query  # log-sum-exp, delta, and what makes the segments' bounds
    if implementation == "cudnn":
        # Its workspace has a row for every segment: 8 bytes for each element of q, such as dq in float32 with
        # dk and dv of each query head in 16 bits, and delta. JAX adds the log-sum-exp of as many rows.
        return MAX_SEGMENTS * per_query * (2 * head_dim + 2) + 2**20
    # Scores of a chunk and their gradient, both in float32 and in 16 bits; q, dout, out and dq in 16 bits.
    chunk = per_query * default_chunk(batch, length, heads)
    return 3 * chunk + 4 * per_query * head_dim // 2


@pytest.mark.parametrize("implementation", KERNELS)
def test_attention_holds_no_scores(implementation, figure):
    batch, length, heads, kv_heads, head_dim = 4, 3840, 32, 8, 128
    shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    segment_ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    serving(implementation, arrays[0], arrays[1], segment_ids)
    compiled = forward_and_gradients.lower(implementation, (), *arrays, segment_ids).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    most = most_temporaries(implementation, batch, length, heads, head_dim)
    figure(
        f"attention, {implementation}, {MAX_SEGMENTS} segments: MB of temporary memory",
        f"{temporary / 1e6:.0f} (<= {most / 1e6:.0f})",
    )
    assert temporary <= most < 4 * batch * heads * length**2


@pytest.mark.parametrize(
    ("dtype", "softcap", "trainable_head", "vocabulary"),
    (
        ("bfloat16", None, False, 128256),
        ("bfloat16", 2.0, True, 128256),
        ("bfloat16", None, False, 50257),
        ("bfloat16", 2.0, True, 32001),
        ("float16", 2.0, True, 32001),
        ("float32", None, True, 32001),
    ),
)
def test_linear_cross_entropy_at_real_size(dtype, softcap, trainable_head, vocabulary, figure):
    """Each implementation against dense float32 logits, and against the others."""
    rows, features = 4096, 2048
    x, head = random_arrays([(rows, features), (vocabulary, features)], dtype)
    head = head / features**0.5
    weights = (jnp.arange(rows) % 3 > 0).astype(jnp.float32)
    targets = jnp.where(weights > 0, jax.random.randint(jax.random.key(0), (rows,), 0, vocabulary), -100)
    trained = (0, 1) if trainable_head else (0,)
    case = f"linear_cross_entropy, {dtype}, {vocabulary}"
    case += f"{f', softcap {softcap}' if softcap else ''}{', dhead' if trainable_head else ''}"
    # Logits and their gradient, twice as wide unless x is bfloat16.
    most = 700e6 if dtype == "bfloat16" else 1400e6
    if trainable_head:  # dhead in float32 too, and what a chunk adds to it
        most += 2 * 4 * vocabulary * features

    def dense(x, head):
        logits = jnp.matmul(x, head.T, precision=jax.lax.Precision.HIGHEST)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        at_target = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
        return jnp.sum((jax.nn.logsumexp(logits, axis=1) - at_target) * weights)

    expected = jax.jit(jax.value_and_grad(dense, trained))(x.astype(jnp.float32), head.astype(jnp.float32))
    found = {}
    for name in cross_entropy_implementations():
        try:
            choose_cross_entropy(x.dtype, implementation=name)
        except ValueError as error:
            figure(f"{case} {name}", str(error))
            continue

        def loss(x, head, name=name):
            options = {"softcap": softcap, "trainable_head": trainable_head, "implementation": name}
            return linear_cross_entropy(x, head, targets, weights, **options)[0]

        compiled = jax.jit(jax.value_and_grad(loss, trained)).lower(x, head).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        figure(f"{case} {name}: MB of temporary memory", f"{temporary / 1e6:.0f} (< {most / 1e6:.0f})")
        assert temporary < most
        found[name] = compiled(x, head)

    for name, other in itertools.combinations([*found, "dense"], 2):
        (a, das), (b, dbs) = ((found | {"dense": expected})[each] for each in (name, other))
        errors = [abs(float(a / b) - 1), *map(relative, das, dbs)]
        figure(
            f"{case} {name} against {other}: errors of loss, dx{', dhead' if trainable_head else ''}",
            " ".join(f"{error:.1e}" for error in errors),
        )
        assert errors[0] <= 1e-5 and max(errors[1:]) <= TOLERANCES[dtype]


@pytest.mark.parametrize("implementation", cross_entropy_implementations())
def test_linear_cross_entropy_of_more_than_2_to_the_31_elements(implementation):
    """Only the last rows count: loss and gradient are those of these rows alone."""
    needing(30)
    rows, features, vocabulary, last = 2**20 + 1024, 2048, 1024, 1024
    assert rows * features > 2**31
    try:
        choose_cross_entropy(jnp.bfloat16, implementation=implementation)
    except ValueError as error:
        pytest.skip(str(error))
    x, head = random_arrays([(rows, features), (vocabulary, features)], jnp.bfloat16)
    head = head / features**0.5
    counted = jax.random.randint(jax.random.key(0), (last,), 0, vocabulary)

    @jax.jit
    def run(x, head, counted):
        others = x.shape[0] - last
        targets = jnp.pad(counted, (others, 0), constant_values=-100)
        weights = jnp.pad(jnp.ones(last), (others, 0))

        def loss(x):
            return linear_cross_entropy(x, head, targets, weights, implementation=implementation)[0]

        # Otherwise XLA makes no more than what is looked at.
        value, dx = jax.lax.optimization_barrier(jax.value_and_grad(loss)(x))
        return value, dx[-last:], jnp.any(dx[:-last] != 0)

    value, dx, others = run(x, head, counted)
    expected_value, expected, _ = run(x[-last:], head, counted)
    assert not others
    assert float(value) == pytest.approx(float(expected_value), rel=1e-5)
    assert relative(dx, expected) <= TOLERANCES["bfloat16"]


def test_kernels_that_write_over_operands_that_are_slices(figure):
    """XLA fills products of odd numbers of rows up to whole tiles, and cuts off what was added."""
    rows, features, width, vocabulary, rank = 1003, 576, 1536, 49152, 32
    x, head, gate, up, down, dy, a, b = random_arrays(
        [
            *((rows, features), (vocabulary, features), (rows, width), (rows, width), (features, width)),
            *((rows, features), (rank, width), (features, rank)),
        ],
        jnp.bfloat16,
    )
    head, down, a, b = head / features**0.5, down / width**0.5, a / width**0.5, b / rank**0.5
    adapter = Adapter(a.astype(jnp.float32), b.astype(jnp.float32), scale=0.5)
    targets = jax.random.randint(jax.random.key(0), (rows,), 0, vocabulary)

    def run(implementation):
        def loss(x, head):
            options = {"chunk": rows, "implementation": implementation}
            return linear_cross_entropy(x, head, targets, jnp.ones(rows), **options)[0]

        def gated(gate, up, adapter):
            return swiglu_lora_linear(gate, up, down, adapter, implementation=implementation)

        def gradients(x, head, gate, up, adapter, dy):
            return jax.grad(loss)(x, head), *jax.vjp(gated, gate, up, adapter)[1](dy)

        arguments = x, head, gate, up, adapter, dy
        compiled = jax.jit(gradients).lower(*arguments).compile({"xla_gpu_enable_triton_gemm": False})
        return jax.tree.leaves(compiled(*arguments))

    errors = [relative(a, b) for a, b in zip(run("triton"), run("xla"), strict=True)]
    figure("over slices: errors of dx, dgate, dup, da, db", " ".join(f"{error:.1e}" for error in errors))
    assert max(errors) <= TOLERANCES["bfloat16"]


@pytest.mark.parametrize("double_quant", (False, True))
@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "float32"))
def test_nf4_implementations_dequantize_alike_bit_for_bit(dtype, double_quant):
    [w] = random_arrays([(4096, 14336)], jnp.bfloat16)
    q = quantize_nf4(w, double_quant)
    serving_nf4("triton", q, dtype)
    words = jnp.uint32 if dtype == "float32" else jnp.uint16
    bits = [
        jax.jit(lambda q, name=name: dequantize_nf4(q, dtype, implementation=name).view(words))(q)
        for name in ("triton", "xla")
    ]
    assert bits[0].shape == w.shape
    np.testing.assert_array_equal(*map(np.asarray, bits))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("implementation", nf4_implementations())
def test_nf4_linear_is_a_product_with_the_weight(implementation, dtype, figure):
    x, w, dy = random_arrays([(2048, 4096), (1024, 4096), (2048, 1024)], dtype)
    q = quantize_nf4(w)
    serving_nf4(implementation, q, dtype)

    def run(function, x, dy):
        y, vjp = jax.vjp(function, x)
        return y, *vjp(dy)

    def dense(x):
        return jnp.matmul(x, dequantize_nf4(q, jnp.float32).T, precision=jax.lax.Precision.HIGHEST)

    linear = functools.partial(nf4_linear, q=q, implementation=implementation)
    found = jax.jit(functools.partial(run, linear))(x, dy)
    expected = jax.jit(functools.partial(run, dense))(x.astype(jnp.float32), dy.astype(jnp.float32))
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    figure(
        f"nf4_linear, {implementation}, {dtype}: errors of y, dx",
        " ".join(f"{error:.1e}" for error in errors),
    )
    # In 16 bits the weight that is multiplied is rounded too.
    assert max(errors) <= TOLERANCES[dtype]


@pytest.mark.parametrize("double_quant", (False, True))
@pytest.mark.parametrize(
    ("dtype", "shape"),
    (
        ("bfloat16", (4096, 14336)),
        ("bfloat16", (1003, 577)),
        ("float16", (4096, 14336)),
        ("float32", (4096, 14336)),
    ),
)
def test_nf4_equals_bitsandbytes_bit_for_bit(dtype, shape, double_quant, figure):
    """Of the mean absmax bitsandbytes' sum is as inexact as ours: it and what is made of it may differ."""
    torch = pytest.importorskip("torch")
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here")
    [w] = random_arrays([shape], jnp.dtype(dtype))
    on_torch = torch.from_dlpack(w).clone()
    packed, state = bitsandbytes.quantize_4bit(on_torch, quant_type="nf4", compress_statistics=double_quant)
    entries = {
        name: value.cpu().numpy() if isinstance(value, torch.Tensor) else value
        for name, value in state.as_dict().items()
    }
    theirs = NF4Weight.from_bitsandbytes(packed.cpu().numpy(), entries)
    ours = quantize_nf4(w, double_quant)
    assert (theirs.shape, theirs.dtype, theirs.double_quant) == (shape, w.dtype, double_quant)
    np.testing.assert_array_equal(np.asarray(ours.packed), theirs.packed)
    if double_quant:
        np.testing.assert_array_max_ulp(np.asarray(ours.offset), theirs.offset, 2)
        steps = np.abs(np.asarray(ours.absmax, int) - theirs.absmax)
        assert steps.max() <= 1 and steps.mean() < 1e-3
    else:
        np.testing.assert_array_equal(as_words(ours.absmax), as_words(theirs.absmax))
    for to in TOLERANCES:
        state.dtype = getattr(torch, to)
        expected = as_words(bitsandbytes.dequantize_4bit(packed, state).float().cpu().numpy())
        for name in nf4_implementations():
            dequantize = jax.jit(functools.partial(dequantize_nf4, dtype=to, implementation=name))
            try:
                found = dequantize(theirs)
            except ValueError as error:
                figure(f"dequantize_nf4 {name}, {shape[0]} x {shape[1]}", str(error))
                continue
            np.testing.assert_array_equal(as_words(found), expected, err_msg=f"{name} {to}")


def as_words(x: jax.Array | np.ndarray) -> np.ndarray:
    """float32's bits, of which 16-bit types have a part: -0 is not 0."""
    return np.asarray(x, np.float32).view(np.uint32)


def large_nf4(implementation: str, double_quant: bool) -> tuple[NF4Weight, NF4Weight]:
    """A weight of random bits and more than 2^31 elements, and its last rows alone; skips as serving_nf4."""
    needing(20)
    out, features, last = 2**15 + 64, 2**16, 64
    assert out * features > 2**31
    blocks = out * features // 64
    keys = jax.random.split(jax.random.key(np.random.default_rng().integers(2**31)), 3)
    arrays = {
        "packed": jax.random.bits(keys[0], (out * features // 2,), jnp.uint8),
        "absmax": jax.random.uniform(keys[1], (blocks,), jnp.float32),
    }
    codes = {}
    if double_quant:
        arrays["absmax"] = jax.random.bits(keys[1], (blocks,), jnp.uint8)
        arrays["absmax2"] = jax.random.uniform(keys[2], (blocks // 256,), jnp.float32)
        codes = {"absmax_code": DYNAMIC_CODE, "offset": jnp.float32(1)}

    def weight(rows, arrays):
        return NF4Weight(shape=(rows, features), dtype=jnp.dtype(jnp.bfloat16), **arrays, **codes)

    tail = {name: array[-(array.size * last // out) :] for name, array in arrays.items()}
    q = weight(out, arrays)
    serving_nf4(implementation, q)
    return q, weight(last, tail)


@pytest.mark.parametrize("double_quant", (False, True))
@pytest.mark.parametrize("implementation", NF4_KERNELS)
def test_nf4_of_more_than_2_to_the_31_elements(implementation, double_quant):
    """The last rows are compared with the reference of them alone."""
    q, tail = large_nf4(implementation, double_quant)
    found = jax.jit(functools.partial(dequantize_nf4, implementation=implementation))(q)
    expected = jax.jit(functools.partial(dequantize_nf4, implementation="reference"))(tail)
    np.testing.assert_array_equal(as_words(found[-tail.shape[0] :]), as_words(expected))


@pytest.mark.parametrize("double_quant", (False, True))
@pytest.mark.parametrize("implementation", NF4_KERNELS)
def test_nf4_linear_of_more_than_2_to_the_31_elements(implementation, double_quant):
    """Only the last outputs have a gradient: they and dx are those of their rows of the weight alone."""
    q, tail = large_nf4(implementation, double_quant)
    x, dy = random_arrays([(128, q.shape[1]), (128, tail.shape[0])], jnp.bfloat16)

    @jax.jit
    def run(q, x, dy):
        y, vjp = jax.vjp(lambda x: nf4_linear(x, q, implementation=implementation), x)
        others = q.shape[0] - dy.shape[1]
        # Otherwise XLA makes no more than what is looked at.
        y, (dx,) = jax.lax.optimization_barrier((y, vjp(jnp.pad(dy, ((0, 0), (others, 0))))))
        return y[:, others:], dx

    for a, b in zip(run(q, x, dy), run(tail, x, dy), strict=True):
        assert relative(a, b) <= TOLERANCES["bfloat16"]


def test_quantize_nf4_of_more_than_2_to_the_31_elements():
    """The last rows are compared with them alone, and with double quantisation for the mean of all."""
    needing(20)
    out, features, last = 2**15 + 64, 2**16, 64
    assert out * features > 2**31
    [w] = random_arrays([(out, features)], jnp.bfloat16)
    alone = quantize_nf4(w[-last:])
    blocks = alone.absmax.size
    q = quantize_nf4(w)
    np.testing.assert_array_equal(np.asarray(q.packed[-alone.packed.size :]), np.asarray(alone.packed))
    np.testing.assert_array_equal(as_words(q.absmax[-blocks:]), as_words(alone.absmax))
    mean = np.asarray(q.absmax).mean(dtype=np.float64)
    q = quantize_nf4(w, double_quant=True)
    np.testing.assert_array_equal(np.asarray(q.packed[-alone.packed.size :]), np.asarray(alone.packed))
    np.testing.assert_array_max_ulp(np.asarray(q.offset), np.float32(mean), 2)
    expected = reference_quantize_absmax(np.asarray(alone.absmax), np.asarray(q.offset))
    np.testing.assert_array_equal(as_words(q.absmax2[-blocks // 256 :]), as_words(expected["absmax2"]))
    # The GPU's reciprocal is inexact.
    steps = np.abs(np.asarray(q.absmax[-blocks:], int) - expected["absmax"])
    assert steps.max() <= 1 and steps.mean() < 1e-3


@pytest.mark.parametrize(
    ("implementation", "arrangement", "dtype", "quantised", "normed", "dropout", "in_vector"),
    (
        *(
            (implementation, "auto", *case)
            for implementation in lora_implementations()
            for case in (
                ("bfloat16", False, False, 0.0, False),
                ("bfloat16", True, False, 0.1, False),
                ("float16", False, True, 0.0, False),
                ("bfloat16", False, True, 0.0, True),
                ("float16", True, False, 0.1, True),
            )
        ),
        *(
            ("auto", arrangement, *case)
            for arrangement in ARRANGEMENTS
            if arrangement != "auto"
            for case in (("bfloat16", True, False, 0.0, True), ("bfloat16", False, True, 0.1, False))
        ),
    ),
)
def test_layers_with_adapters(
    implementation, arrangement, dtype, quantised, normed, dropout, in_vector, figure
):
    """Gate and up of Llama-3.2-1B on 4096 tokens; of two ranks, so that no mix-up goes unseen."""
    serving_lora(implementation)
    rows, features, out, ranks = 4096, 2048, 8192, (32, 64)
    x, dy, other, *weights = random_arrays(
        [(rows, features), *[(rows, out)] * 2, *[(out, features)] * 2], jnp.dtype(dtype)
    )
    weights = [weight / features**0.5 for weight in weights]
    if quantised:
        weights = [quantize_nf4(weight) for weight in weights]
    shapes = [shape for rank in ranks for shape in ((rank, features), (out, rank))]
    trained = [array / array.shape[1] ** 0.5 for array in random_arrays(shapes, jnp.float32)]
    norm = (1 + 0.1 * x[0].astype(jnp.float32), 1e-5) if normed else None

    def run(function, x, dys):
        @jax.jit
        def forward_and_gradients(x, trained, dys):
            def forward(x, trained):
                a, b, other_a, other_b = trained
                key = jax.random.key(0)
                adapters = [Adapter(a, b, 0.5), Adapter(other_a, other_b, 0.25, dropout, key)]
                return function(x, weights, parts_of_a_vector(adapters) if in_vector else adapters)

            ys, vjp = jax.vjp(forward, x, trained)
            return jax.tree.leaves((ys, vjp(dys)))

        return forward_and_gradients(x, trained, dys)

    def plain(x, weights, adapters):
        x = x if norm is None else rms_norm(x, norm[0], epsilon=norm[1])
        return reference_lora_linears(x, weights, adapters)

    options = {"arrangement": arrangement, "implementation": implementation, "norm": norm}
    found = run(functools.partial(lora_linears, **options), x, (dy, other))
    expected = run(plain, x.astype(jnp.float32), tuple(y.astype(jnp.float32) for y in (dy, other)))
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    traits = {"NF4": quantised, "after a norm": normed, "dropout": dropout > 0, "in a vector": in_vector}
    case = ", ".join(
        [f"{implementation} {arrangement}", dtype, *(name for name, there in traits.items() if there)]
    )
    figure(
        f"lora_linears {case}: errors of y, y, dx, da, db, da, db",
        " ".join(f"{error:.1e}" for error in errors),
    )
    assert max(errors) <= TOLERANCES[dtype]


@functools.partial(jax.jit, static_argnums=(0, 1))
def layers_of_last_rows(implementation, dropout, x, weights, trained, dys):
    """Both passes of layers of which only the last rows have a gradient.

    Returns the last rows of ys and dx, and all of the adapters' gradients; then whether dx has others.
    """
    last = dys[0].shape[0]

    def layers(x, trained):
        keys = jax.random.split(jax.random.key(0), len(trained))
        adapters = [Adapter(a, b, 0.5, dropout, key) for (a, b), key in zip(trained, keys, strict=True)]
        return lora_linears(x, weights, adapters, implementation=implementation)

    ys, vjp = jax.vjp(layers, x, trained)
    gradients = vjp(tuple(jnp.pad(dy, ((x.shape[0] - last, 0), (0, 0))) for dy in dys))
    # Otherwise XLA makes no more than what is looked at.
    ys, (dx, dtrained) = jax.lax.optimization_barrier((ys, gradients))
    return [*(y[-last:] for y in ys), dx[-last:], *jax.tree.leaves(dtrained)], jnp.any(dx[:-last] != 0)


@pytest.mark.parametrize(
    ("implementation", "dropout", "rows", "features", "outs"),
    (
        *((name, 0.0, 2**20 + 2048, 2048, (2048, 4096)) for name in lora_implementations()),
        *(
            (name, 0.1, *sizes)
            for name in lora_implementations()
            if name != "xla"
            # Then more than the 65,535 blocks of 64 rows that a grid's second axis could hold.
            for sizes in ((2**20 + 2048, 2048, (2048, 4096)), (2**22 + 2048, 512, (1024, 1024)))
        ),
    ),
)
def test_layers_with_adapters_on_more_than_2_to_the_31_elements(
    implementation, dropout, rows, features, outs
):
    """Only the last rows have a gradient: it and all sums are those of these rows alone.

    With dropout these rows alone would have other masks, and all is compared with XLA's.
    """
    needing(60)
    serving_lora(implementation)
    ranks, last = (32, 64), 1024
    assert rows * features > 2**31
    x, *rest = random_arrays(
        [(rows, features), *((out, features) for out in outs), *((last, out) for out in outs)], jnp.bfloat16
    )
    weights, dys = [weight / features**0.5 for weight in rest[: len(outs)]], tuple(rest[len(outs) :])
    shapes = [
        shape for out, rank in zip(outs, ranks, strict=True) for shape in ((rank, features), (out, rank))
    ]
    parts = [array / array.shape[1] ** 0.5 for array in random_arrays(shapes, jnp.float32)]
    arguments = weights, list(zip(parts[::2], parts[1::2], strict=True)), dys
    found, others = layers_of_last_rows(implementation, dropout, x, *arguments)
    if dropout:
        expected, _ = layers_of_last_rows("xla", dropout, x, *arguments)
    else:
        expected, _ = layers_of_last_rows(implementation, dropout, x[-last:], *arguments)
    assert not others
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) <= TOLERANCES["bfloat16"]


def parts_of_a_vector(adapters: list[Adapter]) -> list[Adapter]:
    """The same, that kernels are to read of a vector, as in training."""
    parts = [adapter.a for adapter in adapters] + [adapter.b for adapter in adapters]
    vector = jax.lax.stop_gradient(jnp.concatenate([part.ravel() for part in parts]))
    starts = list(itertools.accumulate((part.size for part in parts), initial=0))
    return [
        dataclasses.replace(adapter, vector=vector, a_start=a_start, b_start=b_start)
        for adapter, a_start, b_start in zip(adapters, starts, starts[len(adapters) :], strict=False)
    ]


def adapter_of(features: int, out: int, rank: int, dropout: float = 0.0) -> Adapter:
    a, b = shaped(rank, features, dtype=jnp.float32), shaped(out, rank, dtype=jnp.float32)
    return Adapter(a, b, 0.5, dropout, jax.eval_shape(lambda: jax.random.key(0)) if dropout else None)


def check_temporaries(case: str, compiled, most: float, figure) -> None:
    temporary = compiled.memory_analysis().temp_size_in_bytes
    figure(f"{case}: MB of temporary memory", f"{temporary / 1e6:.0f} (<= {most / 1e6:.0f})")
    assert temporary <= most


@pytest.mark.parametrize(
    ("implementation", "quantised", "dropout"),
    (
        *itertools.product(lora_implementations(), (False, True), (0.0,)),
        *((name, False, 0.1) for name in lora_implementations() if name != "xla"),
    ),
)
def test_layers_with_adapters_hold_little(implementation, quantised, dropout, figure):
    """Gate and up of Llama-3.2-1B on 16384 tokens; their results and gradients take 600 MB."""
    serving_lora(implementation)
    rows, features, out, rank = 16384, 2048, 8192, 32
    x, dy, weight = shaped(rows, features), shaped(rows, out), shaped(out, features)
    weights = [jax.eval_shape(quantize_nf4, weight) if quantised else weight] * 2

    def layers(x, adapters, weights):
        return lora_linears(x, weights, adapters, implementation=implementation)

    def both(x, adapters, weights, dys):
        ys, vjp = jax.vjp(lambda x, adapters: layers(x, adapters, weights), x, adapters)
        return ys, vjp(dys)

    adapters = [adapter_of(features, out, rank, dropout)] * 2
    compiled = jax.jit(both).lower(x, adapters, weights, (dy, dy)).compile()
    # Of the size of x: dx without the last of its three products, twice, while they are added, or [x, x A^T]
    # with a weight's [W, S]. Mosaic has neither; one is for cuBLAS. And both dense weights.
    copies = 1 if implementation == "mosaic" else 3
    most = 2 * rows * features * copies + quantised * 2 * 2 * out * features
    name = f"lora_linears, {implementation}{', NF4' * quantised}{', dropout' * (dropout > 0)}"
    check_temporaries(name, compiled, most, figure)


@pytest.mark.parametrize("implementation", lora_implementations())
def test_the_layer_after_a_gate_holds_little(implementation, figure):
    """Down of Llama-3.2-1B on 16384 tokens; its result and gradients take 605 MB."""
    serving_lora(implementation)
    rows, features, out, rank = 16384, 8192, 2048, 32
    gate, dy, weight = shaped(rows, features), shaped(rows, out), shaped(out, features)

    def both(gate, up, adapter, weight, dy):
        def layer(gate, up, adapter):
            return swiglu_lora_linear(gate, up, weight, adapter, implementation=implementation)

        y, vjp = jax.vjp(layer, gate, up, adapter)
        return y, vjp(dy)

    compiled = jax.jit(both).lower(gate, gate, adapter_of(features, out, rank), weight, dy).compile()
    # silu(gate) * up in 16 bits, and half as much for partial sums and for cuBLAS.
    check_temporaries(f"swiglu_lora_linear, {implementation}", compiled, 1.5 * 2 * rows * features, figure)


@pytest.mark.parametrize("double_quant", (False, True))
@pytest.mark.parametrize("implementation", NF4_KERNELS)
def test_dequantize_nf4_holds_nothing(implementation, double_quant, figure):
    q = nf4_shapes(4096, 14336, double_quant=double_quant)
    serving_nf4(implementation, q)
    dequantize = jax.jit(functools.partial(dequantize_nf4, implementation=implementation))
    # The codes at most: neither the absmax of blocks, 4 MB, nor anything of the weight's size.
    name = f"dequantize_nf4, {implementation}{', double quantisation' if double_quant else ''}"
    check_temporaries(name, dequantize.lower(q).compile(), 2**16, figure)


@pytest.mark.parametrize("double_quant", (False, True))
@pytest.mark.parametrize("implementation", NF4_KERNELS)
def test_nf4_linear_holds_one_weight(implementation, double_quant, figure):
    rows, out, features = 4096, 4096, 14336
    q = nf4_shapes(out, features, double_quant)
    serving_nf4(implementation, q)

    def both(x, q, dy):
        y, vjp = jax.vjp(lambda x: nf4_linear(x, q, implementation=implementation), x)
        return y, vjp(dy)

    compiled = jax.jit(both).lower(shaped(rows, features), q, shaped(rows, out)).compile()
    # In 16 bits, in one pass after the other, and half as much for cuBLAS.
    name = f"nf4_linear, {implementation}{', double quantisation' if double_quant else ''}"
    check_temporaries(name, compiled, 1.5 * 2 * out * features, figure)


@pytest.mark.parametrize("double_quant", (False, True))
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_quantize_nf4_holds_little(dtype, double_quant, figure):
    out, features = 4096, 14336
    quantize = jax.jit(functools.partial(quantize_nf4, double_quant=double_quant))
    compiled = quantize.lower(shaped(out, features, dtype=jnp.dtype(dtype))).compile()
    # The absmax of blocks twice, and of a float32 weight the indices, a byte each.
    most = (2 * 4 / 64 + (dtype == "float32")) * out * features
    name = f"quantize_nf4, {dtype}{', double quantisation' if double_quant else ''}"
    check_temporaries(name, compiled, most, figure)


@pytest.mark.parametrize("options", ((), (("window", 100), ("softcap", 2.0))))
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_cached_attention_holds_one_cache(dtype, options, figure):
    batch, capacity, heads, kv_heads, head_dim = 8, 4096, 32, 8, 128
    kind = jnp.dtype(dtype)
    q, cache = (
        shaped(batch, 1, heads, head_dim, dtype=kind),
        shaped(batch, capacity, kv_heads, head_dim, dtype=kind),
    )
    attend = jax.jit(functools.partial(cached_attention, **dict(options)))
    compiled = attend.lower(q, cache, cache, shaped(batch, dtype=jnp.int32)).compile()
    # Keys or values as their product wants them, scores, and what is for cuBLAS; not both caches.
    most = 2 * kind.itemsize * math.prod(cache.shape)
    check_temporaries(f"cached_attention, {dtype} {dict(options) or ''}", compiled, most, figure)


@pytest.mark.parametrize("transposed", (True, False))
@pytest.mark.parametrize(
    ("rows", "out", "ks", "start"),
    (
        (16384, 8192, (2048, 64), 0),
        (16384, 2048, (8192, 8192, 64), 0),
        (4104, 576, (1536, 24), 0),  # nothing is a multiple of a tile
        (2056, 320, (192, 40), 64),
    ),
)
def test_sums_of_products_in_one_kernel(rows, out, ks, start, transposed, figure):
    """Mosaic's, with each tiling. The last left operand is wider than what is read of it."""
    serving_lora("mosaic")
    width = start + (64 if start else ks[-1])
    lefts = random_arrays([(rows, k) for k in ks[:-1]] + [(rows, width)], jnp.bfloat16)
    rights = random_arrays([(out, k) if transposed else (k, out) for k in ks], jnp.bfloat16)
    starts = [0] * (len(ks) - 1) + [start]

    def plain(lefts, rights):
        parts = [left[:, s : s + k] for left, s, k in zip(lefts, starts, ks, strict=True)]
        rights = [right.T for right in rights] if transposed else rights
        joined = [
            jnp.concatenate(sides, axis).astype(jnp.float32) for axis, sides in ((1, parts), (0, rights))
        ]
        return jnp.matmul(*joined, precision="highest")

    # Once: timing ways to multiply in float32 takes longer than all else.
    compiled = jax.jit(plain).lower(lefts, rights).compile({"xla_gpu_autotune_level": 0})
    expected, errors = compiled(lefts, rights), []
    for tiling, _ in TILINGS:
        run = functools.partial(mosaic_sum_of_products, transposed=transposed, tiling=tiling, starts=starts)
        errors.append(relative(jax.jit(run)(lefts, rights), expected))
    case = f"{rows} x {' + '.join(map(str, ks))} x {out}"
    figure(f"sums in one kernel, {case}: errors", " ".join(f"{error:.1e}" for error in errors))
    assert max(errors) <= 3e-3


@pytest.mark.parametrize("implementation", lora_implementations())
def test_the_layer_after_a_gate(implementation, figure):
    """Down of Llama-3.2-1B. Triton's backward kernel writes over its operands, and gate and up live on."""
    serving_lora(implementation)
    rows, features, out, rank = 16384, 8192, 2048, 32
    gate, up, weight, dy = random_arrays(
        [(rows, features), (rows, features), (out, features), (rows, out)], jnp.bfloat16
    )
    weight = weight / features**0.5
    a, b = random_arrays([(rank, features), (out, rank)], jnp.float32)
    a, b = a / features**0.5, b / rank**0.5

    def fast(weight, gate, up, a, b):
        return swiglu_lora_linear(gate, up, weight, Adapter(a, b, 0.5), implementation=implementation)

    def plain(weight, gate, up, a, b):
        return reference_lora_linears(jax.nn.silu(gate) * up, [weight], [Adapter(a, b, 0.5)])[0]

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, weight, gate, up, a, b, dy):
        gate, up = 2 * gate, 2 * up  # made in this program, so that XLA may have them overwritten
        y, vjp = jax.vjp(functools.partial(function, weight), gate, up, a, b)
        gradients, gate, up = jax.lax.optimization_barrier((vjp(dy), gate, up))
        return [y, *gradients], [gate, up]

    arguments = (weight, gate, up, a, b, dy)
    found, later = run(fast, *arguments)
    for now, before in zip(later, (gate, up), strict=True):
        np.testing.assert_array_equal(np.asarray(now, np.float32), np.asarray(2 * before, np.float32))
    again, _ = run(fast, *arguments)
    assert max(map(relative, again, found)) <= 1e-3
    del again, later
    expected, _ = run(plain, *(x.astype(jnp.float32) for x in arguments))
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    figure(
        f"swiglu_lora_linear {implementation}: errors of y, dgate, dup, da, db",
        " ".join(f"{error:.1e}" for error in errors),
    )
    assert max(errors) <= TOLERANCES["bfloat16"]


@pytest.mark.parametrize("implementation", lora_implementations())
def test_the_layer_after_a_gate_on_more_than_2_to_the_31_elements(implementation):
    """Only the last rows have a gradient: it and all sums are those of these rows alone."""
    needing(70)
    serving_lora(implementation)
    rows, features, rank, last = 2**18 + 256, 8192, 32, 1024
    assert rows * features > 2**31
    gate, up = random_arrays([(rows, features)] * 2, jnp.bfloat16)
    weight, dy = random_arrays([(features, features), (last, features)], jnp.bfloat16)
    a, b = random_arrays([(rank, features), (features, rank)], jnp.float32)
    weight, a, b = weight / features**0.5, a / features**0.5, b / rank**0.5

    @jax.jit
    def run(gate, up, dy):
        def layer(gate, up, a, b):
            return swiglu_lora_linear(gate, up, weight, Adapter(a, b, 0.5), implementation=implementation)

        y, vjp = jax.vjp(layer, gate, up, a, b)
        gradients = vjp(jnp.pad(dy, ((y.shape[0] - last, 0), (0, 0))))
        # Otherwise XLA makes no more than what is looked at.
        y, (dgate, dup, da, db) = jax.lax.optimization_barrier((y, gradients))
        others = [jnp.any(x[:-last] != 0) for x in (dgate, dup)]
        return [y[-last:], dgate[-last:], dup[-last:], da, db], others

    found, others = run(gate, up, dy)
    expected, _ = run(gate[-last:], up[-last:], dy)
    assert not any(map(bool, others))
    for x, y in zip(found, expected, strict=True):
        assert relative(x, y) <= TOLERANCES["bfloat16"]


@pytest.mark.parametrize("options", ((), (("window", 100), ("softcap", 2.0))))
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_cached_attention(dtype, options, figure):
    batch, capacity, heads, kv_heads, head_dim = 8, 4096, 32, 8, 128
    q, k, v = random_arrays(
        [(batch, 1, heads, head_dim), *[(batch, capacity, kv_heads, head_dim)] * 2], jnp.dtype(dtype)
    )
    lengths = jnp.asarray([1, 2, 100, 101, 1000, 2049, capacity - 1, capacity], jnp.int32)

    def plain(q, k, v):
        window, softcap = (dict(options).get(name) for name in ("window", "softcap"))
        k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
        scores = jnp.einsum("bqnh,bsnh->bns", q, k, precision="highest") / math.sqrt(head_dim)
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        key = jnp.arange(capacity)
        visible = (key < lengths[:, None]) & (key >= lengths[:, None] - (window or capacity))
        p = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bns,bsnh->bnh", p, v, precision="highest")[:, None]

    found = jax.jit(functools.partial(cached_attention, **dict(options)))(q, k, v, lengths)
    expected = jax.jit(plain)(*(x.astype(jnp.float32) for x in (q, k, v)))
    error = relative(found, expected)
    figure(f"cached_attention, {dtype} {dict(options) or ''}: error", f"{error:.1e}")
    assert found.dtype == dtype and error <= TOLERANCES[dtype]


def plain_rms_norm(x, weight):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight


def plain_rope(x, cos, sin):
    """By complex numbers."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jax.lax.complex(first, second) * jax.lax.complex(cos, sin)[:, :, None]
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def turned(function):
    """rope or plain_rope by random angles."""
    return lambda x, angle: function(x, jnp.cos(angle), jnp.sin(angle))


def plain_geglu(gate, up):
    return gate * jax.scipy.stats.norm.cdf(gate) * up


# name: the op, its formula, and the shapes of its arguments
ELEMENTWISE = {
    "rms_norm": (functools.partial(rms_norm, epsilon=1e-5), plain_rms_norm, ((16384, 2048), (2048,))),
    "rope": (turned(rope), turned(plain_rope), ((4, 2048, 32, 128), (4, 2048, 64))),
    "swiglu": (swiglu, lambda gate, up: gate / (1 + jnp.exp(-gate)) * up, ((16384, 8192),) * 2),
    "geglu": (functools.partial(geglu, approximate=False), plain_geglu, ((16384, 8192),) * 2),
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name, dtype, figure):
    """Both passes. Angles, and the weight of the norm, are float32 and, in 16 bits, not trained."""
    op, formula, shapes = ELEMENTWISE[name]
    gated = name in ("swiglu", "geglu")
    x, dy = random_arrays([shapes[0]] * 2, jnp.dtype(dtype))
    [other] = random_arrays([shapes[1]], jnp.dtype(dtype if gated else "float32"))
    trained = 2 if gated or (name == "rms_norm" and dtype == "float32") else 1

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, x, other, dy):
        y, vjp = jax.vjp(lambda *first: function(*first, *(x, other)[trained:]), *(x, other)[:trained])
        return [y, *vjp(dy)]

    found = run(op, x, other, dy)
    expected = run(formula, *(array.astype(jnp.float32) for array in (x, other, dy)))
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    figure(f"{name}, {dtype}: errors of y, gradients", " ".join(f"{error:.1e}" for error in errors))
    assert found[0].dtype == dtype and max(errors) <= TOLERANCES[dtype]
