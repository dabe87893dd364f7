"""From the data's rows to tokenised documents: cached, cut to length, split into training and evaluation."""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from lorajax.data import cache
from lorajax.data.chat import chat_template, render
from lorajax.data.formats import parse_row
from lorajax.data.sources import Source, open_source
from lorajax.data.tokens import Encoder, TokensAndMask
from lorajax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lorajax.config import DataConfig

_ROWS_PER_BATCH = 1000
# Part of the cache's key: raise it when the same rows and settings come to give other tokens.
_ENCODING_VERSION = 1


@dataclass(frozen=True, eq=False)
class Documents(Sequence[TokensAndMask]):
    """Tokenised documents, each a stretch of two long (memory-mapped) arrays.

    documents[i] is (tokens int32 [n], mask bool [n]); the mask is True where a token is to be learnt.

    Attributes:
        tokens: int32 [S], of all documents and maybe more.
        mask: bool [S].
        starts: int64 [N], where each document begins.
        lengths: int64 [N], in tokens.
        targets: int64 [N], how many tokens of each are learnt (its first token never is).
    """

    tokens: Int[np.ndarray, " S"]
    mask: Bool[np.ndarray, " S"]
    starts: Int[np.ndarray, " N"]
    lengths: Int[np.ndarray, " N"]
    targets: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        start = self.starts[index]
        end = start + self.lengths[index]
        return self.tokens[start:end], self.mask[start:end]

    @property
    def context(self) -> int:
        """Tokens of the document that a token is in, on average over tokens; 0 without any."""
        total = int(self.lengths.sum())
        return round(float(np.square(self.lengths, dtype=np.float64).sum()) / total) if total else 0

    def crc32(self) -> int:
        """Of the documents, one after the other: their lengths, tokens and masks."""
        value = zlib.crc32(np.ascontiguousarray(self.lengths, np.int64))
        for tokens, mask in self:
            value = zlib.crc32(mask, zlib.crc32(tokens, value))
        return value

    def select(self, which: Int[np.ndarray, " M"] | Bool[np.ndarray, " N"]) -> Documents:
        """Some of the documents, in the order given; the tokens are shared."""
        return Documents(self.tokens, self.mask, self.starts[which], self.lengths[which], self.targets[which])

    @classmethod
    def from_arrays(cls, arrays: cache.TokenArrays) -> Documents:
        return _with_targets(arrays.tokens, arrays.mask, arrays.offsets[:-1], np.diff(arrays.offsets))

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Documents:
        """Documents held in memory, from (tokens, mask) of each."""
        pairs = list(pairs)
        ends = np.cumsum([len(tokens) for tokens, _ in pairs], dtype=np.int64)
        tokens = np.fromiter(itertools.chain.from_iterable(tokens for tokens, _ in pairs), np.int32)
        mask = np.fromiter(itertools.chain.from_iterable(mask for _, mask in pairs), bool)
        starts = np.concatenate([np.zeros(1, np.int64), ends])
        return cls.from_arrays(cache.TokenArrays(tokens, mask, starts))


@dataclass(frozen=True)
class DataStats:
    """What became of the rows.

    Attributes:
        rows: rows read.
        documents: documents that came of them.
        truncated: rows cut at max_length.
        dropped: rows left out because they were longer than max_length.
        split: rows that were split into several documents.
        masked_out: documents left out because no token of them was to be learnt.
        tokens: tokens of the documents.
        target_tokens: those of them that are learnt.
    """

    rows: int
    documents: int
    truncated: int
    dropped: int
    split: int
    masked_out: int
    tokens: int
    target_tokens: int


class DataSplits(NamedTuple):
    """Training documents, and those held out for evaluation (None: there are none)."""

    train: Documents
    eval: Documents | None
    train_stats: DataStats
    eval_stats: DataStats | None


def check_length(config: DataConfig, context_length: int | None) -> None:
    """Whether rows of data.max_length are ones that can be learnt, and that the model takes.

    Raises:
        UserError: they are not.
    """
    if config.max_length < 2:
        raise UserError(
            f"data.max_length is {config.max_length}: it must be at least 2, a token and its target"
        )
    if context_length is not None and config.max_length > context_length:
        raise UserError(
            f"data.max_length is {config.max_length}, but the model's context is {context_length} tokens; "
            f"set data.max_length to {context_length} or less"
        )


def load_documents(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    context_length: int | None,
    seed: int,
    eos_ids: Collection[int] = (),
) -> DataSplits:
    """Read, tokenise and cut the data that a config names.

    Tokens are cached by what they come from: the contents of the data, the tokenizer, the template, the form
    and the mask. max_length, overlong and the evaluation split are applied afterwards and do not tokenise
    anew.

    Args:
        config: the data section of the run's config.
        tokenizer: as load_tokenizer gives it.
        context_length: the longest sequence the model takes; None: unknown.
        seed: of the evaluation split.
        eos_ids: tokens at which generation stops, besides the tokenizer's EOS.

    Raises:
        UserError: the data cannot be read, a row cannot be used, nothing is to be learnt, or max_length is
            over the model's context.
    """
    check_length(config, context_length)
    encoder = Encoder(tokenizer, eos_ids)
    template = chat_template(tokenizer, config.chat_template)

    def documents(path: str, key: str) -> Documents:
        source = open_source(path, split=config.split, key=key)
        tokenised = _tokenised(source, config, tokenizer, encoder, template)
        if not len(tokenised):
            raise UserError(f"{key}: {path} holds no rows")
        return tokenised

    train, held_out = documents(config.path, "data.path"), None
    if config.eval_path is not None:
        held_out = documents(config.eval_path, "data.eval_path")
    elif config.eval_fraction > 0:
        train, held_out = split_documents(train, config.eval_fraction, seed)
    train, train_stats = _fit(train, config, "data.path", config.path)
    if held_out is None:
        return DataSplits(train, None, train_stats, None)
    evaluation, eval_stats = _fit(
        held_out,
        config,
        "data.eval_path" if config.eval_path else "data.eval_fraction",
        config.eval_path or config.path,
    )
    return DataSplits(train, evaluation, train_stats, eval_stats)


