"""The small model and the text that come with lorajax, and their builder."""

import glob
import json
import sys
import tomllib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import lorajax
from lorajax.assets.build import (
    ANSWER_CHARACTERS,
    blocks,
    chat_row,
    corpus_rows,
    quickstart_rows,
    text_row,
    train_tokenizer,
    turns,
)
from lorajax.assets.docstrings import (
    Docstring,
    clean,
    collect,
    deduplicate,
    is_useful,
    without_shared,
)
from lorajax.config import load_config
from lorajax.data import decode_with_mask, load_documents, load_tokenizer, render_prompt
from lorajax.data.chat import DEFAULT_TEMPLATE

ROOT = Path(__file__).parents[1]
ASSETS = Path(str(resources.files("lorajax"))) / "assets"
TINY = ASSETS / "tiny"
CONFIG = json.loads((TINY / "config.json").read_text())


def _rows() -> list[dict]:
    return [json.loads(line) for line in (ASSETS / "quickstart.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def tiny_tokenizer():
    return load_tokenizer(TINY)


# --- what ships ---


def test_everything_is_package_data():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {
        name
        for pattern in patterns["lorajax"]
        for name in glob.glob(pattern, root_dir=ASSETS.parent, recursive=True)
    }
    files = [
        "quickstart.jsonl",
        "NOTICE",
        "tiny/config.json",
        "tiny/generation_config.json",
        "tiny/README.md",
    ]
    files += ["tiny/model.safetensors", "tiny/tokenizer.json", "tiny/tokenizer_config.json"]
    files += ["tiny/chat_template.jinja"]
    assert {f"assets/{name}" for name in files} <= packed
    assert all((ASSETS / name).is_file() for name in files)


def test_sizes():
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 8_000_000
    assert (ASSETS / "quickstart.jsonl").stat().st_size <= 1_000_000


def test_weights_are_what_config_says():
    hidden, inner, layers = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_hidden_layers"]
    query = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    key = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    layer = 2 * hidden + 2 * hidden * query + 2 * hidden * key + 3 * hidden * inner
    with safe_open(TINY / "model.safetensors", "np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        types = {file.get_slice(name).get_dtype() for name in shapes}
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    assert total == CONFIG["vocab_size"] * hidden + layers * layer + hidden
    assert total <= 3_000_000
    assert types == {"BF16"}
    assert CONFIG["tie_word_embeddings"] and "lm_head.weight" not in shapes


def test_notice_names_every_source_and_licence():
    notice = (ASSETS / "NOTICE").read_text(encoding="utf-8")
    for holder in (
        "Copyright (c) 2005-2025, NumPy Developers.",
        "Copyright (c) 2001-2002 Enthought, Inc. 2003, SciPy Developers.",
        "Copyright (c) 2007-2026 The scikit-learn developers.",
        "Copyright (c) 2009-2018 statsmodels Developers.",
        "Copyright (c) 2004-2025, NetworkX Developers",
        "Copyright (c) 2006-2023 SymPy Development Team",
        "Copyright 2018 The JAX Authors.",
        "Copyright 2024 The Flax Authors.",
        "Copyright 2019 DeepMind Technologies Limited.",
        "AQR Capital Management, LLC, Lambda Foundry, Inc. and PyData Development Team",
        "2022, 2023 Python Software Foundation",
    ):
        assert holder in notice
    for phrase in (
        "Redistributions in binary form must reproduce the above copyright notice",
        "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2",
        "Apache License, Version 2.0",
        "Changes:",
    ):
        assert phrase in notice


# --- the tokenizer ---


def test_tokenizer_and_config_agree(tiny_tokenizer):
    assert len(tiny_tokenizer) == CONFIG["vocab_size"]
    assert tiny_tokenizer.eos_token == "<|im_end|>"
    assert tiny_tokenizer.pad_token == "<|endoftext|>"
    assert tiny_tokenizer.eos_token_id == CONFIG["eos_token_id"]
    assert tiny_tokenizer.pad_token_id == CONFIG["pad_token_id"]
    generation = json.loads((TINY / "generation_config.json").read_text())
    assert generation["eos_token_id"] == CONFIG["eos_token_id"]


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    if x > 10:\n\n        return x**2\t# naïve — 例 🙂\r\n",
        "Parameters\n----------\nx : array_like\n    Input.",
        "   leading and trailing   ",
    ],
)
def test_tokenizer_gives_text_back(tiny_tokenizer, text):
    assert tiny_tokenizer.decode(tiny_tokenizer(text)["input_ids"]) == text


def test_indentation_and_rules_are_single_tokens(tiny_tokenizer):
    tokens = tiny_tokenizer.tokenize("Returns\n-------\nout : int\n    The sum.\n\nNotes")
    assert tokens == [
        "Returns",
        "Ċ",
        "-------",
        "Ċ",
        "out",
        "Ġ:",
        "Ġint",
        "ĊĠĠĠ",
        "ĠThe",
        "Ġsum",
        ".",
        "ĊĊ",
        "Notes",
    ]


def test_template_marks_answers_and_their_ends(tiny_tokenizer, write_rows, data_config):
    assert tiny_tokenizer.chat_template == DEFAULT_TEMPLATE
    docstring = Docstring("m.f", "function", "(x)", "Adds one.\n\nReturns\n-------\nint")
    dialogue = [("Explain `m.f`.", "f(x)"), ("And now?", "Adds one.")]
    documents = load_documents(
        data_config(write_rows([chat_row(docstring, dialogue)]), max_length=512),
        tiny_tokenizer,
        context_length=1024,
        seed=0,
    ).train
    tokens, mask = documents[0]
    assert decode_with_mask(tiny_tokenizer, tokens, mask) == (
        "<|im_start|>user\nExplain `m.f`.<|im_end|>\n<|im_start|>assistant\n⟦f(x)<|im_end|>⟧\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n⟦Adds one.<|im_end|>⟧\n"
    )
    asked = render_prompt(tiny_tokenizer, dialogue[0][0])
    assert tokens[: len(asked)].tolist() == asked


# --- the quickstart's text ---


def test_quickstart_rows_are_questions_about_pandas():
    rows = _rows()
    assert len({row["id"] for row in rows}) == len(rows) > 1000
    for row in rows:
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert row["id"].startswith("pandas") and f"`{row['id']}`" in question["content"]
        assert len(answer["content"]) >= 30


def test_quickstart_rows_fit_and_have_targets(tiny_tokenizer, data_config):
    config = data_config(str(ASSETS / "quickstart.jsonl"), max_length=512)
    splits = load_documents(config, tiny_tokenizer, context_length=1024, seed=0)
    stats = splits.train_stats
    assert (stats.rows, stats.truncated, stats.masked_out) == (len(_rows()), 0, 0)
    assert int(splits.train.targets.min()) > 5
    tokens = splits.train.tokens[splits.train.mask]
    assert np.count_nonzero(tokens == tiny_tokenizer.eos_token_id) == stats.rows


def test_quickstart_asks_about_rows_that_are_held_out(tiny_tokenizer, tmp_path):
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["--data.cache_dir", str(tmp_path)])
    held_out = load_documents(config.data, tiny_tokenizer, context_length=1024, seed=config.train.seed).eval
    assert held_out is not None
    texts = [tiny_tokenizer.decode(tokens) for tokens, _ in held_out]
    for prompt in config.output.sample_prompts:
        assert any(f"user\n{prompt}<|im_end|>" in text for text in texts), prompt


