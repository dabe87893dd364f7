"""Linear cross-entropy against dense float32 logits, forward and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lorajax_kernels import cross_entropy_implementations, linear_cross_entropy, quantize_nf4
from lorajax_kernels.cross_entropy import choose_cross_entropy, default_chunk, even_chunks
from lorajax_kernels.cross_entropy import triton as host
from lorajax_kernels.cross_entropy.reference import reference_linear_cross_entropy
from lorajax_kernels.cross_entropy.triton import Tiling, triton_loss_and_gradient
from lorajax_kernels.cross_entropy.xla import xla_loss_and_gradient
from lorajax_kernels.device import Device, Implementation

N, D, V = 37, 12, 50


def inputs(dtype=jnp.float32, rows=N, seed=0):
    """x, head, targets, weights; three rows in ten do not count and have target -100."""
    random = np.random.default_rng(seed)
    weights = np.where(random.random(rows) < 0.3, 0, random.choice([1.0, 0.5, 2.0], rows))
    targets = np.where(weights == 0, -100, random.integers(0, V, rows))
    x, head = random.normal(size=(rows, D)), random.normal(size=(V, D))
    return jnp.asarray(x, dtype), jnp.asarray(head, dtype), jnp.asarray(targets), jnp.asarray(weights)


def dense_loss(*arrays, **options):
    return reference_linear_cross_entropy(*arrays, **options)[0]


def loss_and_gradients(function, x, head, targets, weights, scale=1.0):
    """(loss, dx, dhead) of one compiled program."""

    @jax.jit
    def run(x, head, targets, weights):
        loss, vjp = jax.vjp(lambda x, head: function(x, head, targets, weights), x, head)
        return (loss, *vjp(jnp.float32(scale)))

    return run(x, head, targets, weights)


def fused_loss(**options):
    return lambda *arrays: linear_cross_entropy(*arrays, **options)[0]


def assert_close(found, expected, tolerance):
    """Largest difference relative to the largest value, array by array."""
    for name, a, b in zip(("loss", "dx", "dhead"), found, expected, strict=False):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("chunk", "softcap"), ((None, None), (37, 3.0), (10, None), (10, 3.0), (1, 3.0)))
def test_equals_dense_logits(chunk, softcap):
    arrays = inputs()
    expected = loss_and_gradients(functools.partial(dense_loss, softcap=softcap), *arrays, scale=0.7)
    trained = fused_loss(chunk=chunk, softcap=softcap, trainable_head=True)
    assert_close(loss_and_gradients(trained, *arrays, scale=0.7), expected, 1e-5)
    frozen = loss_and_gradients(fused_loss(chunk=chunk, softcap=softcap), *arrays, scale=0.7)
    assert_close(frozen[:2], expected, 1e-5)
    assert not np.any(frozen[2])
    loss, weight = jax.jit(functools.partial(linear_cross_entropy, chunk=chunk, softcap=softcap))(*arrays)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    assert weight == arrays[3].sum()
    assert loss.dtype == weight.dtype == jnp.float32 and loss.shape == weight.shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_half_precision_is_close_to_float32(dtype):
    x, head, targets, weights = inputs(dtype)
    found = loss_and_gradients(fused_loss(chunk=16, trainable_head=True), x, head, targets, weights)
    assert [y.dtype for y in found] == [jnp.float32, dtype, dtype]
    wide = x.astype(jnp.float32), head.astype(jnp.float32), targets, weights
    assert_close(found, loss_and_gradients(dense_loss, *wide), 1e-2)


@pytest.mark.slow
def test_head_may_be_wider_than_x():
    x, head, targets, weights = inputs()
    found = loss_and_gradients(
        fused_loss(trainable_head=True), x.astype(jnp.bfloat16), head, targets, weights
    )
    assert found[1].dtype == jnp.bfloat16 and found[2].dtype == jnp.float32
    assert_close(found, loss_and_gradients(dense_loss, x, head, targets, weights), 2e-2)


@pytest.mark.slow
def test_float16_logits_and_head_gradients_do_not_overflow():
    x, head, targets, weights = inputs(jnp.float16, rows=400)
    x, head, targets = 300 * jnp.abs(x), 100 * head, jnp.minimum(targets, 0)  # logits beyond 65504
    exact = loss_and_gradients(
        dense_loss, x.astype(jnp.float32), head.astype(jnp.float32), targets, weights, 1e-3
    )
    assert exact[0] > 65504 and np.abs(exact[2]).max() > 65504 * 1e-3
    found = loss_and_gradients(fused_loss(chunk=64, trainable_head=True), x, head, targets, weights, 1e-3)
    assert_close(found, exact, 1e-2)


def test_rows_of_weight_0_count_for_nothing_whatever_they_hold():
    x, head, targets, weights = inputs()
    function = fused_loss(chunk=8, trainable_head=True)
    expected = loss_and_gradients(function, x, head, targets, weights)
    idle = weights == 0
    changed = jnp.where(idle[:, None], jnp.nan, x), head, jnp.where(idle, V + 7, targets), weights
    for a, b in zip(loss_and_gradients(function, *changed), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.any(np.asarray(expected[1])[idle])


def test_no_row_counts():
    x, head, targets, weights = inputs()
    for trainable_head in (False, True):
        function = fused_loss(chunk=8, trainable_head=trainable_head)
        assert not any(map(np.any, loss_and_gradients(function, x, head, targets, 0 * weights)))
    assert jax.jit(linear_cross_entropy)(x[:0], head, targets[:0], weights[:0]) == (0, 0)


@pytest.mark.parametrize("target", (V, -1, -100))
def test_target_out_of_range_that_counts_is_nan(target):
    x, head, targets, weights = inputs()
    row = int(jnp.argmax(weights))
    loss, _ = jax.jit(linear_cross_entropy)(x, head, targets.at[row].set(target), weights)
    assert np.isnan(loss)


def inner_jaxprs(jaxpr):
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                item = getattr(item, "jaxpr", item)
                if hasattr(item, "eqns"):
                    yield equation, item


def products(jaxpr, conditional=False):
    """[inside a cond?] for each matrix product of a jaxpr and of those inside it."""
    found = [conditional for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    for equation, inner in inner_jaxprs(jaxpr):
        found += products(inner, conditional or equation.primitive.name == "cond")
    return found


@pytest.mark.parametrize(("differentiate", "trainable_head", "expected"), ((0, 0, 1), (1, 0, 2), (1, 1, 3)))
def test_makes_only_the_products_it_needs_and_none_for_idle_chunks(differentiate, trainable_head, expected):
    function = fused_loss(chunk=8, trainable_head=bool(trainable_head))
    if differentiate:
        function = jax.grad(function)
    assert products(jax.make_jaxpr(function)(*inputs()).jaxpr) == [True] * expected


def test_only_residual_of_a_frozen_head_is_dx():
    x, head, targets, weights = inputs(jnp.bfloat16)
    _, vjp = jax.vjp(lambda x: linear_cross_entropy(x, head, targets, weights)[0], x)
    large = [leaf for leaf in jax.tree.leaves(vjp) if leaf.size > N]
    assert [(leaf.shape, leaf.dtype) for leaf in large] == [((N, D), jnp.bfloat16)]


@pytest.mark.parametrize("trainable_head", (False, True))
def test_never_holds_all_logits(trainable_head):
    rows, width, vocab = 8192, 32, 32768
    shapes = (
        jax.ShapeDtypeStruct((rows, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )

    def temporary_bytes(function):
        gradient = jax.value_and_grad(function, (0, 1))
        return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * rows * vocab
    assert temporary_bytes(fused_loss(chunk=256, trainable_head=trainable_head)) < logits / 10
    assert temporary_bytes(fused_loss(trainable_head=trainable_head)) < logits * 0.8
    assert temporary_bytes(dense_loss) >= logits  # the measure can see them


@pytest.mark.parametrize(
    ("vocab", "dtype", "rows"),
    (
        (50, "bfloat16", 2684288),
        (32000, "float32", 2048),
        (128256, "float16", 512),
        (128256, "bfloat16", 1024),
        (10**6, "float32", 128),
    ),
)
def test_default_chunk_holds_256_mib_of_logits_or_128_rows(vocab, dtype, rows):
    assert default_chunk(vocab, jnp.dtype(dtype)) == rows


@pytest.mark.parametrize(
    ("rows", "limit", "expected"),
    (
        (16384, 1024, (16, 1024)),
        (16384, 2688, (7, 2344)),  # not 2341, of which XLA would copy the logits to fill up a tile
        (37, 1024, (1, 40)),
        (37, 37, (1, 37)),
        (37, 10, (4, 10)),
        (1025, 1024, (2, 520)),
        (0, 128, (1, 8)),
    ),
)
def test_chunks_are_few_even_and_whole_tiles(rows, limit, expected):
    assert even_chunks(rows, limit) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"head": jnp.zeros((V, D + 1))}, r"x must be \[N, D\] and head \[V, D\], got shapes"),
        ({"targets": jnp.zeros(N + 1, jnp.int32)}, r"targets must be \[N=37\] to fit x, got shape \(38,\)"),
        ({"weights": jnp.zeros((N, 1))}, r"weights must be \[N=37\] to fit x, got shape \(37, 1\)"),
        ({"targets": jnp.zeros(N)}, "targets must be integers, got float32"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"chunk": 1.5}, "chunk must be an integer, got 1.5"),
        ({"softcap": -1.0}, "softcap must be positive, got -1.0"),
        ({"softcap": np.inf}, "softcap must be a number, finite in float32, got inf"),
        ({"head": jnp.zeros((0, D))}, r"head must have no axis of length 0, got shape \(0, 12\)"),
        (
            {"x": jnp.zeros((N, 0)), "head": jnp.zeros((V, 0))},
            r"head must have no axis of length 0, got shape \(50, 0\)",
        ),
        ({"head": quantize_nf4(jnp.ones((V, D)))}, "head must be an array, got NF4Weight"),
        ({"x": [1.0]}, "x must be an array, got list"),
        ({"targets": [1] * N}, "targets must be an array, got list"),
        ({"softcap": 3e38}, r"softcap must be between 1e-15 and 1e\+15, got 3e\+38"),
        ({"softcap": 1e-39}, r"softcap must be between 1e-15 and 1e\+15, got 1e-39"),
        *(
            ({"x": jnp.zeros((N, D), dtype)}, f"x must be float32, bfloat16 or float16, got {dtype}")
            for dtype in ("int32", "bool", "float8_e4m3fn", "complex64")
        ),
        *(
            ({"head": jnp.zeros((V, D), dtype)}, f"head must be floating point, got {dtype}")
            for dtype in ("int8", "complex64")
        ),
        *(
            ({"weights": jnp.ones(N, dtype)}, f"weights must be floating point, got {dtype}")
            for dtype in ("int32", "bool", "complex64")
        ),
    ),
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = dict(zip(("x", "head", "targets", "weights"), inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("dtype", ("int64", "uint64", "uint32"))
def test_targets_beyond_32_bits_are_no_index(dtype):
    """NumPy's, of which JAX would take the lower half."""
    x, head, targets, weights = inputs()
    right = np.maximum(targets, 0).astype(dtype)
    assert linear_cross_entropy(x, head, right, weights) == linear_cross_entropy(x, head, targets, weights)
    far = np.array(right)
    far[np.argmax(weights != 0)] += np.array(2**32 if dtype != "uint32" else 2**31, dtype)
    assert np.isnan(linear_cross_entropy(x, head, far, weights)[0])


