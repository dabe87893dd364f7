"""Rows of data and where each came from: files, folders, hub data sets."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorajax.errors import UserError

_ROWS_PER_READ = 1000


class Row(NamedTuple):
    """One row of the data; origin says where it stands, as "train.jsonl:17"."""

    origin: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Rows that can be read again and again.

    Attributes:
        name: as the user gave it.
        rows: starts a new pass over the rows.
        digest: hash of the contents, the same for the same rows.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    digest: str


def open_source(path: str, *, split: str = "train", key: str = "data.path") -> Source:
    """Find the data behind a path.

    Args:
        path: a .jsonl, .json, .csv, .parquet, .txt or .md file; a folder of such files, read in the order of
            their names with its subfolders (text files only where it holds no others: beside data they
            describe it); or a hub data set, "owner/name" or "owner/name:configuration".
        split: split of a hub data set, as `datasets` spells it ("train[:10%]" too).
        key: the config key that gave the path, for messages.

    Raises:
        UserError: nothing readable is there.
    """
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix.lower() not in _READERS:
            raise UserError(f"{key}: {path} is not one of the kinds of file that can be read: {_kinds()}")
        return _files_source(path, [place], place.parent)
    if place.is_dir():
        files = _folder_files(place)
        if not files:
            raise UserError(f"{key}: the folder {path} holds no file that can be read: {_kinds()}")
        return _files_source(path, files, place)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", path) or place.suffix.lower() in _READERS:
        raise UserError(f"{key}: no such file or folder: {path}")
    return _hub_source(path, split, key)


def _kinds() -> str:
    return ", ".join(sorted(_READERS))


def _folder_files(folder: Path) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in _READERS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    return [file for file in files if file.suffix.lower() not in _TEXT] or files


def _files_source(name: str, files: list[Path], base: Path) -> Source:
    def rows() -> Iterator[Row]:
        for file in files:
            yield from _READERS[file.suffix.lower()](file, file.relative_to(base).as_posix())

    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "blake2b").digest())
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
        digest.update(file.suffix.lower().encode() + b"\0")
    return Source(name, rows, digest.hexdigest())


def _read_jsonl(file: Path, name: str) -> Iterator[Row]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            origin = f"{name}:{number}"
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
                raise UserError(f"{origin}: not a row of JSON: {error}") from error
            yield Row(origin, _object(fields, origin))


def _read_json(file: Path, name: str) -> Iterator[Row]:
    try:
        value = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        hint = "; one object per line is JSONL: name the file .jsonl" if error.msg == "Extra data" else ""
        raise UserError(f"{name}:{error.lineno}: not JSON: {error}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not JSON: {error}") from error
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(f'{name}: expected a list of rows, or an object {{"data": [rows]}}')
    for number, fields in enumerate(rows, start=1):
        origin = f"{name}: row {number}"
        yield Row(origin, _object(fields, origin))


def _object(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{origin}: a row must be an object with named columns, not {type(value).__name__}")
    return value


def _read_csv(file: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with file.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        line = 1
        try:
            if reader.fieldnames is None:
                return
            line = reader.line_num + 1
            for fields in reader:
                origin = f"{name}:{line}"
                line = reader.line_num + 1
                if None in fields or None in fields.values():
                    raise UserError(
                        f"{origin}: the row has not as many cells as the {len(reader.fieldnames)} of the "
                        "header"
                    )
                yield Row(origin, fields)
        except csv.Error as error:
            raise UserError(f"{name}:{line}: not CSV in UTF-8: {error}") from error
        except UnicodeDecodeError as error:  # in a block that was read ahead of the row
            start = raw.tell() - len(error.object) + error.start
            raw.seek(0)
            line = raw.read(start).count(b"\n") + 1
            raise UserError(f"{name}:{line}: not CSV in UTF-8: {error.reason}") from error


def _read_parquet(file: Path, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_ROWS_PER_READ):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{name}: row {number}", fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{name}: not a Parquet file that can be read, after row {number}: {error}"
        ) from error


def _read_text(file: Path, name: str) -> Iterator[Row]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not text in UTF-8: {error}") from error
    yield Row(name, {"text": text})


_TEXT = {".txt": _read_text, ".md": _read_text}
_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    **_TEXT,
}


def _hub_source(path: str, split: str, key: str) -> Source:
    import datasets

    name, _, configuration = path.partition(":")
    try:
        data = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{key}: {path} is no local file or folder, and no hub data set that could be loaded (split "
            f"{split!r}): {reason}. Check the path and data.split; without a connection, only data sets "
            "already in the hub's cache load. A data set of several configurations needs one: "
            "owner/name:configuration"
        ) from error

    def rows() -> Iterator[Row]:
        for number, fields in enumerate(data, start=1):
            yield Row(f"{path}[{split}]: row {number}", fields)

    return Source(path, rows, f"{path}:{split}:{data._fingerprint}")
