"""Data: formats -> messages -> tokens and loss mask -> packed rows."""

from lorajax.data.chat import chat_template, render_prompt
from lorajax.data.documents import DataSplits, DataStats, Documents, check_length, load_documents
from lorajax.data.packing import PackingStats, packed_batches, packing_stats
from lorajax.data.tokenizer import load_tokenizer
from lorajax.data.tokens import decode_row, decode_with_mask

__all__ = [
    "DataSplits",
    "DataStats",
    "Documents",
    "PackingStats",
    "chat_template",
    "check_length",
    "decode_row",
    "decode_with_mask",
    "load_documents",
    "load_tokenizer",
    "packed_batches",
    "packing_stats",
    "render_prompt",
]
