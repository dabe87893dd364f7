"""What the commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from lorajax.errors import UserError


def run_command(main: Callable[[Sequence[str]], int]) -> int:
    """Run `main(arguments)` of a command; gives its exit status.

    A UserError is printed without a traceback and gives 2, Ctrl-C gives 130.
    """
    try:
        return main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
