"""Tokenised documents on disk: memory-mapped arrays and their description, in a folder named by a key."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from lorajax.errors import UserError

_DTYPES = {"tokens": np.dtype(np.int32), "mask": np.dtype(np.bool_), "offsets": np.dtype(np.int64)}
_BYTES_PER_READ = 1 << 24


class TokenArrays(NamedTuple):
    """Documents end to end: document i is tokens[offsets[i] : offsets[i + 1]]."""

    tokens: Int[np.ndarray, " S"]
    mask: Bool[np.ndarray, " S"]
    offsets: Int[np.ndarray, " N1"]


def cache_folder(cache_dir: str | None) -> Path:
    """The folder given (data.cache_dir), else lorajax/data in the user's cache folder (XDG_CACHE_HOME)."""
    return Path(cache_dir).expanduser() if cache_dir is not None else user_cache_folder() / "data"


def user_cache_folder() -> Path:
    """lorajax in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lorajax"


def read(folder: Path) -> TokenArrays | None:
    """The arrays in a folder, memory-mapped; None if it is not there, not whole, or not as it was written."""
    try:
        described = json.loads((folder / "arrays.json").read_text())
        arrays = {}
        for name, dtype in _DTYPES.items():
            path = folder / f"{name}.npy"
            if described[name] != {"bytes": path.stat().st_size, "crc32": _checksum(path)}:
                return None
            arrays[name] = _map(path)
            if arrays[name].dtype != dtype or arrays[name].ndim != 1:
                return None
        return TokenArrays(**arrays)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(folder: Path, documents: Iterable[tuple[np.ndarray, np.ndarray]]) -> TokenArrays:
    """Write (tokens, mask) documents, one after the other, and return them memory-mapped.

    The folder appears when it is complete, or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {folder.parent} cannot be written: {error.strerror or error}"
        ) from error
    try:
        _write_arrays(work, documents)
        return _publish(work, folder)
    except OSError as error:
        raise UserError(f"data.cache_dir: writing tokens to {folder.parent} failed: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, folder: Path) -> TokenArrays:
    try:
        work.rename(folder)
    except OSError:
        # Another process was first, or what is there is damaged.
        arrays = read(folder)
        if arrays is not None:
            return arrays
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    return TokenArrays(*(_map(folder / f"{name}.npy") for name in _DTYPES))


def _write_arrays(work: Path, documents: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    with (
        _Appender(work, "tokens") as tokens,
        _Appender(work, "mask") as mask,
        _Appender(work, "offsets") as offsets,
    ):
        offsets.append(np.zeros(1, np.int64))
        for document, learnt in documents:
            tokens.append(document)
            mask.append(learnt)
            offsets.append(np.array([tokens.size], np.int64))
    described: dict[str, Any] = {}
    for name in _DTYPES:
        path = work / f"{name}.npy"
        described[name] = {"bytes": path.stat().st_size, "crc32": _checksum(path)}
    (work / "arrays.json").write_text(json.dumps(described))


class _Appender:
    """A one-dimensional .npy file that grows: NumPy pads headers so that the length can be written last."""

    def __init__(self, folder: Path, name: str):
        self.dtype, self.size = _DTYPES[name], 0
        self._file: BinaryIO = (folder / f"{name}.npy").open("wb")
        self._header()
        self._data_start = self._file.tell()

    def _header(self) -> None:
        described = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.size,),
        }
        np.lib.format.write_array_header_1_0(self._file, described)

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self.size += len(values)

    def __enter__(self) -> _Appender:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.seek(0)
            self._header()
            if self._file.tell() != self._data_start:
                raise OSError("the header of a .npy file does not keep its size")
        finally:
            self._file.close()


def _map(path: Path) -> np.ndarray:
    # NumPy refuses to map an array of no bytes.
    array = np.load(path, mmap_mode="r") if path.stat().st_size > 128 else np.load(path)
    return array


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(_BYTES_PER_READ):
            value = zlib.crc32(block, value)
    return value
