"""The Llama family: HF config -> decoder options, and the table of names."""

from typing import Any

from lorajax.errors import UserError
from lorajax.models.decoder import GATES, DecoderOptions
from lorajax.models.folder import read_flag, read_number, read_size
from lorajax.models.rope import ROPE_TYPES, RopeOptions

# Tree path -> Hugging Face name, both without the leaf (weight, bias): for import, PEFT and merging alike.
NAMES = {
    "embed": "model.embed_tokens",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attention.q_proj": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k_proj": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v_proj": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.o_proj": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp.gate_proj": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.mlp.up_proj": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.mlp.down_proj": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}


def options(hf_config: dict[str, Any]) -> DecoderOptions:
    """Decoder options from the contents of config.json; defaults are those of transformers' LlamaConfig.

    Raises:
        UserError: an option that the decoder does not have, or a value of the wrong type or out of range.
    """
    activation = hf_config.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in GATES:
        raise UserError(f"config.json: hidden_act {activation!r} is not one of {', '.join(GATES)}")
    heads = read_size(hf_config, "num_attention_heads", 32)
    kv_heads = read_size(hf_config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    hidden = read_size(hf_config, "hidden_size", 4096)
    head_dim = read_size(hf_config, "head_dim", hidden // heads)
    if head_dim % 2:
        raise UserError(f"config.json: head_dim {head_dim} is odd, but RoPE rotates pairs")
    attention_bias = read_flag(hf_config, "attention_bias")
    max_position = read_size(hf_config, "max_position_embeddings", 2048)
    return DecoderOptions(
        vocab_size=read_size(hf_config, "vocab_size", 32000),
        hidden_size=hidden,
        intermediate_size=read_size(hf_config, "intermediate_size", 11008),
        num_layers=read_size(hf_config, "num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        norm_epsilon=read_number(hf_config, "rms_norm_eps", 1e-6, or_zero=True),
        activation=activation,
        tie_embeddings=read_flag(hf_config, "tie_word_embeddings"),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=read_flag(hf_config, "mlp_bias"),
        rope=rope_options(hf_config, max_position),
    )


def rope_options(hf_config: dict[str, Any], max_position: int) -> RopeOptions:
    """Read both spellings: `rope_parameters` (transformers 5), and `rope_theta` beside `rope_scaling`.

    Raises:
        UserError: a kind of scaling that is not in ROPE_TYPES, or one whose numbers are missing or make no
            sense.
    """
    place = "rope_scaling" if hf_config.get("rope_scaling") else "rope_parameters"
    scaling = hf_config.get(place) or {}
    if not isinstance(scaling, dict):
        raise UserError(f"config.json: {place} must be an object with a rope_type, not {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UserError(f"config.json: RoPE scaling {kind!r} is not one of {', '.join(ROPE_TYPES)}")
    partial = scaling.get("partial_rotary_factor", hf_config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UserError(f"config.json: partial_rotary_factor {partial} is not supported; only 1.0 is")
    needed = {"linear": ["factor"], "dynamic": ["factor"]}
    needed["llama3"] = ["factor", "low_freq_factor", "high_freq_factor"]
    missing = [name for name in needed.get(kind, []) if scaling.get(name) is None]
    if missing:
        raise UserError(f"config.json: RoPE scaling {kind!r} needs {', '.join(missing)}")
    low, high = read_number(scaling, "low_freq_factor", 1.0), read_number(scaling, "high_freq_factor", 4.0)
    original: float = max_position
    if kind == "llama3":
        if high <= low:
            raise UserError(f"config.json: high_freq_factor {high} must be above low_freq_factor {low}")
        key = "original_max_position_embeddings"
        original = read_number(hf_config, key, read_number(scaling, key, max_position))
    return RopeOptions(
        theta=read_number(scaling, "rope_theta", read_number(hf_config, "rope_theta", 10000.0)),
        type=kind,
        factor=read_number(scaling, "factor", 1.0),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=int(original),
        divisors=tuple(float(d) for d in hf_config.get("rope_divisors", ())),
    )
