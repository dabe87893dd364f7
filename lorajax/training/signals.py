"""SIGTERM and Ctrl-C: finish the step, write a checkpoint, leave."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context in which the first SIGINT or SIGTERM sets `signal`, and the second interrupts at once.

    The first is answered on standard error; the second raises KeyboardInterrupt(number). Outside the main
    thread, where Python cannot handle signals, nothing is ever set.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt(number)
        self.signal = signal.Signals(number)
        said = f"{self.signal.name}: stopping after this step, with a checkpoint; again: at once, without one"
        # Not print: the signal may have come in the midst of one.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{said}\n".encode())
