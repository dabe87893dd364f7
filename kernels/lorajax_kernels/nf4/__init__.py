"""Weights in NF4, 4 bits an element, in bitsandbytes' format: quantised, dequantised, multiplied by.

`lorajax_kernels.nf4.reference` defines the format, and says where bitsandbytes' own GPU and CPU code differ.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lorajax_kernels.checks import check_arrays, check_dtype, check_not_empty
from lorajax_kernels.device import Choice, Device, Implementation, anywhere, choose, function_of
from lorajax_kernels.nf4 import triton
from lorajax_kernels.nf4.reference import BLOCK, CODE, DYNAMIC_CODE, GROUP, reference_dequantize
from lorajax_kernels.nf4.xla import xla_dequantize, xla_quantize
from lorajax_kernels.precision import product

__all__ = [
    "NF4Weight",
    "choose_nf4",
    "dequantize_nf4",
    "nf4_implementations",
    "nf4_linear",
    "quantize_nf4",
]

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight [out, in] in NF4: a pytree of arrays.

    The arrays are flat, because a block need not lie within a row, and because bitsandbytes' are: its own are
    taken as they are. If D divides out and out * in / 64, the d-th of D equal slices of packed and of absmax
    is the d-th of D equal slices of the rows: one sharding of axis 0 over devices serves all of them.

    Attributes:
        packed: two elements a byte, the first in the high nibble; n = ceil(out * in / 2).
        absmax: largest magnitude of each block of 64 elements; with double quantisation an index.
        shape: (out, in).
        dtype: of the weight that was quantised.
        absmax2, absmax_code, offset: with double quantisation, otherwise None. Block b then has the absmax
            absmax_code[absmax[b]] * absmax2[b // 256] + offset. absmax_code is the same for all weights, but
            bitsandbytes makes it anew on each machine, and the last bits depend on the CPU.
    """

    packed: UInt8[Array, " n"]
    absmax: Float[Array, " blocks"] | UInt8[Array, " blocks"]
    shape: tuple[int, int] = field(metadata={"static": True})
    dtype: jnp.dtype = field(metadata={"static": True})
    absmax2: Float[Array, " groups"] | None = None
    absmax_code: Float[Array, " 256"] | None = None
    offset: Float[Array, ""] | None = None

    @property
    def double_quant(self) -> bool:
        """Whether absmax is quantised too."""
        return self.absmax2 is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @classmethod
    def from_bitsandbytes(cls, packed: Any, state: Mapping[str, Any]) -> NF4Weight:
        """A weight that bitsandbytes has quantised, its arrays as NumPy's, without copies.

        Args:
            packed: the weight as bitsandbytes stores it, in any shape and storage type.
            state: QuantState.as_dict(), packed or not. A checkpoint has these entries too, named by the
                weight's name, a dot, and "absmax", "quant_state.bitsandbytes__nf4" and so on.

        Raises:
            ValueError: it is not NF4 in blocks of 64, or an entry is missing or does not fit the others.
        """
        state = _unpacked(state)
        nested = {"nested_blocksize": GROUP, "nested_dtype": "float32"} if "nested_absmax" in state else {}
        for key, expected in ({"quant_type": "nf4", "blocksize": BLOCK} | nested).items():
            if state.get(key) != expected:
                raise ValueError(f"from_bitsandbytes: {key} must be {expected}, got {state.get(key)}")
        if "quant_map" in state and not np.array_equal(state["quant_map"], CODE):
            raise ValueError("from_bitsandbytes: quant_map does not hold the 16 values of NF4")
        needed = ("absmax", "shape", "dtype") + (("nested_quant_map", "nested_offset") if nested else ())
        if missing := [key for key in needed if key not in state]:
            raise ValueError(f"from_bitsandbytes: the state lacks {', '.join(missing)}")
        shape = tuple(state["shape"] or ())
        if len(shape) != 2:
            raise ValueError(f"from_bitsandbytes: the weight must be [out, in], got shape {shape}")
        arrays: dict[str, Any] = {
            "packed": _bytes(packed),
            "absmax": np.asarray(state["absmax"]),
        }
        if nested:
            arrays["absmax2"] = np.asarray(state["nested_absmax"])
            arrays["absmax_code"] = np.asarray(state["nested_quant_map"])
            arrays["offset"] = np.asarray(state["nested_offset"], np.float32)
        try:
            dtype = jnp.dtype(state["dtype"])
        except TypeError:
            raise ValueError(f"from_bitsandbytes: dtype must name a dtype, got {state['dtype']!r}") from None
        q = cls(**arrays, shape=shape, dtype=dtype)
        check_nf4_weight("from_bitsandbytes", q)
        return q