@pytest.mark.parametrize("weight", (2.0**-20, 1.0, 2.0**20))
def test_float16_bears_weights_of_any_size(weight):
    """The gradient of their mean: neither lost nor infinite on the way."""
    x, head, targets, weights = inputs()
    x, head = x.astype(jnp.float16), head.astype(jnp.float16)

    def mean(weights):
        def loss(x):
            total, count = linear_cross_entropy(x, head, targets, weights)
            return total / count

        return jax.grad(loss)(x)

    np.testing.assert_array_equal(mean(weights * weight), mean(weights))


@pytest.mark.parametrize("weight", (1e-8, 1.0, 1e5))
def test_float16_head_gradients_bear_weights_of_any_size(weight):
    """x of float16 times the weight would be nothing, or infinite."""
    x, head, targets, weights = inputs()

    def gradient(x, weights):
        loss = functools.partial(linear_cross_entropy, trainable_head=True)
        return jax.grad(lambda head: loss(x, head, targets, weights)[0])(head)

    expected = gradient(x.astype(jnp.float16).astype(jnp.float32), weights) * weight
    error = gradient(x.astype(jnp.float16), weights * weight) - expected
    assert np.abs(error).max() <= 2e-3 * np.abs(expected).max()


def test_a_softcap_of_numpy_stays_a_float32_s():
    arrays = inputs()
    with jax.enable_x64(True):
        loss, _ = linear_cross_entropy(*arrays, softcap=np.float64(3))
        gradient = jax.grad(lambda x: linear_cross_entropy(x, *arrays[1:], softcap=np.float64(3))[0])(
            arrays[0]
        )
    assert (loss.dtype, gradient.dtype) == (jnp.float32, jnp.float32)