def split_documents(documents: Documents, fraction: float, seed: int) -> tuple[Documents, Documents]:
    """Hold out a random part, the same for the same seed: (the rest, the part), each in its old order.

    Raises:
        UserError: there are fewer than two documents.
    """
    count = len(documents)
    if count < 2:
        raise UserError("data.eval_fraction: one row cannot be split into training and evaluation")
    held_out = min(max(round(count * fraction), 1), count - 1)
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(seed).permutation(count)[:held_out]] = True
    return documents.select(~chosen), documents.select(chosen)


def cut_documents(documents: Documents, max_length: int, overlong: str) -> tuple[Documents, DataStats]:
    """Bring documents to at most max_length tokens, and leave out those without a target.

    Args:
        documents: of any length.
        max_length: in tokens.
        overlong: "truncate", "drop", or "split": parts of max_length tokens, each of which begins with the
            last token of the one before, so that no target is lost.
    """
    rows, is_long = len(documents), documents.lengths > max_length
    count = int(is_long.sum())
    if overlong == "drop":
        kept = documents.select(~is_long)
    elif count == 0:
        kept = documents
    elif overlong == "truncate":
        kept = _with_targets(
            documents.tokens, documents.mask, documents.starts, np.minimum(documents.lengths, max_length)
        )
    else:
        kept = _split_long(documents, max_length)
    learnt = kept.select(kept.targets > 0)
    stats = DataStats(
        rows=rows,
        documents=len(learnt),
        truncated=count if overlong == "truncate" else 0,
        dropped=count if overlong == "drop" else 0,
        split=count if overlong == "split" else 0,
        masked_out=len(kept) - len(learnt),
        tokens=int(learnt.lengths.sum()),
        target_tokens=int(learnt.targets.sum()),
    )
    return learnt, stats


def _split_long(documents: Documents, max_length: int) -> Documents:
    stride = max_length - 1
    parts = np.maximum(-(-(documents.lengths - 1) // stride), 1)
    parent = np.repeat(np.arange(len(documents)), parts)
    number = np.arange(len(parent)) - np.repeat(np.cumsum(parts) - parts, parts)
    starts = documents.starts[parent] + number * stride
    lengths = np.minimum(documents.lengths[parent] - number * stride, max_length)
    return _with_targets(documents.tokens, documents.mask, starts, lengths)


def _with_targets(
    tokens: Int[np.ndarray, " S"],
    mask: Bool[np.ndarray, " S"],
    starts: Int[np.ndarray, " N"],
    lengths: Int[np.ndarray, " N"],
) -> Documents:
    # Views without np.memmap's own __getitem__, which is ten times slower.
    tokens, mask = tokens.view(np.ndarray), mask.view(np.ndarray)
    spans = zip(starts.tolist(), lengths.tolist(), strict=True)
    targets = np.fromiter(
        (np.count_nonzero(mask[start + 1 : start + length]) for start, length in spans), np.int64, len(starts)
    )
    return Documents(tokens, mask, np.asarray(starts), np.asarray(lengths), targets)


def _fit(documents: Documents, config: DataConfig, key: str, path: str) -> tuple[Documents, DataStats]:
    cut, stats = cut_documents(documents, config.max_length, config.overlong)
    if len(cut):
        return cut, stats
    if stats.dropped == stats.rows:
        raise UserError(
            f"{key}: all {stats.rows} rows of {path} are longer than data.max_length ({config.max_length} "
            "tokens) and were dropped; raise data.max_length, or set data.overlong to truncate or split"
        )
    if int(documents.targets.sum()):
        raise UserError(
            f"{key}: in all {stats.rows} rows of {path}, what is to be learnt begins after data.max_length "
            f"({config.max_length} tokens), so no token would be learnt; raise data.max_length, or set "
            "data.overlong to split"
        )
    raise UserError(
        f"{key}: every label is masked: none of the {stats.rows} rows of {path} has a token to be learnt. "
        "Either the assistant's turns (or texts) are empty, or the chat template's {% generation %} marks "
        "enclose nothing; check them, or set data.train_on_prompt to learn every token"
    )


def _tokenised(
    source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerFast, encoder: Encoder, template: str
) -> Documents:
    key = {
        "version": _ENCODING_VERSION,
        "data": source.digest,
        "tokenizer": hashlib.blake2b(encoder.state.encode()).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "bos": encoder.bos_id,
        "eos": [encoder.eos_id, *encoder.eos_ids],
        "template": template,
        "format": config.format,
        "columns": sorted(config.columns.items()),
        "train_on_prompt": config.train_on_prompt,
    }
    name = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
    folder = cache.cache_folder(config.cache_dir) / name
    arrays = cache.read(folder)
    if arrays is None:
        arrays = cache.write(folder, _tokenise(source, config, tokenizer, encoder, template))
    return Documents.from_arrays(arrays)


def _tokenise(
    source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerFast, encoder: Encoder, template: str
) -> Iterator[TokensAndMask]:
    rows = source.rows()
    while batch := list(itertools.islice(rows, _ROWS_PER_BATCH)):
        rendered = [
            render(
                parse_row(
                    row, format=config.format, columns=config.columns, train_on_prompt=config.train_on_prompt
                ),
                tokenizer,
                template,
                origin=row.origin,
                train_on_prompt=config.train_on_prompt,
            )
            for row in batch
        ]
        yield from encoder.encode(rendered)
