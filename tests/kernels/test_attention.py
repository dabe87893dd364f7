"""Attention: every implementation against the dense float32 reference, forward and gradients."""

import functools
import logging
import sys

import jax
import jax.numpy as jnp
import lorajax_kernels
import numpy as np
import pytest
from lorajax_kernels import attention, cached_attention, choose_attention
from lorajax_kernels.attention import cudnn, xla
from lorajax_kernels.device import Device, Implementation, split_over

B, H = 2, 8
# Two rows with one-token segments at both ends and in the middle, and padding; no chunk divides T = 37.
SEGMENT_IDS = np.array([[1] + [2] * 9 + [3] + [4] * 17 + [0] * 9, [1] * 24 + [2] * 12 + [3]], np.int32)
T = SEGMENT_IDS.shape[1]


def qkv(heads, kv_heads, dtype=jnp.float32, batch=B, length=T, head_dim=H, seed=0):
    """Random q, k, v and cotangent of the output."""
    random = np.random.default_rng(seed)
    shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)


@functools.partial(jax.jit, static_argnums=0)
def forward_and_gradients(function, q, k, v, cotangent, segment_ids=SEGMENT_IDS):
    """[output, dq, dk, dv] of one compiled program."""
    out, vjp = jax.vjp(lambda q, k, v: function(q, k, v, segment_ids), q, k, v)
    return [out, *vjp(cotangent)]


def assert_close(found, expected, tolerance):
    """Largest difference relative to the largest value, array by array."""
    for name, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all(), name
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error <= tolerance, f"{name}: {error:.1e}"


# Cached, so that a function already compiled is found again.
@functools.cache
def chunked(chunk, **options):
    """The XLA path cut into chunks of so many tokens, and these into sections as those of a long row are."""
    settings = {"scale": H**-0.5, "window": None, "softcap": None, "max_segments": None, "sections": 4}
    return functools.partial(xla.xla_attention, chunk=chunk, **(settings | options))


@functools.cache
def dense(**options):
    return functools.partial(attention, implementation="reference", **options)


