"""python -m lorajax.chat MODEL: answers a prompt, a file of prompts, or you, in a dialogue."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorajax.command import run_command
from lorajax.errors import UserError
from lorajax.model_arguments import add_model_arguments, load_model, model_source

if TYPE_CHECKING:
    from lorajax.data.formats import Message
    from lorajax.data.sources import Row


def main(argv: Sequence[str]) -> int:
    """Answer as the arguments say; gives the exit status."""
    arguments = _parser().parse_args(argv)
    source = model_source(arguments)
    prompts = None if arguments.file is None else _read_prompts(Path(arguments.file).expanduser())
    from lorajax.generation import generate, stream
    from lorajax.training.program import use_compilation_cache

    use_compilation_cache()
    model, tokenizer = load_model(source)
    options: dict[str, Any] = {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
    }
    if prompts is not None:
        answers = generate(model, tokenizer, prompts, **options)
        _print_answers(prompts, answers, as_json=arguments.file.endswith(".jsonl"))
    elif arguments.prompt is not None:
        _print_pieces(stream(model, tokenizer, arguments.prompt, **options))
    else:
        _dialogue(partial(stream, model, tokenizer, **options))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lorajax.chat",
        description="Answer one prompt, a file of prompts, or, without either, a dialogue in the terminal.",
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="answer this question")
    given.add_argument(
        "--file",
        metavar="FILE",
        help="answer each line of a text file; or each row of a .jsonl file (prompt, or messages up to the "
        "last answer), as rows of prompt and answer",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0, the default: the most likely token"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="draw from the likeliest tokens of this share"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws; default: %(default)s")
    return parser


def _read_prompts(file: Path) -> list[str | list[Message]]:
    from lorajax.data.sources import open_source

    if file.suffix == ".jsonl":
        prompts = [_prompt_of(row) for row in open_source(str(file), key="--file").rows()]
    else:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file: {file} cannot be read: {error}") from error
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--file: {file} holds no prompts")
    return prompts


def _prompt_of(row: Row) -> str | list[Message]:
    from lorajax.data.formats import Conversation, parse_row

    prompt = row.fields.get("prompt")
    if isinstance(prompt, str):
        return prompt
    asked = row if prompt is None else row._replace(fields={"messages": prompt})
    example = parse_row(asked, train_on_prompt=True)
    messages = list(example.messages) if isinstance(example, Conversation) else []
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise UserError(f"{row.origin}: asks nothing; a row needs a prompt, or messages")
    return messages


def _print_answers(prompts: list[str | list[Message]], answers: list[str], *, as_json: bool) -> None:
    for prompt, answer in zip(prompts, answers, strict=True):
        if as_json:
            print(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False))
        else:
            print(f"> {prompt}\n{answer}\n")


def _print_pieces(pieces: Iterator[str]) -> str:
    """Print text as it comes; gives all of it."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def _dialogue(answer: Callable[[list[Message]], Iterator[str]]) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lets input() edit the line and recall earlier ones)
    print("/reset begins a new dialogue, /exit leaves.", file=sys.stderr)
    messages: list[Message] = []
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (question := input("> ").strip()) != "/exit":
            if question == "/reset":
                messages = []
            elif question:
                asked = [*messages, {"role": "user", "content": question}]
                try:
                    text = _print_pieces(answer(asked))
                except UserError as error:
                    print(f"error: {error} (/reset begins a new dialogue)", file=sys.stderr)
                else:
                    messages = [*asked, {"role": "assistant", "content": text}]
        return
    print()


if __name__ == "__main__":
    sys.exit(run_command(main))
