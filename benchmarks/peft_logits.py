"""Logits of an adapter in lorajax and in PEFT on transformers' model, both in float32 on the CPU.

    python benchmarks/peft_logits.py MODEL RUN/adapter --data rows.jsonl --out result.json

MODEL is a folder in Hugging Face layout or a hub id. The rows are cut to --max-length tokens. Needs torch and
peft (the test extra on Python 3.11). Fails where the largest difference is above 1e-4 of the largest logit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import torch
from environment import environment
from transformers import AutoModelForCausalLM

import lorajax
from lorajax.config import DataConfig
from lorajax.data import load_documents
from lorajax.models.decoder import Decoder

TOLERANCE = 1e-4


def documents(arguments: argparse.Namespace) -> list[np.ndarray]:
    """The first rows as tokens, int32 [T] each."""
    config = DataConfig(path=arguments.data, max_length=arguments.max_length)
    loaded = load_documents(
        config,
        lorajax.load_tokenizer(arguments.tokenizer or arguments.model),
        context_length=arguments.max_length,
        seed=0,
    )
    return [loaded.train[index][0] for index in range(arguments.rows)]


def difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Largest difference over the largest logit, of all rows together."""
    apart = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
    return float(apart / max(np.abs(b).max() for b in theirs))


def our_logits(model: Decoder, rows: list[np.ndarray]) -> list[np.ndarray]:
    # One shape: what follows a token does not change its logits.
    longest = max(map(len, rows))
    padded = [jnp.asarray(np.pad(tokens, (0, longest - len(tokens)))[None]) for tokens in rows]
    return [np.asarray(model(each))[0, : len(tokens)] for each, tokens in zip(padded, rows, strict=True)]


def their_logits(model: torch.nn.Module, rows: list[np.ndarray]) -> list[np.ndarray]:
    with torch.no_grad():
        return [model(torch.tensor(tokens[None]).long()).logits[0].numpy() for tokens in rows]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model")
    parser.add_argument("adapter", help="folder with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", help="where the model brings none")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--out", required=True, help="JSON file for the result")
    arguments = parser.parse_args()

    rows = documents(arguments)
    model = lorajax.load(arguments.model, dtype="float32")
    ours_before = our_logits(model, rows)
    ours = our_logits(lorajax.load_adapter(model, arguments.adapter), rows)
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    theirs_before = their_logits(base, rows)
    theirs = their_logits(peft.PeftModel.from_pretrained(base, arguments.adapter).eval(), rows)

    weights = (Path(arguments.adapter) / "adapter_model.safetensors").read_bytes()
    packages = ("lorajax", "jax", "flax", "torch", "transformers", "peft")
    record: dict[str, Any] = {
        "benchmark": "peft_logits",
        **environment(*packages),
        "device": "cpu",
        "adapter_sha256": hashlib.sha256(weights).hexdigest(),
        "rows": len(rows),
        "tokens": sum(map(len, rows)),
        "largest_logit": float(max(np.abs(logits).max() for logits in theirs)),
        "what_the_adapter_changes": difference(ours, ours_before),
        "base_difference": difference(ours_before, theirs_before),
        "adapter_difference": difference(ours, theirs),
        "tolerance": TOLERANCE,
    }
    Path(arguments.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))
    return 0 if record["adapter_difference"] <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
