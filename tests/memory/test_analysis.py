"""Compiling in the memory that there is."""

import logging

import jax
import pytest

from lorajax.memory.analysis import compile_lowered

OUT_OF_MEMORY = jax.errors.JaxRuntimeError("NOT_FOUND: Failed to get configs for: 2 out of 129.\nSee logs")


class Lowered:
    """Compiles only with one of the given levels of timing."""

    def __init__(self, *levels):
        self.levels, self.asked = levels, []

    def compile(self, compiler_options):
        self.asked.append(compiler_options)
        if compiler_options.get("xla_gpu_autotune_level", "all") not in self.levels:
            raise OUT_OF_MEMORY
        return "compiled"


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_products_are_timed_where_that_fits(on_gpu, caplog):
    lowered = Lowered("all", 0)
    assert compile_lowered(lowered, {"some": 1}) == "compiled"
    assert lowered.asked == [{"some": 1}] and not caplog.records


def test_what_cannot_be_timed_is_compiled_without_and_said(on_gpu, caplog):
    lowered = Lowered(0)
    with caplog.at_level(logging.WARNING, logger="lorajax"):
        assert compile_lowered(lowered, {"some": 1}) == "compiled"
    assert lowered.asked == [{"some": 1}, {"some": 1, "xla_gpu_autotune_level": 0}]
    [record] = caplog.records
    assert "Failed to get configs for: 2 out of 129." in record.message


def test_another_error_stays_what_it_is(on_gpu, monkeypatch):
    with pytest.raises(jax.errors.JaxRuntimeError, match="Failed to get configs"):
        compile_lowered(Lowered())
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    lowered = Lowered(0)
    with pytest.raises(jax.errors.JaxRuntimeError):
        compile_lowered(lowered)
    assert len(lowered.asked) == 1