def test_reference_is_softmax_over_visible_keys():
    q, k, v, _ = qkv(4, 2)
    out = np.asarray(jax.jit(dense(scale=0.3, window=6, softcap=1.5))(q, k, v, SEGMENT_IDS))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b, t, n in ((0, 0, 0), (0, 9, 1), (0, 10, 3), (0, 27, 2), (1, 23, 3), (1, 36, 0)):
        first = max(t - 5, int(np.flatnonzero(SEGMENT_IDS[b] == SEGMENT_IDS[b, t])[0]))
        scores = 1.5 * np.tanh(0.3 * k[b, first : t + 1, n // 2] @ q[b, t, n] / 1.5)
        p = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(out[b, t, n], p @ v[b, first : t + 1, n // 2], rtol=1e-5, atol=1e-6)


# One chunk, or several in two sections or more.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "chunk"), ((3, 3, None), (3, 3, 5), (4, 1, 8), (8, 1, None), (8, 1, 5), (9, 3, 8))
)
def test_xla_equals_reference(heads, kv_heads, chunk):
    arrays = qkv(heads, kv_heads)
    found = forward_and_gradients(chunked(chunk), *arrays)
    assert_close(found, forward_and_gradients(dense(), *arrays), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunk", "options"),
    (
        (4, {"window": 1}),
        (None, {"window": 6}),
        (4, {"window": 6}),
        (4, {"window": 500}),
        (None, {"softcap": 1.0}),
        (8, {"softcap": 1.0, "scale": 0.7, "window": 10}),
    ),
)
def test_xla_options_equal_reference(options, chunk):
    arrays = qkv(4, 2)
    found = forward_and_gradients(chunked(chunk, **options), *arrays)
    if options.get("window") == 1:  # the output is v: dq and dk are 0
        np.testing.assert_allclose(found[1], 0, atol=1e-5)
        np.testing.assert_allclose(found[2], 0, atol=1e-5)
        np.testing.assert_array_equal(found[0], jnp.repeat(arrays[2], 2, axis=2))
    else:
        assert_close(found, forward_and_gradients(dense(**options), *arrays), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize("chunk", (None, 8))
def test_half_precision_xla_is_close_to_float32_reference(chunk, dtype):
    arrays = qkv(4, 2, dtype)
    found = forward_and_gradients(chunked(chunk, softcap=20.0), *arrays)
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    wide = [x.astype(jnp.float32) for x in arrays]
    assert_close(found, forward_and_gradients(dense(softcap=20.0), *wide), 1e-2)


@pytest.mark.slow
def test_scores_beyond_float16_do_not_overflow():
    q, k, v, cotangent = qkv(2, 1, jnp.float16)
    found = forward_and_gradients(chunked(8, scale=1.0), 300 * q, 300 * k, v, cotangent)  # scores ~ 1e6
    assert np.isfinite(np.asarray(found[0], np.float32)).all()


@pytest.mark.slow
def test_default_chunks_equal_reference():
    """Rows long enough for the entry point to cut them itself."""
    arrays = qkv(2, 1, batch=1, length=700, head_dim=4)
    segment_ids = np.repeat([1, 2, 3, 0], (1, 399, 250, 50))[None]
    assert xla.default_chunk(1, 700, 2) < 700
    found = forward_and_gradients(attention, *arrays, segment_ids)
    assert_close(found, forward_and_gradients(dense(), *arrays, segment_ids), 1e-5)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("function", (dense(), chunked(None), chunked(8)), ids=("reference", "xla", "xla-8"))
def test_changing_one_segment_leaves_the_others_bit_for_bit(function, dtype):
    """Gradients too, of which a segment of one token has dv alone."""
    before, other = (qkv(4, 2, dtype, seed=seed) for seed in (0, 1))
    expected = [np.asarray(x, np.float32) for x in forward_and_gradients(function, *before)]
    for row, number in ((0, 2), (0, 3), (0, 0), (1, 1)):
        changed = np.zeros((B, T), bool)
        changed[row] = SEGMENT_IDS[row] == number
        after = [jnp.where(changed[..., None, None], 100 * b, a) for a, b in zip(before, other, strict=True)]
        found = [np.asarray(x, np.float32) for x in forward_and_gradients(function, *after)]
        for name, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
            assert np.any(a[changed] != b[changed]) or (number == 3 and name in ("dq", "dk"))
            np.testing.assert_array_equal(a[~changed], b[~changed], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)))
@pytest.mark.parametrize("function", (dense(), chunked(None), chunked(8)), ids=("reference", "xla", "xla-8"))
def test_packed_equals_separate(function, dtype, tolerance):
    arrays = [x[:1] for x in qkv(4, 2, dtype)]
    packed = forward_and_gradients(function, *arrays, SEGMENT_IDS[:1])
    parts = []
    for number in (1, 2, 3, 4, 0):
        piece = np.flatnonzero(SEGMENT_IDS[0] == number)
        document = [x[:, piece].astype(jnp.float32) for x in arrays]
        parts.append(forward_and_gradients(dense(), *document, np.ones((1, len(piece)), np.int32)))
    separate = [jnp.concatenate(pieces, axis=1) for pieces in zip(*parts, strict=True)]
    assert_close(packed, separate, tolerance)


def temporary_bytes(function, *shapes):
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def shapes_of(length, heads):
    array = jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32)
    return array, array, array, jax.ShapeDtypeStruct((1, length), jnp.int32)


def summed(function):
    return lambda *arrays: jnp.sum(jnp.square(function(*arrays)))


def test_xla_never_holds_all_scores():
    length, heads = 2048, 4
    scores = 4 * heads * length * length
    shapes = shapes_of(length, heads)
    gradient = jax.grad(summed(attention), (0, 1, 2))
    assert temporary_bytes(attention, *shapes) < scores / 3
    assert temporary_bytes(gradient, *shapes) < scores / 2
    assert temporary_bytes(summed(dense()), *shapes) >= scores  # the measure can see them


def test_single_chunk_recomputes_its_scores():
    gradient = jax.grad(summed(attention), (0, 1, 2))
    compiled = jax.jit(gradient).lower(*shapes_of(64, 2)).compile().as_text()
    assert compiled.count(" dot(") == 2 + 5  # forward: scores, output; backward: scores, dp, dq, dk, dv


def test_saving_the_named_residuals_avoids_a_second_forward_pass():
    shapes = shapes_of(64, 2)

    def products(policy):
        def gradient(*arrays):
            inner = jax.checkpoint(lambda *x: attention(*x, implementation="xla"), policy=policy)
            return jax.grad(summed(inner), (0, 1, 2))(*arrays)

        # Compiled code shows what is left once unused results are gone.
        return jax.jit(gradient).lower(*shapes).as_text().count("dot_general")

    names = jax.checkpoint_policies.save_only_these_names("attention_output", "attention_lse")
    assert products(names) == products(jax.checkpoint_policies.everything_saveable)
    assert products(names) < products(jax.checkpoint_policies.nothing_saveable)


def test_choice_names_the_first_that_can_serve_and_says_why_not_the_others(monkeypatch, caplog):
    package = sys.modules["lorajax_kernels.attention"]  # the function of that name hides it
    refusing = Implementation("picky", lambda problem, device: f"no head_dim {problem.head_dim}", None)
    monkeypatch.setattr(package, "_IMPLEMENTATIONS", (refusing, *package._IMPLEMENTATIONS))
    q, k, v, _ = qkv(4, 2)
    with caplog.at_level(logging.INFO, "lorajax_kernels"):
        for _ in range(2):
            name, refused = choose_attention(q, k, v, SEGMENT_IDS)
    assert name == "xla" and list(refused) == ["picky", "triton", "cudnn"]
    assert refused["picky"] == "no head_dim 8"
    [record] = caplog.records
    assert record.message.startswith(
        "attention: xla (not picky: no head_dim 8; not triton: it needs an NVIDIA"
    )
    with pytest.raises(ValueError, match="'picky' cannot serve: no head_dim 8"):
        attention(q, k, v, SEGMENT_IDS, implementation="picky")
    assert choose_attention(q, k, v, SEGMENT_IDS, implementation="reference").name == "reference"


def test_unknown_implementation_lists_the_known_ones():
    q, k, v, _ = qkv(4, 2)
    assert lorajax_kernels.attention_implementations() == ("triton", "cudnn", "xla", "reference")
    with pytest.raises(ValueError, match="'flash'; known: auto, triton, cudnn, xla, reference"):
        attention(q, k, v, SEGMENT_IDS, implementation="flash")


@pytest.mark.parametrize(
    ("capability", "head_dim", "max_segments", "expected"),
    (
        ((9, 0), 128, 33, "triton"),  # packed
        ((9, 0), 128, 2, "cudnn"),  # one document and padding
        ((9, 0), 64, 2, "triton"),
        ((9, 0), 128, None, "triton"),  # no bound, which cuDNN needs
        ((8, 0), 128, 2, "triton"),  # older than Hopper
        ((7, 5), 128, 2, "xla"),
    ),
)
def test_choice_follows_what_was_measured(capability, head_dim, max_segments, expected, monkeypatch):
    monkeypatch.setattr(cudnn, "_why_not_this_jax", lambda is_grouped: None)
    device = Device("a GPU", capability, 91900, no_triton="it is old" if capability < (8, 0) else None)
    q = jax.ShapeDtypeStruct((2, 256, 8, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 256, 2, head_dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    choice = choose_attention(q, k, k, ids, max_segments=max_segments, device=device)
    assert choice.name == expected


def test_choice_passes_over_what_cannot_be_split_over_devices(monkeypatch):
    monkeypatch.setattr(cudnn, "_why_not_this_jax", lambda is_grouped: None)
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in qkv(4, 2))
    options = {"max_segments": 9, "device": Device("H200", (9, 0), 91900)}
    with split_over(4):
        name, refused = choose_attention(q, k, v, SEGMENT_IDS, **options)
        assert (name, refused) == ("cudnn", {"triton": "XLA cannot split it over 4 devices"})
        with split_over(1):  # within shard_map
            assert choose_attention(q, k, v, SEGMENT_IDS, **options).name == "triton"
        named = choose_attention(q, k, v, SEGMENT_IDS, implementation="triton", **options)
        assert named.name == "triton"
    assert choose_attention(q, k, v, SEGMENT_IDS, **options).name == "triton"


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"q": (2, 37, 8)}, r"q must be \[B, T, N, H\], got shape \(2, 37, 8\)"),
        ({"k": (2, 36, 2, 8)}, r"k must be .* got shape \(2, 36, 2, 8\)"),
        ({"v": (2, 37, 1, 8)}, r"v must have the shape of k"),
        ({"q": (2, 37, 5, 8)}, r"5 heads, not a multiple of the 2 heads of k"),
        ({"segment_ids": (2, 36)}, r"segment_ids must be \[B=2, T=37\]"),
        ({"window": 0}, r"window must be at least 1, got 0"),
        ({"max_segments": 0}, r"max_segments must be at least 1, got 0"),
        ({"softcap": 0.0}, r"softcap must be positive, got 0.0"),
    ),
)
def test_arguments_that_do_not_fit_are_named(change, message):
    shapes = {"q": (2, 37, 4, 8), "k": (2, 37, 2, 8), "v": (2, 37, 2, 8), "segment_ids": (2, 37)}
    options = {name: value for name, value in change.items() if name not in shapes}
    shapes |= {name: value for name, value in change.items() if name in shapes}
    arrays = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    arrays["segment_ids"] = arrays["segment_ids"].astype(jnp.int32)
    with pytest.raises(ValueError, match=message):
        attention(**arrays, **options)


