"""The adapter's files without PEFT: what is written, what is read, and what is refused."""

import errno
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lorajax.errors import UserError
from lorajax.lora.adapter import add_lora
from lorajax.lora.config import LoRAConfig
from lorajax.lora.peft import load_adapter, save_adapter
from lorajax.models.checkpoint import load

CONFIG = LoRAConfig(rank=3, alpha=6.0, dropout=0.25, target_modules=("q_proj", "down_proj"))


def adapters(model):
    return {
        path: (
            np.asarray(linear.lora_a[...]),
            np.asarray(linear.lora_b[...]),
            linear.lora_scale,
            linear.lora_dropout,
        )
        for path, linear in model.linears().items()
        if linear.lora_a is not None
    }


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for path, (a, b, scale, dropout) in expected.items():
        np.testing.assert_array_equal(actual[path][0], a)
        np.testing.assert_array_equal(actual[path][1], b)
        assert actual[path][2:] == (scale, dropout)


@pytest.fixture
def adapted(model, randomise):
    add_lora(model, CONFIG, seed=0)
    randomise(model)
    return model


@pytest.fixture
def folder(adapted, tmp_path) -> Path:
    """A good adapter, CONFIG's."""
    save_adapter(adapted, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, **fields) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rewrite(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_files(adapted, tmp_path):
    save_adapter(adapted, tmp_path / "deep" / "adapter", base_model="some/base")
    folder = tmp_path / "deep" / "adapter"
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.25,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
    }
    assert config | expected == config
    assert isinstance(config["lora_alpha"], int)
    tensors = load_file(folder / "adapter_model.safetensors")
    shapes = {"self_attn.q_proj": (32, 64), "mlp.down_proj": (48, 32)}
    assert {name: (tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()} == {
        f"base_model.model.model.layers.{layer}.{name}.lora_{half}.weight": (shape, "float32")
        for layer in (0, 1)
        for name, (columns, rows) in shapes.items()
        for half, shape in (("A", (3, columns)), ("B", (rows, 3)))
    }
    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("target_modules", "written"),
    [
        (("q_proj", "0.mlp.up_proj"), ["q_proj", "0.mlp.up_proj"]),
        ("all-linear", ["k_proj", "o_proj", "q_proj", "v_proj", "down_proj", "gate_proj", "up_proj"]),
        (r".*(q|v)_proj", ["q_proj", "v_proj"]),
        (r".*\.1\.mlp\.(up|down)_proj", ["model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]),
    ],
)
def test_written_target_names_select_the_same_layers(model, tmp_path, target_modules, written):
    add_lora(model, LoRAConfig(rank=2, alpha=2.5, target_modules=target_modules), seed=0)
    before = adapters(model)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == written and config["lora_alpha"] == 2.5
    assert_same(adapters(load_adapter(model, tmp_path)), before)


def test_round_trip_into_a_bare_model(adapted, folder, llama_folder, tokens):
    bare = load(llama_folder, dtype="float32")
    assert load_adapter(bare, folder) is bare
    assert_same(adapters(bare), adapters(adapted))
    assert bare.lora_config == CONFIG
    np.testing.assert_array_equal(np.asarray(bare(tokens)), np.asarray(adapted(tokens)))


def test_another_adapter_is_replaced(adapted, folder, llama_folder):
    other = load(llama_folder, dtype="float32")
    add_lora(other, LoRAConfig(rank=5, target_modules=("v_proj", "q_proj")), seed=1)
    load_adapter(other, str(folder))
    assert_same(adapters(other), adapters(adapted))
    assert other.lora_config == CONFIG


def test_half_precision_adapters_become_float32(adapted, folder, model):
    rewrite(
        folder, lambda tensors: tensors.update({k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()})
    )
    before = adapters(adapted)
    load_adapter(model, folder)
    for path, (a, b, _, _) in adapters(model).items():
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, before[path][0].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_rank_stabilised_scale(folder, model, tmp_path):
    edit(folder, use_rslora=True)
    load_adapter(model, folder)
    scale = model.linears()["layers.0.attention.q_proj"].lora_scale
    assert scale == pytest.approx(6 / 3**0.5, rel=1e-15)
    save_adapter(model, tmp_path / "again")
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["use_rslora"] is False
    load_adapter(model, tmp_path / "again")
    assert model.linears()["layers.0.attention.q_proj"].lora_scale == scale


def test_settings_that_change_nothing_are_accepted(adapted, folder, model):
    before = adapters(adapted)
    edit(
        folder,
        init_lora_weights="gaussian",
        lora_bias=False,
        exclude_modules=None,
        megatron_core="megatron.core",
        qalora_group_size=16,
        peft_version="0.99",
        task_type=None,
        target_modules=["q_proj", "down_proj", "query_key_value"],
    )
    load_adapter(model, folder)
    assert_same(adapters(model), before)
    assert model.lora_config == CONFIG


BAD_CONFIGS = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA"),
    ({"use_dora": True}, "only plain LoRA is supported, not use_dora: true"),
    ({"bias": "lora_only"}, 'bias: "lora_only"'),
    ({"modules_to_save": ["lm_head"]}, r'modules_to_save: \["lm_head"\]'),
    ({"rank_pattern": {"q_proj": 2}}, 'rank_pattern: {"q_proj": 2}'),
    ({"alpha_pattern": {"q_proj": 2}, "lora_bias": True}, 'alpha_pattern: {"q_proj": 2}; lora_bias: true'),
    ({"layers_to_transform": [0]}, r"layers_to_transform: \[0\]"),
    ({"layers_to_transform": 0}, "layers_to_transform: 0"),
    ({"exclude_modules": "q_proj"}, "exclude_modules"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out: true"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
    ({"use_of_a_future_variant": {"a": 1}}, "use_of_a_future_variant"),
    ({"init_lora_weights": "pissa_niter_16"}, r'init_lora_weights: "pissa_niter_16" \(it changes the base'),
    ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ({"r": None}, "r must be a whole number, not None"),
    ({"r": 2.5}, "r must be a whole number, not 2.5"),
    ({"r": 0}, "lora.rank must be a whole number of at least 1, not 0"),
    ({"lora_alpha": "16"}, "lora_alpha must be a number, not '16'"),
    ({"lora_dropout": 1.5}, "lora.dropout must be"),
    ({"target_modules": None}, "target_modules must be names or a regular expression, not None"),
    ({"target_modules": []}, "lora.target_modules is empty"),
    ({"target_modules": ["query"]}, "no linear layer is named query"),
    ({"target_modules": ["q_proj", "lm_head"]}, "adapters on the head"),
    ({"target_modules": "q_proj"}, "matches no whole module name"),
    ({"target_modules": "("}, "is no valid regular expression"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS)
def test_refused_configs(adapted, folder, fields, message):
    edit(folder, **fields)
    assert_refused(adapted, folder, f"adapter_config.json: .*{message}")


def assert_refused(model, folder, message):
    """The error says so, and the adapter which the model had is still there."""
    before, config = adapters(model), model.lora_config
    with pytest.raises(UserError, match=message):
        load_adapter(model, folder)
    assert_same(adapters(model), before)
    assert model.lora_config == config


def test_wrong_tensors_are_all_listed(adapted, folder):
    prefix = "base_model.model.model.layers"

    def change(tensors):
        tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((3, 32), np.float32)
        del tensors[f"{prefix}.0.mlp.down_proj.lora_B.weight"]
        tensors[f"{prefix}.1.mlp.down_proj.lora_A.weight"] = np.zeros((3, 47), np.float32)

    rewrite(folder, change)
    with pytest.raises(UserError) as error:
        load_adapter(adapted, folder)
    assert str(error.value) == (
        f"{folder}/adapter_model.safetensors: the tensors are not those of a rank-3 adapter for this model:\n"
        f"  missing: {prefix}.0.mlp.down_proj.lora_B.weight\n"
        f"  wrong shape: {prefix}.1.mlp.down_proj.lora_A.weight is [3, 47], not [3, 48]\n"
        "  surplus: base_model.model.lm_head.lora_A.weight"
    )


@pytest.mark.parametrize(("dtype", "name"), [(np.int8, "I8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")])
def test_quantised_tensors_are_refused(adapted, folder, dtype, name):
    rewrite(folder, lambda tensors: tensors.update({"x": np.zeros(3, dtype)}))
    assert_refused(adapted, folder, rf"only BF16, F16, F32 can: x \({name}\)")


def test_names_of_live_modules_are_no_file_names(adapted, folder):
    def change(tensors):
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    rewrite(folder, change)
    assert_refused(adapted, folder, r"(?s)missing: .*surplus: .*lora_A\.default\.weight")


def test_long_lists_are_cut(adapted, folder):
    rewrite(folder, lambda tensors: tensors.update({f"x{i}": np.zeros(1, np.float32) for i in range(25)}))
    assert_refused(adapted, folder, r"(?s)surplus: x.*and 5 more$")


def test_an_adapter_for_a_larger_model(folder, write_llama, tmp_path):
    larger = load(write_llama(tmp_path / "larger", num_hidden_layers=3, hidden_size=48), dtype="float32")
    assert_refused(larger, folder, r"(?s)\[3, 32\], not \[3, 48\].*missing: base_model.model.model.layers.2")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", None, "adapter: no adapter_config.json; an adapter is a folder with it and"),
        ("adapter_config.json", b"{", "adapter_config.json:1: not JSON"),
        ("adapter_config.json", b"[]", "must hold a JSON object, not list"),
        (
            "adapter_model.safetensors",
            None,
            "adapter: no adapter_model.safetensors beside adapter_config",
        ),
        (
            "adapter_model.safetensors",
            b"",
            "adapter_model.safetensors: cannot be read; the file is truncated",
        ),
    ],
)
def test_missing_and_damaged_files(adapted, folder, file, content, message):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    assert_refused(adapted, folder, message)


def test_truncated_tensors(adapted, folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert_refused(adapted, folder, "adapter_model.safetensors: cannot be read; the file is truncated")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_diverged_adapter(adapted, folder, dtype):
    def change(tensors):
        name = next(name for name in tensors if name.endswith("1.mlp.down_proj.lora_A.weight"))
        tensors[name] = np.full(tensors[name].shape, np.nan, dtype)

    rewrite(folder, change)
    assert_refused(adapted, folder, r"NaN or infinity in 1 of 8 tensors, .*1\.mlp\.down_proj\.lora_A")


def test_pickled_weights_are_refused(adapted, folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert_refused(adapted, folder, "adapter_model.bin: pickled weights are refused, because")


def test_no_such_folder(adapted, tmp_path):
    assert_refused(adapted, tmp_path / "nothing", "nothing: no such file or folder")


def test_an_adapter_from_the_hub(folder, adapted, model, monkeypatch):
    downloads = []

    def download(name, **_):
        downloads.append(name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load_adapter(model, "someone/some-adapter")
    assert downloads == ["someone/some-adapter"]
    assert_same(adapters(model), adapters(adapted))


def test_saving_without_adapter(model, tmp_path):
    with pytest.raises(UserError, match="the model has no adapter to save"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_failed_save_leaves_the_old_adapter(adapted, folder, llama_folder, monkeypatch):
    before = adapters(adapted)
    add_lora(adapted, LoRAConfig(rank=9), seed=0)

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full_disk)  # the second file
        with pytest.raises(UserError, match="cannot write the adapter: .*No space left on device"):
            save_adapter(adapted, folder)
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert_same(adapters(load_adapter(load(llama_folder, dtype="float32"), folder)), before)


def test_saving_over_a_file(adapted, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot write the adapter"):
        save_adapter(adapted, tmp_path / "file")
