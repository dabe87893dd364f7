"""One optimizer step: its gradient, however the batch is cut, packed or recomputed, and half precision."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lorajax_kernels import device

from lorajax.config import TrainConfig
from lorajax.lora.config import LoRAConfig
from lorajax.memory.policy import LayerPolicy, Policy
from lorajax.models import decoder
from lorajax.models.checkpoint import load
from lorajax.sharding import data_mesh
from lorajax.training import step as step_module
from lorajax.training.optimizer import adamw
from lorajax.training.step import LossScale, init_state, loss_and_gradient, make_train_step
from lorajax.training.weights import merge_weights, split_weights

VOCAB, LENGTH, ROWS = 350, 24, 8
# XLA's own passes are as always; LLVM's take most of the time of compiling for a CPU.
OPTIONS = {"xla_backend_optimization_level": 0}
ADAPTERS = {
    "lora": LoRAConfig(rank=4, alpha=8),
    # With dropout, and not everywhere.
    "few": LoRAConfig(rank=4, alpha=8, dropout=0.3, target_modules=("v_proj", "1.mlp.down_proj")),
    "full": None,
}


def make_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """One to three documents and padding on each row, [ROWS, T]; the third row has no target."""
    rng = np.random.default_rng(seed)
    segment_ids = np.zeros((ROWS, LENGTH), np.int32)
    positions = np.zeros((ROWS, LENGTH), np.int32)
    for row in range(ROWS):
        ends = np.sort(rng.choice(np.arange(2, LENGTH + 1), row % 3 + 1, replace=False))
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), 1):
            segment_ids[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
    share = np.array([0.9, 0.1, 0.0, 0.5, 1.0, 0.05, 0.3, 0.2])[:, None]
    weights = (rng.random((ROWS, LENGTH)) < share) & (segment_ids > 0)
    return {
        "tokens": rng.integers(0, VOCAB, (ROWS, LENGTH), dtype=np.int32) * (segment_ids > 0),
        "targets": rng.integers(0, VOCAB, (ROWS, LENGTH), dtype=np.int32) * weights,
        "segment_ids": segment_ids,
        "positions": positions,
        "weights": weights.astype(np.float32),
    }


def cut(batch: dict[str, np.ndarray], micro_batches: int) -> dict[str, np.ndarray]:
    """[A * B, T] -> [A, B, T]"""
    return {name: array.reshape(micro_batches, -1, LENGTH) for name, array in batch.items()}


def difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert found.keys() == expected.keys()
    apart = [np.linalg.norm(found[name] - leaf) for name, leaf in expected.items()]
    size = np.linalg.norm([np.linalg.norm(leaf) for leaf in expected.values()])
    assert size > 0
    return float(np.linalg.norm(apart) / size)


def on_host(gradient) -> dict[str, np.ndarray]:
    assert all(leaf.dtype == jnp.float32 for leaf in gradient.values())
    return {name: np.asarray(leaf, np.float64) for name, leaf in gradient.items()}


@pytest.fixture(scope="module")
def weights(write_llama, tmp_path_factory):
    """weights(mode, attention, dtype): split_weights of the tiny Llama, its adapter random in both halves."""
    folder = write_llama(tmp_path_factory.mktemp("step") / "llama")
    # With tied embeddings, the embedding's gradient is that of the lookup and that of the head.
    tied: Path = write_llama(tmp_path_factory.mktemp("step") / "tied", tie_word_embeddings=True)

    @functools.cache
    def weights(mode: str, attention: str = "auto", dtype: str = "float32"):
        full = mode == "full"
        model = load(
            tied if full else folder,
            lora=ADAPTERS[mode],
            dtype=dtype,
            attention=attention,
            param_dtype="float32" if full else None,
        )
        for index, linear in enumerate(model.linears().values()):
            if linear.lora_b is not None:
                linear.lora_b[...] = 0.3 * jax.random.normal(jax.random.key(index), linear.lora_b[...].shape)
        return split_weights(model, "full" if full else "lora")

    return weights


@pytest.fixture(scope="module")
def gradient(weights):
    """gradient(batch, ...): (loss, gradient by path) of a batch [A, B, T]."""

    @functools.cache
    def program(mode: str, attention: str, checkpointing: str | None, dropout: bool, mlp_chunks: int):
        graph, _, _ = weights(mode, attention)

        def run(trainable, frozen, batch, key):
            return loss_and_gradient(
                graph,
                trainable,
                frozen,
                batch,
                mesh=data_mesh(),
                checkpointing=checkpointing,
                mlp_chunks=mlp_chunks,
                dropout_key=key if dropout else None,
                train_head=mode == "full",
            )

        return jax.jit(run, compiler_options=OPTIONS)

    def gradient(
        batch, mode="lora", *, attention="auto", checkpointing=None, dropout_seed=None, mlp_chunks=1
    ):
        _, trainable, frozen = weights(mode, attention)
        run = program(mode, attention, checkpointing, dropout_seed is not None, mlp_chunks)
        loss, leaves = run(trainable, frozen, batch, jax.random.key(dropout_seed or 0))
        return float(loss), on_host(leaves)

    return gradient


# --- accumulation ---


@pytest.fixture(scope="module")
def dense_gradient(weights):
    """As `gradient`, from the mean cross-entropy over all logits of rows [B, T]."""

    def dense_gradient(rows, mode):
        graph, trainable, frozen = weights(mode, "reference")

        def mean_loss(trainable):
            model = merge_weights(graph, trainable, frozen)
            hidden = model.hidden_states(rows["tokens"], rows["segment_ids"], rows["positions"])
            losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), rows["targets"])
            return jnp.sum(losses * rows["weights"]) / jnp.sum(rows["weights"])

        loss, leaves = jax.jit(jax.value_and_grad(mean_loss), compiler_options=OPTIONS)(trainable)
        return float(loss), on_host(leaves)

    return dense_gradient


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(mode, gradient, dense_gradient):
    rows = make_batch()
    assert len(set(cut(rows, 4)["weights"].sum((1, 2)))) == 4
    whole_loss, whole = gradient(cut(rows, 1), mode)
    reference_loss, reference = dense_gradient(rows, mode)
    assert abs(whole_loss - reference_loss) <= 2e-6 * reference_loss
    assert difference(whole, reference) <= 2e-6
    loss, leaves = gradient(cut(rows, 4), mode)
    assert abs(loss - whole_loss) <= 2e-6 * whole_loss
    assert difference(leaves, whole) <= 2e-6


# --- checkpointing ---


@pytest.mark.parametrize(
    "mode, micro_batches, dropout_seed",
    [
        ("lora", 1, None),
        pytest.param("full", 1, None, marks=pytest.mark.slow),
        pytest.param("few", 2, 5, marks=pytest.mark.slow),
    ],
)
def test_recomputed_and_offloaded_equal_saved(mode, micro_batches, dropout_seed, gradient):
    batch = cut(make_batch(), micro_batches)
    loss, saved = gradient(batch, mode, dropout_seed=dropout_seed)
    for checkpointing in ("none", "full", "offload"):
        other_loss, other = gradient(batch, mode, checkpointing=checkpointing, dropout_seed=dropout_seed)
        assert abs(other_loss - loss) <= 1e-6 * loss
        assert difference(other, saved) <= 1e-6


def layers(*actions, copy_span=1):
    """The policy of two layers; one after the other, or the same for both."""
    return Policy(tuple(map(LayerPolicy.of, actions * (3 - len(actions)))), copy_span=copy_span)


@pytest.mark.parametrize(
    "checkpointing",
    [
        pytest.param(
            layers({"gate": "save", "up": "save", "lora_hidden": "save"}),
            id="gates kept",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            layers({"block_input": "offload", "attention_output": "offload", "gradient": "offload"}),
            id="much away",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            layers({"block_input": "offload", "gate": "offload"}, {"query": "save"}, copy_span=2),
            id="layers differ",
        ),
    ],
)
@pytest.mark.parametrize(
    "micro_batches, dropout_seed", [(1, None), pytest.param(2, 5, marks=pytest.mark.slow)]
)
def test_every_policy_gives_one_gradient(checkpointing, micro_batches, dropout_seed, gradient):
    batch = cut(make_batch(), micro_batches)
    mode = "lora" if dropout_seed is None else "few"
    loss, saved = gradient(batch, mode, dropout_seed=dropout_seed)
    other_loss, other = gradient(batch, mode, checkpointing=checkpointing, dropout_seed=dropout_seed)
    assert abs(other_loss - loss) <= 1e-6 * loss
    assert difference(other, saved) <= 1e-6


def test_where_the_arithmetic_is_the_same_gradients_are_so_bit_for_bit(gradient):
    """Offloaded activations come back as they were; what is computed is that of `full`."""
    batch = cut(make_batch(), 1)
    loss, full = gradient(batch, checkpointing="full")
    away = {"block_input": "offload"}
    for checkpointing in (layers(away), layers(away | {"gradient": "offload"})):
        other_loss, other = gradient(batch, checkpointing=checkpointing)
        assert other_loss == loss
        assert other.keys() == full.keys()
        for name, each in full.items():
            np.testing.assert_array_equal(other[name], each, name)


@pytest.mark.parametrize(
    "mode, checkpointing",
    [
        ("lora", "offload"),
        pytest.param("full", "none", marks=pytest.mark.slow),
    ],
)
def test_an_mlp_in_chunks_has_the_gradient_of_all_tokens(mode, checkpointing, gradient):
    batch = cut(make_batch(), 1)
    loss, whole = gradient(batch, mode, checkpointing=checkpointing)
    other_loss, other = gradient(batch, mode, checkpointing=checkpointing, mlp_chunks=5)
    assert abs(other_loss - loss) <= 1e-6 * loss
    assert difference(other, whole) <= 1e-6


@pytest.mark.slow
def test_dropout_is_the_same_in_any_micro_batches_and_in_parts_of_a_row(gradient):
    rows = make_batch()
    loss, whole = gradient(cut(rows, 1), "few", checkpointing="full", dropout_seed=5)
    _, other = gradient(cut(rows, 1), "few", checkpointing="full", dropout_seed=6)
    assert difference(other, whole) > 0.05
    for micro_batches, mlp_chunks in ((2, 1), (8, 1), (8, 5)):
        batch = cut(rows, micro_batches)
        assert mlp_chunks == 1 or batch["tokens"].shape[1] == 1
        found = gradient(batch, "few", checkpointing="full", dropout_seed=5, mlp_chunks=mlp_chunks)
        assert abs(found[0] - loss) <= 2e-6 * loss
        assert difference(found[1], whole) <= 2e-6


@pytest.mark.slow
def test_dropout_in_parts_of_several_rows_has_masks_of_its_own(gradient):
    """Each part another: as few as these tokens could not be told from a mask for all of them otherwise."""
    batch = cut(make_batch(), 2)
    _, whole = gradient(batch, "few", checkpointing="full", dropout_seed=5)
    _, chunks = gradient(batch, "few", checkpointing="full", dropout_seed=5, mlp_chunks=4)
    _, again = gradient(batch, "few", checkpointing="offload", dropout_seed=5, mlp_chunks=4)
    assert difference(again, chunks) <= 1e-6 < 0.05 < difference(chunks, whole)


@pytest.mark.slow
def test_dropout_has_a_mask_of_its_own_for_each_key_and_micro_batch(gradient):
    rows = make_batch()
    once = {
        name: np.concatenate([array[:4], array[:4]]) for name, array in rows.items()
    }  # the same rows twice
    _, five = gradient(cut(once, 2), "few", dropout_seed=5)
    _, six = gradient(cut(once, 2), "few", dropout_seed=6)
    assert difference(six, five) > 0.1
    # Were the masks of both micro-batches the same, the second would change nothing.
    first_only = {name: array.copy() for name, array in cut(once, 2).items()}
    first_only["weights"][1] = 0
    _, first = gradient(first_only, "few", dropout_seed=5)
    assert difference(first, five) > 0.05


@pytest.fixture(scope="module")
def lowered(write_llama, tmp_path_factory):
    """lowered(checkpointing, platform): the program of the gradient for four layers, not yet compiled."""
    folder = write_llama(tmp_path_factory.mktemp("deep"), num_hidden_layers=4)
    lora = LoRAConfig(rank=4, alpha=8, target_modules=("q_proj",))
    graph, trainable, frozen = split_weights(load(folder, lora=lora, dtype="float32"), "lora")
    batch = cut(make_batch(), 1)

    def lowered(checkpointing, platform):
        def run(trainable, frozen, batch):
            return loss_and_gradient(
                graph, trainable, frozen, batch, mesh=data_mesh(), checkpointing=checkpointing
            )

        return jax.jit(run).trace(trainable, frozen, batch).lower(lowering_platforms=(platform,))

    return lowered


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="this XLA drops the barriers of checkpointing on a CPU"
)
def test_recomputing_takes_less_memory(lowered):
    none, full = (
        lowered(checkpointing, "cpu").compile(OPTIONS).memory_analysis().temp_size_in_bytes
        for checkpointing in ("none", "full")
    )
    assert full < 0.7 * none


def test_the_inputs_of_all_layers_but_the_last_are_offloaded(lowered):
    """As lowered for a GPU; for a CPU, whose memory is the host's, jax leaves the transfers out."""

    def placements(checkpointing):
        return re.findall(
            r'@annotate_device_placement.*_xla_buffer_placement = "(\w+)".*-> tensor<(\S+)>',
            lowered(checkpointing, "cuda").as_text(),
        )

    there, back = [(memory, f"{ROWS}x{LENGTH}x32xf32") for memory in ("pinned_host", "device")]
    assert placements({"block_input": "offload"}) == [there] * 3 + [back] * 3
    assert placements("full") == []


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_kernels_are_chosen_for_a_program_that_is_split_over_devices(checkpointing, weights, monkeypatch):
    """Layers of one kind are traced once; each device has a loss of its own."""
    seen = []

    def spy(function):
        def call(*arguments, **options):
            seen.append((function.__name__, device._split_over.get()))
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(decoder, "attention", spy(decoder.attention))
    monkeypatch.setattr(decoder, "lora_linears", spy(decoder.lora_linears))
    monkeypatch.setattr(step_module, "linear_cross_entropy", spy(step_module.linear_cross_entropy))
    graph, trainable, frozen = weights("lora")
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    jax.make_jaxpr(
        lambda *arguments: loss_and_gradient(graph, *arguments, mesh=mesh, checkpointing=checkpointing)
    )(trainable, frozen, cut(make_batch(), 1))
    assert seen.count(("attention", 2)) == 1
    assert set(seen) == {("attention", 2), ("lora_linears", 2), ("linear_cross_entropy", 1)}


