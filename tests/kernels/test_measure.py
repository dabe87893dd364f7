"""Measuring: what is called and waited for, in which order; the figures are the benchmarks' affair."""

import jax.numpy as jnp
import numpy as np
import pytest
from lorajax_kernels import measure


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_times_are_those_of_the_work_that_is_waited_for(clock):
    queued, log = [], []

    def call(name, seconds):
        def queue():
            log.append(name)
            queued.append(seconds)

        return queue

    def wait(_):
        while queued:
            clock(queued.pop())

    calls = {"a": call("a", 0.012), "b": call("b", 0.2), "c": call("c", 1e-6)}
    times = measure.compare(calls, rounds=3, wait=wait)
    assert {name: round(time.median, 9) for name, time in times.items()} == {"a": 12, "b": 200, "c": 1e-3}
    assert all(time.fastest <= time.median <= time.slowest for time in times.values())
    turns = "".join(log)[15:]  # after the five warm-up calls of each
    assert turns == ("a" * 4 + "b" + "c" * 200) * 3


def test_the_median_of_uneven_runs(clock):
    seconds = iter([0.1] * 5 + [0.1, 0.5, 0.2])
    times = measure.compare({"a": lambda: next(seconds)}, rounds=3, wait=lambda result: clock(result))["a"]
    assert tuple(map(round, times)) == (200, 100, 500)


def test_ceilings_count_bytes_and_operations(monkeypatch):
    monkeypatch.setattr(measure, "compare", lambda calls: {k: measure.Time(2.0, 2.0, 2.0) for k in calls})
    assert measure.copy_bandwidth(4000) == pytest.approx(2 * 4000 / 2e-3)
    assert measure.matmul_rate(jnp.bfloat16, 16) == pytest.approx(2 * 16**3 / 2e-3)


def test_ceilings_are_measured_on_this_machine(monkeypatch):
    monkeypatch.setattr(measure, "_SECONDS_A_RUN", 1e-4)
    found = [measure.copy_bandwidth(2**16), measure.matmul_rate(jnp.float32, 64)]
    assert np.isfinite(found).all() and min(found) > 0
