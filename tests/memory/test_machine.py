"""What a run may take, and the rates that are measured once."""

import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lorajax.memory import machine
from lorajax.memory.costs import Rates
from lorajax.memory.targets import find_target

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


@pytest.mark.parametrize(
    "budget, free, warns", [(None, 14, True), ("8GiB", 14, False), ("16GiB", 14, True), (None, 23.5, False)]
)
def test_memory_that_others_hold_is_named_where_the_run_has_less_for_it(
    budget, free, warns, monkeypatch, caplog
):
    monkeypatch.setattr(machine, "_gpu_memory", lambda: (24 * GIB, int(free * GIB)))
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "1")  # so that it is put back
        monkeypatch.delenv(name)
    machine.claim_gpu_memory(budget)
    expected = "other processes hold 10.00 of the GPU's 24.00 GiB (see nvidia-smi); this one has 13.00 GiB"
    assert caplog.messages == [expected] * warns


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


@pytest.fixture
def gpus(monkeypatch):
    """gpus((limit, in use), ...): GPUs whose allocators say so."""

    def gpus(*sizes):
        devices = [
            SimpleNamespace(
                memory_stats=lambda limit=limit, held=held: {"bytes_limit": limit, "bytes_in_use": held}
            )
            for limit, held in sizes
        ]
        monkeypatch.setattr(machine.jax, "local_devices", lambda: devices)
        monkeypatch.setattr(machine.jax, "default_backend", lambda: "gpu")

    return gpus


@pytest.mark.slow
def test_what_other_arrays_hold_of_a_gpu_is_not_the_runs(gpus, caplog):
    with caplog.at_level(logging.WARNING, "lorajax"):
        gpus((100 * GIB, 0))
        assert machine.gpu_limit(None) == 98 * GIB
        gpus((100 * GIB, 2**20))
        assert machine.gpu_limit(None) == 98 * GIB - 2**20 and machine.gpu_limit("8GiB") == 8 * GIB
        gpus((100 * GIB, 30 * GIB))
        assert machine.gpu_limit("68GiB") == 68 * GIB == machine.gpu_limit("67GiB") + GIB
        assert [record.message[:9] for record in caplog.records] == ["30.00 GiB"]
        assert machine.gpu_limit(None) == machine.gpu_limit("80GiB") == 68 * GIB
    assert len(caplog.records) == 3
    assert "held by other arrays of this process" in caplog.text and "more than 68.00 GiB" in caplog.text


def test_the_fullest_gpu_decides(gpus):
    gpus((100 * GIB, 0), (100 * GIB, 50 * GIB), (90 * GIB, 0))
    assert machine.gpu_limit(None) == 48 * GIB
    gpus((10 * GIB, 10 * GIB), (10 * GIB, 0))
    assert machine.gpu_limit(None) == 0


def test_pinned_host_memory_is_as_much_as_jax_is_told_of_before_it_starts(monkeypatch):
    """XLA's pool has 64 GiB otherwise."""
    name = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
    monkeypatch.setenv(name, "1")  # so that it is put back
    monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "_free_host_memory", lambda: 400 * GIB + 1)
    monkeypatch.setattr(machine, "_gpu_memory", lambda: None)
    monkeypatch.setattr(machine, "_jax_has_started", lambda: True)
    machine.claim_gpu_memory(None)
    assert name not in machine.os.environ and machine.host_limit("100GiB") == 64 * GIB
    monkeypatch.setattr(machine, "_jax_has_started", lambda: False)
    machine.claim_gpu_memory(None)
    assert machine.os.environ[name] == "250" and machine.host_limit("100GiB") == 100 * GIB
    assert machine.host_limit(None) == 200 * GIB
    monkeypatch.setenv(name, "8")
    machine.claim_gpu_memory(None)
    assert machine.host_limit("100GiB") == 8 * GIB


def test_whether_jax_has_started_is_known():
    imports = "import jax; from lorajax.memory.machine import _jax_has_started as started"
    script = f"{imports}; before = started(); jax.devices(); print(before, started())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.fixture
