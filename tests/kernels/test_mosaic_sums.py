"""Sums of products in one Mosaic GPU kernel: interpreted, and compiled for a GPU that is not there."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lorajax_kernels.device import Device, Implementation
from lorajax_kernels.lora import (
    Adapter,
    choose_lora,
    gradient,
    lora_linears,
    mosaic,
    reference_lora_linears,
    swiglu_lora_linear,
)
from lorajax_kernels.lora.mosaic import Tiling, mosaic_sum_of_products, tiling_for

from lorajax.memory.elsewhere import environment_there

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="JAX' CUDA plugin is not installed (lorajax[plan])",
)
needs_jax_0_11 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="it is for JAX 0.11")
H100 = Device("NVIDIA H100", (9, 0), multiprocessors=132)
SMALL = Tiling(columns=128, stages=3)
ANYWHERE = Implementation("mosaic", lambda *_: None, gradient.XLA._replace(sums=True))
# In a process of its own: JAX' plugin is noisy without a GPU.
THERE = """
import contextlib, jax, jax.numpy as jnp
from jax.experimental import topologies
from lorajax.memory.targets import find_target
from lorajax_kernels.lora import mosaic
from lorajax_kernels.lora.mosaic import mosaic_sum_of_products, tiling_for

topology = topologies.get_topology_desc(
    platform="cuda", topology_name="", target_config=find_target("h100").config, topology="1x1x1"
)
mesh = topologies.make_mesh(topology, (1,), ("x",))
there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
"""
LENGTH = """
arrays = [jax.ShapeDtypeStruct((2048, 64), jnp.bfloat16, sharding=there) for _ in range(2)]


def run(left, right):
    tiling = tiling_for(2048, 2048, (64,), 132)
    return mosaic_sum_of_products([left], [right], transposed=True, tiling=tiling, processors=132)


lowered = jax.jit(run).lower(*arrays)
lowered.compile()
print(len(lowered.as_text()))
"""
COMPILATION = """
def compiled(rows, out, ks, transposed, dtype):
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=there)

    def run(lefts, rights):
        tiling = tiling_for(rows, out, ks, 132)
        return mosaic_sum_of_products(lefts, rights, transposed=transposed, tiling=tiling, processors=132)

    rights = [array(out, k) if transposed else array(k, out) for k in ks]

    def lower():
        return jax.jit(lambda *operands: run(*operands)).lower([array(rows, k) for k in ks], rights)

    lowered = lower()
    jax.clear_caches()
    mosaic._lowered.cache_clear()
    program = lowered.compile()
    temporaries, kernels = program.memory_analysis().temp_size_in_bytes, program.as_text().count("mosaic_gpu")
    # As in any other process: compilation caches know it by its text.
    return temporaries == 0 and kernels >= 1 and lowered.as_text() == lower().as_text()


for case in (
    (16384, 8192, (2048, 64), True, jnp.bfloat16),
    (16384, 2048, (8192, 8192, 64), False, jnp.bfloat16),
    (4104, 576, (1536, 24), True, jnp.float16),
    (2048, 2048, (512, 32), False, jnp.bfloat16),
):
    print(compiled(*case))
"""


def normal(*shape, dtype=jnp.float32, seed=0):
    random = np.random.default_rng([seed, *shape])
    return jnp.asarray(random.standard_normal(shape) / shape[-1] ** 0.5, dtype)


def ready(results):
    """Before anything else runs: the interpreter's threads may wait for ops that are under way elsewhere."""
    return jax.block_until_ready(results)


@pytest.fixture
def interpreter(monkeypatch):
    """For `interpret`. No two threads may touch the same memory unordered, copies' included."""
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(f"JAX {jax.__version__} has no interpreter for clusters of Mosaic GPU (0.11 has)")
    from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import get_races
    from jax._src.pallas.mosaic_gpu.interpret.shared_memory import GPUSharedMemory

    wait = GPUSharedMemory.wait_smem_to_gmem
    # It compares n, a JAX array, in a callback and within a lock: that op may wait for the callback to end.
    monkeypatch.setattr(
        GPUSharedMemory, "wait_smem_to_gmem", lambda self, thread, n, reads: wait(self, thread, int(n), reads)
    )
    yield plgpu.InterpretGPUParams(detect_races=True)
    assert not get_races().races_found  # by the last kernel


