"""Forward and backward pass of linear layers that share their input x, [rows, in].

The adapters' A are stacked, and u = x A^T holds the hidden activations of all of them side by side:

    forward    u = x A^T                         one product for all layers
               y_i = x W_i^T + u S_i^T           S_i: scale_i B_i in the columns of layer i, 0 in the others
    backward   du_i = scale_i dy_i B_i           side by side in du
               dB_i = scale_i dy_i^T u_i
               dA = du^T x                       one product for all layers
               dx = sum_i dy_i W_i + du A

With dropout each adapter sees its own x, and what is one product for all layers is dropout.py's. Masks are
made again in the backward pass, and so are weights that are dequantised or cast: its residuals are u and the
arguments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lorajax_kernels.elementwise import inverse_rms, rms_norm, swiglu
from lorajax_kernels.lora.dropout import XLA_DROPPED, Dropped, columns_of
from lorajax_kernels.lora.mosaic import SLICE, Tiling, mosaic_sum_of_products, tiling_for
from lorajax_kernels.lora.operands import Adapter, Weight, dense
from lorajax_kernels.lora.products import should_join, sum_of_products
from lorajax_kernels.lora.triton import (
    MIN_OUT,
    MOST_ADAPTERS,
    MOST_COLUMNS,
    Columns,
    triton_hidden_and_b,
    triton_hidden_and_joined,
    triton_hidden_sums,
    triton_operands,
    triton_swiglu_backward,
)
from lorajax_kernels.lora.triton_dropout import TRITON_DROPPED
from lorajax_kernels.lora.xla import scaled, xla_hidden_and_b
from lorajax_kernels.nf4 import NF4Weight
from lorajax_kernels.precision import MULTIPLE, einsum, product

Rows = Float[Array, "rows in"]
Inverse = Float[Array, " rows"]  # root mean square of each row, float32
Hidden = Float[Array, "rows R"]  # R: the ranks of all adapters and what fills them up
Outputs = Sequence[Float[Array, "rows out_i"]]
Weights = tuple[Weight, ...]
Adapters = tuple[Adapter | None, ...]
Biases = tuple[Float[Array, " out_i"] | None, ...]
# Of a sum of products: rows, out, ks.
Size = tuple[int, int, list[int]]


class Kernels(NamedTuple):
    """An implementation.

    Attributes:
        hidden_and_b: (dy, u, adapter) -> (dy B in parts to be summed, dy^T u), see xla_hidden_and_b.
        hidden_sums: what becomes of these parts, see triton_hidden_sums; None: XLA sums them.
        operands: what products read of adapters that are parts of a vector, see triton_operands; None: XLA
            makes it, one by one.
        hidden_and_joined: (x, A) -> (x A^T, [x, x A^T]), see triton_hidden_and_joined; None: one by one.
        swiglu_backward: (dh, gate, up) -> (dgate, dup, h), see triton_swiglu_backward; None: one by one.
        dropped: what adapters with dropout take in place of products of all of them.
        sums: whether sums of products are Mosaic's where it serves, see tiling_for.
    """

    hidden_and_b: Callable[..., tuple[Array, Array]]
    hidden_sums: Callable[..., tuple[Array, Array | None]] | None = None
    operands: Callable[..., tuple[Array, list[Array]]] | None = None
    hidden_and_joined: Callable[[Array, Array], tuple[Array, Array]] | None = None
    swiglu_backward: Callable[[Array, Array, Array], tuple[Array, Array, Array]] | None = None
    dropped: Dropped = XLA_DROPPED
    sums: bool = False


XLA = Kernels(xla_hidden_and_b)
TRITON = Kernels(
    triton_hidden_and_b,
    triton_hidden_sums,
    triton_operands,
    triton_hidden_and_joined,
    triton_swiglu_backward,
    TRITON_DROPPED,
)
MOSAIC = TRITON._replace(sums=True)


@dataclass(frozen=True)
class Options:
    """What is static.

    Attributes:
        arrangement: one of ARRANGEMENTS.
        trainable_bias: whether biases have gradients.
        kernels: what makes the small products, and whether sums are Mosaic's.
        one_vector: whether all adapters are parts of one vector, A after A, and kernels read them there.
        epsilon: of the norm, where there is one.
    """

    arrangement: str
    trainable_bias: bool
    kernels: Kernels
    one_vector: bool
    epsilon: float = 0.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply(
    options: Options, x: Rows, norm: Array | None, weights: Weights, adapters: Adapters, biases: Biases
) -> Outputs:
    """Of rms_norm(x, norm), with x as residual in place of what is normalised; of x without `norm`."""
    return _forward(options, x, norm, weights, adapters, biases)[0]


def _forward(
    options: Options, x: Rows, norm: Array | None, weights: Weights, adapters: Adapters, biases: Biases
):
    residuals = x, norm, weights, adapters, biases
    (x,), weights, adapters = _once_there((x,), x.dtype, weights, adapters)
    inverse = None
    if norm is not None:
        inverse = checkpoint_name(inverse_rms(x, epsilon=options.epsilon)[:, 0], "lora_hidden")
        x = rms_norm(x, norm, epsilon=options.epsilon)
    u, ys = _hidden_and_outputs(options, x, weights, adapters)
    ys = [y if bias is None else y + bias.astype(y.dtype) for y, bias in zip(ys, biases, strict=True)]
    return tuple(ys), (u, inverse, *residuals)


def _backward(options: Options, residuals, dys: Outputs):
    u, inverse, x, norm, weights, adapters, biases = residuals
    dys, weights, adapters = _once_there(tuple(dys), x.dtype, weights, adapters)
    du, scaled_du, dbs = _gradients_of_b(options, dys, u, adapters, inverse)
    dx = _gradient_of_x(options, x, dys, du, weights, adapters)
    if norm is None:
        das = _gradients_of_a(options, x, du, _present(adapters))
    else:
        das = _gradients_of_a_after_norm(options, x, norm, inverse, du, scaled_du, _present(adapters))
    dadapters = _gradients_of_adapters(das, dbs, adapters)
    # Now: left alone, XLA makes dA last, and holds x until then.
    dx, dadapters = jax.lax.optimization_barrier((dx, dadapters))
    dx, dnorm = (dx, None) if norm is None else _gradients_of_norm(dx, x, norm, inverse)
    return dx, dnorm, None, dadapters, _gradients_of_biases(options, dys, biases)


apply.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_gated(
    options: Options, gate: Rows, up: Rows, weight: Weight, adapter: Adapter | None, bias: Array | None
) -> Array:
    """`apply` of one layer to x = silu(gate) * up, with gate and up as residuals in place of x."""
    return _gated_forward(options, gate, up, weight, adapter, bias)[0]


def _gated_forward(
    options: Options, gate: Rows, up: Rows, weight: Weight, adapter: Adapter | None, bias: Array | None
):
    (y,), (u, *_) = _forward(options, swiglu(gate, up), None, (weight,), (adapter,), (bias,))
    return y, (gate, up, u, weight, adapter, bias)


def _gated_backward(options: Options, residuals, dy: Array):
    gate, up, u, weight, adapter, bias = residuals
    # gate and up too: otherwise their product is kept from the forward pass.
    arrays, weights, adapters = _once_there((dy, gate, up), dy.dtype, (weight,), (adapter,))
    dy, gate, up = jax.lax.optimization_barrier(arrays)
    du, _, dbs = _gradients_of_b(options, [dy], u, adapters)
    dx = _gradient_of_x(options, gate, [dy], du, weights, adapters)
    if options.kernels.swiglu_backward is not None:
        dgate, dup, x = options.kernels.swiglu_backward(dx, gate, up)
        das = _gradients_of_a(options, x, du, _present(adapters))
        [dadapter] = _gradients_of_adapters(das, dbs, adapters)
        dadapter, dgate, dup = jax.lax.optimization_barrier((dadapter, dgate, dup))
    else:
        das = _gradients_of_a(options, swiglu(gate, up), du, _present(adapters))
        [dadapter] = _gradients_of_adapters(das, dbs, adapters)
        # In this order: the product is gone before the gradients of gate and up are there.
        dadapter, gate, up = jax.lax.optimization_barrier((dadapter, gate, up))
        dgate, dup = jax.vjp(swiglu, gate, up)[1](dx)
    dbiases = _gradients_of_biases(options, [dy], (bias,))
    return dgate, dup, None, dadapter, None if dbiases is None else dbiases[0]


apply_gated.defvjp(_gated_forward, _gated_backward)


def _hidden_and_outputs(
    options: Options, x: Rows, weights: Weights, adapters: Adapters
) -> tuple[Hidden, list[Array]]:
    present, columns = _present(adapters), columns_of(adapters)
    width = _width(options, present)
    windows = [_window(own, width) for own in columns]
    tilings = [
        None if size is None else _tiling(options, *size)
        for size in _forward_sizes(x.shape[0], weights, adapters, windows)
    ]
    sums_of_xla = sum(
        weight.shape[0]
        for weight, adapter, tiling in zip(weights, adapters, tilings, strict=True)
        if adapter is not None and tiling is None
    )
    join = sums_of_xla > 0 and should_join(
        options.arrangement, terms=2, rows=x.shape[0], k=x.shape[1], out=sums_of_xla
    )
    # Of u, those that meet each B.
    read = [
        window if tiling is not None else slice(0, width) if join else own
        for own, window, tiling in zip(columns, windows, tilings, strict=True)
    ]
    a, bs = _operands(
        options,
        x,
        present,
        width,
        [
            Columns(own.start - its.start, its.stop - its.start)
            for own, its, adapter in zip(columns, read, adapters, strict=True)
            if adapter is not None
        ],
    )
    at_once = options.kernels.hidden_and_joined if join and width <= MOST_COLUMNS else None
    joined = None
    if _drop(present):
        u = _dropped(options, present).hidden(x, a, present, width)
    elif at_once is not None:
        u, joined = at_once(x, a)
    else:
        u = product("ri,ki->rk", x, a)
    u = checkpoint_name(u, "lora_hidden")
    if join and joined is None:
        joined = jnp.concatenate([x, u], axis=1)

    ys, coming = [], iter(bs)
    for weight, adapter, its, tiling in zip(weights, adapters, read, tilings, strict=True):
        w = dense(weight, x.dtype)
        if adapter is None:
            ys.append(product("ri,oi->ro", x, w))
            continue
        b = next(coming)
        if tiling is not None:
            starts = (0, its.start)
            ys.append(mosaic_sum_of_products([x, u], [w, b], transposed=True, tiling=tiling, starts=starts))
        elif joined is not None:
            ys.append(product("rk,ok->ro", joined, jnp.concatenate([w, b], axis=1)))
        else:
            # In this order cuBLAS may add the first to the second, see sum_of_products.
            ys.append(product("rk,ok->ro", x, w) + product("rk,ok->ro", u[:, its], b))
    return u, ys


def _operands(
    options: Options, x: Rows, present: Sequence[Adapter], width: int, columns: Sequence[Columns]
) -> tuple[Float[Array, "width in"], list[Float[Array, "out_i window_i"]]]:
    """All A, filled up with rows of zeros, and scale B in its columns, of as many adapters as have them."""
    make = options.kernels.operands
    if make is not None and options.one_vector and len(present) <= MOST_ADAPTERS:
        return make(present, width=width, columns=columns, dtype=x.dtype)
    bs = [
        jnp.pad(
            scaled(adapter.b, adapter.scale, x.dtype),
            ((0, 0), (own.left, own.window - own.left - adapter.rank)),
        )
        for adapter, own in zip(present, columns, strict=False)
    ]
    return _filled_up(_stacked_a(x, present), width, axis=0), bs


def in_one_vector(adapters: Adapters) -> bool:
    """Whether there are some, and they are parts of one vector, A after A.

    To be asked of what an op is given: within its derivatives each has a vector of its own.
    """
    present = _present(adapters)
    if not present or any(adapter.vector is None for adapter in present):
        return False
    if any(adapter.vector is not present[0].vector for adapter in present):
        return False
    follow = [adapter.a_start + adapter.a.size for adapter in present]
    return all(adapter.a_start == end for adapter, end in zip(present[1:], follow, strict=False))


def _forward_sizes(
    rows: int, weights: Weights, adapters: Adapters, windows: Sequence[slice]
) -> list[Size | None]:
    """Of the sum that each layer's output is; None without an adapter."""
    return [
        None if adapter is None else (rows, weight.shape[0], [weight.shape[1], window.stop - window.start])
        for weight, adapter, window in zip(weights, adapters, windows, strict=True)
    ]


