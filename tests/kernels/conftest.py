"""Triton kernels without a GPU: run by Triton's interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def interpreted() -> Callable[[str], ModuleType]:
    """interpreted(name): a copy of a module of kernels that take torch tensors and run on the CPU."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    pytest.importorskip("torch", reason="Triton's interpreter needs torch")

    def load(name: str) -> ModuleType:
        found = importlib.util.find_spec(name)
        assert found is not None and found.origin is not None
        spec = importlib.util.spec_from_file_location(f"{name}_interpreted", found.origin)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True  # read where a kernel is decorated
            spec.loader.exec_module(module)
        return module

    return load


# Shared memory of a program, in KB.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


@pytest.fixture(scope="session")
def compile_kernel() -> Callable[..., Any]:
    """compile_kernel(kernel, capability, types, constants, num_warps, num_stages): the kernel for that GPU.

    capability is 80 for 8.0; types are Triton's ("*bf16", "i32") of the arguments that are not constants. The
    result has asm["ptx"], asm["cubin"] and metadata.shared, the bytes of shared memory, of which the GPU has
    enough. No buffer is written while it is read, see overwritten_in_flight.
    """
    triton = pytest.importorskip("triton", reason="Triton is not installed")

    def compile_for(
        kernel: Any,
        capability: int,
        types: Mapping[str, str],
        constants: Mapping[str, Any],
        num_warps: int,
        num_stages: int,
    ) -> Any:
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        # XLA's arrays are aligned, and jax-triton says so: loads are vectors, and are pipelined.
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names)
            if types.get(name, "").startswith("*")
        }
        source = triton.compiler.ASTSource(
            fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned
        )
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compiled = triton.compile(source, target=target, options=options)
        assert compiled.metadata.shared <= SHARED[capability] * 1024
        assert overwritten_in_flight(compiled.asm["ttgir"]) == set()
        return compiled

    return compile_for


@pytest.fixture(name="overwritten_in_flight")
def _overwritten_in_flight() -> Callable[[str], set[str]]:
    return overwritten_in_flight


def overwritten_in_flight(ttgir: str) -> set[str]:
    """Buffers in shared memory that a loop copies into while a product that reads them may not be done.

    Products are asynchronous on Hopper. A buffer has slots, which the iterations of a loop take in turn; each
    is filled some iterations ahead, as many as are filled before the loop.
    """
    slots: dict[str, int] = {}
    buffers: dict[str, str] = {}
    ahead: dict[str, int] = {}
    found: set[str] = set()
    loop: list[tuple[str, Any]] | None = None
    end = ""
    for line in ttgir.splitlines():
        if named := re.match(r"\s*(%\S+) = ttg.local_alloc : .*?memdesc<(\d+)x", line):
            slots[named[1]] = int(named[2])
        elif view := re.match(r"\s*(%\S+) = ttg.memdesc_\w+ (%\w+)", line):
            buffers[view[1]] = buffers.get(view[2], view[2])
        elif "scf.for" in line:
            loop, end = [], line[: len(line) - len(line.lstrip())] + "}"
        elif loop is not None and line.startswith(end):
            found |= _overwritten(loop, slots, ahead)
            loop, ahead = None, {}
        elif copied := re.search(r"async_copy_global_to_local \S+ (%\w+)", line):
            buffer = buffers.get(copied[1], copied[1])
            if loop is None:
                ahead[buffer] = ahead.get(buffer, 0) + 1
            else:
                loop.append(("copy", buffer))
        elif loop is not None and (waited := re.search(r"warp_group_dot_wait .*pendings = (\d+)", line)):
            loop.append(("wait", int(waited[1])))
        elif loop is not None and (dot := re.search(r"warp_group_dot (%[\w#]+), (%[\w#]+),", line)):
            loop.append(("dot", {buffers.get(operand, operand) for operand in dot.groups()}))
            if "isAsync = true" not in line:
                loop.append(("wait", 0))
    return found


def _overwritten(
    loop: Sequence[tuple[str, Any]], slots: Mapping[str, int], ahead: Mapping[str, int]
) -> set[str]:
    in_flight: list[tuple[int, set[str]]] = []
    found = set()
    for iteration in range(2 * max(slots.values(), default=0)):
        for kind, what in loop:
            if kind == "dot":
                in_flight.append((iteration, what))
            elif kind == "wait":
                in_flight = in_flight[max(len(in_flight) - what, 0) :]
            else:
                filled = (iteration + ahead.get(what, 0)) % slots[what]
                if any(what in read and then % slots[what] == filled for then, read in in_flight):
                    found.add(what)
    return found


@pytest.fixture
def run_on_cpu(
    interpreted: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], None]:
    """run_on_cpu(host, kernels): `triton_call` in the module `host` interprets the module `kernels`.

    Arrays may be float32, float16 or integers. Outputs hold NaN, or the smallest integer, until written.
    """
    import torch
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    patch_language = interpreter._patch_lang

    def patched(function: Any) -> Any:
        scope = patch_language(function)
        # The interpreter's scalars are arrays of one element, which numpy no longer takes for integers.
        scope.set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())
        # Triton's library is loaded for compilation; only its reductions are known to the interpreter.
        scope.set_attr(tl, "max", lambda x, axis: tl.reduce(x, axis, tl.standard._elementwise_max))
        scope.set_attr(tl, "sum", lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine))
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patched)
    # Called functions would patch the language once more, which takes most of the time.
    monkeypatch.setattr(
        interpreter.InterpretedFunction, "__call__", lambda self, *args: self.rewrite()(*args)
    )

    def patch(host: str, kernels: str) -> None:
        module = interpreted(kernels)

        def call(kernel: Any, *operands: Any, out_shape: Any, grid: Any, **options: Any) -> Any:
            aliases = options.pop("input_output_aliases", {})
            constants = {name: value for name, value in options.items() if name not in _COMPILATION}
            outputs, tree = jax.tree.flatten(out_shape)
            is_array = [isinstance(operand, jax.Array | np.ndarray) for operand in operands]

            def run(*arrays: Any) -> list[np.ndarray]:
                given = iter(arrays)
                inputs = [
                    torch.from_numpy(np.array(next(given))) if a else operand
                    for a, operand in zip(is_array, operands, strict=True)
                ]
                results = [torch.from_numpy(np.full(o.shape, _unwritten(o.dtype), o.dtype)) for o in outputs]
                made = [result for place, result in enumerate(results) if place not in aliases.values()]
                getattr(module, kernel.__name__)[grid](*inputs, *made, **constants)
                for operand, output in aliases.items():
                    results[output] = inputs[operand]
                return [result.numpy() for result in results]

            arrays = [operand for a, operand in zip(is_array, operands, strict=True) if a]
            return jax.tree.unflatten(tree, jax.pure_callback(run, outputs, *arrays))

        monkeypatch.setattr(importlib.import_module(host), "triton_call", call)

    return patch


_COMPILATION = ("num_warps", "num_stages", "compute_capability", "kernel_for_0_3")


def _unwritten(dtype: np.dtype) -> float:
    return np.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).min


@pytest.fixture
def compilation_cache(tmp_path):
    """A folder of its own for JAX' compilation cache."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
