"""PEFT's adapter format, in and out: adapter_config.json and adapter_model.safetensors.

Tensors are named `base_model.model.<Hugging Face module>.lora_A.weight` [R, in] and `.lora_B.weight` [out, R]
(https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns of bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lorajax.errors import UserError
from lorajax.lora.adapter import LoRAWeights, is_target, select_targets, set_lora
from lorajax.lora.config import LoRAConfig
from lorajax.models.decoder import Decoder
from lorajax.models.folder import read_json, resolve
from lorajax.models.names import hf_name

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

_DTYPES = ("BF16", "F16", "F32")

# Fields of adapter_config.json that say nothing about what the adapter computes. Of the remaining ones, those
# that `_lora_config` does not read must be off: each switches on a variant of LoRA, also those yet to come.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights"}

# Initialisations that leave the base weights as they are. The others (pissa, olora, corda, loftq, ...) change
# them, so that the adapter belongs to weights which no checkpoint holds.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def save_adapter(model: Decoder, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write the adapter, float32, so that PEFT and the tools that read its format can load it.

    Each file is complete or, if the write fails, as it was before.

    Args:
        model: a model with an adapter.
        folder: made if missing; an adapter in it is replaced.
        base_model: hub id or path of the model that the adapter belongs to, for base_model_name_or_path.

    Raises:
        UserError: the model has no adapter, or the folder cannot be written.
    """
    config = model.lora_config
    if config is None:
        raise UserError("the model has no adapter to save; load it with lora=LoRAConfig(...)")
    folder = Path(folder).expanduser()
    tensors: dict[str, np.ndarray] = {}
    for path, linear in model.linears().items():
        if linear.lora_a is not None and linear.lora_b is not None:
            name_a, name_b = _tensor_names(model.family, path)
            tensors[name_a] = np.asarray(linear.lora_a[...], np.float32)
            tensors[name_b] = np.asarray(linear.lora_b[...], np.float32)
    text = json.dumps(_peft_config(model, config, base_model), indent=2, sort_keys=True) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as unfinished:
            (Path(unfinished) / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
            (Path(unfinished) / CONFIG_FILE).write_text(text)
            for file in (WEIGHTS_FILE, CONFIG_FILE):
                os.replace(Path(unfinished) / file, folder / file)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the adapter: {error}") from error


def load_adapter(model: Decoder, folder: str | Path) -> Decoder:
    """Put a PEFT adapter on the model, in place of any that it has, and return the model.

    The model adopts the adapter's rank, alpha, dropout and targets. An adapter with rank-stabilised scale
    (`use_rslora`: alpha / sqrt(rank), Kalajdzievski 2023, arXiv:2312.03732) is adopted with the alpha that
    gives the same scale. Everything is checked first: after an error the model is as it was.

    Args:
        model: any model, with or without an adapter.
        folder: where adapter_config.json and adapter_model.safetensors are, or the hub id of such a folder,
            which is downloaded unless it is in the cache.

    Raises:
        UserError: there is no such adapter; a file is missing or damaged; the adapter is of a kind that this
            library lacks, or for another model; its tensors are not those that its config announces (all of
            them are listed), or hold NaN or infinity.
    """
    place = resolve(folder)
    if not (place / CONFIG_FILE).is_file():
        raise UserError(f"{folder}: no {CONFIG_FILE}; an adapter is a folder with it and {WEIGHTS_FILE}")
    config = _lora_config(model, place / CONFIG_FILE)
    weights = _lora_weights(model, config, place / WEIGHTS_FILE)
    set_lora(model, config, weights)
    return model


def _tensor_names(family: str, path: str) -> tuple[str, str]:
    module = f"base_model.model.{hf_name(family, path)}"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _peft_config(model: Decoder, config: LoRAConfig, base_model: str | None) -> dict[str, Any]:
    """The contents of adapter_config.json: no field that older versions of PEFT would warn about."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": _target_names(model, config),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _target_names(model: Decoder, config: LoRAConfig) -> list[str]:
    """The names as the user gave them, else the shortest that select the same layers.

    A regular expression is not written: PEFT applies it to every module, and fails where it matches one that
    is not linear (an activation, a whole MLP); many tools cannot read one at all.
    """
    if not isinstance(config.target_modules, str):
        return list(config.target_modules)
    selected = select_targets(model, config.target_modules)
    names = [hf_name(model.family, path) for path in selected]
    short = tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return list(short) if select_targets(model, short) == selected else names


def _lora_config(model: Decoder, file: Path) -> LoRAConfig:
    """The settings in adapter_config.json."""
    fields = read_json(file)
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {fields.get('peft_type')!r}; only LORA is supported")
    refused = [
        f"{name}: {json.dumps(value)}"
        for name, value in sorted(fields.items())
        if name not in _READ | _IGNORED and not _is_off(value)
    ]
    if fields.get("init_lora_weights", True) not in _PLAIN_INITS:
        refused.append(
            f"init_lora_weights: {json.dumps(fields['init_lora_weights'])} (it changes the base weights)"
        )
    if refused:
        raise UserError(f"{file}: only plain LoRA is supported, not {'; '.join(refused)}")

    rank, alpha = _number(file, fields, "r", whole=True), _number(file, fields, "lora_alpha")
    dropout = _number(file, {"lora_dropout": 0.0} | fields, "lora_dropout")
    if fields.get("use_rslora"):
        alpha *= math.sqrt(rank)  # alpha / rank is then what alpha / sqrt(rank) was
    targets = fields.get("target_modules")
    if isinstance(targets, list) and all(isinstance(name, str) for name in targets):
        targets = _used_names(model, targets)
    elif not isinstance(targets, str):
        raise UserError(f"{file}: target_modules must be names or a regular expression, not {targets!r}")
    try:
        config = LoRAConfig(rank=int(rank), alpha=alpha, dropout=dropout, target_modules=targets)
        select_targets(model, targets)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return config


def _is_off(value: Any) -> bool:
    # 0 is not off: layers_to_transform: 0 is the first layer, though 0 == False.
    return value is None or value is False or value in ("none", {}, [])


def _number(file: Path, fields: dict[str, Any], name: str, *, whole: bool = False) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise UserError(f"{file}: {name} must be a {'whole ' if whole else ''}number, not {value!r}")
    return value


def _used_names(model: Decoder, targets: list[str]) -> tuple[str, ...]:
    """Names without those that fit no module of the model: PEFT lets them pass, with no tensors for them."""
    modules = [hf_name(model.family, path) for path in (*model.linears(), "embed", "head")]
    used = tuple(name for name in targets if any(is_target(module, (name,)) for module in modules))
    return used or tuple(targets)


def _lora_weights(model: Decoder, config: LoRAConfig, file: Path) -> LoRAWeights:
    """The tensors of the file, checked against the layers that `config` selects."""
    tensors = _read_tensors(file)
    linears = model.linears()
    weights: LoRAWeights = {}
    problems: list[str] = []
    expected: set[str] = set()
    for path in select_targets(model, config.target_modules):
        name_a, name_b = _tensor_names(model.family, path)
        shape_a = (config.rank, linears[path].in_features)
        shape_b = (linears[path].out_features, config.rank)
        for name, shape in ((name_a, shape_a), (name_b, shape_b)):
            if name not in tensors:
                problems.append(f"missing: {name}")
            elif tensors[name].shape != shape:
                problems.append(f"wrong shape: {name} is {list(tensors[name].shape)}, not {list(shape)}")
        if name_a in tensors and name_b in tensors:
            weights[path] = tensors[name_a], tensors[name_b]
        expected |= {name_a, name_b}
    problems += [f"surplus: {name}" for name in tensors if name not in expected]
    if problems:
        shown = problems[:20] + [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise UserError(
            f"{file}: the tensors are not those of a rank-{config.rank} adapter for this model:\n  "
            + "\n  ".join(shown)
        )
    if spoilt := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise UserError(
            f"{file}: NaN or infinity in {len(spoilt)} of {len(tensors)} tensors, {spoilt[0]} first; take an "
            "adapter from before its training diverged"
        )
    return weights


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        if (file.parent / PICKLE_FILE).is_file():
            raise UserError(
                f"{file.parent / PICKLE_FILE}: pickled weights are refused, because reading them can run any "
                f"code; save the adapter again from PEFT, with safe_serialization=True, as {WEIGHTS_FILE}"
            )
        raise UserError(f"{file.parent}: no {WEIGHTS_FILE} beside {CONFIG_FILE}; the adapter is incomplete")
    try:
        with safe_open(file, framework="numpy") as opened:
            dtypes = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
            unreadable = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in _DTYPES]
            if unreadable:
                raise UserError(
                    f"{file}: tensors of a type that cannot be loaded, only {', '.join(_DTYPES)} can: "
                    f"{', '.join(unreadable)}"
                )
            return {name: opened.get_tensor(name) for name in dtypes}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: cannot be read; the file is truncated or damaged: {error}") from error