@pytest.mark.slow
def test_model_has_read_this_kind_of_text(tiny_tokenizer, data_config):
    config = data_config(str(ASSETS / "quickstart.jsonl"), max_length=512)
    documents = load_documents(config, tiny_tokenizer, context_length=1024, seed=0).train
    model = lorajax.load(TINY, dtype="float32")
    losses = []
    for tokens, mask in documents[:8]:
        padded = np.pad(tokens, (0, 512 - len(tokens)))[None]
        logits = np.asarray(model(padded))[0, : len(tokens) - 1]
        scores = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        losses.append(-scores[np.arange(len(tokens) - 1), tokens[1:]][mask[1:]])
    # Random weights, or those of another tokenizer, give log(4096) = 8.3 or more.
    assert np.concatenate(losses).mean() < 4.5


# --- the builder ---

SOURCES = {
    "__init__.py": '''
"""A package about shapes, with a text that is long enough to keep."""
from demo.deep.core import Circle, Drawing, area
''',
    "deep/__init__.py": "",
    "deep/core.py": '''
from collections import OrderedDict

def area(shape, *, scale=1.0, unit: str = "m"):
    """Compute the area of a shape.

    Parameters
    ----------
    shape : Shape
    \tAny shape.   
    """

class Base:
    """What all the shapes have in common, here."""
    def grow(self, factor):
        """Make the shape larger by a factor of your choice."""
    @property
    def colour(self):
        """The colour of the shape as a name, such as red."""

class Drawing(OrderedDict):
    """Shapes by name, in the order in which they are drawn."""

class Circle(Base):
    """A round shape with a centre and a radius."""
    def _hidden(self):
        """A private method that nobody should read about."""

def short():
    """Too short."""
''',
    "broken.py": "raise SystemExit('a script')",
    "tests/__init__.py": '"""Tests of the package, which are nobody\'s business."""',
    "_private.py": '"""A private module that nobody should read about."""',
}


