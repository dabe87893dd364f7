"""Compiled Triton kernels, kept in JAX' compilation cache from one process to the next."""

import dataclasses
import types
from typing import Any

import jax
import pytest
from lorajax_kernels.triton_cache import keep_on_disk


@dataclasses.dataclass
class Result:
    binary: Any
    name: str
    shared_mem_bytes: int = 0


FOLDER = "jax_compilation_cache_dir"


@pytest.fixture
def library(compilation_cache):
    """library(): a jax_triton.triton_lib as a new process finds it, which counts what it compiles."""

    def library(versions="triton 3.6", binary="ptx of {}"):
        compiled = []

        def compile_ttir_inplace(module, backend, options, target):
            compiled.append(module)
            return Result(binary if isinstance(binary, bytes) else binary.format(module), options["name"], 7)

        found = types.SimpleNamespace(CompilationResult=Result, compile_ttir_inplace=compile_ttir_inplace)
        keep_on_disk(found, versions)
        return found, compiled

    return library


def kernel_of(found, module="module", name="f", target=90):
    return found.compile_ttir_inplace(module, object(), {"name": name}, target)


def test_a_kernel_is_compiled_once_for_all_processes(library):
    first, second = library(), library()
    expected = Result("ptx of module", "f", 7)
    assert kernel_of(first[0]) == kernel_of(second[0]) == expected
    assert (first[1], second[1]) == (["module"], [])


def test_what_goes_into_a_kernel_tells_it_from_others(library):
    kernel_of(library()[0])
    for changed in ({"module": "other"}, {"name": "g"}, {"target": 80}):
        found, compiled = library()
        kernel_of(found, **changed)
        assert len(compiled) == 1
    found, compiled = library(versions="triton 3.7")
    kernel_of(found)
    assert len(compiled) == 1


def test_a_damaged_file_is_replaced(library, tmp_path):
    kernel_of(library()[0])
    [path] = (tmp_path / "triton").iterdir()
    path.write_text(path.read_text()[:20])
    damaged, after = library(), library()
    assert kernel_of(damaged[0]) == kernel_of(after[0])
    assert (len(damaged[1]), len(after[1])) == (1, 0)


def test_what_is_no_text_is_not_kept(library, tmp_path):
    for _ in range(2):
        found, compiled = library(binary=b"code")
        assert kernel_of(found).binary == b"code" and len(compiled) == 1


@pytest.mark.parametrize("folder", (None, "gs://bucket/cache"))
def test_without_a_folder_nothing_is_kept(library, folder, tmp_path):
    jax.config.update(FOLDER, folder)
    for _ in range(2):
        found, compiled = library()
        kernel_of(found)
        assert len(compiled) == 1
    assert not list(tmp_path.iterdir())


def test_another_jax_triton_is_left_as_it_is():
    library = types.SimpleNamespace()
    keep_on_disk(library, "")
    keep_on_disk(None, "")
    assert vars(library) == {}