TILINGS = (Tiling(block=16, num_warps=4), Tiling(block=64, num_warps=4), Tiling(block=16384, num_warps=32))


# Places after the end of a row may overflow.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("softcap", (None, 3.0))
@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: str(tiling.block))
def test_triton_equals_xla(run_on_cpu, tiling, softcap):
    """Rows of several blocks, a part of one, and exactly one; a target in each; filled up."""
    run_on_cpu(host.__name__, "lorajax_kernels.cross_entropy.triton_kernels")
    x, head, targets, weights = inputs()
    logits = jnp.pad(jnp.einsum("nd,vd->nv", x, head), ((0, 0), (0, 6)))
    targets = targets.at[0].set(V).at[1].set(-1)  # out of range, and counting
    weights = weights.at[:2].set(1)
    options = {"vocab": V, "softcap": softcap, "dtype": logits.dtype}
    loss, gradient = triton_loss_and_gradient(logits, targets, weights, tiling=tiling, **options)
    expected, expected_gradient = xla_loss_and_gradient(logits, targets, weights, **options)
    assert np.isnan(loss[:2]).all() and np.isnan(expected[:2]).all()
    np.testing.assert_allclose(loss[2:], expected[2:], rtol=1e-5, atol=1e-5)
    counts = np.asarray(weights != 0)
    np.testing.assert_allclose(gradient[counts], expected_gradient[counts], atol=1e-6)
    np.testing.assert_array_equal(gradient[~counts], logits[~counts])
    assert expected_gradient.shape == logits.shape and not np.any(gradient[:, V:])


