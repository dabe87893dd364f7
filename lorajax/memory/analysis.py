"""Programs compiled in the memory that there is, and what they take of a device by XLA's own analysis."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

_log = logging.getLogger("lorajax")

# Among the options of XLA's compiler.
_UNTIMED = {"xla_gpu_autotune_level": 0}


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


def compile_lowered(lowered: Any, options: Mapping[str, Any] | None = None) -> Any:
    """What jax.jit(f).lower(...) gave, compiled, also where there is little memory.

    XLA times ways to multiply on the GPU, with operands and results beside what is there already. Where they
    do not fit it gives up; the program is then compiled without that, and may be slower.
    """
    given = dict(options or {})
    try:
        return lowered.compile(compiler_options=given)
    except jax.errors.JaxRuntimeError as error:
        if jax.default_backend() != "gpu":
            raise
        _log.warning(
            "XLA could not time ways to multiply in the GPU memory that is free (%s); it takes its defaults",
            str(error).splitlines()[0],
        )
        try:
            return lowered.compile(compiler_options=given | _UNTIMED)
        except jax.errors.JaxRuntimeError:
            raise error from None


def memory_of(compiled: Any) -> Memory:
    """Of what jax.jit(f).lower(...).compile() gave."""
    analysis = compiled.memory_analysis()
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(
        analysis.argument_size_in_bytes + outputs,
        analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes,
        analysis.host_temp_size_in_bytes,
    )


def gib(size: int) -> str:
    """As plans write it; what would be 0.00G in MiB or KiB."""
    for unit, power in (("G", 30), ("M", 20), ("K", 10)):
        if size >= 0.005 * 2**power:
            return f"{size / 2**power:.2f}{unit}"
    return "0.00G"
