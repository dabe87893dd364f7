"""NF4 dequantised by a Triton kernel: packed bytes in, the weight out, at the speed of memory.

Double quantisation is undone in the same kernel, by two more lookups for each word. A step of its own would
be another launch, and its float32 absmax, written and read, would add 5% to the bytes moved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax_kernels.device import Device
from lorajax_kernels.nf4.reference import BLOCK, CODE
from lorajax_kernels.triton_call import load_kernels, triton_call

if TYPE_CHECKING:
    from lorajax_kernels.nf4 import NF4Weight, Problem

# Elements of a packed word of 4 bytes.
PER_WORD = 8


@dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up.

    Attributes:
        words: packed words of one program, a power of two of at most 2048. With 4 for each thread they are
            loaded 16 bytes at a time and change threads through shared memory; with 1 they stay in place.
        num_warps: warps of one program.
    """

    words: int
    num_warps: int


# By the bytes of an output element: 2 as measured on an H200, where 256 to 512 words are alike.
TILINGS = {2: Tiling(words=512, num_warps=4), 4: Tiling(words=512, num_warps=4)}


def why_not(problem: Problem, device: Device) -> str | None:
    """None if the kernel can serve the problem there, otherwise the reason why not."""
    if device.why_no_triton is not None:
        return device.why_no_triton
    if math.prod(problem.shape) % BLOCK:
        return f"it needs whole blocks of {BLOCK} elements, a weight of shape {problem.shape} ends within one"
    return None


def triton_dequantize(q: NF4Weight, dtype: jnp.dtype) -> Float[Array, "out in"]:
    """See dequantize_nf4."""
    dequantize_kernel = load_kernels("lorajax_kernels.nf4.triton_kernels").dequantize_kernel
    tiling = TILINGS[jnp.dtype(dtype).itemsize]
    total = math.prod(q.shape) // PER_WORD
    nested: tuple[Any, ...] = (q.absmax2, q.absmax_code, q.offset)
    if not q.double_quant:
        nested = (q.absmax,) * 3  # not read
    return triton_call(
        dequantize_kernel,
        q.packed,
        jnp.asarray(CODE),
        q.absmax,
        *nested,
        out_shape=jax.ShapeDtypeStruct(q.shape, dtype),
        grid=(-(-total // tiling.words),),
        num_warps=tiling.num_warps,
        num_stages=1,
        TOTAL=total,
        NESTED=q.double_quant,
        WORDS=tiling.words,
    )
