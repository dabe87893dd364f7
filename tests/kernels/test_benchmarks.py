"""The benchmarks of the kernels: what they report, and that they run."""

import dataclasses
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from lorajax_kernels.measure import Time

from lorajax.errors import UserError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results():
    path = REPOSITORY / "kernels" / "benchmarks" / "results.py"
    spec = importlib.util.spec_from_file_location("results", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["results"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["results"]


@pytest.fixture
def rows(results, monkeypatch):
    """One case: ours takes 2 ms, two peers 4 and 3 ms, another fails."""
    taken = {"ours": 2.0, "slow peer": 4.0, "peer": 3.0}
    monkeypatch.setattr(
        results, "compare", lambda calls, rounds: {name: Time(*[taken[name]] * 3) for name in calls}
    )

    def fails():
        raise ImportError("no such package\nmore of it")

    makers = {name: lambda: lambda: None for name in taken} | {"absent peer": fails}
    ceilings = results.Ceilings(bytes_per_second=1e12, flops=4e12, half="bfloat16")
    work = results.Work(4e9, "flops")
    return results.measure_case("op", "case", work, ceilings, makers, ours=("ours",), rounds=3)


def test_rates_and_ratios(results, rows):
    ours = results.as_json(rows[0], rows)
    assert (ours["ms"], ours["rate"], ours["of_ceiling"]) == (2.0, "2.0 TFLOP/s", 0.5)
    assert ours["to_best_peer"] == pytest.approx(2 / 3)
    assert "to_best_peer" not in results.as_json(rows[1], rows)
    memory = results.Work(4e9, "bytes")
    makers = {"ours": lambda: lambda: None}
    ceilings = results.Ceilings(bytes_per_second=4e12, flops=1.0, half="bfloat16")
    [row] = results.measure_case("op", "case", memory, ceilings, makers, ours=("ours",), rounds=3)
    assert (row.rate, row.of_ceiling) == ("2000 GB/s", 0.5)
    assert results.to_best_peer(row, [row]) is None


def test_table_in_markdown(results, rows):
    untimed = results.Row("op", "another case", "ours", True, None, note="12 MB of temporary memory")
    record = {"rows": [results.as_json(row, rows) for row in [*rows, untimed]]}
    [line] = results.markdown(record).splitlines()[2:]
    assert line == "| op, case | ours 2 | 50% | 0.67 | peer 3, slow peer 4 |"


def test_a_bound_is_no_peer(results, rows):
    rows = [dataclasses.replace(row, bound=row.implementation == "slow peer") for row in rows]
    ours = results.as_json(rows[0], rows)
    assert (ours["to_best_peer"], ours["to_bound"]) == (pytest.approx(2 / 3), 0.5)
    [title, _, line] = results.markdown({"rows": [results.as_json(row, rows) for row in rows]}).splitlines()
    assert title.endswith("| others | to the bound |")
    assert line == "| op, case | ours 2 | 50% | 0.67 | peer 3 | 0.50: slow peer 4 |"


def test_a_peer_that_fails_is_reported_with_its_reason(results, rows):
    assert (rows[3].ms, rows[3].note) == (None, "ImportError: no such package")
    lines = results.table(rows).splitlines()
    assert lines[1].split()[:5] == ["op", "case", "ours", "2.000", "2.0"] and "0.67" in lines[1]
    assert lines[4].endswith("ImportError: no such package")


@pytest.mark.slow
def test_all_run_in_one_process(tmp_path):
    command = [
        sys.executable,
        REPOSITORY / "benchmarks" / "kernels.py",
        "--tiny",
        "--out",
        tmp_path / "k.json",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    record = json.loads((tmp_path / "k.json").read_text())
    measured = {row["op"] for row in record["rows"] if row["ours"] and "ms" in row}
    assert measured == {row["op"] for row in record["rows"]}
    assert {"attention", "linear_cross_entropy"} <= measured
    assert record["ceilings"]["flops"] > 0 and record["versions"]["jax"]


@pytest.fixture
def script(monkeypatch):
    """script("record"): that module of benchmarks/; it and what it imports from there are gone afterwards."""
    folder = REPOSITORY / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield importlib.import_module
    for name in {path.stem for path in folder.glob("*.py")} & sys.modules.keys() - before:
        del sys.modules[name]


@pytest.fixture
def attention_losses(script, monkeypatch):
    """The module, whose runs are of this process."""
    module = script("attention_losses")

    def run(script, arguments):
        config, here, steps, *overrides = arguments
        assert here == "--here"
        try:
            return module.train(config, int(steps.removeprefix("--steps=")), overrides)
        except (UserError, ValueError) as error:
            return {"error": str(error)}

    monkeypatch.setattr(module, "last_json", run)
    return module


@pytest.mark.slow
def test_losses_of_each_attention_implementation(
    attention_losses, compilation_cache, llama_folder, write_rows, monkeypatch, tmp_path
):
    config, out = tmp_path / "config.yaml", tmp_path / "losses.json"
    data = write_rows([{"prompt": "the capital of", "completion": "France is Paris"}] * 8)
    config.write_text(
        f"model: {{path: {llama_folder}, dtype: bfloat16}}\n"
        f"data: {{path: {data}, max_length: 64, packing: false, cache_dir: {tmp_path}}}\n"
        "train: {per_device_train_batch_size: 1}\n"
        "output: {output_dir: none}\n"
    )
    monkeypatch.setattr(sys, "argv", ["losses", str(config), f"--out={out}", "--steps=2", "--float32"])
    attention_losses.main()
    record = json.loads(out.read_text())
    losses = record["losses"]
    assert {"xla", "xla, float32"} <= losses.keys(), record["refused"]
    assert losses.keys() | record["refused"].keys() == {"cudnn", "triton", "xla", "xla, float32"}
    assert all(len(each) == 2 for each in losses.values())
    apart = max(abs(a - b) for a, b in zip(losses["xla"], losses["xla, float32"], strict=True))
    assert record["differences"]["xla - xla, float32"] == pytest.approx(apart, abs=1e-6)
    assert 0 < apart < 0.05


@pytest.fixture
def record(script):
    return script("record")


def test_what_is_recorded_is_asked_of_scripts_that_know_it(record, tmp_path):
    inputs = dict.fromkeys((*record.INPUTS, "folder", "cache", "configs", "tests"), "given")
    for task in record.TASKS.values():
        _, script, *arguments = record.command(task, inputs, tmp_path / "out.json", "abc")
        if script == "-m":
            assert arguments[0] == "pytest"
            continue
        source = Path(script).read_text()
        options = {each.partition("=")[0] for each in arguments if each.startswith("--")}
        assert {"--out", "--commit"} <= options
        assert all(f'"{option}"' in source for option in options if "." not in option)
    found = record.command(record.TASKS["train_step_1b"], inputs, tmp_path, None)
    assert "given 1b,8,2048,0,0 1b,8,2048,u,0" in found


def test_every_recorded_result_has_figures(record):
    for path in (REPOSITORY / "benchmarks" / "results").glob("*-h200.json"):
        benchmark = json.loads(path.read_text())["benchmark"]
        assert len(record.figures(path, path)) > 5, benchmark


def test_tasks_share_gpus_and_the_time(record, monkeypatch, capsys, tmp_path):
    say = "pytest --version"
    tasks = {
        "says": record.Task(1, say),
        "needs": record.Task(1, f"{say} {{data}}"),
        "fails": record.Task(1, "pytest --no-such-option"),
        "slow": record.Task(0.001, say),
    }
    monkeypatch.setattr(record, "TASKS", tasks)
    command = ["record", f"--folder={tmp_path}", "--gpus=0,1", "--only", *tasks]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="True"):
        record.main()
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[-4:]}
    assert list(lines) == list(tasks)
    assert "done" in lines["says"] and f"pytest {pytest.__version__}" in lines["says"]
    assert "needs --data" in lines["needs"]
    assert "failed, 4" in lines["fails"] and "stopped" in lines["slow"]
    [late] = record.run_all(["says"], {"folder": str(tmp_path)}, None, ["0"], seconds=0)
    assert late.outcome == "not begun"
