"""What this machine has: GPU and host memory that a run may take, and the rates at which it works."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
from lorajax_kernels.device import current_device
from lorajax_kernels.measure import compare, copy_bandwidth, matmul_rate

from lorajax.config import parse_size
from lorajax.data.cache import user_cache_folder
from lorajax.memory.costs import Rates

# What a process takes of a GPU besides JAX's allocator: its CUDA context, libraries, compiled programs.
CONTEXT_BYTES = 2**30
# Share of what the allocator has that is left free: it cuts its memory into pieces.
SLACK = 0.02
# Of the products and copies that rates are measured with, see measure_rates.
_MEASURED = {"matrix": 8192, "copied": 2**28}
_FRACTION = "XLA_CLIENT_MEM_FRACTION"
_OLD_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def claim_gpu_memory(budget: str | None) -> None:
    """Let JAX take what is free on the GPU, or the budget; to be called before JAX starts.

    JAX alone takes 75% of a GPU, whatever other processes have left. A fraction in the environment stays.
    """
    if _FRACTION in os.environ or _OLD_FRACTION in os.environ:
        return
    if (memory := _gpu_memory()) is not None:
        total, free = memory
        os.environ[_FRACTION] = f"{claimed_fraction(total, free, budget):.4f}"


def claimed_fraction(total: int, free: int, budget: str | None) -> float:
    """Of a GPU's memory for JAX' allocator, all in bytes."""
    available = max(free - CONTEXT_BYTES, 0)
    if budget is not None:
        available = min(available, allocated(budget))
    return available / total


def allocated(budget: str) -> int:
    """Bytes that JAX' allocator gets for a budget: it needs its slack on top."""
    return int(parse_size(budget) / (1 - SLACK)) + 2**26


def _gpu_memory() -> tuple[int, int] | None:
    """(total, free) bytes of the visible GPU with the least free; None without nvidia-smi or a GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.split(",") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    sizes = [(int(total) * 2**20, int(free) * 2**20) for total, free in lines if free.strip().isdigit()]
    return min(sizes, key=lambda size: size[1]) if sizes else None


def gpu_limit(budget: str | None) -> int | None:
    """Bytes that weights, state and activations may take on each GPU; None on a CPU."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    if jax.default_backend() != "gpu" or None in limits:
        return None
    available = int(min(limit for limit in limits if limit is not None) * (1 - SLACK))
    return available if budget is None else min(available, parse_size(budget))


def host_limit(budget: str | None) -> int:
    """Bytes of host memory that activations of one GPU may take: half of what is free, shared by the GPUs."""
    available = _free_host_memory() // 2
    return (available if budget is None else min(available, parse_size(budget))) // jax.local_device_count()


def _free_host_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def offloads() -> bool:
    """Whether activations can be kept in pinned memory of the host."""
    kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    return jax.default_backend() == "gpu" and "pinned_host" in kinds


def machine_rates() -> Rates:
    """Of this machine: measured once in some seconds, then kept in the user's cache folder."""
    path = user_cache_folder() / "rates.json"
    kind = f"{current_device().kind}, jax {jax.__version__}"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return Rates(**known[kind])
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    sizes = _measured_sizes(gpu_limit(None))
    rates = measure_rates(**sizes)
    if sizes != _MEASURED:
        return rates  # smaller ones are slower: not to be kept
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(known | {kind: asdict(rates)}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError:
        pass  # measured again next time
    return rates


def _measured_sizes(limit: int | None) -> dict[str, int]:
    """Arguments of measure_rates that fit so many bytes."""
    sizes = dict(_MEASURED)
    # Three matrices in 16 bits; of copies, the source and the results of some that are under way.
    while limit is not None and 4 * sizes["matrix"] ** 2 * 2 > limit:
        sizes["matrix"] //= 2
    while limit is not None and 6 * sizes["copied"] > limit:
        sizes["copied"] //= 2
    return sizes


def measure_rates(*, matrix: int, copied: int) -> Rates:
    """Measured now.

    Args:
        matrix: rows and columns of the product.
        copied: bytes of the copies.
    """
    return Rates(
        flops=matmul_rate(current_device().half_dtype, matrix),
        memory=copy_bandwidth(copied),
        link=_link_bandwidth(copied),
    )


def _link_bandwidth(size: int) -> float:
    """Bytes per second, the slower of the two ways.

    In compiled programs, as steps copy: two copies that are asked for one by one wait for each other.
    """
    there = jnp.ones(size // 4, jnp.float32)
    away = jax.device_put(there, jax.memory.Space.Host)
    leave = jax.jit(lambda array: jax.device_put(array, jax.memory.Space.Host))
    come = jax.jit(lambda array: jax.device_put(array, jax.memory.Space.Device))
    times = compare({"leave": lambda: leave(there), "come": lambda: come(away)}, rounds=5)
    return size / (max(time.median for time in times.values()) / 1e3)