@pytest.mark.parametrize(
    ("rows", "out", "ks", "tiling", "transposed"),
    (
        (256, 128, (128, 32), SMALL, True),  # one tile, and a slice that is half there
        (264, 192, (64, 24, 64), SMALL, False),  # rows and columns that are no multiple of a tile's
        (264, 192, (64, 24, 64), SMALL, True),
        (520, 320, (64, 8), Tiling(columns=192, stages=3), False),  # a tile leaves an odd number of results
        (16, 576, (64,), Tiling(columns=256, stages=2, buffers=4), True),
        (520, 64, (64, 8), Tiling(columns=128, stages=6, strip=2), True),
    ),
)
def test_sums_are_those_of_the_products(interpreter, rows, out, ks, tiling, transposed):
    lefts = [normal(rows, k, seed=i) for i, k in enumerate(ks)]
    rights = [normal(out, k, seed=9 + i) for i, k in enumerate(ks)]
    expected = sum(np.float64(a) @ np.float64(b).T for a, b in zip(lefts, rights, strict=True))
    found = mosaic_sum_of_products(
        lefts,
        rights if transposed else ready([right.T for right in rights]),
        transposed=transposed,
        tiling=tiling,
        processors=4,
        interpret=interpreter,
    )
    assert found.shape == expected.shape and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_left_operand_may_begin_at_a_later_slice(interpreter):
    x, u = normal(256, 64), normal(256, 192, seed=1)
    w, s = normal(128, 64, seed=2), normal(128, 40, seed=3)
    found = mosaic_sum_of_products(
        [x, u], [w, s], transposed=True, tiling=SMALL, starts=[0, 128], processors=2, interpret=interpreter
    )
    expected = np.float64(x) @ np.float64(w).T + np.float64(u)[:, 128:168] @ np.float64(s).T
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_halves_are_summed_in_float32(interpreter, dtype):
    lefts, rights = [normal(256, 320, dtype=dtype)] * 2, [normal(128, 320, dtype=dtype, seed=1)] * 2
    found = mosaic_sum_of_products(
        lefts, rights, transposed=True, tiling=SMALL, processors=2, interpret=interpreter
    )
    exact = 2 * jnp.einsum("rk,ok->ro", lefts[0], rights[0], preferred_element_type=jnp.float32)
    assert found.dtype == dtype
    # The sums of two orders may fall on two sides of a rounding.
    np.testing.assert_allclose(np.float32(found), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)


@pytest.fixture
def sums_of_mosaic(interpreter, monkeypatch):
    """Layers whose sums are Mosaic's and whose small products are XLA's; the list of what it was given."""
    given = []

    def interpreted(lefts, rights, **options):
        given.append([left.shape[1] for left in lefts])
        return mosaic_sum_of_products(lefts, rights, processors=4, interpret=interpreter, **options)

    monkeypatch.setattr(gradient, "mosaic_sum_of_products", interpreted)
    monkeypatch.setattr(mosaic, "LEAST_USE", 0)
    monkeypatch.setattr(gradient, "tiling_for", lambda *sizes: tiling_for(*sizes, 4) and SMALL)
    monkeypatch.setattr("lorajax_kernels.lora._IMPLEMENTATIONS", (ANYWHERE,))
    return given


def assert_close(found, expected):
    """Norm of the difference relative to the norm, array by array."""
    for value, other in zip(found, expected, strict=True):
        assert np.linalg.norm(value - other) <= 1e-5 * np.linalg.norm(other)


def adapter(rank, width, out, seed, **options):
    return Adapter(normal(rank, width, seed=seed), normal(out, rank, seed=seed), 0.5 + seed, **options)


def outputs_and_gradients(layers, x, weights, adapters):
    def run(x, ab):
        trained = [
            a and Adapter(*pair, a.scale, a.dropout, a.key) for a, pair in zip(adapters, ab, strict=True)
        ]
        return layers(x, weights, trained)

    @jax.jit
    def both(x, ab):
        ys, vjp = jax.vjp(run, x, ab)
        return [*ys, *jax.tree.leaves(vjp(tuple(normal(*y.shape, seed=5) for y in ys)))]

    return ready(both(x, [a and (a.a, a.b) for a in adapters]))


