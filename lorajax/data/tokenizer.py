"""Tokenizers, as Transformers loads them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorajax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def _not_about_torch(record: logging.LogRecord) -> bool:
    """False for what Transformers says without torch: that it lacks its models, which nobody asks it for."""
    return "PyTorch was not found" not in record.getMessage()


logging.getLogger("transformers").addFilter(_not_about_torch)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a local folder, or of a hub model through the hub's cache.

    Args:
        path: folder that holds tokenizer.json (or files Transformers converts to it), or hub id.

    Raises:
        UserError: there is no such tokenizer, it has no fast (Rust) form, or it has no EOS token.
    """
    name = str(path)
    if name.endswith(".gguf"):
        raise UserError(
            f"{name}: a GGUF file brings no tokenizer here; set model.tokenizer to the hub id or folder of "
            "the original model"
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        tokenizer = _load_local(folder)
    elif folder.exists():
        raise UserError(f"{name}: a tokenizer is a folder or a hub id, not a file")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such folder (model.tokenizer, or model.path where that is not set)")
    else:
        tokenizer = _load_hub(name)
    if not tokenizer.is_fast:
        raise UserError(
            f"{name}: only a slow tokenizer, which cannot say which characters a token stands for; convert "
            "it to a tokenizer.json (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{name}: the tokenizer has no EOS token, so a model could not learn to stop; set eos_token in "
            "its tokenizer_config.json"
        )
    return tokenizer


def _load_local(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        # A release of Transformers older than the one that saved the folder does not know its
        # tokenizer_class.
        if (folder / "tokenizer.json").is_file():
            return _load_json(folder)
        raise UserError(
            f"{folder}: no tokenizer in this folder ({_first_line(error)}); expected tokenizer.json, or set "
            "model.tokenizer to the hub id or folder of the tokenizer"
        ) from error


def _load_json(folder: Path) -> Any:
    """tokenizer.json as it is, with the special tokens and the chat template that lie beside it."""
    from transformers import PreTrainedTokenizerFast

    settings: dict[str, Any] = {}
    try:
        if (folder / "tokenizer_config.json").is_file():
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
        special = {
            name: token["content"] if isinstance(token, dict) else token
            for name in names
            if (token := settings.get(name)) is not None
        }
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            clean_up_tokenization_spaces=False,
            model_max_length=settings.get("model_max_length"),
            **special,
        )
    except Exception as error:
        raise UserError(f"{folder}: the tokenizer does not load: {_first_line(error)}") from error
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _load_hub(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise UserError(
            f"{name}: no such folder, and the hub gave no tokenizer of that name ({_first_line(error)}); "
            "without a connection, only models already in the hub's cache load: download it first, or give a "
            "local folder"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
