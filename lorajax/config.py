"""Settings of a run: dataclasses, YAML files, and command-line overrides.

The library is jsonargparse: it makes flags, type checks and help text from plain frozen dataclasses, which
the rest of the package and research code use without knowing of it. pydantic-settings wants its own model
classes in their place, takes twice as long to import, and has no flags that append to a list.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import types
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from lorajax.errors import UserError
from lorajax.lora.config import LoRAConfig
from lorajax.memory.policy import ACTIONS, MADE_IN_CHUNKS, MOST_MLP_CHUNKS, PRESETS, Policy


@dataclass(frozen=True)
class ModelConfig:
    """The model that is fine-tuned."""

    path: str
    """Hub id, local folder in Hugging Face layout, or .gguf file."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer; null: the model's own. A .gguf file needs one."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the weights and of the computation; adapters are always float32."""
    quantization: str | None = None
    """Quantization of the frozen weights; only null (none) is supported."""
    attention: str = "auto"
    """Attention implementation; auto picks one and says which."""


@dataclass(frozen=True)
class DataConfig:
    """The training and evaluation data, and how they become rows of tokens."""

    path: str
    """JSONL, JSON, CSV or Parquet file, folder of such files, or hub data set."""
    eval_path: str | None = None
    """Evaluation data, in any form that path takes; null: none, or a part of path (eval_fraction)."""
    eval_fraction: float = 0.0
    """Part of the examples held out for evaluation, from 0 (none) to below 1."""
    split: str = "train"
    """Split of a hub data set."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """Form of a row; auto recognises it by its keys."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where the data names its columns otherwise: the format's name of a column -> the data's name of it."""
    chat_template: str | None = None
    """File with a Jinja chat template; null: the tokenizer's own, or a default where it has none."""
    max_length: int = 2048
    """Length of a row, in tokens."""
    packing: bool = True
    """Put several documents on a row; false: one document on a row."""
    max_segments: int = 32
    """Most documents on one row."""
    overlong: Literal["truncate", "drop", "split"] = "truncate"
    """What is done with a document of more than max_length tokens."""
    train_on_prompt: bool = False
    """Learn every token; false: the assistant's turns only."""
    cache_dir: str | None = None
    """Folder for tokenised data; null: the user's cache folder."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation: what is trained, on how much, and how fast."""

    mode: Literal["lora", "full"] = "lora"
    """Train an adapter (lora) or every weight (full)."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start from the model's weights, or from random ones (mode full only)."""
    per_device_train_batch_size: int = 1
    """Rows per device in a micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    learning_rate: float = 2e-4
    """Highest learning rate of AdamW."""
    max_steps: int = -1
    """Optimizer steps; -1: as many as num_train_epochs gives. When set, it decides alone."""
    num_train_epochs: int = 1
    """Passes over the data, where max_steps is -1."""
    warmup_steps: int = 0
    """Optimizer steps during which the learning rate rises from 0."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after warm-up: to 0 (linear, cosine), or unchanged."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients, from 0 to below 1."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients, from 0 to below 1."""
    adam_epsilon: float = 1e-8
    """Added to AdamW's denominator; above 0."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this global norm; 0: never."""
    eval_steps: int = 0
    """Optimizer steps between evaluations; 0: only at the end, where there is evaluation data."""
    seed: int = 42
    """Seed of everything random (adapter, dropout, order of the data), from 0 to 2**32 - 1."""
    resume_from_checkpoint: str | None = None
    """Checkpoint folder to go on from; auto: the newest in output_dir, if there is one."""