@pytest.mark.parametrize(
    ("ranks", "expected"),
    (
        # Up to 64 columns of u are read at once, and what lies beyond a layer's meets zeros.
        ((24, 24), [[64, 48]] * 2 + [[64, 128, 48]]),
        # More are filled up to slices, of which a layer reads its own.
        ((40, 32), [[64, 128]] * 2 + [[64, 128, 128]]),
    ),
)
def test_layers_equal_the_reference(sums_of_mosaic, ranks, expected):
    outs, width = (64, 128), 64
    x = normal(2, 128, width)
    weights = [normal(out, width, seed=i) for i, out in enumerate(outs)]
    adapters = [rank and adapter(rank, width, outs[i], i) for i, rank in enumerate(ranks)]
    found = outputs_and_gradients(lora_linears, x, weights, adapters)
    assert sums_of_mosaic == expected
    assert_close(found, outputs_and_gradients(reference_lora_linears, x, weights, adapters))


def test_layers_that_do_not_fit_are_left_to_xla(sums_of_mosaic):
    # The second layer's 40 columns are no slice; neither are the 40 that flow back.
    x, weights = normal(256, 64), [normal(64, 64), normal(40, 64, seed=1)]
    adapters = [adapter(8, 64, 64, 0), adapter(8, 64, 40, 1)]
    found = outputs_and_gradients(lora_linears, x, weights, adapters)
    assert sums_of_mosaic == [[64, 16], [64, 40, 16]]
    expected = outputs_and_gradients(reference_lora_linears, x, weights, adapters)
    assert_close(found, expected)


@pytest.mark.parametrize(
    "out, options, reason",
    [
        (72, {}, r"its tiles fit none of 256 x 64 \+ 8 x 72, 256 x 72 \+ 8 x 64"),
        (64, {"arrangement": "added"}, "arrangement is 'added'"),
    ],
)
def test_asked_for_by_name_it_serves_a_sum_or_says_why_not(monkeypatch, out, options, reason):
    monkeypatch.setattr("lorajax_kernels.lora._IMPLEMENTATIONS", (ANYWHERE,))
    x, own = normal(256, 64), adapter(8, 64, out, 0)
    with pytest.raises(ValueError, match=f"lora_linears implementation 'mosaic' cannot serve: {reason}"):
        lora_linears(x, [normal(out, 64)], [own], implementation="mosaic", **options)
    # Without adapters there is no sum, and nothing is refused.
    jax.eval_shape(
        lambda x: lora_linears(x, [normal(out, 64)], [None], implementation="mosaic", **options), x
    )


def test_with_dropout_each_adapter_has_its_own_way_back(sums_of_mosaic):
    x, weights = normal(256, 64), [normal(64, 64), normal(128, 64, seed=1)]
    adapters = [adapter(8, 64, out, i, dropout=0.5, key=jax.random.key(i)) for i, out in enumerate((64, 128))]
    xla = functools.partial(lora_linears, arrangement="added")  # not Mosaic's
    found = outputs_and_gradients(lora_linears, x, weights, adapters)
    assert sums_of_mosaic == [[64, 16], [64, 16], [64, 128]]
    assert_close(found, outputs_and_gradients(xla, x, weights, adapters))
    assert len(sums_of_mosaic) == 3


def test_a_layer_after_a_gate_equals_the_reference(sums_of_mosaic):
    gate, up, weight, own = (
        normal(256, 64),
        normal(256, 64, seed=1),
        normal(128, 64),
        adapter(8, 64, 128, 1),
    )

    def gradients(function):
        gradient = jax.grad(lambda gate, up: jnp.sum(function(gate, up) ** 2), argnums=(0, 1))
        return ready(jax.jit(gradient)(gate, up))

    found = gradients(lambda gate, up: swiglu_lora_linear(gate, up, weight, own))
    assert sums_of_mosaic == [[64, 8], [128, 8]]
    expected = gradients(lambda g, u: reference_lora_linears(jax.nn.silu(g) * u, [weight], [own])[0])
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("rows", "out", "ks", "columns"),
    (
        (16384, 8192, (2048, 64), 256),
        (16384, 512, (2048, 64), 256),
        (16384, 576, (576, 32), 192),  # three tiles of 192, where 256 leaves a quarter
        (1024, 2048, (8192, 8192, 64), 128),  # 32 tiles of 256 on 66 clusters, 64 of 128
        (512, 2048, (2048, 32), None),  # too few tiles either way
        (16384, 8192, (2048, 96), None),  # of u, one slice and a half
        (16384, 8192, (2040, 64), None),
        (16384, 8200, (2048, 64), None),
        (16383, 8192, (2048, 64), None),
        (16384, 8192, (2048, 20), None),
    ),
)
def test_tilings_are_for_sizes_that_are_served(rows, out, ks, columns):
    found = tiling_for(rows, out, ks, 132)
    assert (found and found.columns) == columns


