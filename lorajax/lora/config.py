"""The settings of a LoRA adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorajax.errors import UserError


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapter: which linear layers get one, and how large.

    The adapted layer computes `W x + alpha / rank * B A x` (Hu et al. 2021, arXiv:2106.09685).

    Raises:
        UserError: a value is out of range; the message starts with the key (`lora.rank`).
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
        if not self.rank >= 1:
            raise UserError(f"lora.rank must be at least 1, not {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"lora.alpha must be above 0, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout must be at least 0 and below 1, not {self.dropout}")
        if not self.target_modules:
            raise UserError("lora.target_modules is empty; name the layers to adapt, or use all-linear")
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