def test_whole_loss_through_triton(run_on_cpu, monkeypatch):
    run_on_cpu(host.__name__, "lorajax_kernels.cross_entropy.triton_kernels")
    monkeypatch.setattr(host, "TILING", TILINGS[0])
    arrays = inputs()
    expected = loss_and_gradients(dense_loss, *arrays)
    monkeypatch.setattr(host, "why_not", lambda problem, device: None)
    monkeypatch.setattr(
        "lorajax_kernels.cross_entropy._IMPLEMENTATIONS",
        (Implementation("triton", host.why_not, triton_loss_and_gradient),),
    )
    found = loss_and_gradients(fused_loss(chunk=16, trainable_head=True), *arrays)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("vocab, width", ((48, 48), (49, 56), (V, 56)))
def test_logits_are_whole_multiples(vocab, width):
    """Others XLA would copy to fill them up, and once more to take that away."""
    x, head, targets, weights = inputs(jnp.bfloat16)
    targets = jnp.clip(targets, -100, vocab - 1)

    def shapes(jaxpr):
        found = [
            equation.outvars[0].aval.shape
            for equation in jaxpr.eqns
            if equation.primitive.name == "dot_general"
        ]
        return found + [shape for _, inner in inner_jaxprs(jaxpr) for shape in shapes(inner)]

    arrays = x, head[:vocab], targets, weights
    assert shapes(jax.make_jaxpr(jax.grad(fused_loss()))(*arrays).jaxpr) == [(40, width), (40, D)]
    found, expected = (loss_and_gradients(function, *arrays) for function in (fused_loss(), dense_loss))
    assert_close(found[:2], expected, 2e-2)


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("softcap", (None, 30.0))
@pytest.mark.parametrize("name", ("loss_and_gradient_kernel", "loss_and_gradient_kernel_for_0_3"))
def test_triton_compiles_without_a_gpu(compile_kernel, name, softcap, capability):
    from lorajax_kernels.cross_entropy import triton_kernels

    types = {
        "logits_ptr": "*bf16",
        "targets_ptr": "*i32",
        "weights_ptr": "*fp32",
        "losses_ptr": "*fp32",
        "gradient_ptr": "*bf16",
    }
    kernel = getattr(triton_kernels, name)
    compiled = compile_kernel(
        kernel,
        capability,
        {argument: types[argument] for argument in types if argument in kernel.arg_names},
        {"VOCAB": 50257, "WIDTH": 50264, "SOFTCAP": softcap, "BLOCK": host.TILING.block},
        host.TILING.num_warps,
        1,
    )
    ptx = compiled.asm["ptx"]
    assert "local" not in ptx  # no spills
    # Eight logits at a time, but for the target's, though the vocabulary is odd.
    assert ptx.count("ld.global.v4.b32") == 8 and ptx.count("st.global.v4.b32") == 4
    assert ptx.count("ld.global.b16") == 1 and "st.global.b16" not in ptx


