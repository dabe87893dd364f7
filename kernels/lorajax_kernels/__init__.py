"""Ops for training language models on packed rows.

- `attention`: causal attention within segments, `choose_attention` and `attention_implementations` beside it;
  `cached_attention` for decoding.
- `linear_cross_entropy`: the loss of the head without its logits, `choose_cross_entropy` and
  `cross_entropy_implementations` beside it.
- `lora_linear`, `lora_linears`: frozen layers with adapters that share their input, and `swiglu_lora_linear`,
  the one after a gate; `choose_lora` and `lora_implementations` beside them.
- `quantize_nf4`, `dequantize_nf4`, `nf4_linear`: weights of 4 bits an element, `choose_nf4` and
  `nf4_implementations` beside them.
- `rms_norm`, `rope`, `swiglu`, `geglu`: what lies between the products.
- `segments`: where the segments of a row start and end.
- `device`: what the device can do, and `choose`, the rule that picks an op's implementation.
- `checked`: a mode in which the ops look at values too.
"""

from lorajax_kernels import device, segments
from lorajax_kernels.attention import (
    attention,
    attention_implementations,
    cached_attention,
    choose_attention,
)
from lorajax_kernels.checks import checked
from lorajax_kernels.cross_entropy import (
    choose_cross_entropy,
    cross_entropy_implementations,
    linear_cross_entropy,
)
from lorajax_kernels.elementwise import geglu, rms_norm, rope, swiglu
from lorajax_kernels.lora import (
    Adapter,
    choose_lora,
    lora_implementations,
    lora_linear,
    lora_linears,
    swiglu_lora_linear,
)
from lorajax_kernels.nf4 import (
    NF4Weight,
    choose_nf4,
    dequantize_nf4,
    nf4_implementations,
    nf4_linear,
    quantize_nf4,
)

__all__ = [
    "Adapter",
    "NF4Weight",
    "attention",
    "attention_implementations",
    "cached_attention",
    "checked",
    "choose_attention",
    "choose_cross_entropy",
    "choose_lora",
    "choose_nf4",
    "cross_entropy_implementations",
    "dequantize_nf4",
    "device",
    "geglu",
    "linear_cross_entropy",
    "lora_implementations",
    "lora_linear",
    "lora_linears",
    "nf4_implementations",
    "nf4_linear",
    "quantize_nf4",
    "rms_norm",
    "rope",
    "segments",
    "swiglu",
    "swiglu_lora_linear",
]
