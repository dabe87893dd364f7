"""python -m lorajax.train CONFIG.yaml [--section.key VALUE ...] [--dry-run]"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lorajax.command import run_command
from lorajax.config import parse_arguments


def main(argv: Sequence[str]) -> int:
    """Train as the arguments say; gives the exit status, 128 + N after a stop by signal N."""
    config, arguments = parse_arguments(argv, description="Fine-tune a model with LoRA.")
    from lorajax.training.fit import dry_run, fit  # takes seconds to import: mistakes above answer at once

    if arguments.dry_run:
        print(dry_run(config))
        return 0
    stopped_by = fit(config).stopped_by
    return 0 if stopped_by is None else 128 + stopped_by


if __name__ == "__main__":
    sys.exit(run_command(main))
