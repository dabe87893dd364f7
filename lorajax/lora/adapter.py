"""The adapter's place in the model: which layers get one, its first values, its merge into the weights."""

import difflib
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax.errors import UserError
from lorajax.lora.config import LoRAConfig
from lorajax.models.decoder import Decoder, Linear, LoRAParam
from lorajax.models.names import hf_name
from lorajax.sharding import data_mesh, replicated

# Tree path of a Linear -> (A [R, in], B [out, R]).
LoRAWeights = dict[str, tuple[Array | np.ndarray, Array | np.ndarray]]

# Tree paths of the modules that PEFT can adapt and this library cannot.
_UNSUPPORTED = ("embed", "head")


def select_targets(model: Decoder, target_modules: str | tuple[str, ...]) -> list[str]:
    """Tree paths of the layers that an adapter goes on, in the order of `model.linears()`.

    The rules are PEFT's, on Hugging Face's module names (`model.layers.0.self_attn.q_proj`):

    - `"all-linear"`: every projection in the blocks, not the head;
    - a sequence of names: a module whose name is one of them, or ends with a dot and one of them;
    - another string: a regular expression, which has to match the whole name (`.*\\.(q|v)_proj`).

    Raises:
        UserError: nothing is selected; a name selects nothing (PEFT ignores such names); the expression is
            invalid; the head or the embeddings are selected.
    """
    names = {hf_name(model.family, path): path for path in model.linears()}
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        return list(names.values())
    for path in _UNSUPPORTED:
        name = hf_name(model.family, path)
        if is_target(name, target_modules):
            raise UserError(
                f"lora.target_modules: {target_modules!r} selects {name}; adapters on the head and on the "
                "embeddings are not supported, only on the projections in the blocks"
            )
    selected = [path for name, path in names.items() if is_target(name, target_modules)]
    if isinstance(target_modules, str):
        if not selected and difflib.get_close_matches(target_modules.lower(), ("all-linear",)):
            raise UserError(f"lora.target_modules: did you mean all-linear, not {target_modules!r}?")
        if not selected:
            raise UserError(
                f"lora.target_modules: the regular expression {target_modules!r} matches no whole module "
                f"name; to give names, write a list, [{target_modules}]. {_describe(list(names))}"
            )
        return selected
    unknown = [name for name in target_modules if not any(is_target(known, (name,)) for known in names)]
    if unknown:
        raise UserError(
            f"lora.target_modules: no linear layer is named {', '.join(unknown)}. {_describe(list(names))}"
        )
    return selected


def is_target(name: str, target_modules: str | tuple[str, ...]) -> bool:
    """Whether a regular expression matches, or a sequence names, the module with a Hugging Face name."""
    if isinstance(target_modules, str):
        try:
            return re.fullmatch(target_modules, name) is not None
        except re.error as error:
            raise UserError(
                f"lora.target_modules: {target_modules!r} is no valid regular expression: {error}"
            ) from error
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def _describe(names: list[str]) -> str:
    short = dict.fromkeys(name.rpartition(".")[2] for name in names)
    return f"The model has {', '.join(short)}; in full, {names[0]} to {names[-1]}"


def add_lora(model: Decoder, config: LoRAConfig, *, seed: int) -> None:
    """Put a fresh adapter on the model, in place of any that it has.

    A is uniform in +-1/sqrt(in) (Kaiming-uniform with a = sqrt(5), as in PEFT), B is zero, so the model's
    output does not change. Both are float32. A module's values depend on `seed` and on its path alone, not on
    which other modules are selected.

    Raises:
        UserError: as `select_targets`.
    """
    linears = model.linears()
    key = jax.random.key(seed)
    weights: LoRAWeights = {}
    for path in select_targets(model, config.target_modules):
        # Python's hash() of a string differs from process to process; this checksum does not.
        module_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        linear = linears[path]
        bound = linear.in_features**-0.5
        a = jax.random.uniform(module_key, (config.rank, linear.in_features), jnp.float32, -bound, bound)
        weights[path] = a, jnp.zeros((linear.out_features, config.rank), jnp.float32)
    set_lora(model, config, weights)


def set_lora(model: Decoder, config: LoRAConfig, weights: LoRAWeights) -> None:
    """Put these values on the model, in place of any adapter that it has.

    `weights` holds (A [rank, in], B [out, rank]) for the tree path of each layer that `config` selects; the
    caller has checked that. Both become float32, replicated over the devices like the weights.
    """
    sharding = replicated(data_mesh())

    def place(array: Array | np.ndarray) -> Array:
        return jax.device_put(jnp.asarray(array, jnp.float32), sharding)

    _attach(model, config, {path: (place(a), place(b)) for path, (a, b) in weights.items()})


def outline_lora(model: Decoder, config: LoRAConfig) -> None:
    """`add_lora` on a model without weights (lorajax.models.checkpoint.outline): shapes in place of arrays.

    Raises:
        UserError: as `select_targets`.
    """
    linears = model.linears()
    shapes = {}
    for path in select_targets(model, config.target_modules):
        linear = linears[path]
        a = jax.ShapeDtypeStruct((config.rank, linear.in_features), jnp.float32)
        shapes[path] = a, jax.ShapeDtypeStruct((linear.out_features, config.rank), jnp.float32)
    _attach(model, config, shapes)


def _attach(model: Decoder, config: LoRAConfig, weights: Mapping[str, tuple[Any, Any]]) -> None:
    for path, linear in model.linears().items():
        if path in weights:
            linear.lora_a, linear.lora_b = (LoRAParam(leaf) for leaf in weights[path])
            linear.lora_scale, linear.lora_dropout = config.alpha / config.rank, config.dropout
        else:
            linear.lora_a = linear.lora_b = None
            linear.lora_scale = linear.lora_dropout = 0.0
    model.lora_config = config


def merged_weight(linear: Linear) -> Float[Array, "out in"]:
    """W + scale * B A, computed in float32, in W's dtype; W itself where there is no adapter."""
    weight = linear.weight[...]
    if linear.lora_a is None or linear.lora_b is None:
        return weight
    update = jnp.matmul(linear.lora_b[...], linear.lora_a[...], precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + linear.lora_scale * update).astype(weight.dtype)