@dataclass(frozen=True)
class MemoryConfig:
    """How device memory is traded for time."""

    checkpointing: str | dict[str, str] = "auto"
    """What layers keep for the backward pass: auto (chosen for the memory that there is), none (all that has
    a name), full (only each layer's input), offload (those in host memory, and gradients that are no larger),
    or by the name of an activation: save, offload or recompute, and gradient: offload. Activations are
    block_input, query, key, value, attention_output, attention_lse, block_middle, gate, up, lora_hidden."""
    mlp_chunks: int | None = None
    """Parts of a row's tokens, at most 64, that an MLP takes one after the other, for very long rows; null:
    chosen too with auto, otherwise 1. With more than 1 it keeps neither gate nor up."""
    budget: str | None = None
    """Most GPU memory for weights, state and activations, such as 24GiB; null: what is free. Besides, JAX'
    allocator gets 2.6% and 64 MiB, as it gives memory in pieces, and CUDA's context takes up to 1 GiB."""
    host_budget: str | None = None
    """Most host memory for activations, such as 64GiB, or 0GiB for none; null: half of what is free."""


@dataclass(frozen=True)
class OutputConfig:
    """What a run writes and reports."""

    output_dir: str
    """Folder of the run: config, metrics, checkpoints, adapter."""
    overwrite_output_dir: bool = False
    """Replace another run in output_dir; false: refuse."""
    logging_steps: int = 1
    """Optimizer steps between logged rows."""
    save_steps: int = 0
    """Optimizer steps between checkpoints; 0: only at the end."""
    save_total_limit: int = 2
    """Checkpoints kept; the oldest are deleted."""
    report_to: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Trackers that also get the metrics: tensorboard, wandb."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts that are answered before and after training."""
    sample_max_new_tokens: int = 64
    """Longest answer to a sample prompt, in tokens."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run, one field per section of the YAML file."""

    model: ModelConfig
    lora: LoRAConfig = LoRAConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    output: OutputConfig


class Arguments(NamedTuple):
    """What a command was given beside the config."""

    dry_run: bool


_SECTIONS: dict[str, type] = get_type_hints(Config)
_FIELDS = {f"{name}.{f.name}": f for name, section in _SECTIONS.items() for f in dataclasses.fields(section)}
_TYPES = {
    f"{name}.{key}": hint for name, cls in _SECTIONS.items() for key, hint in get_type_hints(cls).items()
}
_REQUIRED = [
    key
    for key, f in _FIELDS.items()
    if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
]
_FLAGS = ("help", "dry-run")
_SIZES = ("memory.budget", "memory.host_budget")

# What Unsloth, PEFT, TRL and others call a key, where the names are not alike.
_OTHER_NAMES = {
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lr": "train.learning_rate",
    "batch_size": "train.per_device_train_batch_size",
    "epochs": "train.num_train_epochs",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
}

_PATHS = ("data.chat_template", "data.cache_dir", "train.resume_from_checkpoint", "output.output_dir")
_PATHS_OR_HUB_IDS = ("model.path", "model.tokenizer", "data.path", "data.eval_path")
_FILE_SUFFIXES = {".gguf", ".jsonl", ".json", ".csv", ".parquet", ".txt"}


