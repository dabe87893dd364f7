"""Loss and gradient of a chunk of logits by one Triton kernel, which writes the gradient over the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lorajax_kernels.device import Device
from lorajax_kernels.triton_call import passes_aliased_outputs, triton_call

if TYPE_CHECKING:
    from lorajax_kernels.cross_entropy import Problem


@dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up.

    Attributes:
        block: logits that a program holds at a time, a power of two.
        num_warps: warps of one program. Few large programs keep the rows in flight within the L2 cache, so
            that the second visit of a row finds it there.
    """

    block: int
    num_warps: int


# The fastest of eight on an H200, by 1%.
TILING = Tiling(block=16384, num_warps=16)


def why_not(problem: Problem, device: Device) -> str | None:
    """None if the kernel can serve the problem there, otherwise the reason why not."""
    if device.no_triton is not None:
        return device.no_triton
    if problem.dtype != jnp.bfloat16:
        return f"it writes the gradient over bfloat16 logits, and x is {problem.dtype}"
    return None


def triton_loss_and_gradient(
    logits: Float[Array, "rows V"],
    targets: Int[Array, " rows"],
    weights: Float[Array, " rows"],
    *,
    softcap: float | None,
    dtype: jnp.dtype,
    tiling: Tiling | None = None,
) -> tuple[Float[Array, " rows"], Float[Array, "rows V"]]:
    """See xla_loss_and_gradient; dtype is that of the logits, and rows of weight 0 keep their logits."""
    from lorajax_kernels.cross_entropy import triton_kernels

    if dtype != logits.dtype:
        raise ValueError(f"the gradient of {logits.dtype} logits cannot be {dtype}")
    rows, vocab = logits.shape
    tiling = tiling or TILING
    kernel = triton_kernels.loss_and_gradient_kernel
    if passes_aliased_outputs():
        kernel = triton_kernels.loss_and_gradient_kernel_for_0_3
    return triton_call(
        kernel,
        *(logits, targets.astype(jnp.int32), weights),
        out_shape=(
            jax.ShapeDtypeStruct((rows,), jnp.float32),
            jax.ShapeDtypeStruct(logits.shape, logits.dtype),
        ),
        grid=(rows,),
        num_warps=tiling.num_warps,
        num_stages=1,
        input_output_aliases={0: 1},
        VOCAB=vocab,
        SOFTCAP=softcap,
        BLOCK=min(tiling.block, 1 << math.ceil(math.log2(max(vocab, 2)))),
    )
