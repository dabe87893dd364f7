"""Rendered documents become tokens and a mask; rows of tokens become text again."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Int, Shaped

from lorajax.data.chat import Rendered
from lorajax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TokensAndMask: TypeAlias = tuple[Int[np.ndarray, " T"], Bool[np.ndarray, " T"]]


class Encoder:
    """Turns rendered documents into tokens, on all cores (the Rust tokenizer's own threads).

    Every assistant's turn is learnt with the EOS token that ends it, but not what the template writes after
    that token. A document whose last turn ends without EOS gets one.

    Args:
        tokenizer: a fast tokenizer.
        eos_ids: further tokens that end a turn (generation_config's), besides the tokenizer's EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, eos_ids: Collection[int] = ()):
        from tokenizers import Tokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # The template writes the special tokens; post-processing would add them again, and trim offsets.
        state.update(post_processor=None, truncation=None, padding=None)
        self.state = json.dumps(state, sort_keys=True)
        self._tokenizer = Tokenizer.from_str(self.state)
        self.eos_id: int = tokenizer.eos_token_id  # type: ignore[assignment]
        self.eos_ids = tuple(sorted({self.eos_id, *eos_ids}))
        self.bos_id = _added_bos(tokenizer)

    def encode(self, documents: Sequence[Rendered]) -> list[TokensAndMask]:
        """Tokens int32 [T] and mask bool [T] (True: to be learnt) of each document.

        Raises:
            UserError: the tokenizer refuses a document (a lone surrogate, say); the message names its origin.
        """
        texts = [document.text for document in documents]
        try:
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        except Exception:
            encodings = [self._encode_one(document) for document in documents]
        return [
            self._finish(document, encoding) for document, encoding in zip(documents, encodings, strict=True)
        ]

    def _encode_one(self, document: Rendered) -> Any:
        try:
            return self._tokenizer.encode(document.text, add_special_tokens=False)
        except Exception as error:
            raise UserError(f"{document.origin}: the text cannot be tokenised: {error}") from error

    def _finish(self, document: Rendered, encoding: Any) -> TokensAndMask:
        tokens = np.asarray(encoding.ids, np.int32)
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        is_eos = np.isin(tokens, self.eos_ids)
        mask = np.zeros(len(tokens), bool)
        inside = np.zeros(0, np.int64)
        for start, end in document.spans:
            inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
            if document.spans_are_turns:
                inside = _turn(inside, is_eos, offsets, end)
            mask[inside] = True
        if document.ends_in_target and document.spans and len(tokens):
            last = self._unclosed_end(document, inside, is_eos, offsets)
            if last is not None:
                tokens = np.append(tokens[: last + 1], np.int32(self.eos_id))
                mask = np.append(mask[: last + 1], True)
        if document.add_bos and self.bos_id is not None and (not len(tokens) or tokens[0] != self.bos_id):
            tokens, mask = np.insert(tokens, 0, self.bos_id), np.insert(mask, 0, False)
        return tokens, mask

    def _unclosed_end(
        self,
        document: Rendered,
        last_span: Int[np.ndarray, " S"],
        is_eos: Bool[np.ndarray, " T"],
        offsets: Int[np.ndarray, "T 2"],
    ) -> int | None:
        """The last token of the last span; None if the span ends in EOS already, or encloses nothing."""
        if not len(last_span):
            return len(offsets) - 1 if document.spans[-1][1] == len(document.text) else None
        last = last_span[-1]
        ends = last_span[is_eos[last_span]]
        if len(ends) and not document.text[offsets[ends[-1], 1] : offsets[last, 1]].strip():
            return None
        return int(last)


def _turn(
    inside: Int[np.ndarray, " S"], is_eos: Bool[np.ndarray, " T"], offsets: Int[np.ndarray, "T 2"], end: int
) -> Int[np.ndarray, " S"]:
    """A turn goes as far as its EOS: one within its span, or one that follows directly."""
    ends = np.flatnonzero(is_eos[inside])
    if len(ends):
        return inside[: ends[-1] + 1]
    following = int(np.searchsorted(offsets[:, 0], end))
    if following < len(offsets) and is_eos[following] and offsets[following, 0] == end:
        return np.append(inside, following)
    return inside


def _added_bos(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The bos token, if the tokenizer puts one before plain text."""
    bos = tokenizer.bos_token_id
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    return bos if bos is not None and with_special[:1] == [bos] and without[:1] != [bos] else None


def decode_with_mask(
    tokenizer: PreTrainedTokenizerFast,
    tokens: Int[np.ndarray, " T"] | Sequence[int],
    weights: Shaped[np.ndarray, " T"] | Sequence[float],
    *,
    colour: bool = False,
) -> str:
    """The text of tokens, with what is learnt between brackets.

    Args:
        tokenizer: the tokens'.
        tokens: token ids.
        weights: of each of these tokens (not of the one after it); learnt where not 0.
        colour: mark in green, as terminals understand it, in place of brackets.
    """
    before, after = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    ids, learnt = np.asarray(tokens), np.asarray(weights) != 0
    edges = np.flatnonzero(learnt[1:] != learnt[:-1]) + 1
    parts = []
    for start, end in zip([0, *edges], [*edges, len(ids)], strict=True):
        text = str(tokenizer.decode(ids[start:end].tolist()))
        parts.append(f"{before}{text}{after}" if end > start and learnt[start] else text)
    return "".join(parts)


def decode_row(
    tokenizer: PreTrainedTokenizerFast, row: Mapping[str, Shaped[np.ndarray, " T"]], *, colour: bool = False
) -> list[str]:
    """The documents of one row of a batch as text, with what is learnt marked as decode_with_mask does.

    Args:
        tokenizer: the tokens'.
        row: tokens, targets, weights and segment_ids, each [T].
        colour: as for decode_with_mask.
    """
    segment_ids = np.asarray(row["segment_ids"])
    documents = []
    for segment in range(1, int(segment_ids.max(initial=0)) + 1):
        here = np.flatnonzero(segment_ids == segment)
        tokens = np.concatenate([row["tokens"][here[:1]], row["targets"][here]])
        weights = np.concatenate([[0], row["weights"][here]])
        documents.append(decode_with_mask(tokenizer, tokens, weights, colour=colour))
    return documents
