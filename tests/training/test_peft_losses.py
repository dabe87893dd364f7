"""Training follows PEFT step by step: transformers' model, PEFT's adapter, torch's AdamW."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is the reference of this test")
peft = pytest.importorskip("peft", reason="PEFT is the reference of this test")

from transformers import LlamaForCausalLM, get_scheduler  # noqa: E402

from lorajax.config import TrainConfig  # noqa: E402
from lorajax.data import Documents, packed_batches  # noqa: E402
from lorajax.lora.config import LoRAConfig  # noqa: E402
from lorajax.lora.peft import load_adapter, save_adapter  # noqa: E402
from lorajax.models.checkpoint import load  # noqa: E402
from lorajax.sharding import data_mesh  # noqa: E402
from lorajax.training.optimizer import adamw, learning_rate_schedule  # noqa: E402
from lorajax.training.step import init_state, make_train_step  # noqa: E402
from lorajax.training.weights import split_weights  # noqa: E402

STEPS, MICRO_BATCHES, ROWS, LENGTH = 32, 2, 2, 32


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads take longer to meet than these small products to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, np.ndarray]]:
    """STEPS batches [A, B, T] of packed rows; the tokens of a document follow a rule that can be learnt."""
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(60):
        length, start = int(rng.integers(4, LENGTH)), int(rng.integers(40))
        answer = rng.random(length) < rng.uniform(0.2, 1)
        answer[-1] = True
        documents.append(((start + 3 * np.arange(length)) % 40, answer))
    iterator = iter(
        packed_batches(
            Documents.from_pairs(documents),
            batch_shape=(MICRO_BATCHES, ROWS),
            max_length=LENGTH,
            max_segments=8,
            packing=True,
            seed=0,
            epochs=None,
            prefetch=False,
        )
    )
    batches = [next(iterator) for _ in range(STEPS)]
    assert max(batch["segment_ids"].max() for batch in batches) >= 3
    return batches


@pytest.fixture(scope="module")
def adapter(llama_folder, tmp_path_factory):
    """An adapter in PEFT's format, neither half of it zero."""
    model = load(llama_folder, lora=LoRAConfig(rank=4, alpha=8), dtype="float32", seed=3)
    for index, linear in enumerate(model.linears().values()):
        linear.lora_b[...] = 0.05 * jax.random.normal(jax.random.key(index), linear.lora_b[...].shape)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder)
    return folder


def our_losses(folder, adapter, batches, train) -> list[float]:
    graph, trainable, frozen = split_weights(load_adapter(load(folder, dtype="float32"), adapter), "lora")
    schedule = learning_rate_schedule(train, STEPS)
    optimizer = adamw(train, schedule)
    step = jax.jit(
        make_train_step(
            graph,
            optimizer,
            schedule,
            mesh=data_mesh(),
            checkpointing="full",
            dropout=False,
            train_head=False,
            scale_loss=False,
        ),
        compiler_options={"xla_backend_optimization_level": 0},  # LLVM's take most of the time
    )
    state = init_state(trainable, optimizer, seed=0, dtype="float32", tokens_per_step=0)
    losses = []
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics.loss))
    return losses


def their_losses(folder, adapter, batches, train) -> list[float]:
    """A loop in torch; each token sees those before it in its own document, and padding sees padding."""
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
    )
    scheduler = get_scheduler(
        train.lr_scheduler_type, optimizer, num_warmup_steps=train.warmup_steps, num_training_steps=STEPS
    )
    causal = np.tri(LENGTH, dtype=bool)
    losses = []
    for batch in batches:
        tokens, targets, weights, segments, positions = (
            batch[name].reshape(-1, LENGTH)
            for name in ("tokens", "targets", "weights", "segment_ids", "positions")
        )
        visible = causal & (segments[:, :, None] == segments[:, None, :])
        logits = model(
            input_ids=torch.tensor(tokens).long(),
            position_ids=torch.tensor(positions).long(),
            attention_mask=torch.tensor(np.where(visible, 0, -1e9)[:, None], dtype=torch.float32),
        ).logits
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.tensor(targets).long().flatten(), reduction="none"
        )
        loss = (each * torch.tensor(weights).flatten()).sum() / float(weights.sum())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind, warmup", [("linear", 5), ("cosine", 0)])
def test_losses_are_those_of_peft(kind, warmup, llama_folder, adapter, batches):
    train = TrainConfig(
        learning_rate=1e-2,
        lr_scheduler_type=kind,
        warmup_steps=warmup,
        weight_decay=0.1,
        max_grad_norm=0.5,
    )
    theirs = their_losses(llama_folder, adapter, batches, train)
    ours = our_losses(llama_folder, adapter, batches, train)
    assert theirs[-1] < 0.6 * theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
