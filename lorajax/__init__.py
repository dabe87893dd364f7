"""LoRA fine-tuning of Hugging Face language models in JAX."""

import importlib
import logging
import os
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorajax.config import Config
    from lorajax.data.tokenizer import load_tokenizer
    from lorajax.generation import generate
    from lorajax.lora.config import LoRAConfig
    from lorajax.lora.peft import load_adapter, save_adapter
    from lorajax.models.checkpoint import load, save_merged
    from lorajax.training.fit import fit
    from lorajax.training.planning import plan_memory

# Public name -> its module. Imported at first use, so that `--help` and a mistake in a config answer at once.
_HOMES = {
    "Config": "lorajax.config",
    "LoRAConfig": "lorajax.lora.config",
    "fit": "lorajax.training.fit",
    "generate": "lorajax.generation",
    "load": "lorajax.models.checkpoint",
    "load_adapter": "lorajax.lora.peft",
    "load_tokenizer": "lorajax.data.tokenizer",
    "plan_memory": "lorajax.training.planning",
    "save_adapter": "lorajax.lora.peft",
    "save_merged": "lorajax.models.checkpoint",
}

__all__ = [
    "Config",
    "LoRAConfig",
    "fit",
    "generate",
    "load",
    "load_adapter",
    "load_tokenizer",
    "plan_memory",
    "save_adapter",
    "save_merged",
]


def _not_about_missing_cuda(record: logging.LogRecord) -> bool:
    """False for JAX' account of its CUDA plugin where there is no driver: plans compile with it there."""
    text = record.getMessage()
    if not text.startswith("Jax plugin configuration error") or "cuda" not in text:
        return True
    return os.path.exists("/proc/driver/nvidia") or shutil.which("nvidia-smi") is not None


# Pages of traceback otherwise, whatever is run, once lorajax[plan] is installed.
logging.getLogger("jax._src.xla_bridge").addFilter(_not_about_missing_cuda)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorajax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
