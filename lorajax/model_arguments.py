"""The model that a command's arguments name: a base model, one with an adapter, or what a run has made."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorajax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lorajax.models.decoder import Decoder


@dataclass(frozen=True)
class ModelSource:
    """Where a model and its tokenizer come from.

    Attributes:
        path: hub id, folder in Hugging Face layout, or .gguf file.
        adapter: folder of a PEFT adapter; None: the model as it is.
        tokenizer: hub id or folder; None: the model's own.
        dtype: of the weights and of the computation.
        attention: name of an implementation, or "auto".
        chat_template: file with the Jinja template that a run was given; None: it was given none.
        from_run: a run names the model; the tokenizer then gets the template that the run trained with.
    """

    path: str
    adapter: str | None = None
    tokenizer: str | None = None
    dtype: str = "bfloat16"
    attention: str = "auto"
    chat_template: str | None = None
    from_run: bool = False


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --adapter, --tokenizer and --dtype."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="hub id, folder in Hugging Face layout, .gguf file, or the folder of a run of lorajax.train, "
        "which names base model, tokenizer and dtype and holds the adapter",
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="adapter in PEFT's format")
    parser.add_argument("--tokenizer", metavar="PATH", help="hub id or folder; default: the model's own")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of weights and computation; default: the run's, or bfloat16",
    )


def model_source(arguments: argparse.Namespace) -> ModelSource:
    """The model that the arguments name; what they give wins over what a run's config says.

    Raises:
        UserError: a run's config cannot be read, the run has written no model yet, or MODEL is an adapter.
    """
    folder = Path(arguments.model).expanduser()
    is_model = (folder / "config.json").is_file()
    is_run = (folder / "config.yaml").is_file() and not is_model
    if (folder / "adapter_config.json").is_file() and not is_model and not is_run:
        raise UserError(
            f"{folder}: an adapter, not a model; give the run's folder, or the adapter's base model and "
            f"--adapter {folder}"
        )
    source = _of_run(folder, arguments.adapter) if is_run else ModelSource(arguments.model)
    return replace(
        source,
        adapter=arguments.adapter or source.adapter,
        tokenizer=arguments.tokenizer or source.tokenizer,
        dtype=arguments.dtype or source.dtype,
    )


def load_model(source: ModelSource) -> tuple[Decoder, PreTrainedTokenizerFast]:
    """The model with its adapter, and its tokenizer.

    Raises:
        UserError: as lorajax.load, lorajax.load_adapter and lorajax.load_tokenizer.
    """
    from lorajax.data import chat_template, load_tokenizer
    from lorajax.lora.peft import load_adapter
    from lorajax.models.checkpoint import load, resolve

    place = resolve(source.path)
    if place.is_file() and source.tokenizer is None:
        raise UserError(
            f"{source.path}: a GGUF file brings no tokenizer here; name the original model's with --tokenizer"
        )
    tokenizer = load_tokenizer(source.tokenizer or place)
    if source.from_run:
        tokenizer.chat_template = chat_template(tokenizer, source.chat_template)
    model = load(place, dtype=source.dtype, attention=source.attention)
    if source.adapter is not None:
        load_adapter(model, Path(source.adapter).expanduser())
    return model, tokenizer


def _of_run(path: Path, other_adapter: str | None) -> ModelSource:
    from lorajax.config import load_config
    from lorajax.training.folder import RunFolder

    folder = RunFolder(path)
    config = load_config(folder.config)
    is_full = config.train.mode == "full"
    outcome = folder.model if is_full else folder.adapter
    if not outcome.is_dir() and (is_full or other_adapter is None):
        raise UserError(
            f"{path}: the run has not written {outcome.name}/ yet; let it finish, or go on with it "
            f"(python -m lorajax.train {folder.config} --train.resume_from_checkpoint auto)"
        )
    return ModelSource(
        path=str(outcome) if is_full else config.model.path,
        adapter=None if is_full else str(outcome),
        tokenizer=None if is_full else config.model.tokenizer,
        dtype=config.model.dtype,
        attention=config.model.attention,
        chat_template=config.data.chat_template,
        from_run=True,
    )
