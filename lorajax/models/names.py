"""Module names: tree path <-> Hugging Face name, by the family's table.

    hf_name("llama", "layers.3.attention.q_proj") == "model.layers.3.self_attn.q_proj"
    tree_path("llama", "model.layers.3.self_attn.q_proj") == "layers.3.attention.q_proj"

Both sides are modules, without the leaf: of a tensor's name, split `.weight` or `.bias` off first.
"""

import functools
import re

from lorajax.models import FAMILIES

_LAYER = re.compile(r"(?<=\.)[0-9]+(?=\.)")


def hf_name(family: str, path: str) -> str:
    """Hugging Face name of the module at a tree path.

    Raises:
        KeyError: the family has no such module.
    """
    return _translate(FAMILIES[family].NAMES, path)


def tree_path(family: str, name: str) -> str:
    """Tree path of the module with a Hugging Face name. The layer's number is not checked against a model.

    Raises:
        KeyError: the family has no such module.
    """
    return _translate(_tree_paths(family), name)


@functools.cache
def _tree_paths(family: str) -> dict[str, str]:
    return {name: path for path, name in FAMILIES[family].NAMES.items()}


def _translate(table: dict[str, str], name: str) -> str:
    layer = _LAYER.search(name)
    if layer is None:
        return table[name]
    return table[_LAYER.sub("{i}", name, count=1)].replace("{i}", layer[0])
