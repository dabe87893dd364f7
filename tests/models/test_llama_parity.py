"""Float32 logits equal those of transformers for every option of the family."""

import numpy as np
import pytest

from lorajax.models.checkpoint import load, outline

TOLERANCE = 1e-5

# All texts below are longer than this: scaled RoPE is compared past the original context.
CONTEXT = 32
LINEAR = {"factor": 4.0}
DYNAMIC = {"factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": CONTEXT}

OPTIONS = {
    "grouped heads, head_dim above D/N": {},
    "one key for each head, head_dim of D/N, tied": {
        "num_key_value_heads": 4,
        "head_dim": None,
        "tie_word_embeddings": True,
    },
    "one key for all heads, head_dim below D/N, gelu": {
        "num_key_value_heads": 1,
        "head_dim": 4,
        "hidden_act": "gelu",
    },
    "attention bias, gelu_pytorch_tanh": {"attention_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    "mlp bias, relu": {"mlp_bias": True, "hidden_act": "relu"},
    "large epsilon": {"rms_norm_eps": 0.1},
    "theta": {"rope_theta": 500.0},
    "linear": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_theta": 500.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama3": {
        "rope_theta": 500.0,
        "rope_scaling": LLAMA3 | ORIGINAL,
        "max_position_embeddings": 128,
    },
    "llama3, original length beside rope_scaling": {
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64},
        "max_position_embeddings": 128,
        **ORIGINAL,
    },
    "llama3 without an original length": {"rope_scaling": LLAMA3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_logits(options, write_llama, tmp_path, random_tokens, transformers_logits, difference):
    folder = write_llama(tmp_path, **{"max_position_embeddings": CONTEXT} | options)
    tokens = random_tokens(1, 90)
    (expected,) = transformers_logits(folder, list(tokens))
    found = load(folder, dtype="float32")(tokens)[0]
    assert found.dtype == np.float32
    assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("kind", ["theta", "linear", "dynamic", "llama3"])
def test_other_spellings(kind, write_llama, tmp_path, random_tokens, transformers_logits):
    """Of what test_logits compares: `rope_parameters`, and `rope_scaling` with `rope_type`."""
    old = {"max_position_embeddings": CONTEXT} | OPTIONS[kind]
    rest = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    scaling = dict(old.get("rope_scaling", {}))
    rope_type = scaling.pop("type", None) or scaling.get("rope_type", "default")
    spellings = [
        old | {"rope_scaling": scaling | {"rope_type": rope_type}},
        rest | {"rope_parameters": scaling | {"rope_type": rope_type, "rope_theta": 500.0}},
    ]
    tokens = random_tokens(1, 90)
    first = write_llama(tmp_path / "first", **old)
    (expected,) = transformers_logits(first, list(tokens))
    for number, spelling in enumerate(spellings):
        folder = write_llama(tmp_path / str(number), **spelling)
        assert outline(folder).options == outline(first).options
        (found,) = transformers_logits(folder, list(tokens))
        np.testing.assert_array_equal(found, expected)


def test_dynamic_scaling_follows_each_document(
    write_llama, tmp_path, random_tokens, transformers_logits, difference
):
    """On a packed row, against transformers on one document at a time."""
    folder = write_llama(tmp_path, **{"max_position_embeddings": CONTEXT} | OPTIONS["dynamic"])
    lengths = (CONTEXT, CONTEXT + 1, 1, 90, 5)
    documents = [random_tokens(length, seed=seed) for seed, length in enumerate(lengths)]
    row = {
        "tokens": np.concatenate(documents)[None],
        "segment_ids": np.repeat(np.arange(len(lengths)) + 1, lengths)[None],
    }
    logits = np.split(load(folder, dtype="float32")(**row)[0], np.cumsum(lengths)[:-1])
    for found, expected in zip(logits, transformers_logits(folder, documents), strict=True):
        assert difference(found, expected) <= TOLERANCE
