"""The merge command: the merged model computes what base and adapter do; nothing is lost unasked."""

import json

import jax
import numpy as np
import pytest

from lorajax.config import Config, DataConfig, ModelConfig, OutputConfig, save_config
from lorajax.data import load_tokenizer
from lorajax.errors import UserError
from lorajax.lora.config import LoRAConfig
from lorajax.lora.peft import save_adapter
from lorajax.merge import main
from lorajax.models.checkpoint import load

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


@pytest.fixture
def base(write_llama, make_tokenizer, tmp_path):
    folder = write_llama(tmp_path / "base")
    make_tokenizer().save_pretrained(str(folder))
    return folder


@pytest.fixture
def adapted(base, tmp_path):
    """The folder of an adapter, and the logits that the model has with it."""
    model = load(
        base, lora=LoRAConfig(rank=4, alpha=8, target_modules=("q_proj", "down_proj")), dtype="float32"
    )
    for index, linear in enumerate(model.linears().values()):
        if linear.lora_b is not None:
            linear.lora_b[...] = 0.3 * jax.random.normal(jax.random.key(index), linear.lora_b[...].shape)
    save_adapter(model, tmp_path / "run" / "adapter")
    return tmp_path / "run" / "adapter", np.asarray(model(TOKENS))


def merge(*arguments):
    return main([str(argument) for argument in arguments])


def assert_close(logits, expected):
    assert np.max(np.abs(np.asarray(logits) - expected)) <= 1e-5 * np.max(np.abs(expected))


def test_base_and_adapter(base, adapted, tokenizer, tmp_path, capsys):
    adapter, expected = adapted
    settings = {"eos_token_id": [2, 0], "temperature": 0.2}
    (base / "generation_config.json").write_text(json.dumps(settings))
    out = tmp_path / "new" / "merged"
    assert merge(base, out, "--adapter", adapter, "--dtype", "float32") == 0
    assert capsys.readouterr().out == f"written to {out}\n"
    merged = load(out, dtype="float32")
    assert merged.lora_config is None
    assert_close(merged(TOKENS), expected)
    assert np.max(np.abs(expected - np.asarray(load(base, dtype="float32")(TOKENS)))) > 0.1
    assert json.loads((out / "generation_config.json").read_text()) == settings
    assert load_tokenizer(out).chat_template == tokenizer.chat_template
    assert load_tokenizer(out)("hello thanks")["input_ids"] == tokenizer("hello thanks")["input_ids"]


def test_run(base, adapted, marked_template, tmp_path):
    """dtype and chat template are the run's."""
    template = tmp_path / "template.jinja"
    template.write_text(marked_template)
    run = tmp_path / "run"
    config = Config(
        model=ModelConfig(path=str(base), dtype="float32"),
        data=DataConfig(path="org/data", chat_template=str(template)),
        output=OutputConfig(output_dir=str(run)),
    )
    save_config(config, run / "config.yaml")
    assert merge(run, tmp_path / "merged") == 0
    assert_close(load(tmp_path / "merged", dtype="float32")(TOKENS), adapted[1])
    assert load_tokenizer(tmp_path / "merged").chat_template == marked_template


def test_another_model_is_replaced_only_when_told(base, adapted, write_llama, tmp_path):
    adapter, expected = adapted
    out = write_llama(tmp_path / "merged", seed=5)
    before = np.asarray(load(out, dtype="float32")(TOKENS))
    arguments = [base, out, "--adapter", adapter, "--dtype", "float32"]
    with pytest.raises(UserError, match="merged is not empty; choose another folder, or add --overwrite"):
        merge(*arguments)
    np.testing.assert_array_equal(load(out, dtype="float32")(TOKENS), before)
    assert merge(*arguments, "--overwrite") == 0
    assert_close(load(out, dtype="float32")(TOKENS), expected)


@pytest.mark.parametrize("given", ["model", "adapter"])
def test_what_is_merged_is_not_overwritten(base, adapted, given):
    adapter, _ = adapted
    out = base if given == "model" else adapter
    files = {file: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(UserError, match="is what is to be merged; choose another folder"):
        merge(base, out, "--adapter", adapter, "--overwrite")
    assert {file: file.read_bytes() for file in out.iterdir()} == files


def test_nothing_to_merge(base, tmp_path):
    with pytest.raises(
        UserError, match="nothing to merge; name an adapter with --adapter, or give a run's folder"
    ):
        merge(base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_is_no_model(base, adapted, tmp_path):
    adapter, _ = adapted
    with pytest.raises(UserError, match=f"or the adapter's base model and --adapter {adapter}$"):
        merge(adapter, tmp_path / "merged")


def test_out_is_a_file(base, adapted, tmp_path):
    (tmp_path / "merged").write_text("")
    with pytest.raises(UserError, match="merged is a file; give a folder"):
        merge(base, tmp_path / "merged", "--adapter", adapted[0])
