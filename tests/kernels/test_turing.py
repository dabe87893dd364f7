"""The XLA paths compiled for a T4, on which there is neither Triton nor cuDNN attention, without one.

JAX compiles for a GPU that is not there where its CUDA plugin is installed: `pip install --no-deps` of
jax-cuda13-plugin and jax-cuda13-pjrt, of jaxlib's version. The plugin is noisy without a GPU, so this file
compiles in a process of its own, as a script.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from lorajax_kernels import (
    Adapter,
    attention,
    cached_attention,
    dequantize_nf4,
    geglu,
    linear_cross_entropy,
    lora_linears,
    nf4_linear,
    quantize_nf4,
    rms_norm,
    rope,
    swiglu,
    swiglu_lora_linear,
)

# What the compiler asks of a GPU, in the text form of XLA's stream_executor.GpuTargetConfigProto.
T4 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 65536
  shared_memory_per_core: 65536
  threads_per_core_limit: 1024
  core_count: 40
  fpus_per_core: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 320064000000
  l2_cache_size: 4194304
  clock_rate_ghz: 1.59
  device_memory_size: 15828320256
  cuda_compute_capability { major: 7 minor: 5 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  name: "Tesla T4"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "Tesla T4"
"""

pytestmark = pytest.mark.slow

HALF = jnp.float16  # Turing has no bfloat16
BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 4096, 8, 2, 64
ROWS, FEATURES, OUT, VOCABULARY, RANK = 4096, 1024, 8192, 64000, 16
SCORES, LOGITS, LAYER_OUTPUT = 4 * BATCH * HEADS * LENGTH**2, 4 * ROWS * VOCABULARY, 2 * ROWS * OUT
HEAD_GRADIENT = 4 * VOCABULARY * FEATURES
REQUESTS = 16
CACHE, WEIGHT = 2 * REQUESTS * LENGTH * KV_HEADS * HEAD_DIM, 2 * OUT * FEATURES


def shape(*sizes: int, dtype: Any = HALF) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def both(function: Callable[..., Any], constants: int = 0) -> Callable[..., Any]:
    """Both passes of a function whose last arguments are constants; the cotangent comes after them."""

    def passes(*arguments):
        *arguments, dy = arguments
        trained = len(arguments) - constants
        y, vjp = jax.vjp(lambda *first: function(*first, *arguments[trained:]), *arguments[:trained])
        return y, vjp(dy)

    return passes


def attend(q, k, v, segment_ids, **options):
    return attention(q, k, v, segment_ids, implementation="xla", **options)


def cross_entropy(x, head, targets, weights, trainable_head=False):
    def loss(x, head):
        options = {"trainable_head": trainable_head, "implementation": "xla"}
        return linear_cross_entropy(x, head, targets, weights, **options)[0]

    return jax.value_and_grad(loss, (0, 1) if trainable_head else (0,))(x, head)


def layers(x, adapters, weights, norm=None):
    norm = None if norm is None else (norm, 1e-5)
    return lora_linears(x, weights, adapters, norm=norm, implementation="xla")


def gated_layer(gate, up, adapter, weight):
    return swiglu_lora_linear(gate, up, weight, adapter, implementation="xla")


