"""The NF4 format and its definition in plain code (Dettmers et al., 2023, QLoRA).

The flat row-major weight is cut into blocks of BLOCK elements. An element is an index into the 16 values of
CODE, times the largest magnitude of its block, absmax. Two indices make a byte, the first in the high nibble.

Double quantisation subtracts their mean, the offset, from the float32 absmax and cuts them into groups of
GROUP. Each is an index into the 256 values of DYNAMIC_CODE, times the largest magnitude of its group,
absmax2.

Bytes and scales are those of bitsandbytes' CUDA kernels:

- An element is multiplied by the reciprocal of absmax, not divided by it.
- It gets the higher of two indices if it is above, not at, the threshold between them. An absmax halfway
  between two values of DYNAMIC_CODE gets the even index.
- Subnormal float32 count as zero. A block of zeros has index 0 everywhere, since 0 times the infinite
  reciprocal is NaN, which is above no threshold: it dequantises to -0.
- The last block may be part of one, and an odd last nibble is that of a zero.

The kernels use the GPU's approximate reciprocal, and so does XLA on a GPU. Elsewhere it is rounded correctly:
an ulp there changes no index of a bfloat16 weight, those of one ratio of element to absmax in float16, and
under one in 10^6 in float32. The kernels pass over a NaN; here all of its block becomes NaN.

On a CPU bitsandbytes does not follow its kernels: a block of zeros has index 7, four thresholds are an ulp
off, the last part of a block is divided by its absmax, which is 1e-38 if it is all zeros, and the index of an
absmax that is nearly halfway between two values may be either. With AVX-512, release 0.50.2 dequantises rows
that end within a block wrongly.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

if TYPE_CHECKING:
    from lorajax_kernels.nf4 import NF4Weight

BLOCK, GROUP = 64, 256

# fmt: off
CODE = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)
# Halfway between neighbours of CODE, to float32's last bit as the kernels have them.
THRESHOLDS = np.array([
    -0.84809643030166626, -0.61063289642333984, -0.45999526977539062, -0.33967941999435425,
    -0.23460739850997925, -0.13791173696517944, -0.045525018125772476, 0.039790149778127670,
    0.12025525420904160, 0.20352125167846680, 0.29201376438140869, 0.38931253552436829,
    0.50166338682174683, 0.64278692007064819, 0.86147838830947876,
], np.float32)
# fmt: on


def _dynamic_code() -> np.ndarray:
    """The signed 8-bit dynamic type (Dettmers, 2015), float32 [256].

    It has 0, 1 and, with both signs, seven decades: of that below 10^-k the middles of 2^(6-k) equal parts.
    Bit for bit as bitsandbytes makes it on an x86 CPU with AVX2, where torch.linspace fuses multiply and add.
    """
    one, tenth = np.float32(1), np.float32(0.1)
    middles = []
    for decade in range(7):
        parts = 2**decade
        step, i = np.float64((one - tenth) / np.float32(parts)), np.arange(parts + 1)
        # In float64 the product is exact: with the sum it is rounded once, to float32.
        bounds = np.where(i < (parts + 1) // 2, tenth + step * i, one - step * (parts - i)).astype(np.float32)
        middles.append(np.float32(10.0 ** (decade - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2)))
    positive = np.concatenate(middles)
    return np.sort(np.concatenate([-positive, positive, np.array([0, 1], np.float32)]))


DYNAMIC_CODE = _dynamic_code()


def reference_quantize(w: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of quantize_nf4(w) by name, in NumPy."""
    absmax, scaled = _scaled(np.asarray(w, np.float32), BLOCK)
    index = (scaled[..., None] > THRESHOLDS).sum(-1).reshape(-1, 2)
    packed = (index[:, 0] << 4 | index[:, 1]).astype(np.uint8)
    return {"packed": packed[: -(-w.size // 2)], "absmax": absmax}


def reference_quantize_absmax(absmax: np.ndarray, offset: np.float32) -> dict[str, np.ndarray]:
    """The arrays of absmax in double quantisation by name, for some offset, in NumPy."""
    absmax2, scaled = _scaled(absmax - offset, GROUP)
    halfway = (DYNAMIC_CODE[:-1] + DYNAMIC_CODE[1:]) / np.float32(2)
    is_even = np.arange(halfway.size) % 2 == 0
    above = np.where(is_even, scaled[..., None] > halfway, scaled[..., None] >= halfway)
    index = above.sum(-1).astype(np.uint8).reshape(-1)
    return {"absmax": index[: absmax.size], "absmax2": absmax2, "absmax_code": DYNAMIC_CODE}


def _scaled(x: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """x in rows: the largest magnitude of each, and the rows times its reciprocal; NaN where it is 0."""
    rows = _without_subnormals(np.pad(x.reshape(-1), (0, -x.size % width)).reshape(-1, width))
    absmax = np.abs(rows).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return absmax, rows * _without_subnormals(np.float32(1) / absmax)[:, None]


def _without_subnormals(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)


def reference_dequantize(q: NF4Weight, dtype: jnp.dtype) -> Float[Array, "out in"]:
    """See dequantize_nf4."""
    index = jnp.stack([q.packed >> 4, q.packed & 15], axis=-1).reshape(-1)[: math.prod(q.shape)]
    scale = jnp.repeat(block_scales(q), BLOCK)[: index.size]
    return (jnp.asarray(CODE)[index] * scale).astype(dtype).reshape(q.shape)


def block_scales(q: NF4Weight) -> Float[Array, " blocks"]:
    """absmax of each block, float32."""
    if q.absmax2 is None or q.absmax_code is None or q.offset is None:
        return jnp.asarray(q.absmax)
    value = jnp.asarray(q.absmax_code).at[q.absmax].get(mode="promise_in_bounds")
    return rounded(value * jnp.repeat(q.absmax2, GROUP)[: q.absmax.size]) + q.offset


def rounded(x: Array) -> Array:
    """x itself, kept from being fused with a later sum: the two would be rounded only once."""
    return jnp.maximum(x, jnp.finfo(x.dtype).min)
