"""Documents become batches of packed rows: a grain pipeline with exact state.

What grain shuffles and packs is light: each document is the range of its places in the long token array. The
rows are put together from that array afterwards, a whole batch in one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int, Shaped

from lorajax.data.documents import Documents

# More bins waste less of each row; all of them are packed again when a run resumes among them.
_BINS = 64
_BATCHES_AHEAD = 2
_DOCUMENTS_PER_READ = 4096
_READ_IN_PLACE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclass(frozen=True)
class PackingStats:
    """What the packed rows hold.

    Attributes:
        rows: rows of max_length tokens.
        documents: documents on them, every epoch counted.
        tokens: places filled, one less than the tokens of each document.
        target_tokens: places whose target is learnt.
        fill_rate: part of the places that is filled, from 0 to 1.
    """

    rows: int
    documents: int
    tokens: int
    target_tokens: int
    fill_rate: float


class _Places(Sequence[Mapping[str, Int[np.ndarray, " n"]]]):
    """Document i as the places of all its tokens but the last, which is only a target."""

    def __init__(self, documents: Documents):
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        start = self._documents.starts[index]
        return {"places": np.arange(start, start + self._documents.lengths[index] - 1)}

    def __repr__(self) -> str:
        return f"Documents({len(self)})"


def packed_batches(
    documents: Documents,
    *,
    batch_shape: tuple[int, int],
    max_length: int,
    max_segments: int,
    packing: bool,
    seed: int,
    shuffle: bool = True,
    epochs: int | None = 1,
    prefetch: bool = True,
) -> grain.IterDataset[dict[str, Shaped[np.ndarray, "A B T"]]]:
    """Batches of packed rows, best fit first.

    A document of n tokens takes n-1 places of a row: its tokens but the last, its tokens but the first as
    their targets, and the mask of these as weights; so no target lies in another document. Each batch is a
    dict of arrays [A, B, T]: tokens, targets int32 and weights float32 (all 0 in padding), segment_ids int32
    (0 in padding, else from 1), positions int32 (from 0 in each segment). Rows without any document fill the
    last batch.

    The iterator's get_state() is a JSON-serialisable dict, valid between any two batches; set_state() on an
    iterator of the same arguments goes on exactly from there.

    Args:
        documents: each of 2 to max_length + 1 tokens.
        batch_shape: (A, B), micro-batches in a batch and rows in each.
        max_length: T.
        max_segments: most documents on a row.
        packing: False puts one document on a row.
        seed: of the order, which is another one in each epoch, and of the rows' order.
        shuffle: False keeps the documents' order, as nearly as packing can.
        epochs: passes over the documents; None: without end.
        prefetch: make the next batches in a thread.
    """
    rows = grain.experimental.BestFitPackIterDataset(
        _order(grain.MapDataset.source(_Places(documents)), seed, shuffle, epochs).to_iter_dataset(
            _READ_IN_PLACE
        ),
        length_struct={"places": max_length},
        num_packing_bins=_BINS,
        seed=seed,
        shuffle_bins=shuffle,
        max_sequences_per_bin=max_segments if packing else 1,
    )
    shape = (*batch_shape, max_length)
    batches = rows.batch(
        batch_shape[0] * batch_shape[1], batch_fn=lambda some: _assemble(documents, some, shape)
    )
    return grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=_BATCHES_AHEAD if prefetch else 0
    )


def _order(documents: grain.MapDataset, seed: int, shuffle: bool, epochs: int | None) -> grain.MapDataset:
    if shuffle:
        documents = documents.shuffle(seed % 2**32)
    return documents.repeat(epochs)


def _assemble(
    documents: Documents, rows: Sequence[Mapping[str, Int[np.ndarray, " T"]]], shape: tuple[int, int, int]
) -> dict[str, Shaped[np.ndarray, "A B T"]]:
    def stacked(name: str) -> Any:
        out = np.zeros((shape[0] * shape[1], shape[2]), rows[0][name].dtype)
        for number, row in enumerate(rows):
            out[number] = row[name]
        return out.reshape(shape)

    places, segment_ids = stacked("places"), stacked("places_segment_ids")
    filled = segment_ids > 0
    following = places + filled
    return {
        "tokens": documents.tokens[places] * filled,
        "targets": documents.tokens[following] * filled,
        "weights": (documents.mask[following] & filled).astype(np.float32),
        "segment_ids": segment_ids,
        "positions": stacked("places_positions"),
    }


def packing_stats(
    documents: Documents,
    *,
    max_length: int,
    max_segments: int,
    packing: bool,
    seed: int,
    shuffle: bool = True,
    epochs: int | None = 1,
    max_rows: int | None = None,
) -> PackingStats:
    """Count the rows that packed_batches makes of the same arguments, without making them.

    Follows grain's best-fit packer on lengths alone, in the same order of documents, and gives its rows.

    Args:
        documents, max_length, max_segments, packing, seed, shuffle, epochs: as for packed_batches.
        max_rows: stop as soon as this many rows are counted, or a few more; needed where epochs is None.
    """
    if epochs is None and max_rows is None:
        raise ValueError("rows without end cannot be counted: give epochs or max_rows")
    rows = counted = tokens = targets = 0
    for group in _packed_groups(
        documents.lengths - 1, max_length, max_segments if packing else 1, seed, shuffle, epochs
    ):
        rows += group.rows
        counted += len(group.documents)
        tokens += int(documents.lengths[group.documents].sum()) - len(group.documents)
        targets += int(documents.targets[group.documents].sum())
        if max_rows is not None and rows >= max_rows:
            break
    return PackingStats(rows, counted, tokens, targets, tokens / (rows * max_length) if rows else 0.0)


class _Group(NamedTuple):
    """What grain packs together: its bins, emptied as rows when a document fits in none of them."""

    rows: int
    documents: list[int]


def _packed_groups(
    lengths: Int[np.ndarray, " N"], max_length: int, most: int, seed: int, shuffle: bool, epochs: int | None
) -> Iterator[_Group]:
    order = _order(grain.MapDataset.range(len(lengths)), seed, shuffle, epochs).batch(_DOCUMENTS_PER_READ)
    # A bin that holds the most documents counts as overfull.
    used, held = np.zeros(_BINS, np.int64), [0] * _BINS
    documents: list[int] = []
    for number in range(len(order)):
        for document in order[number].tolist():
            length = int(lengths[document])
            fits = np.where(used <= max_length - length, used, -1)
            best = int(fits.argmax())
            if fits[best] < 0:
                yield _Group(_BINS - held.count(0), documents)
                used[:], held, documents, best = 0, [0] * _BINS, [], 0
            held[best] += 1
            used[best] = used[best] + length if held[best] < most else max_length + 1
            documents.append(document)
    if documents:
        yield _Group(_BINS - held.count(0), documents)
