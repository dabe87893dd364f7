"""The running account of a run: progress bar, metrics rows, and the stop at a loss that is no number."""

from __future__ import annotations

import math
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from tqdm import TqdmWarning
from tqdm.auto import tqdm

from lorajax.errors import UserError
from lorajax.training.metrics import MetricsLog, peak_memory_bytes
from lorajax.training.step import SMALLEST_LOSS_SCALE, StepMetrics

# Seconds between two states of the bar where it is not shown on a terminal, but written to a file.
_FILE_INTERVAL = 10.0


class _Numbers(NamedTuple):
    """StepMetrics on the host."""

    loss: float
    grad_norm: float
    learning_rate: float
    loss_scale: float


class _Pending(NamedTuple):
    step: int
    metrics: StepMetrics
    tokens: int
    target_tokens: int


@dataclass
class Totals:
    """What this process has done so far.

    Attributes:
        seconds: spent in training steps.
        tokens: that are not padding.
        last_loss: of the last step read, None before the first.
    """

    seconds: float = 0.0
    tokens: int = 0
    last_loss: float | None = None


class Progress:
    """Reads each step's metrics when the next step has been started, so that the device never waits for it.

    A row's step_seconds and tokens_per_second are means over the steps since the last row; the rest are the
    step's own.
    """

    def __init__(self, log: MetricsLog, *, start: int, total: int, logging_steps: int, scaled: bool):
        self._log, self._every, self._total, self._scaled = log, logging_steps, total, scaled
        self._pending: _Pending | None = None
        self._window_seconds, self._window_tokens, self._window_steps = 0.0, 0, 0
        self._clock = time.perf_counter()
        self.totals = Totals()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmWarning)  # a notebook without ipywidgets gets plain text
            self._bar = tqdm(
                initial=start,
                total=total,
                unit="step",
                desc="train",
                dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else _FILE_INTERVAL,
            )

    def step_started(self, step: int, metrics: StepMetrics, tokens: int, target_tokens: int) -> None:
        """Take a step's metrics, still on the device, and read those of the step before.

        Raises:
            UserError: the loss of the step before is no number.
        """
        self.flush()
        self._pending = _Pending(step, metrics, tokens, target_tokens)

    def flush(self) -> None:
        """Wait for the step that is running, and report it.

        Raises:
            UserError: its loss is no number.
        """
        if self._pending is None:
            return
        (step, device_metrics, tokens, target_tokens), self._pending = self._pending, None
        metrics = _Numbers(*map(float, jax.device_get(device_metrics)))
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._check(step, metrics)
        self.totals.seconds += seconds
        self.totals.tokens += tokens
        self.totals.last_loss = metrics.loss
        self._window_seconds += seconds
        self._window_tokens += tokens
        self._window_steps += 1
        rate = self._window_tokens / self._window_seconds
        peak = peak_memory_bytes()
        status = f"loss {metrics.loss:.3f}, {rate:,.0f} tokens/s, peak {peak / 2**30:.2f} GiB"
        self._bar.set_postfix_str(status, refresh=False)
        self._bar.update(step - self._bar.n)
        if step % self._every and step not in (1, self._total):
            return
        row: dict[str, Any] = {
            "step": step,
            "loss": metrics.loss,
            "grad_norm": metrics.grad_norm if math.isfinite(metrics.grad_norm) else None,
            "learning_rate": metrics.learning_rate,
            "tokens": tokens,
            "target_tokens": target_tokens,
            "step_seconds": self._window_seconds / self._window_steps,
            "tokens_per_second": rate,
            "peak_memory_bytes": peak,
        }
        if self._scaled:
            row["loss_scale"] = metrics.loss_scale
        self._log.write(row)
        self._window_seconds, self._window_tokens, self._window_steps = 0.0, 0, 0

    def evaluated(self, step: int, loss: float, target_tokens: int, seconds: float) -> None:
        """Write an evaluation's row; the time it took counts for no step."""
        self._log.write(
            {
                "step": step,
                "eval_loss": loss,
                "eval_target_tokens": target_tokens,
                "eval_seconds": seconds,
                "peak_memory_bytes": peak_memory_bytes(),
            }
        )
        self.say(f"step {step}: eval_loss {loss:.4f}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.clear()
        tqdm.write(text)
        self._bar.refresh()

    def restart_clock(self) -> None:
        """What was done since the last step is no part of the next one."""
        self._clock = time.perf_counter()

    def close(self) -> None:
        self._bar.close()

    def _check(self, step: int, metrics: _Numbers) -> None:
        """Raise unless the step made an update, or float16's loss scale is still being found."""
        if not math.isfinite(metrics.loss):
            what = f"the loss is {metrics.loss}"
        elif math.isfinite(metrics.grad_norm):
            return
        elif not self._scaled:
            what = f"the norm of the gradient is {metrics.grad_norm}"
        elif metrics.loss_scale < SMALLEST_LOSS_SCALE:
            what = f"float16 overflows even with the loss scaled by {metrics.loss_scale}"
        else:
            return
        raise NotFinite(step, what)


class NotFinite(UserError):
    """A step's loss or gradient is no number; the step changed nothing."""

    def __init__(self, step: int, what: str):
        super().__init__(f"step {step}: {what}")
        self.step, self.what = step, what
