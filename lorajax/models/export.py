"""A model as a Hugging Face checkpoint, its adapter merged into the weights."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lorajax.errors import UserError
from lorajax.lora.adapter import merged_weight
from lorajax.models.decoder import Decoder
from lorajax.models.gguf import rope_scaling_of
from lorajax.models.names import hf_name

SHARD_BYTES = 5 * 10**9

_INDEX = "model.safetensors.index.json"


def save_merged(model: Decoder, folder: str | Path) -> None:
    """Write config.json, generation_config.json and safetensors, in shards above 5 GB (SHARD_BYTES).

    Adapters are merged, W + scale * B A in float32; all weights are then cast to the model's dtype. Files are
    written beside their place and renamed into it, config.json last: what cannot be written completely
    leaves an earlier model in the folder as it was. Files of other names, such as a tokenizer's, stay. The
    host holds one shard at a time.

    Raises:
        UserError: the folder cannot be written; the model comes from a GGUF file with RoPE frequencies that
            no config.json can state.
    """
    folder = Path(folder).expanduser()
    documents = {"config.json": _config(model)}
    if model.eos_token_ids:
        documents["generation_config.json"] = _generation_config(model, documents["config.json"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            index = _write_shards(model, draft)
            if index is not None:
                documents = {_INDEX: index} | documents
            for name, document in documents.items():
                (draft / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            for file in draft.glob("*.safetensors"):  # written for their owner alone
                shutil.copymode(draft / "config.json", file)
            _move(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the model cannot be written there: {error}") from error


def _move(draft: Path, folder: Path) -> None:
    """Put the new files in the place of the old; between the two, the folder is no model, not a mixture."""
    (folder / "config.json").unlink(missing_ok=True)
    for old in [*folder.glob("model*.safetensors"), folder / _INDEX]:
        old.unlink(missing_ok=True)
    for new in sorted(draft.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(new, folder / new.name)


def _config(model: Decoder) -> dict[str, Any]:
    config = json.loads(model.hf_config)
    if divisors := config.pop("rope_divisors", None):
        scaling = rope_scaling_of(
            tuple(divisors), theta=model.options.rope.theta, head_dim=model.options.head_dim
        )
        if scaling is None:
            raise UserError(
                "the RoPE frequencies of this GGUF file follow no rule that a config.json can state, so the "
                "merged model would lose them; save the adapter (save_adapter), or merge it into the "
                "original Hugging Face model"
            )
        config["rope_scaling"] = scaling
    # The old name of the key, unless the new one is there already: every release of transformers reads it.
    config["dtype" if "dtype" in config else "torch_dtype"] = str(model.dtype)
    return config


def _generation_config(model: Decoder, config: dict[str, Any]) -> dict[str, Any]:
    ids = list(model.eos_token_ids)
    special = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    return special | {"eos_token_id": ids if len(ids) > 1 else ids[0]}


def _write_shards(model: Decoder, folder: Path) -> dict[str, Any] | None:
    """Write all weights; gives the index, or None where one file holds them all."""
    linears = model.linears()
    shards = _plan(model)
    total = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {}
        for (module, kind), array in shard.items():
            if kind == "weight" and module in linears:
                array = merged_weight(linears[module])
            value = np.ascontiguousarray(array.astype(model.dtype))
            values[f"{hf_name(model.family, module)}.{kind}"] = value
            total += value.nbytes
        save_file(values, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(values, file)
    return None if len(shards) == 1 else {"metadata": {"total_size": total}, "weight_map": weight_map}


def _plan(model: Decoder) -> list[dict[tuple[str, str], Array]]:
    """For each shard: (tree path of the module, weight or bias) -> the array, adapters left out."""
    shards: list[dict[tuple[str, str], Array]] = [{}]
    held = 0
    for (*path, kind), leaf in nnx.to_flat_state(nnx.state(model)):
        if kind in ("weight", "bias"):
            size = leaf.size * model.dtype.itemsize
            if shards[-1] and held + size > SHARD_BYTES:
                shards.append({})
                held = 0
            shards[-1][".".join(map(str, path)), kind] = leaf[...]
            held += size
    return shards