@pytest.mark.parametrize(
    ("changed", "named"), (("BTN", "q"), ("BTK", "q"), ("TNH", "q"), ("BN", "q"), ("K", "k"))
)
def test_axes_of_length_0_are_named(changed, named):
    axes = dict(zip("BTNKH", (2, 5, 4, 2, 8), strict=True)) | dict.fromkeys(changed, 0)
    q, k = ([axes[axis] for axis in name] for name in ("BTNH", "BTKH"))
    with pytest.raises(ValueError, match=f"attention: {named} must have no axis of length 0, got shape"):
        attention(jnp.zeros(q), jnp.zeros(k), jnp.zeros(k), jnp.zeros(q[:2], jnp.int32))


WRONG_OPTIONS = (
    ({"softcap": np.inf}, "softcap must be a number, finite in float32, got inf"),
    ({"softcap": np.nan}, "softcap must be a number, finite in float32, got nan"),
    ({"softcap": 1e39}, r"softcap must be a number, finite in float32, got 1e\+39"),
    ({"softcap": 0}, "softcap must be positive, got 0"),
    ({"softcap": 3e38}, r"softcap must be between 1e-15 and 1e\+15, got 3e\+38"),
    ({"scale": 1e-45}, r"scale must be between 1e-15 and 1e\+15, got 1e-45"),
    ({"scale": np.nan}, "scale must be a number, finite in float32, got nan"),
    ({"scale": -np.inf}, "scale must be a number, finite in float32, got -inf"),
    ({"window": 2.5}, "window must be an integer, got 2.5"),
    ({"window": 0}, "window must be at least 1, got 0"),
)