def load_config(path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies overrides.

    Args:
        path: the YAML file; None: everything comes from the overrides. Paths in it are relative to its
            folder.
        overrides: as on the command line: `["--train.max_steps", "3", "--lora.rank=8"]`. Paths in them are
            relative to the working directory.

    Returns:
        The checked config; local paths in it are absolute, names of hub repositories are as given.

    Raises:
        UserError: the file cannot be read, or a key is unknown, missing, of the wrong type, out of range, or
            contradicts another; the message names the key and where it was written.
    """
    return parse_arguments([*([os.fspath(path)] if path is not None else []), *overrides])[0]


def parse_arguments(
    argv: Sequence[str],
    *,
    prog: str = "python -m lorajax.train",
    description: str | None = None,
    own_flags: Sequence[str] = (),
) -> tuple[Config, Arguments]:
    """Reads a command line `[CONFIG.yaml] [--section.key VALUE ...] [--dry-run]`.

    Args:
        argv: the arguments without the program's name.
        prog: the command, as `--help` shows it.
        description: what the command does, for `--help`.
        own_flags: names of flags that the command itself takes out of argv; a misspelt one is left there.

    Raises:
        UserError: as load_config.
        SystemExit: after printing the help text, with code 0.
    """
    parser = _parser(prog, description)
    flags = {token[2:].split("=")[0].removesuffix("+") for token in argv if token.startswith("--")}
    overridden = {".".join(flag.split(".")[:2]) for flag in flags}
    unknown = {key: "command line" for key in sorted(overridden.difference(_FLAGS))}
    _refuse_unknown(unknown, (*_FLAGS, *own_flags))

    blank = jsonargparse.Namespace()
    for key in _REQUIRED:
        blank[key] = ""  # read as "not given" below
    given = _checked(lambda: parser.parse_args(argv, blank), lambda key: "command line")
    values, lines = _read_yaml(given.config) if given.config else ({}, {})
    file = given.config or "command line"

    def where_read(key: str) -> str:
        return lines.get(key, file)

    def where(key: str) -> str:
        return "command line" if key in overridden else where_read(key)

    merged = blank
    if values:
        read = _checked(lambda: parser.parse_object(_with_blanks(values)), where_read, values)
        merged = _resolve_paths(read, Path(os.path.abspath(given.config)).parent)
        merged.pop("config")
    merged = _checked(lambda: parser.parse_args(argv, merged), where)
    merged = _resolve_paths(merged, Path.cwd(), only=overridden)
    _refuse_null(merged, where)

    try:
        config = Config(**{name: cls(**vars(merged[name])) for name, cls in _SECTIONS.items()})
    except UserError as error:
        problems = [str(error)]
    else:
        problems = list(_problems(config))
    if problems:
        raise UserError("\n".join(f"{where(_key_of(problem))}: {problem}" for problem in problems))
    return config, Arguments(dry_run=given.dry_run)


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Writes every setting as YAML that `load_config` reads back to an equal config.

    Local paths that are relative to the working directory are written as absolute ones.
    """
    values = _resolve_paths(as_plain(config), Path.cwd())
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def validate(config: Config) -> None:
    """Checks a config that was built in code as one from a file is checked: types, ranges, contradictions.

    Raises:
        UserError: every problem found, each naming its key.
    """
    values = as_plain(config)
    _checked(lambda: _parser("", None).parse_object(values), lambda key: "config", values)
    _refuse_null(values, lambda key: "config")
    if problems := list(_problems(config)):
        raise UserError("\n".join(problems))


@functools.cache
def _parser(prog: str, description: str | None) -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s CONFIG.yaml [--section.key VALUE ...] [--dry-run]",
        description=description,
        epilog="Paths in the file are relative to it, paths in flags to the working directory. A flag wins "
        "over the file. KEY+ appends to a list; --data.columns.NAME COLUMN sets one entry of a mapping.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="YAML file with the sections below.")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Show the resolved config, the data's statistics and one row with its loss mask, then stop.",
    )
    for name, section in _SECTIONS.items():
        summary = (section.__doc__ or "").partition("\n")[0]
        parser.add_argument_group(name, summary).add_class_arguments(section, name, as_group=False)
    return parser