def test_choice_follows_the_device():
    hopper = Device("H200", (9, 0), 91900)
    assert choose_cross_entropy(jnp.bfloat16, device=hopper).name == "triton"
    assert choose_cross_entropy(jnp.float16, device=hopper).name == "xla"
    assert choose_cross_entropy(jnp.bfloat16, softcap=30.0, device=hopper).name == "triton"
    _, refused = choose_cross_entropy(jnp.bfloat16, softcap=1e6, device=hopper)
    assert refused == {"triton": "it takes softcaps up to 10000, not 1e+06"}
    assert choose_cross_entropy(jnp.bfloat16).name == "xla"  # here
    assert cross_entropy_implementations() == ("triton", "xla")
    with pytest.raises(ValueError, match="implementation 'triton' cannot serve: it writes .* float32"):
        choose_cross_entropy(jnp.float32, implementation="triton", device=hopper)


@pytest.mark.parametrize(
    ("dtype", "vocab"), (("int8", 256), ("uint8", 256), ("uint16", 2**16), ("int16", 70_000))
)
def test_targets_of_any_integers(dtype, vocab):
    """Of which the size of the vocabulary is none."""
    x, head = jnp.ones((4, 3)), jnp.linspace(-1, 1, 3 * vocab).reshape(vocab, 3)
    targets = np.array([0, 1, 2, 127])
    expected = linear_cross_entropy(x, head, targets, jnp.ones(4))[0]
    for function in (linear_cross_entropy, reference_linear_cross_entropy):
        found = function(x, head, targets.astype(dtype), jnp.ones(4))[0]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
