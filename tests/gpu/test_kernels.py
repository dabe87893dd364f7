"""The kernels on the GPU, each against a float32 reference on random data at real sizes."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lorajax_kernels import (
    Adapter,
    attention,
    attention_implementations,
    choose_attention,
    choose_cross_entropy,
    choose_lora,
    cross_entropy_implementations,
    dequantize_nf4,
    linear_cross_entropy,
    lora_implementations,
    lora_linears,
    quantize_nf4,
    rms_norm,
    swiglu_lora_linear,
)
from lorajax_kernels.attention.xla import default_chunk
from lorajax_kernels.lora import ARRANGEMENTS, reference_lora_linears
from lorajax_kernels.lora.mosaic import TILINGS, mosaic_sum_of_products
from lorajax_kernels.nf4 import choose_nf4

KERNELS = [name for name in attention_implementations() if name != "reference"]
MAX_SEGMENTS = 7
# Segments of every row begin elsewhere; the last one of each is padding.
ROWS = (
    (1, 700, 1, 255, 43, 24),
    (128, 128, 128, 128, 512),
    (1023, 1),
    (333, 1, 1, 1, 300, 200, 188),
)
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}


def uneven_segments() -> jax.Array:
    return jnp.asarray(np.stack([np.repeat(np.arange(len(row)), row) for row in ROWS]), jnp.int32)


def random_arrays(shapes: list[tuple[int, ...]], dtype: jnp.dtype) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(np.random.default_rng().integers(2**31)), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward_and_gradients(implementation, options, q, k, v, dout, segment_ids):
    options = {"max_segments": MAX_SEGMENTS} | dict(options)

    def attend(q, k, v):
        return attention(q, k, v, segment_ids, implementation=implementation, **options)

    out, vjp = jax.vjp(attend, q, k, v)
    return [out, *vjp(dout)]


def relative(found: jax.Array, expected: jax.Array) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


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
    ),
)
def test_attention_of_uneven_segments(implementation, heads, head_dim, dtype, options, figure):
    segment_ids = uneven_segments()
    batch, length = segment_ids.shape
    shapes = [(batch, length, n, head_dim) for n in (heads[0], heads[1], heads[1], heads[0])]
    arrays = random_arrays(shapes, jnp.dtype(dtype))
    serving(implementation, arrays[0], arrays[1], segment_ids, **dict(options))
    found = forward_and_gradients(implementation, options, *arrays, segment_ids)
    wide = [x.astype(jnp.float32) for x in arrays]
    expected = forward_and_gradients("reference", options, *wide, segment_ids)
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    case = f"{implementation} N{heads[0]} K{heads[1]} H{head_dim} {dtype} {dict(options) or ''}"
    figure(f"attention, {case}: errors of out, dq, dk, dv", " ".join(f"{error:.1e}" for error in errors))
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    assert max(errors) <= TOLERANCES[dtype]


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_segment_does_not_touch_the_others(implementation):
    segment_ids = uneven_segments()
    batch, length = segment_ids.shape
    q, k, v, other = random_arrays([(batch, length, n, 128) for n in (8, 2, 2, 8)], jnp.bfloat16)
    serving(implementation, q, k, segment_ids)
    attend = jax.jit(
        lambda q, k, v: attention(
            q, k, v, segment_ids, max_segments=MAX_SEGMENTS, implementation=implementation
        )
    )
    changed = np.asarray(segment_ids == 1)
    where = jnp.asarray(changed)[..., None, None]
    before = np.asarray(attend(q, k, v), np.float32)
    poisoned = (
        jnp.where(where, 100 * a, b) for a, b in ((other, q), (other[:, :, :2], k), (other[:, :, :2], v))
    )
    after = np.asarray(attend(*poisoned), np.float32)
    assert (before[changed] != after[changed]).any()
    np.testing.assert_array_equal(before[~changed], after[~changed])


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
    stats = jax.local_devices()[0].memory_stats()
    if stats["bytes_limit"] < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
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


def test_linear_cross_entropy_at_real_size(figure):
    """Each implementation against dense float32 logits, and against the others."""
    rows, features, vocabulary = 4096, 2048, 128256
    x, head = random_arrays([(rows, features), (vocabulary, features)], jnp.bfloat16)
    head = head / features**0.5
    targets = jax.random.randint(jax.random.key(0), (rows,), 0, vocabulary)
    weights = (jnp.arange(rows) % 3 > 0).astype(jnp.float32)

    def dense(x, head):
        logits = jnp.matmul(x, head.T, precision=jax.lax.Precision.HIGHEST)
        at_target = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        return jnp.sum((jax.nn.logsumexp(logits, axis=1) - at_target) * weights)

    expected = jax.jit(jax.value_and_grad(dense))(x.astype(jnp.float32), head.astype(jnp.float32))
    found = {}
    for name in cross_entropy_implementations():
        try:
            choose_cross_entropy(x.dtype, implementation=name)
        except ValueError as error:
            figure(f"linear_cross_entropy {name}", str(error))
            continue

        def loss(x, head, name=name):
            return linear_cross_entropy(x, head, targets, weights, implementation=name)[0]

        compiled = jax.jit(jax.value_and_grad(loss)).lower(x, head).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        figure(f"linear_cross_entropy {name}: MB of temporary memory", f"{temporary / 1e6:.0f} (< 700)")
        assert temporary < 700e6
        found[name] = compiled(x, head)

    for name, other in itertools.combinations([*found, "dense"], 2):
        (a, da), (b, db) = ((found | {"dense": expected})[each] for each in (name, other))
        errors = abs(float(a / b) - 1), relative(da, db)
        figure(f"linear_cross_entropy {name} against {other}: loss, dx", "{:.1e} {:.1e}".format(*errors))
        assert errors[0] <= 1e-3 and errors[1] <= 1e-2


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
    assert max(errors) <= 1e-2


@pytest.mark.parametrize("double_quant", (False, True))
@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "float32"))
def test_nf4_implementations_dequantize_alike_bit_for_bit(dtype, double_quant):
    [w] = random_arrays([(4096, 14336)], jnp.bfloat16)
    q = quantize_nf4(w, double_quant)
    try:
        choose_nf4(q, dtype, implementation="triton")
    except ValueError as error:
        pytest.skip(str(error))
    words = jnp.uint32 if dtype == "float32" else jnp.uint16
    bits = [
        jax.jit(lambda q, name=name: dequantize_nf4(q, dtype, implementation=name).view(words))(q)
        for name in ("triton", "xla")
    ]
    assert bits[0].shape == w.shape
    np.testing.assert_array_equal(*map(np.asarray, bits))


@pytest.mark.parametrize("quantised, normed", ((False, False), (True, False), (False, True)))
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_layers_with_adapters(arrangement, quantised, normed, figure):
    """Gate and up of Llama-3.2-1B on 4096 tokens, the second with dropout, after a norm or without."""
    rows, features, out, rank = 4096, 2048, 8192, 32
    x, dy, *weights = random_arrays([(rows, features), (rows, out), *[(out, features)] * 2], jnp.bfloat16)
    weights = [weight / features**0.5 for weight in weights]
    if quantised:
        weights = [quantize_nf4(weight) for weight in weights]
    a, b = random_arrays([(rank, features), (out, rank)], jnp.float32)
    a, b = a / features**0.5, b / rank**0.5
    norm = (1 + 0.1 * x[0].astype(jnp.float32), 1e-5) if normed else None

    def run(function, x, dy):
        @jax.jit
        def forward_and_gradients(x, a, b, dy):
            def forward(x, a, b):
                adapters = [Adapter(a, b, 0.5), Adapter(a, b, 0.5, 0.1, jax.random.key(0))]
                return function(x, weights, adapters)

            ys, vjp = jax.vjp(forward, x, a, b)
            return *ys, *vjp((dy, dy))

        return forward_and_gradients(x, a, b, dy)

    def plain(x, weights, adapters):
        x = x if norm is None else rms_norm(x, norm[0], epsilon=norm[1])
        return reference_lora_linears(x, weights, adapters)

    found = run(functools.partial(lora_linears, arrangement=arrangement, norm=norm), x, dy)
    expected = run(plain, x.astype(jnp.float32), dy.astype(jnp.float32))
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    case = f"{arrangement}{', NF4' if quantised else ''}{', after a norm' if normed else ''}"
    figure(f"lora_linears {case}: errors of y, y, dx, da, db", " ".join(f"{error:.1e}" for error in errors))
    assert max(errors) <= 1e-2


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
    assert max(errors) <= 1e-2