def sums_of(
    options: Options, rows: int, weights: Weights, adapters: Adapters
) -> list[tuple[Size, Tiling | None]]:
    """The sums of products of both passes: (rows, out, ks), and the tiling of those that are Mosaic's."""
    present, columns = _present(adapters), columns_of(adapters)
    width, inner = _width(options, present), weights[0].shape[1]
    windows = [_window(own, width) for own in columns]
    sizes = [size for size in _forward_sizes(rows, weights, adapters, windows) if size is not None]
    back = [weight.shape[0] for weight in weights]
    if present and not _drop(present):
        back.append(width)
    if len(back) > 1:
        sizes.append((rows, inner, back))
    return [(each, _tiling(options, *each)) for each in sizes]


def _tiling(options: Options, rows: int, out: int, ks: Sequence[int]) -> Tiling | None:
    """For a sum of products that is to be Mosaic's; None where it is XLA's."""
    if not options.kernels.sums or options.arrangement != "auto":
        return None
    return tiling_for(rows, out, ks)


def _width(options: Options, present: Sequence[Adapter]) -> int:
    """Columns of u: the ranks of all adapters, and what fills them up."""
    ranks = sum(adapter.rank for adapter in present)
    multiple = SLICE if options.kernels.sums and ranks > SLICE else MULTIPLE
    return -(-ranks // multiple) * multiple


def _window(own: slice, width: int) -> slice:
    """The columns of u that Mosaic reads for those of a layer: whole slices, where u has so many."""
    return slice(own.start // SLICE * SLICE, min(-(-own.stop // SLICE) * SLICE, width))


def _gradients_of_b(
    options: Options, dys: Outputs, u: Hidden, adapters: Adapters, inverse: Inverse | None = None
) -> tuple[Hidden, Float[Array, "rows R"] | None, list[Array]]:
    """What flows back into the hidden activations, that times `inverse`, not filled up, and dB of each."""
    parts, dbs, present = [], [], _present(adapters)
    for dy, adapter, columns in zip(dys, adapters, columns_of(adapters), strict=True):
        if adapter is not None:
            kernels = XLA if dy.shape[1] < MIN_OUT else options.kernels
            part, db = kernels.hidden_and_b(dy, u, adapter, columns=columns)
            parts.append(part)
            dbs.append(adapter.scale * db)
    if not present:
        return u, None, dbs
    # In float16 the inverse may be too large for it, see _gradients_of_a_after_norm.
    inverse = None if u.dtype == jnp.float16 else inverse
    return *_hidden_sums(options, parts, _width(options, present), inverse), dbs


def _hidden_sums(
    options: Options, parts: Sequence[Float[Array, "strips_i rows R_i"]], width: int, inverse: Inverse | None
) -> tuple[Hidden, Float[Array, "rows R"] | None]:
    """Sums over the strips side by side, filled up with zeros, and these times `inverse`, not filled up."""
    make = options.kernels.hidden_sums
    if make is not None and len(parts) <= MOST_ADAPTERS:
        return make(parts, width=width, inverse=inverse)
    # XLA's own products are whole.
    sums = [
        jnp.sum(part, axis=0, dtype=jnp.float32).astype(part.dtype) if len(part) > 1 else part[0]
        for part in parts
    ]
    du = jnp.concatenate(sums, axis=1)
    scaled_du = None if inverse is None else (du.astype(jnp.float32) * inverse[:, None]).astype(du.dtype)
    return _filled_up(du, width, axis=1), scaled_du


def _gradients_of_adapters(
    das: Sequence[Array], dbs: Sequence[Array], adapters: Adapters
) -> tuple[Adapter | None, ...]:
    gradients = iter(map(_as_gradient, _present(adapters), das, dbs))
    return tuple(None if adapter is None else next(gradients) for adapter in adapters)


def _gradients_of_a(options: Options, x: Rows, du: Hidden, present: Sequence[Adapter]) -> Sequence[Array]:
    """dA of each adapter, [R_i, in] float32."""
    if not present:
        return []
    if _drop(present):
        return _dropped(options, present).gradients(x, du, present)
    columns = columns_of(present)
    da = einsum("rk,ri->ki", du[:, : columns[-1].stop], x)
    return [da[own] for own in columns]


def _gradients_of_a_after_norm(
    options: Options,
    x: Rows,
    norm: Array,
    inverse: Inverse,
    du: Hidden,
    scaled_du: Float[Array, "rows R"] | None,
    present: Sequence[Adapter],
) -> Sequence[Array]:
    """The same for adapters that see rms_norm(x, norm), which need not be made again.

    It is x times one factor a row and one a column, and so is what a dropout leaves of it. Those of the rows
    go to the small side of the product; in float16, where they are large enough to overflow if x is small, to
    x after all.
    """
    if x.dtype == jnp.float16:
        # Otherwise it is kept from the forward pass.
        du, x = jax.lax.optimization_barrier((du, x))
        x = (x.astype(jnp.float32) * inverse[:, None]).astype(x.dtype)
    elif scaled_du is not None:
        du = scaled_du
    return [norm.astype(jnp.float32) * da for da in _gradients_of_a(options, x, du, present)]


def _gradients_of_norm(dy: Rows, x: Rows, norm: Array, inverse: Inverse) -> tuple[Rows, Float[Array, " in"]]:
    """What flows back through rms_norm(x, norm), and the gradient of norm."""
    normed, wide = x.astype(jnp.float32) * inverse[:, None], dy.astype(jnp.float32)
    scaled = wide * norm.astype(jnp.float32)
    dx = inverse[:, None] * (scaled - normed * jnp.mean(scaled * normed, axis=1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(wide * normed, axis=0).astype(norm.dtype)


def _gradient_of_x(
    options: Options, x: Rows, dys: Outputs, du: Hidden, weights: Weights, adapters: Adapters
) -> Rows:
    present = _present(adapters)
    lefts, rights = list(dys), [dense(weight, x.dtype) for weight in weights]
    if present:
        a = _operands(options, x, present, _width(options, present), [])[0]
        if not _drop(present):
            lefts.append(du)
            rights.append(a)
    ks = [left.shape[1] for left in lefts]
    tiling = _tiling(options, x.shape[0], x.shape[1], ks) if len(lefts) > 1 else None
    if tiling is not None:
        dx = mosaic_sum_of_products(lefts, rights, transposed=False, tiling=tiling)
    else:
        k = sum(dy.shape[1] for dy in dys)
        join = should_join(options.arrangement, terms=len(lefts), rows=x.shape[0], k=k, out=x.shape[1])
        dx = sum_of_products(lefts, rights, join=join)
    return _dropped(options, present).added(dx, du, a, present) if _drop(present) else dx


def _gradients_of_biases(options: Options, dys: Outputs, biases: Biases) -> Biases | None:
    def gradient(dy: Array, bias: Array | None) -> Array | None:
        return None if bias is None else jnp.sum(dy, axis=0, dtype=jnp.float32).astype(bias.dtype)

    return tuple(map(gradient, dys, biases)) if options.trainable_bias else None


def _as_gradient(adapter: Adapter, da: Array, db: Array) -> Adapter:
    a, b = da.astype(adapter.a.dtype), db.astype(adapter.b.dtype)
    return dataclasses.replace(adapter, a=a, b=b, key=None, first_row=None, vector=None)


def _once_there(
    arrays: tuple[Array, ...], dtype: jnp.dtype, weights: Weights, adapters: Adapters
) -> tuple[tuple[Array, ...], Weights, Adapters]:
    """The same values, with the weights that are to be dequantised or cast, and the keys, behind a barrier.

    Left alone, XLA may make the dense weights and the masks of many layers ahead, and it takes what the two
    passes make for one value to keep.
    """
    made = [w if isinstance(w, NF4Weight) or w.dtype != dtype else None for w in weights]
    keys = [adapter.key if adapter is not None and adapter.drops else None for adapter in adapters]
    if not jax.tree.leaves((made, keys)):
        return arrays, weights, adapters
    arrays, made, keys = jax.lax.optimization_barrier((arrays, made, keys))
    weights = tuple(w if m is None else m for w, m in zip(weights, made, strict=True))
    adapters = tuple(
        adapter if adapter is None or key is None else dataclasses.replace(adapter, key=key)
        for adapter, key in zip(adapters, keys, strict=True)
    )
    return arrays, weights, adapters


def _present(adapters: Adapters) -> list[Adapter]:
    return [adapter for adapter in adapters if adapter is not None]


def _drop(present: Sequence[Adapter]) -> bool:
    """Whether each is to see its own part of x."""
    return any(adapter.drops for adapter in present)


def _dropped(options: Options, present: Sequence[Adapter]) -> Dropped:
    return options.kernels.dropped if len(present) <= MOST_ADAPTERS else XLA_DROPPED


def _stacked_a(x: Rows, present: Sequence[Adapter]) -> Float[Array, "R in"]:
    """A of all these in x's dtype."""
    none = jnp.zeros((0, x.shape[1]), x.dtype)
    return jnp.concatenate([none, *(adapter.a.astype(x.dtype) for adapter in present)])


def _filled_up(x: Array, size: int, *, axis: int) -> Array:
    """x with zeros at the end of an axis, up to this size."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)
