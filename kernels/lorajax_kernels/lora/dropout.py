"""What adapters see of x where they have a dropout: each its own part.

    u_i = drop_i(x) A_i^T        dA_i = du_i^T drop_i(x)        dx += sum_i drop_i(du_i A_i)

A mask is made again wherever it is needed, of a key and of places alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from lorajax_kernels.lora.operands import Adapter
from lorajax_kernels.precision import einsum, product


class Dropped(NamedTuple):
    """An implementation; see the functions of XLA for what each gives.

    Attributes:
        hidden: (x, A, adapters, width) -> u.
        gradients: (x, du, adapters) -> dA of each.
        added: (dx, du, A, adapters) -> dx.
    """

    hidden: Callable[..., Array]
    gradients: Callable[..., list[Array]]
    added: Callable[..., Array]


def columns_of(adapters: Sequence[Adapter | None]) -> list[slice]:
    """Where the hidden activations of each lie beside those of the others; nowhere without an adapter."""
    ends = [0, *itertools.accumulate(0 if adapter is None else adapter.rank for adapter in adapters)]
    return list(map(slice, ends[:-1], ends[1:]))


def xla_dropped_hidden(
    x: Float[Array, "rows in"], a: Float[Array, "width in"], adapters: Sequence[Adapter], width: int
) -> Float[Array, "rows width"]:
    """Hidden activations side by side, and zeros.

    Args:
        a: of all adapters, in x's dtype, and what fills it up.
    """
    parts = [
        product("ri,ki->rk", _seen(x, adapter), _gained(a[own], adapter))
        for own, adapter in zip(columns_of(adapters), adapters, strict=True)
    ]
    u = jnp.concatenate(parts, axis=1)
    return jnp.pad(u, ((0, 0), (0, width - u.shape[1])))


def xla_dropped_gradients(
    x: Float[Array, "rows in"], du: Float[Array, "rows width"], adapters: Sequence[Adapter]
) -> list[Float[Array, "R_i in"]]:
    """Of each A, float32."""
    return [
        _gained(einsum("rk,ri->ki", du[:, own], _seen(x, adapter)), adapter)
        for own, adapter in zip(columns_of(adapters), adapters, strict=True)
    ]


def xla_dropped_added(
    dx: Float[Array, "rows in"],
    du: Float[Array, "rows width"],
    a: Float[Array, "width in"],
    adapters: Sequence[Adapter],
) -> Float[Array, "rows in"]:
    """dx, and what flows back through the adapters."""
    for own, adapter in zip(columns_of(adapters), adapters, strict=True):
        dx = dx + _seen(product("rk,ki->ri", du[:, own], _gained(a[own], adapter)), adapter)
    return dx


XLA_DROPPED = Dropped(xla_dropped_hidden, xla_dropped_gradients, xla_dropped_added)


def drop(x: Float[Array, "rows in"], adapter: Adapter) -> Float[Array, "rows in"]:
    """What the adapter sees of x: zeros at the rate of its dropout, and larger values that make up for them.

    The map is linear in x, and its own transpose.
    """
    return _gained(_seen(x, adapter), adapter)


def _seen(x: Float[Array, "rows columns"], adapter: Adapter) -> Float[Array, "rows columns"]:
    """x with those zeros, and values as they are: in float16 larger ones may overflow."""
    return jnp.where(kept(seed_of(adapter), x.shape), x, 0) if adapter.drops else x


def _gained(x: Float[Array, "*shape"], adapter: Adapter) -> Float[Array, "*shape"]:
    """x times what makes up for the zeros, rounded once."""
    return (x.astype(jnp.float32) / (1 - adapter.dropout)).astype(x.dtype) if adapter.drops else x


def seed_of(adapter: Adapter) -> UInt32[Array, " 3"]:
    """Start and step of an adapter's random numbers, and the last of them that keeps an element; see `kept`.

    Of the key its last two words count. Without one everything is kept. The start is that of x's first row.
    """
    if adapter.key is None or not adapter.drops:
        return jnp.array([0, 1, 2**32 - 1], jnp.uint32)
    first, step = _mixed(jax.random.key_data(adapter.key)[-2:] + jnp.uint32(0x9E3779B9))
    step |= 1
    start = first + step  # of both words: the first of jax.random.key(seed) is 0
    if adapter.first_row is not None:
        start += adapter.first_row.astype(jnp.uint32) * step
    last = max(round((1 - adapter.dropout) * 2**32), 1) - 1
    return jnp.stack([start, step, jnp.uint32(last)])


def kept(seed: UInt32[Array, " 3"], shape: tuple[int, ...]) -> Bool[Array, "rows columns"]:
    """Which elements are: those whose random number is small enough.

    The numbers of a row are those of SplitMix (Steele, Lea and Flood, 2014), in 32 bits, and so are the rows'
    starts. They take a fifth of the operations of JAX' own (threefry), which are for what must not be
    guessed: masks of those took most of the time in which a step was compiled.
    """
    start, step, last = seed
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1))
    return _mixed(_mixed(start + row * step) + column * step) <= last


def _mixed(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Another number for each, whose upper half, which decides, depends on all bits.

    The multiplications of the least biased function of two that Wellons' hash-prospector found (2018).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    return (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
