"""python -m lorajax.merge MODEL OUT: an adapter merged into its base model, as a Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lorajax.command import run_command
from lorajax.errors import UserError
from lorajax.model_arguments import ModelSource, add_model_arguments, load_model, model_source


def main(argv: Sequence[str]) -> int:
    """Merge as the arguments say; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lorajax.merge",
        description="Merge an adapter into its base model and write the result in Hugging Face layout.",
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    parser.add_argument("out", metavar="OUT", help="folder for the merged model")
    parser.add_argument("--overwrite", action="store_true", help="replace another model in OUT")
    arguments = parser.parse_args(argv)
    source, out = model_source(arguments), Path(arguments.out).expanduser()
    _check(source, out, arguments.overwrite)
    _merge(source, out)
    print(f"written to {out}")
    return 0


def _check(source: ModelSource, out: Path, overwrite: bool) -> None:
    if source.adapter is None:
        raise UserError(
            f"{source.path}: nothing to merge; name an adapter with --adapter, or give a run's folder"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder")
    inputs = [Path(path).expanduser().resolve() for path in (source.path, source.adapter)]
    if out.resolve() in inputs:
        raise UserError(f"{out} is what is to be merged; choose another folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} is not empty; choose another folder, or add --overwrite")


def _merge(source: ModelSource, out: Path) -> None:
    from lorajax.models.checkpoint import resolve, save_merged

    model, tokenizer = load_model(source)
    save_merged(model, out)
    generation_config = resolve(source.path) / "generation_config.json"
    try:
        if generation_config.is_file():
            shutil.copyfile(generation_config, out / generation_config.name)
        tokenizer.save_pretrained(str(out))
    except OSError as error:
        raise UserError(f"{out}: the tokenizer cannot be written there: {error}") from error


if __name__ == "__main__":
    sys.exit(run_command(main))
