"""Loss and gradient of a chunk of logits by one Triton kernel, which writes the gradient over the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lorajax_kernels.checks import why_not_capped
from lorajax_kernels.device import Device
from lorajax_kernels.triton_call import block_for, load_kernels, triton_call

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


# The fastest of eight on an H200, all close together.
TILING = Tiling(block=16384, num_warps=16)


def why_not(problem: Problem, device: Device) -> str | None:
    """None if the kernel can serve the problem there, otherwise the reason why not."""
    if device.why_no_triton is not None:
        return device.why_no_triton
    if problem.dtype != jnp.bfloat16:
        return f"it writes the gradient over bfloat16 logits, and x is {problem.dtype}"
    return why_not_capped(problem.softcap)


def triton_loss_and_gradient(
    logits: Float[Array, "rows width"],
    targets: Int[Array, " rows"],
    weights: Float[Array, " rows"],
    *,
    vocab: int,
    softcap: float | None,
    dtype: jnp.dtype,
    tiling: Tiling | None = None,
) -> tuple[Float[Array, " rows"], Float[Array, "rows width"]]:
    """See xla_loss_and_gradient; dtype is that of the logits, and rows of weight 0 keep their logits."""
    triton_kernels = load_kernels("lorajax_kernels.cross_entropy.triton_kernels")
    if dtype != logits.dtype:
        raise ValueError(f"the gradient of {logits.dtype} logits cannot be {dtype}")
    rows, width = logits.shape
    tiling = tiling or TILING
    return triton_call(
        triton_kernels.loss_and_gradient_kernel,
        *(logits, targets.astype(jnp.int32), weights),
        out_shape=(
            jax.ShapeDtypeStruct((rows,), jnp.float32),
            jax.ShapeDtypeStruct(logits.shape, logits.dtype),
        ),
        grid=(rows,),
        num_warps=tiling.num_warps,
        num_stages=1,
        input_output_aliases={0: 1},
        kernel_for_0_3=triton_kernels.loss_and_gradient_kernel_for_0_3,
        VOCAB=vocab,
        WIDTH=width,
        SOFTCAP=softcap,
        BLOCK=min(tiling.block, block_for(width, least=2)),
    )
