"""Times of compiled functions, and what the device itself can do: the ceilings that times are held against.

Calls are queued in runs of many and the clock is read where a run ends, so that what Python and JAX do
before each call hides behind the device's work. What takes the device less than some 100 microseconds is not
measured well this way.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_SECONDS_A_RUN = 0.05
_MOST_CALLS = 200


class Time(NamedTuple):
    """Milliseconds of one call: the median of several runs, the fastest and the slowest of them."""

    median: float
    fastest: float
    slowest: float


def compare(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 9,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> dict[str, Time]:
    """Time several functions on the same device, in turns, so that a change of its clocks meets all alike.

    Args:
        calls: by name, functions without arguments that queue their work and return what `wait` waits for.
            Each is called a few times first, which compiles it.
        rounds: runs of each.
        wait: returns once the work behind its argument, and all that was queued before it, is done.
    """
    counts = {name: _calls_a_run(call, wait) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_run(call, counts[name], wait))
    return {name: Time(statistics.median(each), min(each), max(each)) for name, each in times.items()}


def copy_bandwidth(size: int = 2**31) -> float:
    """Bytes per second, read and written together, of copying an array of `size` bytes on the device."""
    array = jnp.arange(size // 4, dtype=jnp.float32)
    copy = jax.jit(jnp.copy)
    time_ms = compare({"copy": lambda: copy(array)})["copy"].median
    return 2 * array.nbytes / (time_ms / 1e3)


def matmul_rate(dtype: Any, size: int = 8192) -> float:
    """Floating-point operations per second of a product of two random [size, size] matrices."""
    random = np.random.default_rng(0)
    a, b = (jnp.asarray(random.standard_normal((size, size), np.float32), dtype) for _ in range(2))
    product = jax.jit(jnp.matmul)
    time_ms = compare({"product": lambda: product(a, b)})["product"].median
    return 2 * size**3 / (time_ms / 1e3)


def _calls_a_run(call: Callable[[], Any], wait: Callable[[Any], Any]) -> int:
    _run(call, 2, wait)  # compiles, and lets clocks and caches settle
    seconds = _run(call, 3, wait) / 1e3
    return int(min(max(_SECONDS_A_RUN / seconds, 1), _MOST_CALLS))


def _run(call: Callable[[], Any], count: int, wait: Callable[[Any], Any]) -> float:
    """Milliseconds of one of `count` calls in a row."""
    began = time.perf_counter()
    result = None
    for _ in range(count):
        result = call()
    wait(result)
    return 1e3 * (time.perf_counter() - began) / count
