"""The package as it is installed: metadata, modules, commands, and the configs that come with it."""

import gc
import logging
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import metadata, requires, version
from pathlib import Path

import pytest

from lorajax.command import run_command
from lorajax.config import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_metadata():
    assert version("lorajax") == "0.1.0"
    assert metadata("lorajax")["Requires-Python"] == ">=3.11"
    assert set(metadata("lorajax").get_all("Provides-Extra")) == {
        "cuda12",
        "cuda13",
        "plan",
        "test",
        "notebook",
        "tracking",
    }


def test_torch_is_needed_by_tests_only():
    for requirement in requires("lorajax") or []:
        if requirement.startswith(("torch", "peft")):
            assert 'extra == "test"' in requirement.replace("'", '"')


@pytest.mark.parametrize(
    "folder", [ROOT / "lorajax", ROOT / "kernels" / "lorajax_kernels"], ids=lambda path: path.name
)
def test_every_folder_of_modules_is_a_package(folder):
    folders = {path.parent for path in folder.rglob("*.py")}
    assert folders
    assert [str(path) for path in folders if not (path / "__init__.py").exists()] == []


def test_both_packages_are_found_from_another_folder(tmp_path):
    code = "import lorajax, lorajax_kernels; print(lorajax.__file__, lorajax_kernels.__file__)"
    result = run("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "lorajax" in result.stdout


def test_configs_are_read_without_heavy_imports(tmp_path):
    code = "import sys, lorajax.config; print({'transformers', 'datasets', 'torch'} & set(sys.modules))"
    result = run("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "set()"


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_a_cuda_plugin_that_nothing_can_run_on_is_passed_over_in_silence(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    result = subprocess.run(
        [sys.executable, "-c", "import lorajax, jax; print(jax.default_backend())"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.stdout.strip(), result.stderr.strip()) == ("cpu", "")


def test_what_else_jax_says_of_its_plugins_is_not_kept_back(monkeypatch):
    said = "Jax plugin configuration error: Exception when calling jax_plugins.{}.initialize()"

    def heard(plugin: str) -> bool:
        record = logging.makeLogRecord({"msg": said.format(plugin)})
        return bool(logging.getLogger("jax._src.xla_bridge").filter(record))

    monkeypatch.setattr(os.path, "exists", lambda path: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert heard("libtpu") and not heard("xla_cuda13")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert heard("xla_cuda13")


def test_train_command_explains_itself_from_another_folder(tmp_path):
    result = run("-m", "lorajax.train", "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "--train.learning_rate" in result.stdout
    assert "--dry-run" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such config file"),
        (["--train.max_step=3"], "unknown key train.max_step; did you mean train.max_steps?"),
    ],
)
def test_train_command_says_what_is_wrong_without_a_traceback(tmp_path, arguments, expected):
    result = run("-m", "lorajax.train", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost():
    """Python drops what such a callback raises; JAX has one."""

    def callback(phase: str, info: dict) -> None:
        if phase == "start":
            gc.callbacks.remove(callback)
            raise KeyboardInterrupt

    def main(arguments: object) -> int:
        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(5)
        return 0

    hook = sys.unraisablehook
    assert run_command(main) == 130
    assert sys.unraisablehook is hook


def test_a_reader_that_leaves_ends_a_command_quietly(tmp_path):
    code = (
        "import sys; from lorajax.command import run_command; "
        "sys.exit(run_command(lambda _: print('x' * 10**6)))"
    )
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert command.stdout.read(1) == b"x"
    command.stdout.close()
    assert command.stderr.read() == b"" and command.wait() == 141
    command.stderr.close()


def test_another_pipe_that_breaks_is_an_error():
    def main(arguments):
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        run_command(main)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_load(path):
    text = path.read_text(encoding="utf-8")
    overrides = [] if path.stem == "quickstart" else ["--data.path", "org/data"]
    config = load_config(path, overrides)
    assert config.output.output_dir == str(ROOT / "runs" / path.stem)
    header = text.partition("\nmodel:")[0]
    assert f"python -m lorajax.train configs/{path.name}" in header
    assert "Expected:" in header


def test_there_are_configs():
    assert {path.stem for path in CONFIGS} >= {"quickstart", "smollm2_135m", "pretrain_tiny"}
