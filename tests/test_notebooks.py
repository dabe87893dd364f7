"""The notebooks are valid, hold no outputs, and run from top to bottom (with less to do)."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert "01_quickstart" in {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.slow
def test_quickstart_runs(write_llama, tokenizer, write_rows, tmp_path, monkeypatch):
    # A program that a cell compiles serves those after it, and the user's caches stay as they are.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    (settings,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    rows = write_rows(
        [{"prompt": f"What is {i}?", "completion": f"It is {i + 1} less 1."} for i in range(99)]
    )
    folder = write_llama(tmp_path / "llama", max_position_embeddings=512)
    tokenizer.save_pretrained(str(folder))
    settings.source += (
        f"\nmodel_path, data_path = {str(folder)!r}, {rows!r}\nmax_steps, max_new_tokens = 2, 8\n"
    )
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    assert "⟦" in _printed(notebook, "data") and "<|im_end|>⟧" in _printed(notebook, "data")
    assert "2 steps in" in _printed(notebook, "report")
    assert "adapter_model.safetensors" in _printed(notebook, "save")
    assert (tmp_path / "runs" / "notebook" / "metrics.jsonl").is_file()
    assert (tmp_path / "runs" / "merged" / "model.safetensors").is_file()
    assert _printed(notebook, "merge").strip() in _printed(notebook, "after")


def _printed(notebook, cell_id: str) -> str:
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
