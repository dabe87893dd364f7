"""Tests that need an NVIDIA GPU: `pytest -n 0 tests/gpu`. A table of the figures comes last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import pytest

_FIGURES = pytest.StashKey[list[tuple[str, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash.setdefault(_FIGURES, [])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if jax.default_backend() != "gpu":
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    figures = config.stash.get(_FIGURES, [])
    if figures:
        width = max(len(name) for name, _ in figures)
        terminalreporter.section(f"figures on {jax.local_devices()[0].device_kind}")
        for name, value in figures:
            terminalreporter.line(f"{name:{width}}  {value}")


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """figure(name, value): a line of the table at the end."""
    return lambda name, value: request.config.stash[_FIGURES].append((name, value))
