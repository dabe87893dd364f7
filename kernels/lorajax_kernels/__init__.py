"""Ops for training language models on packed rows, each with a plain reference.

- `attention`: causal attention within segments, `choose_attention` and `attention_implementations` beside it;
  `cached_attention` for decoding.
- `linear_cross_entropy`: the loss of the head without its logits.
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
from lorajax_kernels.cross_entropy import linear_cross_entropy

__all__ = [
    "attention",
    "attention_implementations",
    "cached_attention",
    "checked",
    "choose_attention",
    "device",
    "linear_cross_entropy",
    "segments",
]
