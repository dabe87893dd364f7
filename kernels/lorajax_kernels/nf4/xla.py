"""NF4 in plain XLA for any device."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax_kernels.nf4.reference import BLOCK, CODE, DYNAMIC_CODE, GROUP, THRESHOLDS, block_scales, rounded

if TYPE_CHECKING:
    from lorajax_kernels.nf4 import NF4Weight

# A sum is made of sums of so many terms, so that its rounding error does not grow with their number.
SUM_WIDTH = 16

_HALFWAY = (DYNAMIC_CODE[:-1] + DYNAMIC_CODE[1:]) / np.float32(2)
# What lies halfway goes up from an odd index, so there the float before is what a value must exceed.
DYNAMIC_THRESHOLDS = np.where(np.arange(255) % 2, np.nextafter(_HALFWAY, np.float32(-1)), _HALFWAY)


@functools.partial(jax.jit, static_argnums=1)
def xla_quantize(w: Float[Array, "out in"], double_quant: bool) -> dict[str, Array]:
    """The arrays of quantize_nf4(w), by name."""
    absmax, scaled = _scaled(_rows(w.astype(jnp.float32).reshape(-1), BLOCK))
    index = jnp.zeros(scaled.shape, jnp.uint8)
    for threshold in THRESHOLDS:
        index += scaled > threshold
    index = index.reshape(-1, 2)
    packed = (index[:, 0] << 4 | index[:, 1])[: -(-w.size // 2)]
    if not double_quant:
        return {"packed": packed, "absmax": absmax}
    offset = _mean(absmax)
    absmax2, scaled = _scaled(_rows(absmax - offset, GROUP))
    index = jnp.sum(scaled[..., None] > DYNAMIC_THRESHOLDS, axis=-1, dtype=jnp.uint8)
    return {
        "packed": packed,
        "absmax": index.reshape(-1)[: absmax.size],
        "absmax2": absmax2,
        "offset": offset,
        "absmax_code": jnp.asarray(DYNAMIC_CODE),
    }


def xla_dequantize(q: NF4Weight, dtype: jnp.dtype) -> Float[Array, "out in"]:
    """See dequantize_nf4."""
    scale = block_scales(q)
    packed = jnp.pad(q.packed, (0, scale.size * BLOCK // 2 - q.packed.size)).reshape(-1, BLOCK // 2, 1)
    index = packed >> jnp.array([4, 0], jnp.uint8) & 15  # [blocks, BLOCK / 2, 2]
    w = jnp.asarray(CODE).at[index].get(mode="promise_in_bounds") * scale[:, None, None]
    return w.astype(dtype).reshape(-1)[: math.prod(q.shape)].reshape(q.shape)


def _rows(x: Float[Array, " n"], width: int) -> Float[Array, "rows width"]:
    return jnp.pad(x, (0, -x.size % width)).reshape(-1, width)


def _scaled(rows: Float[Array, "rows width"]) -> tuple[Float[Array, " rows"], Float[Array, "rows width"]]:
    """The largest magnitude of each row, and the rows times its reciprocal; NaN where it is 0."""
    rows = _without_subnormals(rows)
    absmax = jnp.max(jnp.abs(rows), axis=1)
    return absmax, rows * _without_subnormals(1 / absmax)[:, None]


def _without_subnormals(x: Array) -> Array:
    return jnp.where(jnp.abs(x) < jnp.finfo(jnp.float32).tiny, 0, x)


def _mean(x: Float[Array, " n"]) -> Float[Array, ""]:
    """The mean to the last bit, or next to it: the second sum has what the first one rounded away."""
    mean = rounded(_sum(x) / x.size)
    return rounded(mean + _sum(x - mean) / x.size)


def _sum(x: Float[Array, " n"]) -> Float[Array, ""]:
    while x.size > 1:
        x = jnp.sum(_rows(x, SUM_WIDTH), axis=1)
    return x.reshape(())
