"""What a plan counts beside the training step."""

import dataclasses
from types import SimpleNamespace

import pytest

from lorajax.config import OutputConfig
from lorajax.errors import UserError
from lorajax.memory.plan import Plan
from lorajax.memory.planner import Breakdown, Estimate
from lorajax.memory.policy import Layout, Policy
from lorajax.training import planning

GIB = 2**30


@pytest.fixture
def plan():
    """Of 8 GiB, of which weights and state take 3."""
    chosen = Estimate(Layout(1, Policy.of("full", 2)), 1, 1.0, Breakdown(2 * GIB, 0, GIB, GIB, GIB), 0)
    return Plan("some GPU", 8 * GIB, 0, 4096, [chosen], chosen)


@pytest.fixture
def inputs(tmp_path):
    output = OutputConfig(output_dir=str(tmp_path), sample_prompts=["a", "b"])
    return SimpleNamespace(config=SimpleNamespace(output=output), tokenizer=None)


@pytest.mark.parametrize("each, at_once", [(0.5, 8), (1, 4), (5, 1)])
def test_as_many_prompts_are_answered_at_a_time_as_fit(each, at_once, plan, inputs, monkeypatch):
    monkeypatch.setattr(
        planning, "answering_memory", lambda *_, batch_size, **__: int(each * batch_size * GIB)
    )
    found, number = planning.plan_answers(plan, inputs, None)
    assert number == at_once
    assert (
        found.others == {"generation": (3 + each * at_once) * GIB}
        and found.most == found.others["generation"]
    )
    assert "checkpoint 3.00G, generation" in found.lines()["other times"]


def test_answers_that_do_not_fit_are_refused_before_training(plan, inputs, monkeypatch):
    monkeypatch.setattr(planning, "answering_memory", lambda *_, **__: 6 * GIB)
    with pytest.raises(
        UserError, match=r"sample_prompts takes 6.00G .* \(3.00G\), the budget is 8.00G; shorten"
    ):
        planning.plan_answers(plan, inputs, None)


def test_the_most_of_a_plan_is_that_of_its_largest_program(plan):
    assert plan.most == 5 * GIB
    assert plan.beside("evaluation", GIB).most == 5 * GIB
    assert plan.beside("evaluation", 4 * GIB).most == 7 * GIB
    assert dataclasses.replace(plan, sizes={plan.chosen.layout: 6 * GIB}).most == 6 * GIB