# --- packing ---


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["xla", "reference"])
def test_packed_documents_have_the_gradients_of_separate_ones(attention, gradient):
    rows = {name: array[5:6] for name, array in make_batch(seed=3).items()}
    rows["weights"] = (rows["segment_ids"] > 0).astype(np.float32)
    assert rows["segment_ids"].max() == 3 and (rows["segment_ids"] == 0).any()
    packed_loss, packed = gradient(cut(rows, 1), attention=attention)
    total = rows["weights"].sum()
    sums = {name: np.zeros_like(leaf) for name, leaf in packed.items()}
    loss_sum = 0.0
    for number in (1, 2, 3):
        (here,) = np.nonzero(rows["segment_ids"][0] == number)
        alone = {name: np.zeros_like(array) for name, array in rows.items()}
        for name, array in rows.items():
            alone[name][0, : len(here)] = array[0, here]
        alone["segment_ids"] = np.minimum(alone["segment_ids"], 1)
        loss, leaves = gradient(cut(alone, 1), attention=attention)
        loss_sum += loss * len(here)
        sums = {name: leaf + leaves[name] * len(here) for name, leaf in sums.items()}
    assert abs(packed_loss - loss_sum / total) <= 1e-5 * packed_loss
    for name, leaf in packed.items():
        assert difference({name: leaf}, {name: sums[name] / total}) <= 1e-5, name


