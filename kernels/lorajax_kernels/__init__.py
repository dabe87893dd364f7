"""Ops for training language models on packed rows, each with a plain reference.

- `attention`: causal attention within segments, `choose_attention` and `attention_implementations` beside it;
  `cached_attention` for decoding.
- `linear_cross_entropy`: the loss of the head without its logits.
- `segments`: where the segments of a row start and end.
"""

from lorajax_kernels import segments
from lorajax_kernels.attention import (
    attention,
    attention_implementations,
    cached_attention,
    choose_attention,
)
from lorajax_kernels.cross_entropy import linear_cross_entropy

__all__ = [
    "attention",
    "attention_implementations",
    "cached_attention",
    "choose_attention",
    "linear_cross_entropy",
    "segments",
]
