"""What a run says about itself: before it starts, in a dry run, and when it is done."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

import jax
import yaml

from lorajax.config import Config, as_plain
from lorajax.data import DataStats, decode_row
from lorajax.memory.analysis import Memory, gib
from lorajax.memory.plan import Plan, table
from lorajax.training.inputs import Inputs, first_row


def banner(inputs: Inputs, plan: Plan | None, *, trainable: int, total: int, memory: Memory) -> str:
    """Versions, device, model, data, and what the run will do; trainable and total count parameters.

    Args:
        plan: of the memory, None where it is not planned.
        memory: of the compiled step.
    """
    config, train = inputs.config, inputs.config.train
    versions = ", ".join(f"{name} {_version(name)}" for name in ("lorajax", "jax", "flax"))
    tokens = inputs.rows_per_step * config.data.max_length
    lines = {
        "versions": f"{versions}, Python {sys.version.split()[0]}",
        "device": _device(),
        "model": f"{config.model.path}: {total:,} parameters, {config.model.dtype}",
        "attention": _attention(inputs),
        "trainable": f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.2f}%)"
        + (_lora(config) if train.mode == "lora" else ", all of them"),
        **data_lines(inputs),
        "batch": f"{inputs.rows_per_step} rows = {inputs.layout.rows} a device x {inputs.micro_batches} "
        f"accumulated x {inputs.mesh.size} devices: {tokens:,} tokens",
        "steps": f"{inputs.total_steps:,}; learning rate {train.learning_rate:g}, "
        f"{train.lr_scheduler_type} after {train.warmup_steps} steps of warm-up",
        "memory": f"{gib(memory.total)} a device for a step: {gib(memory.arguments)} weights and state, "
        f"{gib(memory.temporaries)} activations; {gib(memory.host)} of the host's",
    }
    if plan is not None:
        lines |= plan.lines()
    else:
        lines["kept"] = f"checkpointing {inputs.layout.checkpointing}"
        if inputs.config.memory.checkpointing == "auto":
            lines["kept"] += ": auto plans for a GPU, and there is none"
    return table(lines)


def data_lines(inputs: Inputs) -> dict[str, str]:
    """The data's statistics, for the banner and the dry run."""
    data, packing, documents = inputs.config.data, inputs.packing, inputs.documents
    lines = {"data": f"{data.path}: {_stats(documents.train_stats)}"}
    if documents.eval_stats is not None:
        lines["evaluation"] = _stats(documents.eval_stats)
    how = f"at most {data.max_segments} documents each" if data.packing else "one document each"
    lines["rows"] = (
        f"{packing.rows:,} of {data.max_length} tokens, {how}: {packing.documents:,} documents, "
        f"{packing.target_tokens:,} target tokens, {100 * packing.fill_rate:.1f}% filled"
    )
    return lines


def dry_run_text(inputs: Inputs) -> str:
    """The resolved config, the data's statistics, and the first row of training with its loss mask."""
    documents = decode_row(inputs.tokenizer, first_row(inputs), colour=sys.stdout.isatty())
    how = "green" if sys.stdout.isatty() else "between ⟦ and ⟧"
    row = "\n".join(f"--- document {number}\n{text}" for number, text in enumerate(documents, 1))
    config = yaml.safe_dump(as_plain(inputs.config), sort_keys=False, allow_unicode=True)
    statistics = table(data_lines(inputs) | {"steps": f"{inputs.total_steps:,}"})
    return f"{config}\n{statistics}\n\nThe first row; what is learnt is {how}:\n{row}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a folder that was put on the path, not installed
        return "(not installed)"


def _device() -> str:
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    memory = f", {gib(stats['bytes_limit'])} for JAX" if "bytes_limit" in stats else ""
    return f"{jax.device_count()} x {device.device_kind} ({device.platform}){memory}"


def _attention(inputs: Inputs) -> str:
    name, refused = inputs.attention
    how = "chosen automatically" if inputs.config.model.attention == "auto" else "as asked"
    return "; ".join((f"{name} ({how}", *(f"not {other}: {why}" for other, why in refused.items()))) + ")"


def _lora(config: Config) -> str:
    lora = config.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    return f": LoRA rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g} on {targets}"


def _stats(stats: DataStats) -> str:
    changed = {
        "truncated": stats.truncated,
        "dropped as too long": stats.dropped,
        "split": stats.split,
        "left out with nothing to learn": stats.masked_out,
    }
    notes = "".join(f", {count:,} {what}" for what, count in changed.items() if count)
    return (
        f"{stats.documents:,} documents of {stats.rows:,} rows{notes}; {stats.tokens:,} tokens, "
        f"{stats.target_tokens:,} of them targets"
    )
