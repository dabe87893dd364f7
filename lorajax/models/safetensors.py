"""Hugging Face folders: the headers of model.safetensors or of its shards, and tensors read one by one."""

import functools
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns of bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from lorajax.errors import UserError
from lorajax.models.folder import read_config, read_json, why_no_safetensors
from lorajax.models.stored import StoredCheckpoint, StoredTensor

_DTYPES = ("BF16", "F16", "F32")


def open_folder(folder: Path) -> StoredCheckpoint:
    """Read config.json and the headers of all weight files.

    Raises:
        UserError: config.json or the weights are missing, damaged, or of another kind.
    """
    hf_config, eos_token_ids = read_config(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        tensors |= _read_header(file)
    return StoredCheckpoint(folder, hf_config, eos_token_ids, tensors)


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or its shards, by name.

    Raises:
        UserError: there are none, or not all of them.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{folder}: {why_no_safetensors(folder)}")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{index}: weight_map must map names of tensors to names of files")
    files = [folder / name for name in sorted(set(shards.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{index} names files that are not there: {', '.join(missing)}; download them again")
    return files


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        # Not the memory map: its pages would count as this process's memory beside the arrays made from them.
        reader = safe_open(str(file), framework="numpy", backend="pread")
        names = reader.offset_keys()
        slices = {name: reader.get_slice(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or damaged ({error}); download it again") from error
    unreadable = [f"{n} ({s.get_dtype()})" for n, s in slices.items() if s.get_dtype() not in _DTYPES]
    if unreadable:
        raise UserError(
            f"{file}: tensors of a type that cannot be loaded, only {', '.join(_DTYPES)} can: "
            f"{', '.join(unreadable)}"
        )
    return {
        name: StoredTensor(tuple(slices[name].get_shape()), functools.partial(_read, file, reader, name))
        for name in names
    }


def _read(file: Path, reader: Any, name: str, dtype: np.dtype) -> np.ndarray:
    try:
        return reader.get_tensor(name).astype(dtype, copy=False)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: {name} cannot be read: {error}") from error
