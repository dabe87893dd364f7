"""What a run knows before it reads any weights: tokenizer, documents, and how many steps they make."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from lorajax_kernels import choose_attention
from lorajax_kernels.device import Choice, split_over

from lorajax.config import Config
from lorajax.data import (
    DataSplits,
    Documents,
    PackingStats,
    chat_template,
    load_documents,
    load_tokenizer,
    packed_batches,
    packing_stats,
)
from lorajax.errors import UserError
from lorajax.generation import check_prompts
from lorajax.memory.plan import outline_of
from lorajax.memory.policy import Layout
from lorajax.models.checkpoint import fingerprint, resolve
from lorajax.models.decoder import Decoder
from lorajax.sharding import data_mesh, rows
from lorajax.training.step import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def max_segments(config: Config) -> int:
    """Most segments on a row: its documents, and its padding."""
    return (config.data.max_segments if config.data.packing else 1) + 1


@dataclass(frozen=True, kw_only=True)
class RunShape:
    """What the compiled programs of a run depend on, besides its model.

    Attributes:
        config: the run's.
        mesh: the devices.
        total_steps: optimizer steps of the whole run.
        planned: how a step goes over its rows; None: as the config says, which must not be "auto" then.
    """

    config: Config
    mesh: Mesh
    total_steps: int
    planned: Layout | None = None

    @property
    def layout(self) -> Layout:
        if self.planned is not None:
            return self.planned
        rows, memory = self.config.train.per_device_train_batch_size, self.config.memory
        return Layout(rows, memory.checkpointing, memory.mlp_chunks or 1)

    @property
    def rows_per_device(self) -> int:
        """Of a step."""
        train = self.config.train
        return train.per_device_train_batch_size * train.gradient_accumulation_steps

    @property
    def micro_batches(self) -> int:
        return self.rows_per_device // self.layout.rows

    @property
    def rows_per_micro_batch(self) -> int:
        """On all devices."""
        return self.layout.rows * self.mesh.size

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_device * self.mesh.size

    @property
    def max_segments(self) -> int:
        return max_segments(self.config)

    @property
    def context(self) -> int | None:
        """Tokens of the document that a token is in, on average; None: not known, as many as a row has."""
        return None


@dataclass(frozen=True, kw_only=True)
class Inputs(RunShape):
    """A run's inputs, checked.

    Attributes:
        model_path: local folder or file of the model.
        outline: the model and its adapter without their weights.
        attention: the implementation that serves it, and why others do not.
        tokenizer: the model's; its chat template is the one in use.
        documents: for training and evaluation.
        packing: what the rows of one epoch hold, or of as many as the steps need if that is less.
    """

    model_path: Path
    outline: Decoder
    attention: Choice
    tokenizer: PreTrainedTokenizerFast
    documents: DataSplits
    packing: PackingStats

    @property
    def context(self) -> int:
        return self.documents.train.context

    @property
    def drawn_by(self) -> list[int]:
        """What dropout's masks depend on besides `identity`: rows of which an MLP takes parts, and these."""
        rows, chunks = self.layout.rows, self.layout.mlp_chunks
        return [rows, chunks] if min(rows, chunks) > 1 else [1, 1]

    def identity(self) -> dict[str, Any]:
        """What must stay the same for a run to go on exactly from a checkpoint.

        Raises:
            UserError: the weights cannot be read.
        """
        data, train, lora = self.config.data, self.config.train, self.config.lora
        stats = self.documents.train_stats
        same: dict[str, Any] = {
            "train.mode": train.mode,
            "train.seed": train.seed,
            "train.per_device_train_batch_size": train.per_device_train_batch_size,
            "train.gradient_accumulation_steps": train.gradient_accumulation_steps,
            "train.num_train_epochs": _epochs(self.config),
            "model.dtype": self.config.model.dtype,
            "lora.rank": lora.rank,
            "lora.alpha": lora.alpha,
            "lora.dropout": lora.dropout,
            "lora.target_modules": lora.target_modules
            if isinstance(lora.target_modules, str)
            else list(lora.target_modules),
            "data.max_length": data.max_length,
            "data.packing": data.packing,
            "data.max_segments": data.max_segments,
            "the training documents (number, tokens, target tokens)": [
                stats.documents,
                stats.tokens,
                stats.target_tokens,
            ],
            "the training documents (CRC-32)": self.documents.train.crc32(),
            "the number of devices": self.mesh.size,
        }
        if train.mode == "lora":  # in mode full the checkpoint holds all weights
            same["the model's weights (fingerprint)"] = fingerprint(self.model_path)
        return same