def test_who_chooses_it(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert choose_lora(jnp.bfloat16, 32, device=H100).name == "mosaic"
    for device, reason in (
        (Device("A100", (8, 0), no_mosaic="it needs 9.0", multiprocessors=108), "it needs 9.0"),
        (Device("B200", (10, 0), multiprocessors=148), "capability 9.0"),
    ):
        choice = choose_lora(jnp.bfloat16, 32, device=device)
        assert choice.name == "triton" and reason in choice.refused["mosaic"]
    assert "bfloat16 and float16" in choose_lora(jnp.float32, 32, device=H100).refused["mosaic"]
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(ValueError, match=r"'mosaic' cannot serve: it needs JAX 0\.11"):
        choose_lora(jnp.bfloat16, 32, implementation="mosaic", device=H100)


@needs_jax_0_11
def test_a_kernel_is_lowered_once_for_all_processes(compilation_cache, monkeypatch):
    pytest.importorskip("flatbuffers")
    lowered = []
    lower = mosaic._lower
    monkeypatch.setattr(mosaic, "_lower", lambda *arguments: lowered.append(1) or lower(*arguments))

    def program(rows=256):
        """Its text, as a new process finds it."""
        mosaic._lowered.cache_clear()
        jax.clear_caches()
        arrays = [jax.ShapeDtypeStruct((size, 64), jnp.bfloat16) for size in (rows, 128)]

        @jax.jit
        def run(left, right):
            return mosaic_sum_of_products([left], [right], transposed=True, tiling=SMALL, processors=4)

        return run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()

    text = program()
    assert program() == text and len(lowered) == 1
    assert program(512) != text and len(lowered) == 2
    # Without a folder, or with another release, it is lowered again.
    monkeypatch.setattr(jax, "__version__", "0.12.0")
    assert program() == text and len(lowered) == 3
    jax.config.update("jax_compilation_cache_dir", None)
    assert program() == text and len(lowered) == 4
    mosaic._lowered.cache_clear()


FROM_CACHE = """
import os, jax, jax.numpy as jnp
from lorajax_kernels.lora import mosaic

lowered = []
lower = mosaic._lower
mosaic._lower = lambda *arguments: lowered.append(1) or lower(*arguments)
pair = tuple((jax.ShapeDtypeStruct((256, 64), jnp.bfloat16),) for _ in range(2))
mosaic._lowered(*pair, mosaic._Options(True, (0,), mosaic.Tiling(columns=128, stages=3), 2))
print(len(lowered), os.path.exists(os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"]))
"""


@needs_plugin
@needs_jax_0_11
def test_a_process_that_lowers_nothing_knows_where_the_runtime_is(tmp_path):
    """Without it XLA's compiler fails on the GPU, and so does what it has compiled before."""
    pytest.importorskip("flatbuffers")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    environment.pop("MOSAIC_GPU_RUNTIME_LIB_PATH", None)
    command = [sys.executable, "-c", FROM_CACHE]
    found = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
        for _ in range(2)
    ]
    assert found == ["1 True", "0 True"]


def compile_there(script, **environment):
    """What a script prints that compiles for a GPU which is not there."""
    environment = environment_there() | environment
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_plugin
@needs_jax_0_11
def test_compiles_for_hopper_without_a_gpu():
    assert compile_there(f"{THERE}{COMPILATION}").split() == ["True"] * 4


@needs_plugin
@needs_jax_0_11
def test_a_kernel_is_written_in_fewer_words_for_the_same_code(tmp_path):
    lengths, codes = [], []
    for number, plain in enumerate(("", "mosaic._simplified = contextlib.nullcontext\n")):
        folder = tmp_path / str(number)
        folder.mkdir()
        dumps = {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_TO": str(folder)}
        lengths.append(int(compile_there(f"{THERE}{plain}{LENGTH}", **dumps)))
        [code] = folder.glob("*.ptx")
        codes.append(code.read_text())
    assert lengths[0] < 0.75 * lengths[1]
    assert "wgmma" in codes[0]
    assert codes[0] == codes[1]
