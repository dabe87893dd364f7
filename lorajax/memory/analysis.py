"""What a compiled program takes of a device, by XLA's own analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Memory:
    """Memory of one device that a compiled program takes, in bytes.

    Attributes:
        arguments: what goes in, and results that do not take its place: of a training step, weights,
            optimizer state and batch.
        temporaries: activations, scratch and the program's code.
        host: pinned memory of the host.
    """

    arguments: int
    temporaries: int
    host: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


def memory_of(compiled: Any) -> Memory:
    """Of what jax.jit(f).lower(...).compile() gave."""
    analysis = compiled.memory_analysis()
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(
        analysis.argument_size_in_bytes + outputs,
        analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes,
        analysis.host_temp_size_in_bytes,
    )
