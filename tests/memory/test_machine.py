"""What a run may take, and the rates that are measured once."""

import json

import pytest

from lorajax.memory import machine
from lorajax.memory.costs import Rates

GIB = 2**30


def test_jax_gets_what_is_free_less_what_the_process_needs_besides():
    assert machine.claimed_fraction(24 * GIB, 24 * GIB, None) == pytest.approx(23 / 24)
    assert machine.claimed_fraction(24 * GIB, 10 * GIB, None) == pytest.approx(9 / 24)
    assert machine.claimed_fraction(24 * GIB, GIB // 2, None) == 0


def test_a_budget_lowers_it_and_other_processes_lower_the_budget():
    with_budget = machine.claimed_fraction(24 * GIB, 24 * GIB, "8GiB")
    assert 8 / 24 < with_budget < 8.4 / 24
    assert machine.claimed_fraction(24 * GIB, 5 * GIB, "8GiB") == pytest.approx(4 / 24)


def test_a_fraction_in_the_environment_stays(monkeypatch):
    monkeypatch.setattr(machine, "_gpu_memory", lambda: (24 * GIB, 12 * GIB))
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    machine.claim_gpu_memory(None)
    assert machine.os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.5"
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    machine.claim_gpu_memory(None)
    assert float(machine.os.environ["XLA_CLIENT_MEM_FRACTION"]) == pytest.approx(11 / 24, abs=1e-3)
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")


def test_free_memory_is_that_of_the_fullest_visible_gpu(monkeypatch, tmp_path):
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '24576, 20000'\necho '24576, 10000'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert machine._gpu_memory() == (24576 * 2**20, 10000 * 2**20)
    script.write_text("#!/bin/sh\nexit 9\n")
    assert machine._gpu_memory() is None


def test_a_cpu_has_no_gpu_memory_and_half_of_its_free_memory_for_activations():
    assert machine.gpu_limit(None) is None and not machine.offloads()
    assert 0 < machine.host_limit(None) < 2**50
    assert machine.host_limit("1MiB") <= 2**20


def test_rates_are_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def measure(**sizes):
        calls.append(sizes)
        return Rates(1e12, 2e11, 3e10)

    monkeypatch.setattr(machine, "measure_rates", measure)
    assert machine.machine_rates() == machine.machine_rates() == Rates(1e12, 2e11, 3e10)
    assert len(calls) == 1
    (known,) = json.loads((tmp_path / "lorajax" / "rates.json").read_text()).values()
    assert known == {"flops": 1e12, "memory": 2e11, "link": 3e10}
    (tmp_path / "lorajax" / "rates.json").write_text("nonsense")
    machine.machine_rates()
    assert len(calls) == 2


def test_rates_are_measured_within_the_memory_there_is_and_only_kept_at_full_size(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "measure_rates", lambda matrix, copied: Rates(matrix, copied, 1.0))
    monkeypatch.setattr(machine, "gpu_limit", lambda budget: GIB // 2)
    assert machine.machine_rates() == Rates(8192, 2**26, 1.0)
    monkeypatch.setattr(machine, "gpu_limit", lambda budget: GIB // 16)
    assert machine.machine_rates() == Rates(2048, 2**23, 1.0)
    assert not (tmp_path / "lorajax" / "rates.json").exists()
    monkeypatch.setattr(machine, "gpu_limit", lambda budget: 80 * GIB)
    assert machine.machine_rates() == Rates(8192, 2**28, 1.0)
    assert (tmp_path / "lorajax" / "rates.json").exists()


def test_rates_can_be_measured_here():
    rates = machine.measure_rates(matrix=64, copied=2**16)
    assert min(rates.flops, rates.memory, rates.link) > 0