@pytest.mark.parametrize(
    ("options", "message"),
    (*WRONG_OPTIONS, ({"max_segments": 2.5}, "max_segments must be an integer, got 2.5")),
)
def test_options_without_a_meaning_are_named(options, message):
    q, k, v, _ = qkv(4, 2)
    with pytest.raises(ValueError, match=f"^attention: {message}"):
        attention(q, k, v, SEGMENT_IDS, **options)


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_a_window_of_any_length_sees_all(implementation):
    q, k, v, _ = qkv(4, 2)
    run = functools.partial(attention, q, k, v, SEGMENT_IDS, implementation=implementation)
    np.testing.assert_allclose(run(window=2**40), run(), rtol=1e-6, atol=1e-6)


def test_mixed_dtypes_are_refused():
    q, k, v, _ = qkv(4, 2)
    with pytest.raises(ValueError, match="got float32, bfloat16, float32"):
        attention(q, k.astype(jnp.bfloat16), v, SEGMENT_IDS)
    with pytest.raises(ValueError, match="segment_ids must be integers, got float32"):
        attention(q, k, v, SEGMENT_IDS.astype(np.float32))


@pytest.mark.parametrize("options", ({}, {"window": 4, "softcap": 1.0, "scale": 0.5}))
@pytest.mark.parametrize(("dtype", "tolerance"), ((jnp.float32, 1e-5), (jnp.float16, 1e-2)))
def test_cached_attention_equals_last_query_of_reference(options, dtype, tolerance):
    q, k, v, _ = qkv(6, 2, dtype, batch=3)
    lengths = np.array([1, 20, T])
    valid = np.arange(T) < lengths[:, None]
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    expected = np.asarray(jax.jit(dense(**options))(*wide, np.where(valid, 1, 0)))[np.arange(3), lengths - 1]
    last = q[np.arange(3), lengths - 1][:, None]
    run = jax.jit(functools.partial(cached_attention, **options))
    found = run(last, k, v, lengths)
    assert found.shape == last.shape and found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found[:, 0], np.float32), expected, atol=tolerance)
    stale = [jnp.where(valid[..., None, None], x, 1000) for x in (k, v)]
    np.testing.assert_array_equal(run(last, *stale, lengths), found)


