"""What this machine has: GPU and host memory that a run may take, and the rates at which it works."""

from __future__ import annotations

import gc
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from lorajax_kernels.device import current_device
from lorajax_kernels.measure import compare, copy_bandwidth, matmul_rate

from lorajax.config import parse_size
from lorajax.data.cache import user_cache_folder
from lorajax.memory.costs import Rates
from lorajax.memory.targets import target_of_kind

_log = logging.getLogger("lorajax")

# What a process takes of a GPU besides JAX's allocator: its CUDA context, libraries, compiled programs.
CONTEXT_BYTES = 2**30
# Share of what the allocator has that is left free: it cuts its memory into pieces.
SLACK = 0.02
# Bytes that other arrays hold and that are worth a word.
_NOTED = 2**28
# And that other processes do; of an empty GPU, the driver has some hundred MiB.
_OTHERS = 2**30
# Of the products and copies that rates are measured with, see measure_rates.
_MEASURED = {"matrix": 8192, "copied": 2**28}
# Of the products and copies that a GPU's data sheet promises: what does less is not alone on it.
_DOUBTFUL = 0.25
# Of XLA's pool of pinned host memory, which all GPUs of a process share, in GiB; and what it is otherwise.
_HOST_POOL, _HOST_POOL_DEFAULT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", 64
_FRACTION = "XLA_CLIENT_MEM_FRACTION"
_OLD_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def claim_gpu_memory(budget: str | None) -> None:
    """Let JAX take what is free on the GPU, or the budget; to be called before JAX starts.

    JAX alone takes 75% of a GPU, whatever other processes have left, and at most 64 GiB of pinned memory of
    the host. What the environment says of either stays.
    """
    if not _jax_has_started():
        # What plans may take (see host_limit) and a quarter more, as a pool is cut into pieces. Not all that
        # is free: it grows by doubling, and may pin twice what it gives away.
        pool = _free_host_memory() * 5 // 8 // 2**30
        os.environ.setdefault(_HOST_POOL, str(max(pool, _HOST_POOL_DEFAULT)))
    if _FRACTION in os.environ or _OLD_FRACTION in os.environ:
        return
    if (memory := _gpu_memory()) is not None:
        total, free = memory
        fraction = claimed_fraction(total, free, budget)
        if total - free >= _OTHERS and (budget is None or fraction * total < allocated(budget)):
            _log.warning(
                "other processes hold %.2f of the GPU's %.2f GiB (see nvidia-smi); this one has %.2f GiB",
                (total - free) / 2**30,
                total / 2**30,
                fraction * total / 2**30,
            )
        os.environ[_FRACTION] = f"{fraction:.4f}"


def _jax_has_started() -> bool:
    """Whether what the environment says comes too late; JAX says that in private alone."""
    from jax._src import xla_bridge

    return bool(xla_bridge.backends_are_initialized())


def claimed_fraction(total: int, free: int, budget: str | None) -> float:
    """Of a GPU's memory for JAX' allocator, all in bytes."""
    available = max(free - CONTEXT_BYTES, 0)
    if budget is not None:
        available = min(available, allocated(budget))
    return available / total


def allocated(budget: str) -> int:
    """Bytes that JAX' allocator gets for a budget: it needs its slack on top.

    And 0.5%, because it is told a share, of the memory that CUDA has: less than nvidia-smi says by as much.
    """
    return int(1.005 * parse_size(budget) / (1 - SLACK)) + 2**26


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
    """Bytes that weights, state and activations of a run may take on each GPU; None on a CPU.

    To be called before any of them is there: what the process holds by then, such as the model of an earlier
    run, is something else's.
    """
    if (memory := _gpu_memory_left()) is None:
        return None
    left, held = memory
    limit = left if budget is None else min(left, parse_size(budget))
    if limit == left and held >= _NOTED:
        _log.warning(
            "%.2f GiB of the GPU's memory is held by other arrays of this process, such as the model of an "
            "earlier run; delete them, or restart it, to have more than %.2f GiB",
            held / 2**30,
            left / 2**30,
        )
    return limit


def _gpu_memory_left() -> tuple[int, int] | None:
    """Bytes that JAX' allocator still has, and those that it has given, on the GPU with the least left."""
    if jax.default_backend() != "gpu":
        return None
    gc.collect()  # what refers to itself keeps its arrays until then
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if any("bytes_limit" not in each for each in stats):
        return None
    sizes = [(int(each["bytes_limit"] * (1 - SLACK)), each.get("bytes_in_use", 0)) for each in stats]
    return min((max(limit - held, 0), held) for limit, held in sizes)