def prepare(config: Config) -> Inputs:
    """Read and check everything but the weights.

    Raises:
        UserError: the model's configuration, the tokenizer, the sample prompts or the data cannot be used.
    """
    mesh, data, train = data_mesh(), config.data, config.train
    path = resolve(config.model.path, weights=train.init == "pretrained")
    model = outline_of(config, path)
    attention = _choose_attention(config, model, mesh)
    tokenizer = load_tokenizer(config.model.tokenizer or path)
    if len(tokenizer) > model.options.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model only {model.options.vocab_size} "
            "embeddings; set model.tokenizer to the model's own"
        )
    tokenizer.chat_template = chat_template(tokenizer, data.chat_template)
    prompts, new = config.output.sample_prompts, config.output.sample_max_new_tokens
    try:
        check_prompts(model, tokenizer, prompts, max_new_tokens=new)
    except UserError as error:
        raise UserError(f"output.sample_prompts, output.sample_max_new_tokens: {error}") from error
    documents = load_documents(
        data,
        tokenizer,
        context_length=model.options.context_length,
        seed=train.seed,
        eos_ids=model.eos_token_ids,
    )
    rows_per_step = train.per_device_train_batch_size * mesh.size * train.gradient_accumulation_steps
    packing = packing_stats(
        documents.train,
        max_length=data.max_length,
        max_segments=data.max_segments,
        packing=data.packing,
        seed=train.seed,
        epochs=_epochs(config) or 1,
        max_rows=train.max_steps * rows_per_step if train.max_steps > 0 else None,
    )
    total_steps = train.max_steps if train.max_steps > 0 else -(-packing.rows // rows_per_step)
    if train.warmup_steps > total_steps:
        raise UserError(
            f"train.warmup_steps is {train.warmup_steps}, but the run has {total_steps} steps; lower it"
        )
    return Inputs(
        config=config,
        mesh=mesh,
        total_steps=total_steps,
        model_path=path,
        outline=model,
        attention=attention,
        tokenizer=tokenizer,
        documents=documents,
        packing=packing,
    )


def _choose_attention(config: Config, model: Decoder, mesh: Mesh) -> Choice:
    options, rows, length = model.options, config.train.per_device_train_batch_size, config.data.max_length
    q = jax.ShapeDtypeStruct((rows, length, options.num_heads, options.head_dim), model.dtype)
    k = jax.ShapeDtypeStruct((rows, length, options.num_kv_heads, options.head_dim), model.dtype)
    segment_ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    try:
        with split_over(mesh.size):
            return choose_attention(
                q,
                k,
                k,
                segment_ids,
                max_segments=max_segments(config),
                implementation=model.attention_implementation,
            )
    except ValueError as error:
        raise UserError(f"model.attention: {error}; set it to auto") from error


class TrainingBatch(NamedTuple):
    """A batch on the devices.

    Attributes:
        arrays: see lorajax.training.step.Batch.
        tokens: that are not padding.
        target_tokens: whose loss counts.
        position: state of the data after this batch.
    """

    arrays: Batch
    tokens: int
    target_tokens: int
    position: dict[str, Any]


def training_batches(inputs: Inputs, position: dict[str, Any] | None) -> Generator[TrainingBatch, None, None]:
    """Batches from the beginning, or from a position on; close it when done."""
    shape = (inputs.micro_batches, inputs.rows_per_micro_batch)
    iterator = iter(_batches(inputs, inputs.documents.train, shape, _epochs(inputs.config), shuffle=True))
    try:
        if position is not None:
            iterator.set_state(position)
        for batch in iterator:
            yield TrainingBatch(*_on_devices(batch, inputs.mesh), iterator.get_state())
    finally:
        iterator.close()


def evaluation_batches(inputs: Inputs) -> Generator[tuple[Batch, int, int], None, None]:
    """The held-out documents once: (arrays, tokens, target tokens); arrays are [1, B, T]."""
    assert inputs.documents.eval is not None
    iterator = iter(
        _batches(inputs, inputs.documents.eval, (1, inputs.rows_per_micro_batch), 1, shuffle=False)
    )
    try:
        for batch in iterator:
            yield _on_devices(batch, inputs.mesh)
    finally:
        iterator.close()


def first_row(inputs: Inputs) -> dict[str, np.ndarray]:
    """The first row of training, [T] arrays on the host."""
    iterator = iter(_batches(inputs, inputs.documents.train, (1, 1), 1, shuffle=True))
    try:
        return {name: array[0, 0] for name, array in next(iterator).items()}
    finally:
        iterator.close()


def _batches(
    inputs: Inputs, documents: Documents, shape: tuple[int, int], epochs: int | None, *, shuffle: bool
) -> Any:
    data = inputs.config.data
    return packed_batches(
        documents,
        batch_shape=shape,
        max_length=data.max_length,
        max_segments=data.max_segments,
        packing=data.packing,
        seed=inputs.config.train.seed,
        shuffle=shuffle,
        epochs=epochs,
    )


def _on_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> tuple[Batch, int, int]:
    tokens, targets = int(np.sum(batch["segment_ids"] > 0)), int(np.sum(batch["weights"] > 0))
    return jax.device_put(batch, rows(mesh)), tokens, targets


def _epochs(config: Config) -> int | None:
    """Passes over the data; None: as many as max_steps needs."""
    return None if config.train.max_steps > 0 else config.train.num_train_epochs
