"""What every checkpoint format offers: a config, and tensors that are read one at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, known from the header.

    Attributes:
        shape: as Hugging Face orders the axes.
        read: reads the values from the file into a new array of the given dtype; nothing stays in memory
            beside what it returns.
    """

    shape: tuple[int, ...]
    read: Callable[[np.dtype], np.ndarray]


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint whose headers are read and whose weights are not.

    Attributes:
        place: the folder or file, for messages.
        hf_config: contents of config.json, or what a GGUF file says, in Hugging Face's spelling.
        eos_token_ids: tokens at which generation stops.
        tensors: by Hugging Face name, in the order in which they lie in the files.
    """

    place: Path
    hf_config: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    tensors: dict[str, StoredTensor]