def _problems(config: Config) -> Iterator[str]:
    """Values out of range and settings that contradict each other, as sentences that start with a key."""
    values = {
        f"{name}.{key}": value for name, fields in as_plain(config).items() for key, value in fields.items()
    }
    for key in _REQUIRED:
        if not values[key]:
            yield f"{key} is missing; set it in the config file or with --{key} VALUE"
    at_least = {
        "data.max_length": 2,  # one token to read and one to predict
        "data.max_segments": 1,
        "train.per_device_train_batch_size": 1,
        "train.gradient_accumulation_steps": 1,
        "train.warmup_steps": 0,
        "train.weight_decay": 0,
        "train.max_grad_norm": 0,
        "train.eval_steps": 0,
        "train.seed": 0,
        "output.logging_steps": 1,
        "output.save_steps": 0,
        "output.save_total_limit": 1,
        "output.sample_max_new_tokens": 1,
    }
    for key, least in at_least.items():
        if not (math.isfinite(values[key]) and values[key] >= least):
            yield f"{key} must be at least {least}, not {values[key]}"
    for key in ("train.learning_rate", "train.adam_epsilon"):
        if not (math.isfinite(values[key]) and values[key] > 0):
            yield f"{key} must be above 0, not {values[key]}"
    if values["train.seed"] >= 2**32:
        yield f"train.seed must be below 2**32, not {values['train.seed']}"
    for key in ("data.eval_fraction", "train.adam_beta1", "train.adam_beta2"):
        if not 0 <= values[key] < 1:
            yield f"{key} must be at least 0 and below 1, not {values[key]}"

    model, data, train, output = config.model, config.data, config.train, config.output
    if model.quantization is not None:
        yield f"model.quantization is {model.quantization!r}, which is not supported; set it to null"
    yield from _memory_problems(config.memory)
    if config.data.max_length < (config.memory.mlp_chunks or 1) <= MOST_MLP_CHUNKS:
        yield f"memory.mlp_chunks is {config.memory.mlp_chunks}, rows have {config.data.max_length} tokens"
    if train.max_steps != -1 and train.max_steps < 1:
        yield f"train.max_steps must be at least 1, or -1 to train by epochs, not {train.max_steps}"
    if train.max_steps == -1 and train.num_train_epochs < 1:
        yield "train.num_train_epochs must be at least 1 where train.max_steps is not set"
    if 0 < train.max_steps < train.warmup_steps:
        yield (
            f"train.warmup_steps ({train.warmup_steps}) is more than train.max_steps ({train.max_steps}); "
            "lower the one, or raise the other"
        )
    if train.init == "random" and train.mode == "lora":
        yield "train.init is random, but an adapter needs pretrained weights; set train.mode to full"
    if train.mode == "full" and config.lora != LoRAConfig():
        yield "train.mode is full, which trains no adapter, but the lora section is set; remove it"
    if data.eval_path is not None and data.eval_fraction > 0:
        yield "data.eval_fraction and data.eval_path are both set; keep one of them"
    if train.eval_steps > 0 and data.eval_path is None and data.eval_fraction == 0:
        yield "train.eval_steps is set, but not data.eval_path or data.eval_fraction; set one of them"
    if output.overwrite_output_dir and train.resume_from_checkpoint == "auto":
        yield (
            "output.overwrite_output_dir deletes what train.resume_from_checkpoint needs; to go on, add "
            "--output.overwrite_output_dir false"
        )


def _key_of(problem: str) -> str:
    """The key that a sentence of `_problems` starts with."""
    found = re.match(r"[\w.]+", problem)
    return found[0] if found else ""


def _memory_problems(memory: MemoryConfig) -> Iterator[str]:
    for key in _SIZES:
        if (text := getattr(memory, key.partition(".")[2])) is not None:
            try:
                size = parse_size(text)
            except ValueError as error:
                yield f"{key} {error}"
            else:
                if not size and key == "memory.budget":
                    yield f"{key} must be above 0, not {text!r}"
    if memory.mlp_chunks is not None and not 1 <= memory.mlp_chunks <= MOST_MLP_CHUNKS:
        yield f"memory.mlp_chunks must be in 1..{MOST_MLP_CHUNKS}, not {memory.mlp_chunks}"
    if (memory.mlp_chunks or 1) > 1 and isinstance(memory.checkpointing, dict):
        for name in MADE_IN_CHUNKS:
            if memory.checkpointing.get(name, "recompute") != "recompute":
                yield f"memory.checkpointing keeps {name}, which an MLP in memory.mlp_chunks makes again"
    if isinstance(memory.checkpointing, str):
        if memory.checkpointing not in (known := ("auto", *PRESETS)):
            yield (
                f"memory.checkpointing must be one of {_listed(known)}, or a mapping from activations to "
                f"{_listed(ACTIONS)}, not {memory.checkpointing!r}"
            )
        return
    try:
        Policy.of(memory.checkpointing, 1)
    except ValueError as error:
        yield f"memory.checkpointing: {error}"