def test_collect_names_public_docstrings_once(tmp_path, monkeypatch):
    for name, source in SOURCES.items():
        path = tmp_path / "demo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        found = {docstring.name: docstring for docstring in collect("demo")}
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "demo"]:
            del sys.modules[name]
    assert list(found) == [
        "demo",
        "demo.Circle",
        "demo.Circle.colour",
        "demo.Circle.grow",
        "demo.Drawing",
        "demo.area",
        "demo.deep.core.Base",
    ]
    assert [found[f"demo.{name}"].kind for name in ("Circle", "Circle.colour", "Circle.grow", "area")] == [
        "class",
        "attribute",
        "method",
        "function",
    ]
    assert found["demo.Circle.grow"].signature == "(factor)"
    assert found["demo.area"].heading == "area(shape, *, scale=1.0, unit='m')"
    assert found["demo.area"].text.endswith("shape : Shape\n    Any shape.")


@pytest.mark.slow
def test_standard_library_has_builtins_and_topics():
    found = {docstring.name: docstring for docstring in collect("python")}
    assert found["len"].heading == "len(obj, /)"
    assert found["str.split"].kind == "method"
    assert found["BaseException.add_note"].text.startswith("Exception.add_note(note)")
    assert found["os.path.join"].kind == "function"
    assert found["lambda"].kind == "topic"
    modules = {name.partition(".")[0] for name in found}
    assert "traceback" in modules
    assert not {"antigravity", "asynchat", "idlelib", "posix", "test", "trace", "uu"} & modules


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ImportError, match="no_such_package"):
        collect("no_such_package")


def test_clean_removes_indentation_and_what_changes_from_run_to_run():
    text = "First.  \n\n\n\n    Second.\n    >>> f()\n    0.123  # may vary\n      more\n    "
    assert clean(text) == "First.\n\nSecond.\n>>> f()\n  more"


@pytest.mark.parametrize(
    ("name", "text", "useful"),
    [
        ("m.f", "Return the number of elements of a thing.", True),
        ("m.f", "Return it.", False),
        ("m.Point", "Point(x: int, y: int, label: str = 'a long name')", False),
        ("m.Place", "Point(x: int, y: int, label: str = 'a long name')", False),
        ("m.Point.x", "Alias for field number 0, whatever that may be", False),
        ("m.f", "Ein Satz in anderer Schrift: Привет, как дела, всё хорошо", False),
    ],
)
def test_is_useful(name, text, useful):
    assert is_useful(name, text) == useful