# --- half precision, and steps that are not finite ---


@pytest.fixture(scope="module")
def half_run(weights):
    """half_run(dtype): (step(state, batch), first state, batch [1, B, T])."""
    schedule = optax.constant_schedule(3e-2)
    optimizer = adamw(TrainConfig(weight_decay=0.1), schedule)
    batch = cut(make_batch(), 1)

    @functools.cache
    def half_run(dtype: str):
        graph, trainable, frozen = weights("few", dtype=dtype)
        step = make_train_step(
            graph,
            optimizer,
            schedule,
            mesh=data_mesh(),
            checkpointing="full",
            dropout=False,
            train_head=False,
            scale_loss=dtype == "float16",
        )
        compiled = jax.jit(step, compiler_options=OPTIONS)
        state = init_state(trainable, optimizer, seed=0, dtype=dtype, tokens_per_step=ROWS * LENGTH)
        return lambda state, batch: compiled(state, frozen, batch), state, batch

    return half_run


def assert_same_state(found, expected):
    """Bit for bit, but for the loss scale."""
    leaves = [jax.tree.leaves(state._replace(loss_scale=None)) for state in (found, expected)]
    for left, right in zip(*leaves, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_learns(dtype, half_run, gradient):
    step, state, batch = half_run(dtype)
    loss, leaves = gradient(batch, "few")
    metrics = []
    for _ in range(30):
        state, metric = step(state, batch)
        metrics.append(metric)
    assert metrics[0].loss == pytest.approx(loss, rel=1e-2)
    # The norm of the float32 gradient: the loss scale is taken out again.
    norm = np.linalg.norm([np.linalg.norm(leaf) for leaf in leaves.values()])
    assert metrics[0].grad_norm == pytest.approx(norm, rel=2e-2)
    assert metrics[-1].loss < 0.7 * metrics[0].loss
    # 192 tokens: the largest power of two by which a sum over 256 stays in range.
    assert {float(metric.loss_scale) for metric in metrics} == {128.0 if dtype == "float16" else 1.0}
    assert int(state.updates) == 30


@pytest.mark.slow
def test_an_overflow_skips_the_update_and_halves_the_scale(half_run):
    step, state, batch = half_run("float16")
    state, _ = step(state, batch)
    large = state._replace(loss_scale=LossScale(jnp.float32(2**30), jnp.int32(7)))
    after, metrics = step(large, batch)
    assert np.isfinite(metrics.loss) and not np.isfinite(metrics.grad_norm)
    assert metrics.loss_scale == 2**30
    assert (after.loss_scale.scale, after.loss_scale.good_steps) == (2**29, 0)
    assert_same_state(after, large)
    # It comes down until a step fits, and that one is made.
    for _ in range(30):
        after, metrics = step(after, batch)
        if np.isfinite(metrics.grad_norm):
            break
    assert int(after.updates) == int(large.updates) + 1
    assert 1 < after.loss_scale.scale < 2**29


@pytest.mark.slow
def test_the_scale_doubles_after_200_good_steps(half_run):
    step, state, batch = half_run("float16")
    state = state._replace(loss_scale=LossScale(jnp.float32(64), jnp.int32(198)))
    state, _ = step(state, batch)
    assert (state.loss_scale.scale, state.loss_scale.good_steps) == (64, 199)
    state, _ = step(state, batch)
    assert (state.loss_scale.scale, state.loss_scale.good_steps) == (128, 0)


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing(half_run):
    step, state, batch = half_run("bfloat16")
    state, _ = step(state, batch)
    bad = batch | {"targets": np.full_like(batch["targets"], VOCAB)}  # no such token: the loss is NaN
    after, metrics = step(state, bad)
    assert np.isnan(metrics.loss)
    assert_same_state(after, state)
    assert after.loss_scale.scale == 1