_A_SIZE = "a size with its unit, such as 24GiB"
_SIZE_UNITS = {
    # G is what plans print for GiB.
    **{unit: 1024**power for power, unit in enumerate(("B", "K", "M", "G", "T"))},
    **{unit: 1024**power for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), start=1)},
    **{unit: 1000**power for power, unit in enumerate(("KB", "MB", "GB", "TB"), start=1)},
}


def parse_size(text: str) -> int:
    """Bytes of a size such as 24GiB, 24G (the same), 512 MiB or 8e9 B.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): size for unit, size in _SIZE_UNITS.items()}
    try:
        if found is None or found[2].lower() not in units:
            raise ValueError
        return int(float(found[1]) * units[found[2].lower()])
    except (ValueError, OverflowError):
        raise ValueError(f"must be {_A_SIZE}, not {text!r}") from None


def as_plain(config: Config) -> dict[str, dict[str, Any]]:
    """The config as nested dicts of what YAML can hold."""
    values = asdict(config)
    for fields in values.values():
        fields.update({key: list(value) for key, value in fields.items() if isinstance(value, tuple)})
    return values


def _with_blanks(values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Adds "" for each required key that is absent or null: the command line may still give it."""
    filled = {name: dict(fields) for name, fields in values.items()}
    for key in _REQUIRED:
        section, name = key.split(".")
        if filled.setdefault(section, {}).get(name) is None:
            filled[section][name] = ""
    return filled


# --- paths ---


def _resolve_paths(values: Any, base: Path, only: Iterable[str] = (*_PATHS, *_PATHS_OR_HUB_IDS)) -> Any:
    """Makes the local paths among the keys `only` absolute, in place.

    Args:
        values: indexed by section, then by key.
    """
    for key in only:
        section, _, name = key.partition(".")
        value = values[section][name] if key in _PATHS or key in _PATHS_OR_HUB_IDS else None
        if not value or (key in _PATHS_OR_HUB_IDS and _is_hub_id(value, base)):
            continue
        if (key, value) != ("train.resume_from_checkpoint", "auto"):
            values[section][name] = os.path.abspath(base / Path(value).expanduser())
    return values


def _is_hub_id(value: str, base: Path) -> bool:
    if (
        Path(value).is_absolute()
        or value.startswith(("./", "../", "~"))
        or Path(value).suffix in _FILE_SUFFIXES
    ):
        return False
    return not (base / value).exists()


# --- YAML ---

_EXPONENT_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 2e-4 is a number, as in YAML 1.2, and a date is text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes the text that _Loader would read as a number or as the end of a line."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(line_end in data for line_end in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+.0123456789"))


