"""The settings of a LoRA adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

from lorajax.errors import UserError


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapter: which linear layers get one, and how large.

    The adapted layer computes `W x + alpha / rank * B A x` (Hu et al. 2021, arXiv:2106.09685).

    Raises:
        UserError: a value is of the wrong type or out of range; the message starts with the key
            (`lora.rank`).
    """

    rank: int = 32
    """Rows of A and columns of B; at least 1."""
    alpha: float = 16.0
    """The adapter's product is multiplied by alpha / rank; above 0."""
    dropout: float = 0.0
    """Probability of dropping an element of the adapter's input while training, from 0 to below 1."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Which linear layers: all-linear (every one in the blocks, not the head), a list of names
    ([q_proj, v_proj]), or a regular expression that matches whole module names."""

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, Integral) and self.rank >= 1):
            raise UserError(f"lora.rank must be a whole number of at least 1, not {self.rank!r}")
        if not (isinstance(self.alpha, Real) and 0 < self.alpha < math.inf):
            raise UserError(f"lora.alpha must be a number above 0, not {self.alpha!r}")
        if not (isinstance(self.dropout, Real) and 0 <= self.dropout < 1):
            raise UserError(f"lora.dropout must be a number of at least 0 and below 1, not {self.dropout!r}")
        if not self.target_modules:
            raise UserError("lora.target_modules is empty; name the layers to adapt, or use all-linear")
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
