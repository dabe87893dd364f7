"""What the commands share."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Sequence

from lorajax.errors import UserError


def run_command(main: Callable[[Sequence[str]], int]) -> int:
    """Run `main(arguments)` of a command; gives its exit status.

    A UserError is printed without a traceback and gives 2, Ctrl-C gives 130.
    """
    before, sys.unraisablehook = sys.unraisablehook, _raise_again
    try:
        return main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        sys.unraisablehook = before


def _raise_again(lost: sys.UnraisableHookArgs) -> None:
    """Send Ctrl-C once more where its exception was lost: JAX' callback of the garbage collector drops it."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    # Later, when the callback has returned; a signal, and not Python's own note of one, ends a wait too.
    threading.Timer(0.05, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
