import json
import subprocess
import sys

import pytest

from lorajax.data import load_tokenizer
from lorajax.errors import UserError


def test_local_folder_round_trip(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_token == "<|im_end|>"
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded("hello fox")["input_ids"] == tokenizer("hello fox")["input_ids"]


def test_nothing_is_said_of_torch_which_nobody_needs(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    program = f"""
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
from lorajax.data import load_tokenizer
load_tokenizer({str(tmp_path)!r})
import logging, sys
assert "torch" not in sys.modules
logging.getLogger("transformers").warning("something else")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "something else" in done.stderr.splitlines()[-1]
    assert "PyTorch" not in done.stderr


def test_unknown_tokenizer_class_falls_back_to_tokenizer_json(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "FromALaterReleaseTokenizer"
    config["eos_token"] = {"content": "<|im_end|>", "__type": "AddedToken"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_token_id == tokenizer.eos_token_id
    assert loaded.chat_template == tokenizer.chat_template


def test_fallback_reads_what_lies_beside_tokenizer_json(tmp_path, tokenizer):
    from lorajax.data.tokenizer import _load_json

    tokenizer.save_pretrained(tmp_path)
    loaded = _load_json(tmp_path)
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert loaded.chat_template == tokenizer.chat_template
    text = "<|im_start|>user\n hello  fox"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_no_eos(tmp_path, make_tokenizer):
    make_tokenizer(pad_token="<|end|>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(tmp_path)


def test_gguf_needs_a_tokenizer():
    with pytest.raises(UserError, match=r"model\.tokenizer"):
        load_tokenizer("some/model.gguf")


@pytest.mark.parametrize("make_folder", [False, True])
def test_nothing_there(tmp_path, make_folder):
    path = tmp_path / "nothing"
    if make_folder:
        path.mkdir()
    with pytest.raises(UserError, match="nothing"):
        load_tokenizer(path)


def test_offline_and_not_cached(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"someone/no-such-model.*connection"):
        load_tokenizer("someone/no-such-model")