def _bytes(packed: Any) -> np.ndarray:
    """Of an array of NumPy's or torch's, whose bfloat16 NumPy lacks."""
    if hasattr(packed, "detach"):
        import torch

        packed = packed.detach().contiguous().view(torch.uint8)
    return np.asarray(packed).reshape(-1).view(np.uint8)


def _unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with the JSON of its packed form, if it is that, taken apart."""
    entries = {key: value for key, value in state.items() if not key.startswith("quant_state.")}
    for key in state.keys() - entries.keys():
        entries |= json.loads(np.asarray(state[key]).tobytes())
    return entries


@dataclass(frozen=True)
class Problem:
    """What an implementation is asked to do: a weight of that shape, dequantised to that dtype."""

    shape: tuple[int, int]
    dtype: jnp.dtype


# "auto" takes the first that can serve: the fastest first, as measured on large weights.
_IMPLEMENTATIONS: tuple[Implementation[Problem], ...] = (
    Implementation("triton", triton.why_not, triton.triton_dequantize, splits=False),
    Implementation("xla", anywhere, xla_dequantize),
    Implementation("reference", anywhere, reference_dequantize),
)


def nf4_implementations() -> tuple[str, ...]:
    """Names of the implementations of dequantize_nf4, in the order in which "auto" tries them."""
    return tuple(known.name for known in _IMPLEMENTATIONS)


def choose_nf4(
    q: NF4Weight,
    dtype: Any = None,
    *,
    implementation: str = "auto",
    device: Device | None = None,
) -> Choice:
    """Which implementation dequantize_nf4 runs for these arguments.

    Args:
        q: of arrays or jax.ShapeDtypeStruct.
        device: where it is to run; None: the current one.

    Returns:
        (name, refused); `refused` maps each implementation tried before to the reason why it cannot serve. An
        automatic choice is logged once.

    Raises:
        ValueError: as in dequantize_nf4.
    """
    check_nf4_weight("dequantize_nf4", q)
    problem = Problem(q.shape, _output_dtype(q, dtype))
    return choose("dequantize_nf4", _IMPLEMENTATIONS, problem, implementation=implementation, device=device)


def quantize_nf4(w: Float[Array, "out in"], double_quant: bool = False) -> NF4Weight:
    """Quantise to NF4 (Dettmers et al., 2023, QLoRA), bit for bit as bitsandbytes does on a GPU.

    Args:
        w: float32, bfloat16 or float16.
        double_quant: quantise absmax to 8 bits too: 0.516 bytes an element rather than 0.5625. The offset may
            be 2 ulp from bitsandbytes', whose sum is as inexact; given the offset, all else is equal.

    Raises:
        ValueError: w is no array [out, in], is empty, or has another dtype.
    """
    check_arrays("quantize_nf4", w=w)
    if w.ndim != 2:
        raise ValueError(f"quantize_nf4: w must be [out, in], got shape {w.shape}")
    check_not_empty("quantize_nf4", w=w)
    check_dtype("quantize_nf4", "float32, bfloat16 or float16", w=w)
    w = jnp.asarray(w)
    out_features, in_features = w.shape
    return NF4Weight(**xla_quantize(w, double_quant), shape=(out_features, in_features), dtype=w.dtype)


def dequantize_nf4(
    q: NF4Weight, dtype: Any = None, *, implementation: str = "auto"
) -> Float[Array, "out in"]:
    """The weight, bit for bit as bitsandbytes dequantises it: the float32 product rounded once to dtype.

    An op that is to be differentiated calls it within a custom_vjp of its own, as nf4_linear does: q is the
    residual, and in each pass goes through an optimization_barrier with what W is to be multiplied by.

    Args:
        dtype: float32, bfloat16 or float16; None: that of the weight that was quantised.
        implementation: a name of `nf4_implementations()`, or "auto": the first of them that can serve.

    Raises:
        ValueError: q is no NF4Weight, an array of it has the wrong shape or dtype, dtype is none of these, or
            the implementation is unknown or cannot serve.
    """
    choice = choose_nf4(q, dtype, implementation=implementation)
    return function_of(_IMPLEMENTATIONS, choice.name)(q, _output_dtype(q, dtype))


def nf4_linear(
    x: Float[Array, "*rows in"], q: NF4Weight, *, implementation: str = "auto"
) -> Float[Array, "*rows out"]:
    """x W^T in x's dtype, W dequantised to it; float32 is multiplied at full precision.

    The residual of the backward pass is q, and W is made again there. q is a constant.

    Args:
        x: float32, bfloat16 or float16.
        implementation: as in dequantize_nf4.

    Raises:
        ValueError: x does not fit q, or as in dequantize_nf4.
    """
    check_nf4_weight("nf4_linear", q)
    check_arrays("nf4_linear", x=x)
    if x.ndim < 1 or x.shape[-1] != q.shape[1]:
        raise ValueError(f"nf4_linear: x must be [..., in={q.shape[1]}] to fit q, got shape {x.shape}")
    check_dtype("nf4_linear", "float32, bfloat16 or float16", x=x)
    problem = Problem(q.shape, x.dtype)
    choice = choose("nf4_linear", _IMPLEMENTATIONS, problem, implementation=implementation)
    return _linear(choice.name, x, q)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(implementation: str, x: Array, q: NF4Weight) -> Array:
    x, w = _dequantize_for(x, q, implementation)
    return product("...i,oi->...o", x, w)


def _linear_forward(implementation: str, x: Array, q: NF4Weight) -> tuple[Array, NF4Weight]:
    return _linear(implementation, x, q), q


def _linear_backward(implementation: str, q: NF4Weight, dy: Array) -> tuple[Array, None]:
    dy, w = _dequantize_for(dy, q, implementation)
    return product("...o,oi->...i", dy, w), None


_linear.defvjp(_linear_forward, _linear_backward)


def _dequantize_for(x: Array, q: NF4Weight, implementation: str) -> tuple[Array, Array]:
    """x, and W in its dtype, made only once x is there.

    Left alone, XLA may make the W of many layers ahead, and takes those of both passes for one value to keep.
    """
    x, q = jax.lax.optimization_barrier((x, q))
    return x, dequantize_nf4(q, x.dtype, implementation=implementation)


def _output_dtype(q: NF4Weight, dtype: Any) -> jnp.dtype:
    with contextlib.suppress(TypeError):  # what is no dtype stays what it is
        dtype = q.dtype if dtype is None else jnp.dtype(dtype)
    if dtype not in _DTYPES:
        raise ValueError(f"dequantize_nf4: dtype must be float32, bfloat16 or float16, got {dtype}")
    return dtype


def check_nf4_weight(op: str, q: NF4Weight, name: str = "q") -> None:
    """Raise unless it is an NF4Weight whose arrays fit its shape and one another."""
    if not isinstance(q, NF4Weight):
        raise ValueError(f"{op}: {name} must be an NF4Weight, got {type(q).__name__}")
    if len(q.shape) != 2:
        raise ValueError(f"{op}: {name} must be of a weight [out, in], got one of shape {q.shape}")
    size = math.prod(q.shape)
    blocks = -(-size // BLOCK)
    expected: dict[str, tuple[Any, tuple[int, ...]]] = {
        "packed": (jnp.uint8, (-(-size // 2),)),
        "absmax": (jnp.float32, (blocks,)),
    }
    if any(array is not None for array in (q.absmax2, q.absmax_code, q.offset)):
        expected |= {
            "absmax": (jnp.uint8, (blocks,)),
            "absmax2": (jnp.float32, (-(-blocks // GROUP),)),
            "absmax_code": (jnp.float32, DYNAMIC_CODE.shape),
            "offset": (jnp.float32, ()),
        }
    owner = "" if name == "q" else f"{name}'s "
    for part, (dtype, shape) in expected.items():
        array = getattr(q, part)
        if array is None or array.dtype != dtype or array.shape != shape:
            found = "None" if array is None else f"{array.dtype} {array.shape}"
            wanted = f"{jnp.dtype(dtype)} {shape} for a weight of shape {q.shape}"
            raise ValueError(f"{op}: {owner}{part} must be {wanted}, got {found}")
