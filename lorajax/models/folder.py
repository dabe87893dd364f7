"""Where a model is, and what the JSON files of a Hugging Face folder say."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from lorajax.errors import UserError

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WHY_NOT_PICKLED = (
    "pickled weights are refused, because unpickling a file runs whatever code is in it; convert them to "
    "safetensors where you trust the file (transformers: model.save_pretrained(folder)), or take a release "
    "of the model that has safetensors"
)
_TOKENIZER_FILES = ["tokenizer*", "*.model", "vocab.txt", "merges.txt", "*.jinja"]


def resolve(path: str | Path, *, weights: bool = True) -> Path:
    """Local place of a model: a folder, or a .gguf file.

    Args:
        path: folder, .gguf file, or hub id; a hub id is looked up in Hugging Face's cache and downloaded
            where it is not there yet, with a progress bar. Weights that are not safetensors are left out.
        weights: False leaves the safetensors out of a download too.

    Raises:
        UserError: there is no such place; the hub cannot be reached and its cache has no such model; the path
            is a file of another kind.
    """
    name = str(path)
    place = Path(name).expanduser()
    suffix = place.suffix.lower()
    if place.is_dir():
        return place
    if place.is_file():
        if suffix == ".gguf":
            return place
        if suffix in _PICKLED:
            raise UserError(f"{name}: {_WHY_NOT_PICKLED}")
        raise UserError(
            f"{name}: a model is a folder that holds config.json and safetensors, a .gguf file, or a hub id; "
            "of a file in such a folder, give the folder"
        )
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None
    if isinstance(path, Path) or not is_hub_id or suffix in (".gguf", ".safetensors", *_PICKLED):
        raise UserError(f"{name}: no such file or folder; a hub id is NAME or OWNER/NAME")
    return _download(name, weights)


def _download(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", *_TOKENIZER_FILES] + ["*.safetensors"] * weights
    try:
        # Subfolders hold the same weights once more, in other formats.
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{name}: no such file or folder here, and no such model from the hub ({reason}). Without a "
            f"connection, only models in the hub's cache load: download it first (hf download {name}), or "
            "give a local folder"
        ) from error


def read_config(folder: Path) -> tuple[dict[str, Any], tuple[int, ...]]:
    """config.json, and the EOS token ids that it and generation_config.json name.

    Raises:
        UserError: there is no config.json (an adapter's folder is told apart), a file is not JSON, or an EOS
            token id is no whole number.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder}: this is a PEFT adapter, not a model; load the model that it was trained on, then "
                f"lorajax.load_adapter(model, {str(folder)!r})"
            )
        raise UserError(f"{folder}: no config.json; a model's folder holds config.json and safetensors")
    hf_config = read_json(folder / "config.json")
    ids = _eos_token_ids(folder / "config.json", hf_config)
    generation = folder / "generation_config.json"
    if generation.is_file():
        ids = (*ids, *_eos_token_ids(generation, read_json(generation)))
    return hf_config, tuple(dict.fromkeys(ids))


def _eos_token_ids(file: Path, fields: dict[str, Any]) -> tuple[int, ...]:
    named = fields.get("eos_token_id")
    ids = tuple(named) if isinstance(named, list) else () if named is None else (named,)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise UserError(f"{file}: eos_token_id must be a whole number or a list of them, not {named!r}")
    return ids


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not JSON: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object, not {type(value).__name__}")
    return value


def read_size(fields: dict[str, Any], key: str, default: int) -> int:
    """A whole number of at least 1 in config.json; missing or null: the default.

    Raises:
        UserError: it is something else; so too from read_number and read_flag.
    """
    value = fields.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {key} must be a whole number of at least 1, not {value!r}")
    return value


def read_number(fields: dict[str, Any], key: str, default: float, *, or_zero: bool = False) -> float:
    """A finite number above 0, or from 0 on, in config.json; missing or null: the default."""
    value = fields.get(key)
    value = default if value is None else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.float_info.max or (value == 0 and not or_zero):
        least = "of at least" if or_zero else "above"
        raise UserError(f"config.json: {key} must be a number {least} 0, not {value!r}")
    return float(value)


def read_flag(fields: dict[str, Any], key: str) -> bool:
    """true or false in config.json; missing or null: false."""
    value = fields.get(key)
    if not isinstance(value, bool | None):
        raise UserError(f"config.json: {key} must be true or false, not {value!r}")
    return bool(value)


def why_no_safetensors(folder: Path) -> str:
    """What a folder without safetensors holds instead, and what to do about it."""
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    if pickled := [name for name in files if name.endswith(_PICKLED)]:
        return f"the only weights are {', '.join(pickled)}: {_WHY_NOT_PICKLED}"
    if ggufs := [name for name in files if name.endswith(".gguf")]:
        return f"no safetensors here; to load a GGUF file, give its own path: {folder / ggufs[0]}"
    return "no weights; expected model.safetensors, or model.safetensors.index.json with its shards"
