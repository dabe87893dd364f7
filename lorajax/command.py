"""What the commands share."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from lorajax.errors import UserError


def run_command(main: Callable[[Sequence[str]], int]) -> int:
    """Run `main(arguments)` of a command; gives its exit status.

    A UserError is printed without a traceback and gives 2, Ctrl-C gives 130, and KeyboardInterrupt(N), of a
    signal N, 128 + N. Where nobody reads on, as behind `| head`, it is 128 + SIGPIPE's.
    """
    before, sys.unraisablehook = sys.unraisablehook, _raise_again
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        return 128 + _signal_of(interrupt)
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE
    finally:
        sys.unraisablehook = before


def _nobody_reads() -> bool:
    """Whether it is standard output that is broken; what is left for it goes nowhere then."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    if broken := any(event & select.POLLERR for _, event in poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return broken


def _signal_of(interrupt: KeyboardInterrupt) -> int:
    return interrupt.args[0] if interrupt.args else signal.SIGINT


def _raise_again(lost: sys.UnraisableHookArgs) -> None:
    """Send a signal again where its exception was lost: JAX' callback of the garbage collector drops it."""
    interrupt = lost.exc_value
    if not isinstance(interrupt, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    # Later, when the callback has returned; a signal, and not Python's own note of one, ends a wait too.
    threading.Timer(0.05, signal.pthread_kill, (main_thread, _signal_of(interrupt))).start()
