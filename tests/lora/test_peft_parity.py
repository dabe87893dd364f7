"""The same adapters in PEFT on transformers' model, as the reference."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is the reference of these tests")
peft = pytest.importorskip("peft", reason="PEFT is the reference of these tests")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from lorajax.errors import UserError  # noqa: E402
from lorajax.lora.adapter import add_lora, merged_weight, select_targets  # noqa: E402
from lorajax.lora.config import LoRAConfig  # noqa: E402
from lorajax.lora.peft import load_adapter, save_adapter  # noqa: E402
from lorajax.models import llama  # noqa: E402
from lorajax.models.checkpoint import load, save_merged  # noqa: E402
from lorajax.models.decoder import Decoder  # noqa: E402
from lorajax.models.names import hf_name, tree_path  # noqa: E402

ADAPTERS = [
    LoRAConfig(rank=4, alpha=12.0, target_modules=("q_proj", "1.mlp.down_proj")),
    LoRAConfig(rank=8, alpha=2.5, target_modules=r".*\.(k|v|gate)_proj"),
    LoRAConfig(rank=2, alpha=5.0, target_modules="all-linear"),
    LoRAConfig(rank=3, alpha=4.0, target_modules=r".*\.mlp.*"),  # also matches modules that are not linear
]


def reference(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def reference_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def assert_same_logits(actual, expected):
    assert np.abs(np.asarray(actual) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("config", ADAPTERS, ids=lambda config: str(config.target_modules))
def test_peft_loads_what_is_saved_here(model, llama_folder, randomise, tokens, tmp_path, config):
    base = np.asarray(model(tokens))
    add_lora(model, config, seed=0)
    randomise(model)
    logits = np.asarray(model(tokens))
    assert np.abs(logits - base).max() > 0.1 * np.abs(base).max()
    save_adapter(model, tmp_path, base_model=str(llama_folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(reference(llama_folder), tmp_path)
    assert_same_logits(logits, reference_logits(theirs, tokens))

    merged = theirs.merge_and_unload().state_dict()
    for path, linear in model.linears().items():
        expected = merged[f"{hf_name('llama', path)}.weight"].numpy()
        np.testing.assert_allclose(np.asarray(merged_weight(linear)), expected, rtol=0, atol=2e-6)


def test_a_merged_checkpoint_is_what_peft_merges(model, llama_folder, randomise, tokens, tmp_path):
    add_lora(model, ADAPTERS[2], seed=0)
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    save_merged(model, tmp_path / "merged")
    theirs = peft.PeftModel.from_pretrained(reference(llama_folder), tmp_path / "adapter").merge_and_unload()
    ours = reference(tmp_path / "merged")
    assert_same_logits(reference_logits(ours, tokens), reference_logits(theirs, tokens))
    assert_same_logits(load(tmp_path / "merged", dtype="float32")(tokens), reference_logits(theirs, tokens))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"]},
        {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
        {"r": 9, "lora_alpha": 7, "target_modules": r".*\.(q|v)_proj"},
        {"r": 9, "lora_alpha": 7, "use_rslora": True, "target_modules": ["v_proj"]},
    ],
    ids=str,
)
def test_what_peft_saves_is_loaded_here(model, llama_folder, tokens, tmp_path, settings):
    torch.manual_seed(0)
    # init_lora_weights=False makes both halves random.
    settings = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, init_lora_weights=False, **settings)
    theirs = peft.get_peft_model(reference(llama_folder), settings).eval()
    theirs.save_pretrained(tmp_path)
    base = np.asarray(model(tokens))
    logits = np.asarray(load_adapter(model, tmp_path)(tokens))
    assert np.abs(logits - base).max() > 0.1 * np.abs(base).max()
    assert_same_logits(logits, reference_logits(theirs, tokens))
    assert model.lora_config.rank == settings.r and model.lora_config.dropout == 0.1


TWELVE_LAYERS = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def twelve_layers() -> Decoder:
    return Decoder(llama.options(TWELVE_LAYERS), dtype=jnp.float32)


def peft_targets(target_modules) -> set[str]:
    """Tree paths of the modules that PEFT adapts."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**TWELVE_LAYERS))
    if isinstance(target_modules, tuple):
        target_modules = list(target_modules)
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=target_modules), model)
    names = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    return {tree_path("llama", name) for name in names}


@pytest.mark.parametrize(
    "target_modules",
    [
        "all-linear",
        "ALL-LINEAR",
        ("q_proj",),
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ("self_attn.o_proj", "model.layers.3.mlp.up_proj"),
        ("1.mlp.up_proj", "layers.10.self_attn.q_proj"),
        r".*\.(q|v)_proj",
        r".*_proj",
        r".*layers\.1\d?\..*(up|down)_proj",
        r"model\.layers\.(0|1|2)\.self_attn\.[qkvo]_proj",
        r"(?i).*\.Q_PROJ",
    ],
    ids=str,
)
def test_the_same_layers_as_peft(twelve_layers, target_modules):
    selected = select_targets(twelve_layers, target_modules)
    assert selected and set(selected) == peft_targets(target_modules)


@pytest.mark.parametrize("target_modules", ["q_proj", "layers.0", ("proj",), ("mlp",), ("layers",)], ids=str)
def test_what_peft_refuses_is_refused(twelve_layers, target_modules):
    with pytest.raises(ValueError):
        peft_targets(target_modules)
    with pytest.raises(UserError):
        select_targets(twelve_layers, target_modules)
