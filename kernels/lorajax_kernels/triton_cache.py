"""Compiled Triton kernels in JAX' compilation cache.

JAX finds a compiled program in its cache by the program's text, which holds its kernels compiled. Without a
cache of their own, a process compiles them all before it can look.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


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
        folder = jax.config.values["jax_compilation_cache_dir"]
        if not folder or "://" in folder:
            return compile_kernel(module, backend, options, *others)
        key = "\0".join([str(module), type(backend).__name__, repr(options), repr(others), versions])
        path = Path(folder) / "triton" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        try:
            return result(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            pass  # there is none, or it is damaged
        made = compile_kernel(module, backend, options, *others)
        try:
            text = json.dumps(dataclasses.asdict(made))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except (OSError, TypeError):
            pass  # compiled again next time
        return made

    return cached
