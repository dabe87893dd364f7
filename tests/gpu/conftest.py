"""Tests that need an NVIDIA GPU: two commands, because tensors of more than 2^31 elements need most of one.

    XLA_CLIENT_MEM_FRACTION=0.2 python -m pytest -n 4 tests/gpu
    XLA_CLIENT_MEM_FRACTION=0.9 python -m pytest -n 0 tests/gpu -k 2_to_the_31

Most of their time is the compiler's, so that some at once take less. The first skips what needs more memory,
up to 70 GiB, than its share of the GPU. A table of the figures comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

_FIGURE = "figure"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if jax.default_backend() != "gpu":
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = (report for reports in terminalreporter.stats.values() for report in reports)
    properties = (pair for report in reports for pair in getattr(report, "user_properties", ()))
    figures = sorted({tuple(value) for name, value in properties if name == _FIGURE})
    if figures:
        width = max(len(name) for name, _ in figures)
        terminalreporter.section(f"figures on {jax.local_devices()[0].device_kind}")
        for name, value in figures:
            terminalreporter.line(f"{name:{width}}  {value}")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rates of a GPU that tests share, with their flags, are not for the user's later runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, str], None]:
    """figure(name, value): a line of the table at the end."""
    return lambda name, value: record_property(_FIGURE, (name, value))