def programs() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """By name: a function, and the shapes of its arguments."""
    q, k = shape(BATCH, LENGTH, HEADS, HEAD_DIM), shape(BATCH, LENGTH, KV_HEADS, HEAD_DIM)
    segment_ids, targets = shape(BATCH, LENGTH, dtype=jnp.int32), shape(ROWS, dtype=jnp.int32)
    query, cache = shape(REQUESTS, 1, HEADS, HEAD_DIM), shape(REQUESTS, LENGTH, KV_HEADS, HEAD_DIM)
    near = functools.partial(attend, window=1000, softcap=20.0)
    angle = shape(BATCH, LENGTH, HEAD_DIM // 2, dtype=jnp.float32)
    head, counted = shape(VOCABULARY, FEATURES), shape(ROWS, dtype=jnp.float32)
    x, dy, weight = shape(ROWS, FEATURES), shape(ROWS, OUT), shape(OUT, FEATURES)
    weights, dys, norm = [weight] * 2, (dy, dy), shape(FEATURES, dtype=jnp.float32)
    a, b = shape(RANK, FEATURES, dtype=jnp.float32), shape(OUT, RANK, dtype=jnp.float32)
    adapters = [Adapter(a, b, 0.5), Adapter(a, b, 0.5)]
    dropped = [Adapter(a, b, 0.5, 0.1, jax.eval_shape(lambda: jax.random.key(0)))] * 2
    down = Adapter(shape(RANK, OUT, dtype=jnp.float32), shape(FEATURES, RANK, dtype=jnp.float32), 0.5)
    nf4 = jax.eval_shape(quantize_nf4, weight)
    return {
        "attention": (both(attend, 1), (q, k, k, segment_ids, q)),
        "attention, windowed and capped": (both(near, 1), (q, k, k, segment_ids, q)),
        "cached attention": (cached_attention, (query, cache, cache, shape(REQUESTS, dtype=jnp.int32))),
        "cross-entropy": (cross_entropy, (x, head, targets, counted)),
        "cross-entropy and head": (
            functools.partial(cross_entropy, trainable_head=True),
            (x, head, targets, counted),
        ),
        "lora": (both(layers, 1), (x, adapters, weights, dys)),
        "lora on NF4": (both(layers, 1), (x, adapters, [nf4] * 2, dys)),
        "lora with dropout": (both(layers, 1), (x, dropped, weights, dys)),
        "lora after a norm": (both(layers, 2), (x, adapters, weights, norm, dys)),
        "lora after a gate": (both(gated_layer, 1), (dy, dy, down, shape(FEATURES, OUT), x)),
        "nf4": (lambda w: dequantize_nf4(w, HALF, implementation="xla"), (nf4,)),
        "quantize_nf4": (quantize_nf4, (weight,)),
        "nf4_linear": (both(functools.partial(nf4_linear, implementation="xla"), 1), (x, nf4, dy)),
        "rms_norm": (both(functools.partial(rms_norm, epsilon=1e-5), 1), (x, norm, x)),
        "rope": (both(rope, 2), (q, angle, angle, q)),
        "swiglu": (both(swiglu), (dy, dy, dy)),
        "geglu": (both(functools.partial(geglu, approximate=False)), (dy, dy, dy)),
    }


def compile_all() -> dict[str, Any]:
    """What the tests look at, by program; or {"none": why nothing can be compiled}."""
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=T4, topology="1x1x1"
        )
    except Exception as error:  # there is no plugin, or it does not fit jaxlib
        return {"none": f"JAX cannot compile for a GPU here: {error}"}
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = {}
    for name, (function, arguments) in programs().items():
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), arguments)
        compiled = jax.jit(function).lower(*arguments).compile()
        found[name] = {
            "temporaries": compiled.memory_analysis().temp_size_in_bytes,
            "operands": operands(compiled.as_text()),
        }
    return found


def operands(program: str) -> list[str]:
    """Types of what cuBLAS is given to multiply, in HLO text."""
    types = dict(re.findall(r"%([\w.-]+) = \(?(\w+)\[", program))
    pairs = re.findall(r'custom-call\(%([\w.-]+), %([\w.-]+)[,)].*?custom_call_target="__cublas', program)
    return sorted({types[name] for pair in pairs for name in pair})


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    settings = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    command = [sys.executable, __file__]
    done = subprocess.run(
        command, env=os.environ | settings, check=True, stdout=subprocess.PIPE, text=True, timeout=240
    )
    found = json.loads(done.stdout.splitlines()[-1])
    if "none" in found:
        pytest.skip(found["none"])
    return found


@pytest.mark.parametrize(
    ("name", "most"),
    (
        ("attention", SCORES / 2),
        ("attention, windowed and capped", SCORES / 2),
        ("cached attention", 2 * CACHE),
        ("cross-entropy", LOGITS / 2),
        # dhead in float32, and what a chunk adds to it.
        ("cross-entropy and head", LOGITS / 2 + 2 * HEAD_GRADIENT),
        ("lora", LAYER_OUTPUT),
        ("lora on NF4", LAYER_OUTPUT),
        ("lora with dropout", LAYER_OUTPUT),
        ("lora after a norm", LAYER_OUTPUT),
        ("lora after a gate", LAYER_OUTPUT),
        ("nf4", 1),
        ("quantize_nf4", WEIGHT / 16),
        ("nf4_linear", 1.5 * WEIGHT),
        ("rms_norm", 16 * ROWS),
        ("rope", 16 * ROWS),
        ("swiglu", 16 * ROWS),
        ("geglu", 16 * ROWS),
    ),
)
def test_what_a_program_holds(compiled, name, most):
    assert compiled[name]["temporaries"] < most


@pytest.mark.parametrize(
    "name",
    (
        *("attention", "attention, windowed and capped", "cached attention"),
        *("cross-entropy", "cross-entropy and head", "nf4_linear"),
        *("lora", "lora on NF4", "lora with dropout", "lora after a norm", "lora after a gate"),
    ),
)
def test_products_are_of_float16(compiled, name):
    """XLA widens bfloat16 to float32 for Turing, where that is many times slower."""
    assert compiled[name]["operands"] == ["f16"]


if __name__ == "__main__":
    print(json.dumps(compile_all()))
