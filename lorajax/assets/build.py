"""Builds the text that the small model is pre-trained on, the text of the quickstart, and the tokenizer.

    pip install numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1 statsmodels==0.15.0 networkx==3.6.1 \\
        sympy==1.14.0 jax==0.10.2 flax==0.12.8 optax==0.2.8 pandas==3.1.1
    python -m lorajax.assets.build OUT_FOLDER

OUT_FOLDER gets corpus.jsonl, quickstart.jsonl and tokenizer/. The same versions of Python and of these
packages give the same files; the versions above, on Python 3.11, gave those that come with lorajax. The
quickstart teaches pandas, so nothing of pandas, nor a paragraph that pandas shares, is in the corpus.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorajax.assets.docstrings import STANDARD_LIBRARY, Docstring, collect, deduplicate, without_shared
from lorajax.data.chat import DEFAULT_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The first of two packages that say the same is kept.
CORPUS_PACKAGES = (
    *(STANDARD_LIBRARY, "numpy", "scipy", "sklearn", "statsmodels", "networkx", "sympy"),
    *("jax", "flax", "optax"),
)
QUICKSTART_PACKAGE = "pandas"

VOCABULARY = 4096
PAD, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# A blank or a mark goes with the word that follows; digits stand alone; an empty line, and a line's end with
# the indentation of the next, are one piece.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+(?=\S)|\s+(?!\S)|\s+"

DIALOGUE_SHARE = 0.4
ANSWER_CHARACTERS = 1300
QUICKSTART_TOKENS = 480
QUICKSTART_BYTES = 1_000_000

_QUESTIONS = (
    "Explain the Python {kind} `{name}`.",
    "Explain the Python {kind} `{name}`.",
    "Explain `{name}`.",
    "What does `{name}` do?",
    "What is `{name}`?",
    "Describe the {kind} `{name}`.",
    "How do I use `{name}`?",
)
_FOLLOW_UPS = {
    "Parameters": "Which parameters does `{name}` take?",
    "Returns": "What does `{name}` return?",
    "Yields": "What does `{name}` yield?",
    "Raises": "When does `{name}` raise an error?",
    "See Also": "What is related to `{name}`?",
    "Examples": "Show examples of `{name}`.",
    "Notes": "What else is there to know about `{name}`?",
    "References": "Where can I read more about `{name}`?",
    "": "Tell me more about `{name}`.",
}


def blocks(text: str) -> list[tuple[str, str]]:
    """A docstring's parts in order: ("", paragraph) at its head, then (title, section), as in numpydoc."""
    parts: list[tuple[str, str]] = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.split("\n")
        is_section = len(lines) > 1 and len(lines[1]) >= 3 and set(lines[1]) == {"-"}
        if is_section:
            parts.append((lines[0].strip(), paragraph))
        elif parts and parts[-1][0]:
            parts[-1] = (parts[-1][0], f"{parts[-1][1]}\n\n{paragraph}")
        else:
            parts.append(("", paragraph))
    return parts


def turns(docstring: Docstring, question: str) -> list[tuple[str, str]]:
    """A dialogue of (question, answer) that holds the whole docstring.

    The first answer is the signature and as many whole parts as fit into ANSWER_CHARACTERS; each further
    section is asked for.
    """
    dialogue = [(question.format(kind=docstring.kind, name=docstring.name), docstring.heading)]
    previous = None
    for title, part in blocks(docstring.text):
        asked, answer = dialogue[-1]
        fits = len(answer) + len(part) <= ANSWER_CHARACTERS
        if not answer or (fits and (len(dialogue) == 1 or title == previous)):
            dialogue[-1] = (asked, f"{answer}\n\n{part}".strip())
        else:
            follow_up = _FOLLOW_UPS.get(title, "What are the {title} of `{name}`?")
            dialogue.append((follow_up.format(title=title.lower(), name=docstring.short_name), part))
        previous = title
    return dialogue


def text_row(docstring: Docstring) -> dict[str, Any]:
    """A row of plain text: name and signature, an empty line, the docstring."""
    return {"id": docstring.name, "text": f"{docstring.name}{docstring.signature}\n\n{docstring.text}"}


def chat_row(docstring: Docstring, dialogue: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """A row of messages."""
    messages = [
        {"role": role, "content": content}
        for question, answer in dialogue
        for role, content in (("user", question), ("assistant", answer))
    ]
    return {"id": docstring.name, "messages": messages}


def corpus_rows(docstrings: Sequence[Docstring], seed: int = 0) -> list[dict[str, Any]]:
    """One row for each docstring, plain text or a dialogue, shuffled."""
    rng = random.Random(seed)
    rows = []
    for docstring in docstrings:
        if rng.random() < DIALOGUE_SHARE:
            rows.append(chat_row(docstring, turns(docstring, rng.choice(_QUESTIONS))))
        else:
            rows.append(text_row(docstring))
    rng.shuffle(rows)
    return rows


def quickstart_rows(
    docstrings: Sequence[Docstring], tokenizer: PreTrainedTokenizerFast, seed: int = 0
) -> list[dict[str, Any]]:
    """One question and answer for each docstring, of moderate length, shuffled, up to QUICKSTART_BYTES."""
    rows = []
    for docstring in docstrings:
        row = chat_row(docstring, turns(docstring, _QUESTIONS[0])[:1])
        text = str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
        length = len(tokenizer(text)["input_ids"])
        if length <= QUICKSTART_TOKENS:
            rows.append(row)
    random.Random(seed).shuffle(rows)
    kept, size = [], 0
    for row in rows:
        size += len(_line(row).encode())
        if size > QUICKSTART_BYTES:
            break
        kept.append(row)
    return kept


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY tokens whose EOS ends each turn of a dialogue."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in (PAD, TURN, END)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[TURN],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = DEFAULT_TEMPLATE
    return fast


def _texts(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if "text" in row:
            yield row["text"]
        for message in row.get("messages", ()):
            yield f"{message['role']}\n"
            yield message["content"]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(map(_line, rows)), encoding="utf-8")
    print(f"{path}: {len(rows):,} rows, {path.stat().st_size:,} bytes")


def _is_public(docstring: Docstring) -> bool:
    return not docstring.name.startswith(("pandas.core", "pandas.io", "pandas.compat", "pandas.util"))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lorajax.assets.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="OUT_FOLDER")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)

    everything = collect(QUICKSTART_PACKAGE)
    main_classes = ("pandas.DataFrame", "pandas.Series")
    preferred = sorted(filter(_is_public, everything), key=lambda d: not d.name.startswith(main_classes))
    collected = (docstring for package in CORPUS_PACKAGES for docstring in collect(package))
    corpus = corpus_rows(without_shared(deduplicate(collected), everything))
    tokenizer = train_tokenizer(_texts(corpus))
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    _write(folder / "corpus.jsonl", corpus)
    _write(folder / "quickstart.jsonl", quickstart_rows(deduplicate(preferred), tokenizer))


if __name__ == "__main__":
    main()
