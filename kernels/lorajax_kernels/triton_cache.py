"""Compiled Triton kernels in JAX' compilation cache.

JAX finds a compiled program in its cache by the program's text, which holds its kernels compiled. Without a
cache of their own, a process compiles them all before it can look.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from lorajax_kernels import jax_cache


def keep_on_disk(triton_lib: Any, versions: str) -> None:
    """Let jax-triton keep the kernels that it compiles, as long as it has the function that this stands for.

    Args:
        triton_lib: jax_triton.triton_lib.
        versions: of all that has a part in compiling.
    """
    compile_kernel = getattr(triton_lib, "compile_ttir_inplace", None)
    result = getattr(triton_lib, "CompilationResult", None)
    if compile_kernel is not None and isinstance(result, type) and dataclasses.is_dataclass(result):
        triton_lib.compile_ttir_inplace = kept_on_disk(compile_kernel, result, versions)


def kept_on_disk(
    compile_kernel: Callable[..., Any], result: Callable[..., Any], versions: str
) -> Callable[..., Any]:
    """compile_kernel(module, backend, options, ...) -> result, which looks into JAX' compilation cache first.

    Args:
        compile_kernel: the module's text and the other arguments decide what it gives.
        result: a dataclass; what does not go into JSON is not kept.
        versions: as in keep_on_disk.
    """

    @functools.wraps(compile_kernel)
    def cached(module: Any, backend: Any, options: Any, *others: Any) -> Any:
        key = "\0".join([str(module), type(backend).__name__, repr(options), repr(others), versions])
        try:
            return result(**jax_cache.load("triton", key))
        except TypeError:
            pass  # there is none, or it is of another release
        made = compile_kernel(module, backend, options, *others)
        jax_cache.store("triton", key, dataclasses.asdict(made))
        return made

    return cached
