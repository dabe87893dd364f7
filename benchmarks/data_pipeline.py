"""How fast tokenised documents become packed batches, in tokens per second.

    python benchmarks/data_pipeline.py --out result.json
    python benchmarks/data_pipeline.py --data rows.jsonl --tokenizer FOLDER_OR_HUB_ID --out result.json

Without --data, documents are made up, with log-normal lengths as instruction data has them: short ones
(median 118 tokens), where the time goes into packing, and longer ones (median 396). With --data, that file is
tokenised first (not measured as part of the pipeline) and packed besides. Expected: at least 500,000 tokens/s
on 2 cores in every case.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment

from lorajax.config import DataConfig
from lorajax.data import Documents, load_documents, load_tokenizer, packed_batches, packing_stats

_BATCH_SHAPE = (1, 8)


def made_up_documents(count: int, median: float, sigma: float, max_length: int) -> Documents:
    """Random tokens in documents of log-normal length, the second half of each to be learnt."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(median), sigma, count).astype(int), 2, max_length)
    return Documents.from_pairs(
        (rng.integers(0, 49152, length).tolist(), [False] * (length // 2) + [True] * (length - length // 2))
        for length in lengths
    )


def measure(documents: Documents, max_length: int, max_segments: int, epochs: int) -> dict[str, Any]:
    """Tokens per second of the pipeline on the documents, the time until the first batch included."""
    options: dict[str, Any] = dict(
        max_length=max_length, max_segments=max_segments, packing=True, seed=0, epochs=epochs
    )
    start = time.perf_counter()
    stats = packing_stats(documents, **options)
    counting = time.perf_counter() - start
    tokens = 0
    start = time.perf_counter()
    batches = iter(packed_batches(documents, batch_shape=_BATCH_SHAPE, **options))
    for batch in batches:
        tokens += int((batch["segment_ids"] > 0).sum())
    seconds = time.perf_counter() - start
    batches.close()
    if tokens != stats.tokens:
        raise AssertionError(f"the pipeline gave {tokens} tokens, the count says {stats.tokens}")
    return {
        "median_tokens": float(np.median(documents.lengths)),
        "max_length": max_length,
        "max_segments": max_segments,
        "documents": stats.documents,
        "tokens": tokens,
        "rows": stats.rows,
        "fill_rate": round(stats.fill_rate, 4),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds),
        "documents_per_second": round(stats.documents / seconds),
        "counting_seconds": round(counting, 3),
        "counting_documents_per_second": round(stats.documents / counting),
    }


def measure_file(path: str, tokenizer_path: str, max_length: int, max_segments: int) -> dict[str, Any]:
    """As measure, for a real file, with the seconds of tokenising and of loading the cached tokens."""
    tokenizer = load_tokenizer(tokenizer_path)
    with tempfile.TemporaryDirectory() as cache:
        config = DataConfig(path=path, max_length=max_length, cache_dir=cache)
        start = time.perf_counter()
        documents, _, stats, _ = load_documents(config, tokenizer, context_length=None, seed=0)
        tokenising = time.perf_counter() - start
        start = time.perf_counter()
        load_documents(config, tokenizer, context_length=None, seed=0)
        cached = time.perf_counter() - start
        return {
            "data": Path(path).name,
            **measure(documents, max_length, max_segments, epochs=3),
            "tokenising_seconds": round(tokenising, 3),
            "tokenising_tokens_per_second": round(stats.tokens / tokenising),
            "cached_load_seconds": round(cached, 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="a data file to tokenise and pack besides the made-up documents")
    parser.add_argument("--tokenizer", help="hub id or folder of the tokenizer for --data")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--max-segments", type=int, default=32)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--out", help="JSON file for the result")
    arguments = parser.parse_args()
    if bool(arguments.data) != bool(arguments.tokenizer):
        parser.error("--data and --tokenizer go together")
    length, segments = arguments.max_length, arguments.max_segments
    cases = {
        "short": measure(
            made_up_documents(arguments.documents, 118, 0.9, length), length, segments, epochs=1
        ),
        "long": measure(made_up_documents(arguments.documents, 396, 0.9, length), length, segments, epochs=1),
    }
    if arguments.data:
        cases["file"] = measure_file(arguments.data, arguments.tokenizer, length, segments)
    versions = environment("grain", "numpy", "tokenizers", "transformers")
    result = {"benchmark": "data_pipeline", **versions, "batch_shape": _BATCH_SHAPE, "cases": cases}
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