def host_limit(budget: str | None) -> int:
    """Bytes of host memory that activations of one GPU may take: half of what is free, shared by the GPUs.

    And no more than XLA's pool has, which is as large as it was told to be before JAX started.
    """
    pool = int(os.environ.get(_HOST_POOL, _HOST_POOL_DEFAULT)) * 2**30
    available = min(_free_host_memory() // 2, pool)
    return (available if budget is None else min(available, parse_size(budget))) // jax.local_device_count()


def _free_host_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Of the machine, or of the container or job that the process is in, where that may take less."""
    return max(0, min([_free_of_machine(proc), *_free_of_groups(proc, cgroups)]))


def _free_of_machine(proc: Path) -> int:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class _GroupFiles(NamedTuple):
    """Of a control group: names of its limit, of what it uses, and, in memory.stat, of files' idle pages."""

    limit: str
    usage: str
    idle: str


_VERSION_1 = _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _GroupFiles("memory.max", "memory.current", "inactive_file")


def _free_of_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """Below the limit of each control group that the process is in and that has one."""
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, files = cgroups, _VERSION_2
        elif "memory" in controllers.split(","):
            root, files = cgroups / "memory", _VERSION_1
        else:
            continue
        group = root / path.lstrip("/")
        # Those above it limit it too. A container may see its own group as the root.
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (free := _free_of_group(folder, files)) is not None:
                yield free


def _free_of_group(folder: Path, files: _GroupFiles) -> int | None:
    """None: it has no limit."""
    try:
        limit, usage = (int((folder / name).read_text(encoding="utf-8")) for name in files[:2])
    except (OSError, ValueError):  # no such group, or "max"
        return None
    stat = dict(line.split() for line in _lines(folder / "memory.stat"))
    return limit - usage + int(stat.get(files.idle, 0))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def offloads() -> bool:
    """Whether activations can be kept in pinned memory of the host."""
    kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    return jax.default_backend() == "gpu" and "pinned_host" in kinds


def machine_rates() -> Rates:
    """Of this machine: measured once in some seconds, then kept in the user's cache folder.

    Measured in the run's own process, whose JAX has the GPU's memory: a run that measures them may report a
    peak of up to 1.5 GiB (see _measured_sizes) where its steps take less. Where others use the GPU meanwhile,
    plans are better off with its data sheet's.
    """
    path = user_cache_folder() / "rates.json"
    # Machines that share a home may hold the same GPU behind another link; flags can make products slower.
    kind = f"{platform.node()}: {current_device().kind}, jax {jax.__version__}"
    if flags := os.environ.get("XLA_FLAGS"):
        kind += f", {flags}"
    known = _known_rates(path)
    if kind in known:
        return known[kind]
    memory = _gpu_memory_left()
    sizes = _measured_sizes(None if memory is None else memory[0])
    rates = measure_rates(**sizes)
    if sizes != _MEASURED:
        return rates  # smaller ones are slower: not to be kept
    target = target_of_kind(current_device().kind)
    if target is not None and _is_doubtful(rates, promised := target.rates):
        _log.warning(
            "this GPU does products at %.0f TFLOP/s and copies at %.2f TB/s, where some %.0f and %.2f are to "
            "be expected: something else uses it or slows it down (see nvidia-smi). The plan goes by what is "
            "to be expected, and the next run measures again",
            *(figure for each in (rates, promised) for figure in (each.flops / 1e12, each.memory / 1e12)),
        )
        return promised
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        plain = {kind: asdict(each) for kind, each in {**known, kind: rates}.items()}
        temporary.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError:
        pass  # measured again next time
    return rates


def _is_doubtful(rates: Rates, promised: Rates) -> bool:
    """Links are left aside: how many lanes of which generation a GPU has is the host's affair."""
    return rates.flops < _DOUBTFUL * promised.flops or rates.memory < _DOUBTFUL * promised.memory


def _known_rates(path: Path) -> dict[str, Rates]:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return {kind: Rates(**each) for kind, each in plain.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _measured_sizes(limit: int | None) -> dict[str, int]:
    """Arguments of measure_rates that fit so many bytes."""
    sizes = dict(_MEASURED)
    # Three matrices in 16 bits; of copies, the source and the results of some that are under way.
    while limit is not None and 4 * sizes["matrix"] ** 2 * 2 > max(limit, 2**20):
        sizes["matrix"] //= 2
    while limit is not None and 6 * sizes["copied"] > max(limit, 2**20):
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