def host(tmp_path):
    """host({name: text}) -> free bytes of a host of 8 GiB with such files in /proc and of cgroups."""

    def free(files):
        for name, text in {"proc/meminfo": "MemAvailable: 8388608 kB\n", **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return machine._free_host_memory(tmp_path / "proc", tmp_path / "cgroup")

    return free


def test_without_limits_host_memory_is_the_machines(host):
    assert host({}) == 8 * GIB
    files = {"cgroup/memory.max": "max\n", "cgroup/memory.current": "1073741824\n"}
    assert host({"proc/self/cgroup": "0::/\n", **files}) == 8 * GIB
    assert host({"proc/self/cgroup": "0::/gone\n1:cpu:/\n"}) == 8 * GIB


def test_a_containers_limit_bounds_host_memory(host):
    files = {
        "proc/self/cgroup": "0::/\n",
        "cgroup/memory.max": f"{4 * GIB}\n",
        "cgroup/memory.current": f"{GIB}\n",
    }
    assert host(files) == 3 * GIB
    assert host({"cgroup/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n"}) == 3.5 * GIB
    assert host({"cgroup/memory.current": f"{5 * GIB}\n"}) == 0
    assert host({"cgroup/memory.max": f"{64 * GIB}\n"}) == 8 * GIB


def test_a_limit_above_the_process_group_counts(host):
    job = "cgroup/slurm/job"
    files = {"proc/self/cgroup": "0::/slurm/job/step\n", f"{job}/memory.max": f"{2 * GIB}\n"}
    assert host({**files, f"{job}/memory.current": "0\n", f"{job}/step/memory.max": "max\n"}) == 2 * GIB


def test_control_groups_of_version_1_count(host):
    files = {
        "proc/self/cgroup": "5:cpu:/other\n4:hugetlb,memory:/docker/abc\n0::/\n",
        # A container sees its own group as the root.
        "cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
        "cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
        "cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 4}\n",
    }
    assert host(files) == 1.25 * GIB


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
    monkeypatch.setattr(machine, "_gpu_memory_left", lambda: (GIB // 2, 0))
    assert machine.machine_rates() == Rates(8192, 2**26, 1.0)
    monkeypatch.setattr(machine, "_gpu_memory_left", lambda: (GIB // 16, 0))
    assert machine.machine_rates() == Rates(2048, 2**23, 1.0)
    monkeypatch.setattr(machine, "_gpu_memory_left", lambda: (0, 80 * GIB))
    assert min(machine.machine_rates().flops, machine.machine_rates().memory) > 0
    assert not (tmp_path / "lorajax" / "rates.json").exists()
    monkeypatch.setattr(machine, "_gpu_memory_left", lambda: (80 * GIB, 0))
    assert machine.machine_rates() == Rates(8192, 2**28, 1.0)
    assert (tmp_path / "lorajax" / "rates.json").exists()


def test_machines_that_share_a_home_have_their_own_rates(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    links = {"one": 1e10, "two": 5e10}
    for name, link in links.items():
        monkeypatch.setattr(machine.platform, "node", lambda name=name: name)
        monkeypatch.setattr(machine, "measure_rates", lambda link=link, **sizes: Rates(1e12, 2e11, link))
        assert machine.machine_rates().link == link
    monkeypatch.setattr(machine.platform, "node", lambda: "one")
    assert machine.machine_rates().link == 1e10  # kept, though another was measured since


def test_rates_under_other_flags_are_others(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for flags, flops in (("", 1e12), ("--xla_gpu_autotune_level=0", 1e11)):
        monkeypatch.setenv("XLA_FLAGS", flags)
        monkeypatch.setattr(machine, "measure_rates", lambda flops=flops, **sizes: Rates(flops, 2e11, 3e10))
        assert machine.machine_rates().flops == flops
    monkeypatch.setenv("XLA_FLAGS", "")
    assert machine.machine_rates().flops == 1e12


@pytest.mark.parametrize(
    ("flops", "memory", "doubtful"), [(12e12, 4e12, True), (7e14, 1e11, True), (4e14, 2e12, False)]
)
def test_rates_of_a_gpu_in_use_are_neither_believed_nor_kept(
    flops, memory, doubtful, monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    h200, measured = find_target("h200"), Rates(flops, memory, 3e10)
    monkeypatch.setattr(machine, "current_device", lambda: h200.device)
    monkeypatch.setattr(machine, "measure_rates", lambda **sizes: measured)
    monkeypatch.setattr(machine, "_gpu_memory_left", lambda: (80 * GIB, 0))
    assert machine.machine_rates() == (h200.rates if doubtful else measured)
    assert (tmp_path / "lorajax" / "rates.json").exists() is not doubtful
    assert ("something else uses it" in caplog.text) is doubtful


def test_rates_can_be_measured_here():
    rates = machine.measure_rates(matrix=64, copied=2**16)
    assert min(rates.flops, rates.memory, rates.link) > 0