def _docstring(name: str, *lines: str) -> Docstring:
    return Docstring(name, "function", "", "\n\n".join(lines))


def test_deduplicate_leaves_out_what_mostly_repeats():
    common = "The same long line of boilerplate that many functions of a package share."
    first = _docstring("a", common, "A line of its own that only the first of these functions has.")
    copy = _docstring("b", common, "short difference")
    second = _docstring("c", common, "Another long line, which only the second of these functions has.")
    assert deduplicate([first, copy, second]) == [first, second]


def test_held_out_text_is_kept_apart():
    paragraph = (
        "A paragraph of more than a hundred characters, which two packages have in common because one of "
        "them copied it."
    )
    held_out = _docstring("pandas.f", "Summary.", paragraph.replace(" which", "\nwhich"))
    shares, differs = _docstring("numpy.f", "Other.", paragraph), _docstring("numpy.g", "Summary.")
    assert without_shared([shares, differs], [held_out]) == [differs]


NUMPYDOC = """Sum of things.

A longer explanation.

Parameters
----------
x : int
    A thing.

y : int
    Another.

Returns
-------
int

Examples
--------
>>> add(1, 2)
3"""


def test_blocks_are_paragraphs_then_sections():
    found = blocks(NUMPYDOC)
    assert [title for title, _ in found] == ["", "", "Parameters", "Returns", "Examples"]
    assert "\n\n".join(part for _, part in found) == NUMPYDOC
    assert found[2][1].endswith("y : int\n    Another.")


def test_a_dialogue_holds_the_whole_docstring():
    short = Docstring("m.add", "function", "(x, y)", NUMPYDOC)
    assert turns(short, "Explain the {kind} `{name}`.") == [
        ("Explain the function `m.add`.", f"add(x, y)\n\n{NUMPYDOC}")
    ]
    long = Docstring("m.add", "function", "(x, y)", NUMPYDOC.replace("A thing.", "A thing. " * 200))
    dialogue = turns(long, "What is `{name}`?")
    assert [question for question, _ in dialogue] == [
        "What is `m.add`?",
        "Which parameters does `add` take?",
        "What does `add` return?",
        "Show examples of `add`.",
    ]
    assert dialogue[0][1] == "add(x, y)\n\nSum of things.\n\nA longer explanation."
    assert len(dialogue[0][1]) <= ANSWER_CHARACTERS
    assert "\n\n".join(answer for _, answer in dialogue) == f"add(x, y)\n\n{long.text}"


def test_corpus_rows_are_texts_and_dialogues_in_a_fixed_order():
    docstrings = [_docstring(f"m.f{i}", f"Function number {i} of many.") for i in range(200)]
    rows = corpus_rows(docstrings, seed=1)
    assert rows == corpus_rows(docstrings, seed=1) != corpus_rows(docstrings, seed=2)
    assert sorted(row["id"] for row in rows) == sorted(docstring.name for docstring in docstrings)
    assert 40 < sum("messages" in row for row in rows) < 120
    assert text_row(docstrings[3]) in rows or docstrings[3].name in {
        row["id"] for row in rows if "messages" in row
    }


def test_quickstart_rows_are_short_and_few(monkeypatch):
    docstrings = [_docstring(f"m.f{i}", f"Function number {i} of many.") for i in range(50)]
    docstrings.append(_docstring("m.long", "word " * 2000))
    tokenizer = train_tokenizer(docstring.text for docstring in docstrings)
    rows = quickstart_rows(docstrings, tokenizer)
    assert sorted(row["id"] for row in rows) == sorted(docstring.name for docstring in docstrings[:50])
    monkeypatch.setattr("lorajax.assets.build.QUICKSTART_BYTES", 1000)
    fewer = quickstart_rows(docstrings, tokenizer)
    assert fewer == rows[: len(fewer)]
    assert 900 < sum(len(json.dumps(row)) + 1 for row in fewer) <= 1000