def _read_yaml(path: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Reads a config file: values by section and key, and `FILE:LINE` of every section and section.key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file (looked in {Path.cwd()})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        values = loader.construct_document(root) if root else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold the sections {_listed(_SECTIONS)}, not {_shown(values)}")

    lines: dict[str, str] = {}
    for section, section_line, node in _entries(root):
        _note(lines, section, f"{path}:{section_line}")
        for key, line, _ in _entries(node) if section in _SECTIONS else ():
            _note(lines, f"{section}.{key}", f"{path}:{line}")
    _refuse_unknown({key: line for key, line in lines.items() if key not in _SECTIONS})
    for section, fields in values.items():
        if fields is not None and not isinstance(fields, dict):
            raise UserError(f"{lines[section]}: {section} must be a section of keys, not {_shown(fields)}")
    return {section: fields for section, fields in values.items() if fields}, lines


def _entries(node: yaml.Node | None) -> Iterator[tuple[str, int, yaml.Node]]:
    """Key, line (from 1) and value of each entry of a YAML mapping."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield str(key.value), key.start_mark.line + 1, value


def _note(lines: dict[str, str], key: str, line: str) -> None:
    if key in lines:
        raise UserError(f"{line}: {key} is given twice, here and at {lines[key]}; remove one")
    lines[key] = line


# --- messages ---


def _checked(
    parse: Callable[[], jsonargparse.Namespace],
    where: Callable[[str], str],
    values: dict[str, Any] | None = None,
) -> jsonargparse.Namespace:
    """Runs jsonargparse, and says in one sentence what it refuses.

    Args:
        where: the place of a section.key, for the message.
        values: the values that are parsed, by section and key, if they are at hand.
    """
    try:
        return parse()
    except ArgumentError as error:
        message = str(error)
    found = re.search(r'(?:key "|--)(\w+\.\w+)', message)
    key = found.group(1) if found else None
    if key is None or key not in _TYPES:
        raise UserError(f"command line: {' '.join(message.split())}")
    if "expected one argument" in message:
        raise UserError(f"command line: --{key} needs a value")
    section, name = key.split(".")
    if values is not None:
        value = _shown(values[section][name])
    else:
        value = _shown(re.split(r"(?:Got|Given) value: ", message)[-1])
    expected = _A_SIZE if key in _SIZES else _expected(_TYPES[key])
    raise UserError(f"{where(key)}: {key} must be {expected}, not {value}")


def _refuse_null(values: Any, where: Callable[[str], str]) -> None:
    """Raises for a null that the type does not allow: jsonargparse takes it for "not given"."""
    for key, hint in _TYPES.items():
        section, name = key.split(".")
        if values[section][name] is None and types.NoneType not in get_args(hint):
            raise UserError(f"{where(key)}: {key} must be {_expected(hint)}, not null")


def _expected(hint: Any) -> str:
    """A type hint in words."""
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        types.NoneType: "null",
    }
    if hint in words:
        return words[hint]
    inner = [arg for arg in get_args(hint) if arg is not Ellipsis]
    origin = get_origin(hint)
    if origin is Literal:
        return f"one of {_listed(inner)}"
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(arg) for arg in inner)
    if origin is dict:
        return f"a mapping from {_expected(inner[0])} to {_expected(inner[1])}"
    return f"a list of {_expected(inner[0])}"


def _refuse_unknown(places: dict[str, str], flags: Sequence[str] = ()) -> None:
    """Raises for the keys (key -> where it was written) that no section has; some may be misspelt flags."""
    unknown = [
        f"{place}: unknown key {key}; {_suggestion(key, flags)}"
        for key, place in places.items()
        if key not in _FIELDS
    ]
    if unknown:
        raise UserError("\n".join(unknown))


def _suggestion(key: str, flags: Sequence[str]) -> str:
    """The valid key nearest to an unknown one: its name elsewhere first, then a similar name."""
    section, _, name = key.rpartition(".")
    if key in _SECTIONS:
        return f"{key} is a section: give --{key}.KEY VALUE"
    own = [valid.split(".")[1] for valid in _FIELDS if valid.startswith(f"{section}.")]
    if moved := [valid for valid in _FIELDS if valid.split(".")[1] == name]:
        return f"did you mean {' or '.join(moved)}?"
    if name in _OTHER_NAMES:
        return f"did you mean {_OTHER_NAMES[name]}?"
    if near := difflib.get_close_matches(name, own, n=1):
        return f"did you mean {section}.{near[0]}?"
    if not section and (near := difflib.get_close_matches(name, [*_SECTIONS, *flags], n=1)):
        return f"did you mean {'--' if near[0] in flags else ''}{near[0]}?"
    if near := difflib.get_close_matches(name, [valid.split(".")[1] for valid in _FIELDS], n=1):
        return f"did you mean {next(valid for valid in _FIELDS if valid.endswith(f'.{near[0]}'))}?"
    if own:
        return f"{section} has {_listed(own)}"
    return f"the sections are {_listed(_SECTIONS)}"


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(str(name) for name in names)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