def test_cached_attention_refuses_shapes_that_do_not_fit():
    q, k, v, _ = qkv(4, 2)
    with pytest.raises(ValueError, match=r"cached_attention needs q \[B, 1, N, H\]"):
        cached_attention(q, k, v, jnp.array([1, 2]))


def cached(change, **options):
    """cached_attention on zeros of these shapes and dtypes, but for the changes."""
    kinds = {
        "q": ((2, 1, 4, 8), jnp.float32),
        "k_cache": ((2, 5, 2, 8), jnp.float32),
        "v_cache": ((2, 5, 2, 8), jnp.float32),
        "lengths": ((2,), jnp.int32),
    }
    arrays = {
        name: jnp.zeros(change.get(name, kinds[name][0]), change.get(f"{name} dtype", kinds[name][1]))
        for name in kinds
    }
    return cached_attention(**arrays, **options)


@pytest.mark.parametrize(
    ("shapes", "message"),
    (
        ({"q": (2, 4, 8)}, r"got q \(2, 4, 8\)"),
        ({"q": (2, 1, 3, 8)}, r"got q \(2, 1, 3, 8\)"),
        ({"q": (2, 1, 4, 16)}, r"got q \(2, 1, 4, 16\)"),
        ({"k_cache": (2, 5, 8)}, r"k_cache \(2, 5, 8\)"),
        ({"k_cache": (3, 5, 2, 8), "v_cache": (3, 5, 2, 8)}, r"k_cache \(3, 5, 2, 8\)"),
        ({"k_cache": (2, 5, 2, 4), "v_cache": (2, 5, 2, 4)}, r"k_cache \(2, 5, 2, 4\)"),
        ({"v_cache": (2, 5, 2, 4)}, r"v_cache \(2, 5, 2, 4\)"),
        ({"lengths": (2, 1)}, r"lengths \(2, 1\)"),
        ({"q": (2, 1, 0, 8)}, r"q must have no axis of length 0, got shape \(2, 1, 0, 8\)"),
        ({"k_cache": (2, 5, 0, 8)}, r"k_cache must have no axis of length 0, got shape \(2, 5, 0, 8\)"),
        ({"k_cache": (2, 0, 2, 8)}, r"k_cache must have no axis of length 0, got shape \(2, 0, 2, 8\)"),
    ),
)
def test_cached_attention_names_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=f"cached_attention.* {message}"):
        cached(shapes)


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    (
        ("q", jnp.int32, "float32, bfloat16 or float16"),
        ("k_cache", jnp.int8, "floating point"),
        ("v_cache", jnp.complex64, "floating point"),
        ("lengths", jnp.float32, "integers"),
    ),
)
def test_cached_attention_names_wrong_dtypes(name, dtype, kind):
    message = f"cached_attention: {name} must be {kind}, got {jnp.dtype(dtype)}"
    with pytest.raises(ValueError, match=message):
        cached({f"{name} dtype": dtype})


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_cached_attention_names_options_without_a_meaning(options, message):
    with pytest.raises(ValueError, match=f"cached_attention: {message}"):
        cached({}, **options)


@pytest.mark.parametrize("implementation", ("xla", "reference"))
def test_ids_that_differ_beyond_32_bits_are_different_segments(implementation):
    """NumPy's, of which JAX would take the lower half."""
    q, k, v, _ = qkv(4, 2)
    far = SEGMENT_IDS.astype(np.int64) << 32
    run = functools.partial(attention, q, k, v, implementation=implementation)
    np.testing.assert_array_equal(run(far), run(SEGMENT_IDS))


@pytest.mark.parametrize("dtype", (np.int8, np.uint8, np.uint16))
def test_cached_attention_takes_lengths_of_any_integers(dtype):
    q, k, v, _ = qkv(4, 2)
    run = functools.partial(cached_attention, q[:, :1], k, v, window=4)
    np.testing.assert_array_equal(run(np.array([2, T], dtype)), run(np.array([2, T])))


def test_cached_attention_takes_a_window_of_any_length():
    q, k, v, _ = qkv(4, 2)
    run = functools.partial(cached_attention, q[:, :1], k, v, np.array([3, T]))
    np.testing.assert_array_equal(run(window=2**40), run())
