"""How a Triton kernel is launched from JAX, whichever jax-triton is installed.

Modules of kernels import triton at their top, so they are loaded only where a kernel is about to run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Container, Sequence
from typing import Any

import jax
from jaxtyping import Array

from lorajax_kernels.device import is_assumed
from lorajax_kernels.triton_cache import keep_on_disk

# Of CUtensorMapDataType in the CUDA driver's API.
_TMA_TF32 = 11


def triton_call(
    kernel: Any,
    *operands: Array | int | float,
    out_shape: Any,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    compute_capability: int | None = None,
    input_output_aliases: dict[int, int] | None = None,
    kernel_for_0_3: Any = None,
    **constants: Any,
) -> Any:
    """Run `kernel[grid](*operands, *outputs, **constants)`.

    There are no derivatives and no batching rule: wrap it in jax.custom_vjp.

    Args:
        kernel: a function decorated with triton.jit.
        operands: arrays become pointers; numbers are compiled in.
        out_shape: pytree of jax.ShapeDtypeStruct, one for each output; what they hold at first is undefined.
        grid: numbers of programs along up to three axes.
        num_warps, num_stages: of the kernel's compilation.
        compute_capability: to compile for, as 90 for 9.0; None: that of the GPU at hand.
        input_output_aliases: from the place of an operand to that of the output that takes its memory. Such
            outputs come last, and `kernel` gets no pointer for them.
        kernel_for_0_3: where outputs have aliases, the same kernel with a pointer for each of those too; see
            passes_aliased_outputs.
        constants: the kernel's constexpr arguments.

    Returns:
        Arrays of the structure of out_shape.
    """
    aliases = input_output_aliases or {}
    operands = tuple(_apart(operands, aliases))
    if is_assumed():
        results = stand_in(*operands, out_shape=out_shape, input_output_aliases=aliases)
    else:
        library, spelling = _jax_triton()
        if aliases and passes_aliased_outputs():
            kernel = kernel_for_0_3
        results = library.triton_call(
            *operands,
            kernel=kernel,
            grid=grid,
            num_warps=num_warps,
            num_stages=num_stages,
            compute_capability=compute_capability,
            input_output_aliases=aliases,
            **{spelling: out_shape},
            **constants,
        )
    leaves, tree = jax.tree.flatten(results)
    return jax.tree.unflatten(tree, _apart(leaves, aliases.values()))


def _apart(arrays: Sequence[Any], places: Container[int]) -> list[Any]:
    """The arrays, with those at these places behind barriers.

    XLA (of jaxlib 0.11) makes one fusion of a kernel and of a slice that it reads or writes, and the fusion
    knows nothing of the kernel's aliases: what it writes in an operand's place is lost. Across a barrier it
    makes none.
    """
    return [jax.lax.optimization_barrier(x) if i in places else x for i, x in enumerate(arrays)]


def stand_in(
    *operands: Array | int | float, out_shape: Any, input_output_aliases: dict[int, int] | None = None
) -> Any:
    """What XLA sees of a kernel: operands, results and aliases as in triton_call. It cannot run."""
    arrays = [operand for operand in operands if not isinstance(operand, int | float)]
    shapes, tree = jax.tree.flatten(out_shape)
    # Where jax-triton's calls go; what a call holds is read when it runs.
    call = jax.ffi.ffi_call(
        "triton_kernel_call",
        shapes,
        input_output_aliases=input_output_aliases,
        custom_call_api_version=2,
        legacy_backend_config="",
    )
    return jax.tree.unflatten(tree, call(*arrays))


def load_kernels(module: str) -> Any:
    """A module of kernels; without Triton, where they are stood in for, something that has every name."""
    return _AnyName() if is_assumed() else importlib.import_module(module)


class _AnyName:
    def __getattr__(self, name: str) -> None:
        return None


def passes_aliased_outputs() -> bool:
    """Whether kernels get a pointer for an output that takes an operand's memory: until jax-triton 0.4."""
    return _jax_triton()[1] == "out_shape"


def block_for(size: int, least: int = 16) -> int:
    """The smallest power of two that holds `size` elements; tl.dot needs 16 along each axis."""
    return max(least, 1 << (size - 1).bit_length())


@functools.cache
def _jax_triton() -> tuple[Any, str]:
    """jax-triton, and what its release calls out_shape."""
    import triton
    import triton.backends.nvidia.driver as driver

    if not hasattr(driver, "TMA_TF32"):
        # jax-triton 0.4 imports it, and without it takes Triton 3.6 for one without NVIDIA's backend.
        driver.TMA_TF32 = _TMA_TF32
    _leave_torch_out()
    import jax_triton

    versions = f"triton {triton.__version__}, jax-triton {jax_triton.__version__}"
    keep_on_disk(getattr(jax_triton, "triton_lib", None), versions)
    release = tuple(int(part) for part in jax_triton.__version__.split(".")[:2])
    return jax_triton, "out_type" if release >= (0, 4) else "out_shape"


def _leave_torch_out() -> None:
    """Let Triton learn which classes it knows before it looks at a kernel's arguments, but not PyTorch's.

    It would import PyTorch where that is installed, which takes seconds. It knows a tensor of PyTorch by its
    data_ptr too.
    """
    if "torch" in sys.modules:
        return
    with contextlib.suppress(ImportError):
        from triton._C.libtriton import native_specialize_impl

        sys.modules["torch"] = None  # type: ignore[assignment]  # so that it cannot be imported
        try:
            native_specialize_impl(None, 0, False, False, False)
        finally:
            del sys.modules["torch"]
