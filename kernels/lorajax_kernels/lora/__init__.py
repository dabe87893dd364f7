"""Frozen linear layers with low-rank adapters that share one input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lorajax_kernels.checks import check_arrays, check_dtype, check_number
from lorajax_kernels.device import Choice, Device, Implementation, anywhere, choose, function_of
from lorajax_kernels.lora import gradient, mosaic, triton
from lorajax_kernels.lora.operands import Adapter
from lorajax_kernels.lora.products import ARRANGEMENTS
from lorajax_kernels.lora.reference import reference_lora_linears
from lorajax_kernels.nf4 import NF4Weight, check_nf4_weight

__all__ = [
    "ARRANGEMENTS",
    "Adapter",
    "choose_lora",
    "lora_implementations",
    "lora_linear",
    "lora_linears",
    "reference_lora_linears",
    "swiglu_lora_linear",
]


@dataclass(frozen=True)
class Problem:
    """What an implementation is asked to do: adapters of at most this rank, in this dtype."""

    dtype: jnp.dtype
    rank: int


@dataclass(frozen=True)
class _Names:
    """What an op calls its arguments; {} is the number of a layer."""

    op: str
    x: str = "x"
    weight: str = "weights[{}]"
    adapter: str = "adapters[{}]."
    bias: str = "biases[{}]"


_LINEARS = _Names("lora_linears")
_LINEAR = _Names("lora_linear", weight="weight", adapter="", bias="bias")
_GATED = _Names("swiglu_lora_linear", x="gate", weight="weight", adapter="adapter.", bias="bias")


# How the small products of adapters, and sums of products, are made. "auto" takes the first that can serve.
_IMPLEMENTATIONS: tuple[Implementation[Problem], ...] = (
    Implementation("mosaic", mosaic.why_not, gradient.MOSAIC, splits=False),
    Implementation("triton", triton.why_not, gradient.TRITON, splits=False),
    Implementation("xla", anywhere, gradient.XLA),
)


def lora_implementations() -> tuple[str, ...]:
    """Names of the implementations of lora_linears, in the order in which "auto" tries them."""
    return tuple(known.name for known in _IMPLEMENTATIONS)


def choose_lora(
    dtype: jnp.dtype, rank: int, *, implementation: str = "auto", device: Device | None = None
) -> Choice:
    """Which implementation lora_linears runs for x of a dtype and adapters of at most this rank.

    Args:
        device: where it is to run; None: the current one.

    Returns:
        (name, refused); `refused` maps each implementation tried before to the reason why it cannot serve. An
        automatic choice is logged once.

    Raises:
        ValueError: the implementation is unknown or cannot serve.
    """
    return _choose(_LINEARS.op, dtype, rank, implementation, device)


def _choose(
    op: str, dtype: jnp.dtype, rank: int, implementation: str, device: Device | None = None
) -> Choice:
    problem = Problem(jnp.dtype(dtype), rank)
    return choose(op, _IMPLEMENTATIONS, problem, implementation=implementation, device=device)


def lora_linear(
    x: Float[Array, "*rows in"],
    weight: Float[Array, "out in"] | NF4Weight,
    a: Float[Array, "R in"],
    b: Float[Array, "out R"],
    *,
    scale: float = 1.0,
    bias: Float[Array, " out"] | None = None,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    trainable_bias: bool = False,
    arrangement: str = "auto",
    implementation: str = "auto",
) -> Float[Array, "*rows out"]:
    """x weight^T + bias + scale * dropout(x) a^T b^T: `lora_linears` of one layer."""
    adapter = Adapter(a, b, scale, dropout, key)
    return _linears(
        _LINEAR, x, [weight], [adapter], [bias], None, trainable_bias, arrangement, implementation
    )[0]


def lora_linears(
    x: Float[Array, "*rows in"],
    weights: Sequence[Float[Array, "out_i in"] | NF4Weight],
    adapters: Sequence[Adapter | None],
    *,
    biases: Sequence[Float[Array, " out_i"] | None] | None = None,
    norm: tuple[Float[Array, " in"], float] | None = None,
    trainable_bias: bool = False,
    arrangement: str = "auto",
    implementation: str = "auto",
) -> tuple[Float[Array, "*rows out_i"], ...]:
    """Linear layers that share their input: query, key and value, or gate and up.

        gate, up = lora_linears(x, [w_gate, w_up], [Adapter(a, b, scale=0.5), None])

    Differentiable in x and in the adapters. Weights are constants, and so are biases unless they are trained:
    their gradients are zero, and never computed.

    The residuals are the arguments, the adapters' hidden activations x a^T, [rows, R], and with a norm the
    inverse root mean square of each row, float32. These have the name "lora_hidden" for rematerialisation
    policies: they are small, and where they are saved, a layer whose output is saved or not needed has
    nothing to compute again. x is the caller's to name, and to save, recompute or offload.

    Products are made in x's dtype with float32 sums; float32 is multiplied at full precision.

    Args:
        x: float32, bfloat16 or float16.
        weights: one a layer; a float array is cast to x's dtype, an NF4Weight dequantised to it.
        adapters: one a layer, or None for a layer without.
        biases: likewise; None if no layer has one.
        norm: (weight, epsilon): the layers see rms_norm(x, weight, epsilon=epsilon). The residual is x then.
        trainable_bias: make the biases' gradients.
        arrangement: how the adapter's product meets the frozen one. "joined": one GEMM on [x, x a^T] and
            [W, scale * b]; "added": two GEMMs; "auto": one accumulator for both where the implementation is
            "mosaic" and sizes allow it, otherwise what moves less memory, in either pass.
        implementation: a name of `lora_implementations()`, or "auto": the first of them that can serve.
            "triton" has kernels for the adapters' products, "mosaic" for their sums with the frozen ones too,
            each where sizes allow it; a name of which no kernel would run raises.

    Returns:
        One output a layer, in x's dtype.

    Raises:
        ValueError: shapes, dtypes or options do not fit together, or the implementation is unknown or cannot
            serve.
    """
    return _linears(_LINEARS, x, weights, adapters, biases, norm, trainable_bias, arrangement, implementation)


def swiglu_lora_linear(
    gate: Float[Array, "*rows in"],
    up: Float[Array, "*rows in"],
    weight: Float[Array, "out in"] | NF4Weight,
    adapter: Adapter | None,
    *,
    bias: Float[Array, " out"] | None = None,
    trainable_bias: bool = False,
    arrangement: str = "auto",
    implementation: str = "auto",
) -> Float[Array, "*rows out"]:
    """`lora_linears` of one layer on swiglu(gate, up), the largest activation of a decoder layer.

    It is no residual: the backward pass, which reads gate and up anyway, makes it again.

    Args:
        gate, up: float32, bfloat16 or float16.
        weight, adapter, bias, trainable_bias, arrangement, implementation: as in lora_linears.

    Returns:
        In gate's dtype.

    Raises:
        ValueError: as in lora_linears, or up does not fit gate.
    """
    check_arrays(_GATED.op, gate=gate, up=up)
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"swiglu_lora_linear: up must be {gate.dtype} of shape {gate.shape} to fit gate, "
            f"got {up.dtype} of shape {up.shape}"
        )
    _check(_GATED, gate, (weight,), (adapter,), (bias,), arrangement)
    options = _options(_GATED.op, gate, (weight,), (adapter,), trainable_bias, arrangement, implementation)
    flat = [x.reshape(-1, x.shape[-1]) for x in (gate, up)]
    y = gradient.apply_gated(options, *flat, weight, adapter, bias)
    return y.reshape(*gate.shape[:-1], y.shape[-1])


def _linears(
    names: _Names,
    x: Array,
    weights: Sequence[gradient.Weight],
    adapters: Sequence[Adapter | None],
    biases: Sequence[Array | None] | None,
    norm: tuple[Array, float] | None,
    trainable_bias: bool,
    arrangement: str,
    implementation: str,
) -> tuple[Array, ...]:
    given_biases = () if biases is None else biases
    for name, given in (("weights", weights), ("adapters", adapters), ("biases", given_biases)):
        if not isinstance(given, Sequence):
            raise ValueError(f"{names.op}: {name} must be a sequence, got {type(given).__name__}")
    weights, adapters = tuple(weights), tuple(adapters)
    biases = (None,) * len(weights) if biases is None else tuple(biases)
    _check(names, x, weights, adapters, biases, arrangement)
    weight, epsilon = (None, 0.0) if norm is None else _checked_norm(names.op, norm, x.shape[-1])
    options = _options(names.op, x, weights, adapters, trainable_bias, arrangement, implementation, epsilon)
    ys = gradient.apply(options, x.reshape(-1, x.shape[-1]), weight, weights, adapters, biases)
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys)


def _checked_norm(op: str, norm: Any, width: int) -> tuple[Array, float]:
    if not (isinstance(norm, tuple) and len(norm) == 2):
        raise ValueError(f"{op}: norm must be (weight, epsilon), got {type(norm).__name__}")
    weight, epsilon = norm
    check_arrays(op, norm=weight)
    check_dtype(op, "floating point", norm=weight)
    check_number(op, "norm's epsilon", epsilon, at_least=0)
    if weight.shape != (width,):
        raise ValueError(f"{op}: norm must be of [in={width}], got shape {weight.shape}")
    return weight, epsilon


def _options(
    op: str,
    x: Array,
    weights: gradient.Weights,
    adapters: gradient.Adapters,
    trainable_bias: bool,
    arrangement: str,
    implementation: str,
    epsilon: float = 0.0,
) -> gradient.Options:
    rank = max((adapter.rank for adapter in adapters if adapter is not None), default=0)
    # What is chosen is the same for all three, and logged once; an error names the one that was called.
    choice = _choose(_LINEARS.op if implementation == "auto" else op, x.dtype, rank, implementation)
    # No rows are no programs for a kernel.
    kernels = function_of(_IMPLEMENTATIONS, choice.name) if x.size else gradient.XLA
    together = gradient.in_one_vector(adapters)
    options = gradient.Options(arrangement, trainable_bias, kernels, together, epsilon)
    rows = math.prod(x.shape[:-1])
    if x.size and (reason := _why_no_kernel(implementation, options, rows, weights, adapters)):
        raise ValueError(f"{op} implementation {implementation!r} cannot serve: {reason}")
    return options


def _why_no_kernel(
    implementation: str,
    options: gradient.Options,
    rows: int,
    weights: gradient.Weights,
    adapters: gradient.Adapters,
) -> str | None:
    """Why what is asked for by name would run none of its kernels; None if it runs some, or has none."""
    if implementation == "triton":
        return triton.why_no_kernel(weights, adapters)
    if implementation != "mosaic":
        return None
    sums = gradient.sums_of(options, rows, weights, adapters)
    if not sums or any(tiling for _, tiling in sums):
        return None
    if options.arrangement != "auto":
        return f"arrangement is {options.arrangement!r}"
    sizes = ", ".join(f"{rows} x {' + '.join(map(str, ks))} x {out}" for (rows, out, ks), _ in sums)
    return f"its tiles fit none of {sizes}"


def _check(
    names: _Names,
    x: Array,
    weights: gradient.Weights,
    adapters: gradient.Adapters,
    biases: gradient.Biases,
    arrangement: str,
) -> None:
    op = names.op
    check_arrays(op, **{names.x: x})
    if x.ndim < 1 or x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        got = f"{x.dtype} of shape {x.shape}"
        raise ValueError(f"{op}: {names.x} must be [..., in] in float32, bfloat16 or float16, got {got}")
    for name, given in (("adapters", adapters), ("biases", biases)):
        if len(given) != len(weights):
            raise ValueError(
                f"{op}: {name} must be one for each of the {len(weights)} weights, got {len(given)}"
            )
    if arrangement not in ARRANGEMENTS:
        known = ", ".join(ARRANGEMENTS)
        raise ValueError(f"{op}: unknown arrangement {arrangement!r}; known: {known}")
    if not weights:
        raise ValueError(f"{op}: weights must hold at least one, got none")
    width = x.shape[-1]
    if not width:
        raise ValueError(f"{op}: {names.x} must have features, got shape {x.shape}")
    for i, (weight, adapter, bias) in enumerate(zip(weights, adapters, biases, strict=True)):
        name = names.weight.format(i)
        if isinstance(weight, NF4Weight):
            check_nf4_weight(op, weight, name)
        else:
            check_arrays(op, **{name: weight})
        if len(weight.shape) != 2 or weight.shape[1] != width:
            raise ValueError(
                f"{op}: {name} must be [out, in={width}] to fit {names.x}, got shape {weight.shape}"
            )
        check_dtype(op, "floating point", **{name: weight})
        out = weight.shape[0]
        if not isinstance(adapter, Adapter | None):
            name = names.adapter.format(i).rstrip(".")
            raise ValueError(f"{op}: {name} must be an Adapter or None, got {type(adapter).__name__}")
        if adapter is not None:
            _check_adapter(op, names.adapter.format(i), adapter, names.x, width, out)
        if bias is not None:
            own = names.bias.format(i)
            check_arrays(op, **{own: bias})
            if bias.shape != (out,):
                raise ValueError(f"{op}: {own} must be [out={out}] to fit {name}, got shape {bias.shape}")
            check_dtype(op, "floating point", **{own: bias})


def _check_adapter(op: str, name: str, adapter: Adapter, x: str, width: int, out: int) -> None:
    a, b, dropout = adapter.a, adapter.b, adapter.dropout
    where = f"{op}: {name}"
    check_arrays(op, **{f"{name}a": a, f"{name}b": b})
    if a.ndim != 2 or a.shape[1] != width:
        raise ValueError(f"{where}a must be [R, in={width}] to fit {x}, got shape {a.shape}")
    if b.shape != (out, adapter.rank):
        raise ValueError(f"{where}b must be [out={out}, R={adapter.rank}] to fit a, got shape {b.shape}")
    check_dtype(op, "floating point", **{f"{name}a": a, f"{name}b": b})
    check_number(op, f"{name}scale", adapter.scale)
    check_number(op, f"{name}dropout", dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"{where}dropout must be at least 0 and below 1, got {dropout}")
    if adapter.drops:
        _check_key(op, f"{name}key", adapter.key)
    if adapter.first_row is not None:
        check_arrays(op, **{f"{name}first_row": adapter.first_row})
        check_dtype(op, "integers", **{f"{name}first_row": adapter.first_row})
        if adapter.first_row.ndim:
            raise ValueError(f"{where}first_row must be a scalar, got shape {adapter.first_row.shape}")
    if adapter.vector is not None:
        _check_vector(where, adapter, adapter.vector)


def _check_key(op: str, name: str, key: Any) -> None:
    """Raise unless it is one key, or the words of one."""
    check_arrays(op, **{name: key})
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not (key.ndim == 0 if typed else key.dtype == jnp.uint32 and key.shape == _words_of_key()):
        raise ValueError(f"{op}: {name} must be one key of jax.random, got {key.dtype} of shape {key.shape}")


def _words_of_key() -> tuple[int, ...]:
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape


def _check_vector(where: str, adapter: Adapter, vector: Array) -> None:
    """Raise unless a and b lie within it, as kernels read it without looking."""
    ends = adapter.a_start + adapter.a.size, adapter.b_start + adapter.b.size
    if vector.ndim != 1 or vector.dtype != jnp.float32:
        raise ValueError(f"{where}vector must be float32 [N], got {vector.dtype} of shape {vector.shape}")
    if min(adapter.a_start, adapter.b_start) < 0 or max(ends) > vector.size:
        places = f"a_start={adapter.a_start} and b_start={adapter.b_start}"
        raise ValueError(f"{where}vector has {vector.size} elements, too few for a and b at {places}")
