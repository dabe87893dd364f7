"""Workloads at the shapes of known models, without arrays."""

import pytest

from lorajax.memory.costs import Rates, Workload
from lorajax.memory.planner import Problem, micro_batch_counts
from lorajax.models.decoder import DecoderOptions

H200 = Rates(flops=720e12, memory=4.2e12, link=55e9)
SHAPES = {
    "1b": DecoderOptions(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        max_position=8192,
    ),
    "8b": DecoderOptions(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position=8192,
    ),
}
# Bytes of the weights with a tied head, and parameters of adapters of rank 32 on all projections.
SIZES = {"1b": (2_471_628_800, 22_544_384), "8b": (15_008_796_672, 83_886_080)}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def problem():
    """problem("1b", rows=8, length=2048, ...)"""

    def make(name: str, *, rows: int, length: int, rates: Rates = H200, offloads: bool = True) -> Problem:
        weights, trainable = SIZES[name]

        def workload(rows: int) -> Workload:
            return Workload(
                options=SHAPES[name],
                ranks=dict.fromkeys(PROJECTIONS, 32),
                itemsize=2,
                weights=weights,
                trainable=trainable,
                rows=rows,
                length=length,
                context=length,
            )

        fixed = (weights, 4 * trainable, 8 * trainable)
        return Problem(workload, rates, rows, fixed, offloads, micro_batch_counts(rows))

    return make
