"""Models from checkpoints, and checkpoints from models.

Loading reads the headers of all files first and compares them with what the config asks for; only then do the
weights stream, tensor by tensor, from the file to their final dtype and device. The host never holds more
than one tensor beside the model.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray
from lorajax_kernels import attention_implementations

from lorajax.errors import UserError
from lorajax.lora.adapter import add_lora
from lorajax.lora.config import LoRAConfig
from lorajax.models import FAMILIES
from lorajax.models.decoder import Decoder, DecoderOptions, LoRAParam
from lorajax.models.export import save_merged
from lorajax.models.folder import read_config, read_number, resolve
from lorajax.models.gguf import open_gguf
from lorajax.models.names import hf_name
from lorajax.models.safetensors import open_folder, weight_files
from lorajax.models.stored import StoredCheckpoint, StoredTensor
from lorajax.sharding import data_mesh, replicated

__all__ = ["check_weights", "fingerprint", "initialise", "load", "outline", "resolve", "save_merged"]

DTYPES = ("bfloat16", "float16", "float32")

# Old releases of transformers stored these; they follow from the config.
_DERIVED = (".rotary_emb.inv_freq",)

# Places of a model's files that a fingerprint looks at, about, and bytes that it reads at each.
_SAMPLES, _SAMPLE_BYTES = 256, 1 << 14

# Tree path of a leaf, as flax has it: ("layers", 0, "attention", "q_proj", "weight").
LeafPath = tuple[str | int, ...]


def load(
    path: str | Path,
    *,
    lora: LoRAConfig | None = None,
    dtype: str = "bfloat16",
    quantization: str | None = None,
    attention: str = "auto",
    param_dtype: str | None = None,
    seed: int = 0,
) -> Decoder:
    """Load a model, with a fresh adapter where `lora` asks for one.

    Args:
        path: hub id, folder in Hugging Face layout (config.json and safetensors), or .gguf file.
        lora: the adapter to add; None: the base model as it is.
        dtype: of the activations and the weights: bfloat16, float16 or float32. Adapters are always float32.
        quantization: of the frozen weights; only None is supported.
        attention: name of an implementation (lorajax_kernels.attention_implementations()), or "auto".
        param_dtype: of the weights, where it is not that of the activations.
        seed: of the adapter's initial values.

    Raises:
        UserError: an argument is out of range; there is no such model, or none of a kind that can be loaded;
            its files are damaged; tensors are missing, surplus or of the wrong shape (all in one error).
    """
    _check_quantization(quantization)
    _check_arguments(dtype, param_dtype, attention)
    place = resolve(path)
    checkpoint = _open(place)
    model = _outline(place, checkpoint.hf_config, checkpoint.eos_token_ids, dtype, param_dtype, attention)
    model = _with_leaves(model, _read_weights(checkpoint, model))
    if lora is not None:
        add_lora(model, lora, seed=seed)
    return model


def check_weights(path: str | Path, model: Decoder, *, quantization: str | None = None) -> None:
    """Look for a model's weights in the headers of its files, without reading them.

    Args:
        path, quantization: as in `load`.
        model: what `outline` gave for the path, with or without an adapter.

    Raises:
        UserError: as `load`, as far as the headers tell.
    """
    _check_quantization(quantization)
    _find_tensors(_open(resolve(path)), model)


def fingerprint(path: str | Path) -> str:
    """A hash that tells a model's weights from others: of the files' sizes, and of bytes all over them.

    A few MiB are read, whatever the size. Where the files lie, and what the only one is called, is not in it.

    Args:
        path: as in `load`.

    Raises:
        UserError: there are no weights, or they cannot be read.
    """
    place, digest = resolve(path), hashlib.blake2b(digest_size=8)
    files = [place] if place.is_file() else weight_files(place)
    try:
        sizes = [file.stat().st_size for file in files]
        digest.update(repr(sizes).encode())
        stride = max(_SAMPLE_BYTES, sum(sizes) // _SAMPLES)
        for file, size in zip(files, sizes, strict=True):
            with file.open("rb", buffering=0) as stream:
                for start in range(0, size, stride):
                    stream.seek(start)
                    digest.update(stream.read(_SAMPLE_BYTES))
    except OSError as error:
        raise UserError(f"{place}: the weights cannot be read: {error}") from error
    return digest.hexdigest()


def outline(
    path: str | Path, *, dtype: str = "bfloat16", param_dtype: str | None = None, attention: str = "auto"
) -> Decoder:
    """The model without its weights: shapes and dtypes in place of arrays.

    Args:
        path: as in `load`; a folder needs no weights.
        dtype, param_dtype, attention: as in `load`.

    Raises:
        UserError: as `load`, as far as the config and a GGUF file's header tell.
    """
    _check_arguments(dtype, param_dtype, attention)
    place = resolve(path, weights=False)
    if place.is_file():
        checkpoint = open_gguf(place)
        hf_config, eos_token_ids = checkpoint.hf_config, checkpoint.eos_token_ids
    else:
        hf_config, eos_token_ids = read_config(place)
    return _outline(place, hf_config, eos_token_ids, dtype, param_dtype, attention)


def initialise(
    path: str | Path,
    *,
    dtype: str = "bfloat16",
    param_dtype: str | None = None,
    attention: str = "auto",
    seed: int,
) -> Decoder:
    """A model with random weights, from config.json alone.

    Weights are drawn from a normal distribution of standard deviation `initializer_range` (config.json;
    default 0.02), norms are 1, biases 0, as Hugging Face initialises. The values depend on the seed and the
    config alone.

    Args:
        path: hub id, or folder that holds a config.json; weights that lie there are not read.
        dtype, param_dtype, attention: as in `load`.
        seed: of the weights.

    Raises:
        UserError: as `load`.
    """
    model = outline(path, dtype=dtype, param_dtype=param_dtype, attention=attention)
    deviation = read_number(json.loads(model.hf_config), "initializer_range", 0.02, or_zero=True)
    sharding = replicated(data_mesh())
    leaves = {}
    for index, (leaf, abstract) in enumerate(_leaves(model).items()):
        shape, stored = abstract.shape, abstract.dtype
        if len(shape) == 2:
            values = _draw(jax.random.fold_in(jax.random.key(seed), index), deviation, shape, stored)
        else:
            values = jnp.full(shape, 0 if leaf[-1] == "bias" else 1, stored)
        leaves[leaf] = jax.device_put(values, sharding)
    return _with_leaves(model, leaves)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw(key: PRNGKeyArray, deviation: float, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    return (deviation * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _check_quantization(quantization: str | None) -> None:
    if quantization is not None:
        raise UserError(f"quantization {quantization!r} is not supported; leave it at None (null in YAML)")


def _check_arguments(dtype: str, param_dtype: str | None, attention: str) -> None:
    for key, value in (("dtype", dtype), ("param_dtype", param_dtype or dtype)):
        if value not in DTYPES:
            raise UserError(f"{key} {value!r} is not one of {', '.join(DTYPES)}")
    known = ("auto", *attention_implementations())
    if attention not in known:
        raise UserError(f"model.attention {attention!r} is not one of {', '.join(known)}")


def _outline(
    place: Path,
    hf_config: dict[str, Any],
    eos_token_ids: tuple[int, ...],
    dtype: str,
    param_dtype: str | None,
    attention: str,
) -> Decoder:
    family, options = _options(place, hf_config)
    model = nnx.eval_shape(
        functools.partial(
            Decoder,
            options,
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype or dtype),
            attention_implementation=attention,
            family=family,
            hf_config=json.dumps(hf_config, indent=2),
        )
    )
    model.eos_token_ids = eos_token_ids
    return model


def _options(place: Path, hf_config: dict[str, Any]) -> tuple[str, DecoderOptions]:
    family = hf_config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{place}: model_type {family!r} is not supported; supported: {known}")
    if quantization := hf_config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(
            f"{place}: the weights are quantized ({method}), which cannot be loaded; take the model in "
            "bfloat16, float16 or float32"
        )
    try:
        return family, FAMILIES[family].options(hf_config)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _leaves(model: Decoder) -> dict[LeafPath, Any]:
    flat: Any = nnx.to_flat_state(nnx.state(model))
    return dict(flat)


def _with_leaves(model: Decoder, leaves: dict[LeafPath, Array]) -> Decoder:
    state: Any = leaves  # plain arrays in place of variables: merge makes the variables
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(state))


def _open(place: Path) -> StoredCheckpoint:
    return open_gguf(place) if place.is_file() else open_folder(place)


def _find_tensors(
    checkpoint: StoredCheckpoint, model: Decoder
) -> tuple[dict[str, tuple[LeafPath, jax.ShapeDtypeStruct]], dict[str, StoredTensor], StoredTensor | None]:
    """The leaves by the names of their tensors, the tensors, and a head that the embeddings replace."""
    wanted: dict[str, tuple[LeafPath, jax.ShapeDtypeStruct]] = {}
    for leaf, abstract in _leaves(model).items():
        if isinstance(abstract, LoRAParam):
            continue  # of an adapter, which is not in there
        wanted[_tensor_name(model.family, *leaf)] = leaf, abstract
    tensors = dict(checkpoint.tensors)
    embed, head = (_tensor_name(model.family, module, "weight") for module in ("embed", "head"))
    second = tensors.pop(head, None) if model.options.tie_embeddings else None
    if second is not None and embed not in tensors:
        tensors[embed], second = second, None
    _check_tensors(checkpoint.place, {name: leaf.shape for name, (_, leaf) in wanted.items()}, tensors)
    return wanted, tensors, second


def _read_weights(checkpoint: StoredCheckpoint, model: Decoder) -> dict[LeafPath, Array]:
    """All leaves of the model, read in the order in which they lie in the files."""
    wanted, tensors, second = _find_tensors(checkpoint, model)
    embed, head = (_tensor_name(model.family, module, "weight") for module in ("embed", "head"))
    if second is not None and not _equal(tensors[embed], second, wanted[embed][1].dtype):
        raise UserError(
            f"{checkpoint.place}: the config ties the head to the embeddings, but {head} is not "
            f'{embed}; set "tie_word_embeddings": false in config.json, or take the surplus tensor out'
        )
    sharding = replicated(data_mesh())
    leaves = {}
    for name, tensor in tensors.items():
        if name in wanted:
            leaf, abstract = wanted[name]
            # Transfers are asynchronous: without the wait, the host would hold every tensor under way.
            leaves[leaf] = jax.block_until_ready(jax.device_put(tensor.read(abstract.dtype), sharding))
    return leaves


def _tensor_name(family: str, *leaf: str | int) -> str:
    *module, kind = map(str, leaf)
    return f"{hf_name(family, '.'.join(module))}.{kind}"


def _equal(first: StoredTensor, second: StoredTensor, dtype: np.dtype) -> bool:
    return first.shape == second.shape and np.array_equal(first.read(dtype), second.read(dtype))


def _check_tensors(place: Path, wanted: dict[str, tuple[int, ...]], tensors: dict[str, StoredTensor]) -> None:
    """Raises one UserError with every tensor that is missing, surplus or misshapen."""
    problems = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in tensors]
    problems += [
        f"surplus: {name} {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if name not in wanted and not name.endswith(_DERIVED)
    ]
    problems += [
        f"wrong shape: {name} is {list(tensors[name].shape)}, the config asks for {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != tuple(shape)
    ]
    if problems:
        raise UserError(
            f"{place}: the tensors do not fit the config; check that the config belongs to these weights, or "
            "download both again:\n  " + "\n  ".join(problems)
        )
