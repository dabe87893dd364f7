"""The planner's arithmetic against programs that are compiled for a CPU."""

import functools

import jax
import numpy as np
import pytest

from lorajax.lora.config import LoRAConfig
from lorajax.memory.costs import Rates, workload
from lorajax.memory.planner import Problem, estimate, micro_batch_counts
from lorajax.memory.policy import Layout
from lorajax.models.checkpoint import load
from lorajax.sharding import data_mesh
from lorajax.training.step import loss_and_gradient
from lorajax.training.weights import split_weights

ROWS, LENGTH = 8, 256
ATTENTION = ("query", "key", "value", "attention_output", "block_middle", "lora_hidden")
KEPT = {
    "full": "full",
    "attention": dict.fromkeys(("block_input", *ATTENTION), "save"),
    "gates": dict.fromkeys(("block_input", "gate", "up", "lora_hidden"), "save"),
    "none": "none",
}

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="this XLA drops the barriers of checkpointing on a CPU"
)


@pytest.fixture(scope="module")
def model(write_llama, tmp_path_factory):
    """Its logits take more than the workspace of any layer: all that is kept is there beside them."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "vocab_size": 8192}
    folder = write_llama(tmp_path_factory.mktemp("model"), **sizes)
    return load(folder, lora=LoRAConfig(rank=4, alpha=8), dtype="float32")


@pytest.fixture(scope="module")
def temporary(model):
    """temporary(name, micro_batches): bytes of a gradient's program beside its arguments and results."""
    graph, trainable, frozen = split_weights(model, "lora")

    @functools.cache
    def temporary(name, micro_batches=1):
        zeros = np.zeros((micro_batches, ROWS // micro_batches, LENGTH), np.int32)
        batch = dict.fromkeys(("tokens", "targets", "positions"), zeros) | {"segment_ids": zeros + 1}
        batch["weights"] = np.ones(zeros.shape, np.float32)

        def run(trainable, frozen, batch):
            return loss_and_gradient(
                graph, trainable, frozen, batch, mesh=data_mesh(), checkpointing=KEPT[name]
            )

        compiled = jax.jit(run).lower(trainable, frozen, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    return temporary


@pytest.fixture(scope="module")
def estimated(model):
    """estimated(name, micro_batches): bytes of activations that are kept."""
    _, trainable, frozen = split_weights(model, "lora")
    count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))

    def of_rows(rows):
        return workload(model, weights=weights, trainable=count, rows=rows, length=LENGTH, context=LENGTH)

    fixed = weights, 4 * count, 8 * count
    problem = Problem(of_rows, Rates(1e12, 1e11, 1e10), ROWS, fixed, True, micro_batch_counts(ROWS))

    def estimated(name, micro_batches=1):
        return estimate(problem, Layout(ROWS // micro_batches, KEPT[name])).device.activations

    return estimated


@pytest.mark.parametrize("kept, micro_batches", [("attention", 1), ("gates", 1), ("none", 1), ("none", 4)])
def test_what_is_kept_takes_what_the_plan_says(kept, micro_batches, temporary, estimated):
    """More than what `full` keeps; of micro-batches there is one at a time."""
    more = temporary(kept, micro_batches) - temporary("full", micro_batches)
    plan = estimated(kept, micro_batches) - estimated("full", micro_batches)
    assert more == pytest.approx(plan, rel=0.05)
