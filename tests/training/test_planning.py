"""What a plan counts beside the training step."""

import dataclasses
from types import SimpleNamespace

import pytest

from lorajax.config import OutputConfig, load_config
from lorajax.errors import UserError
from lorajax.memory.costs import Rates
from lorajax.memory.plan import Plan, outline_of
from lorajax.memory.planner import Breakdown, Estimate
from lorajax.memory.policy import Layout, Policy
from lorajax.training import planning
from lorajax.training.inputs import RunShape

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


@pytest.mark.parametrize("context", [None, 100])
def test_attention_is_planned_for_the_documents_that_there_are(context, plan, llama_folder, monkeypatch):
    """On a GPU that is imagined."""
    monkeypatch.setattr(planning, "gpu_limit", lambda budget: GIB)
    monkeypatch.setattr(planning, "host_limit", lambda budget: GIB)
    monkeypatch.setattr(planning, "offloads", lambda: True)
    monkeypatch.setattr(planning, "machine_rates", lambda: Rates(1e15, 4e12, 5e10))
    found = []
    monkeypatch.setattr(planning, "make_plan", lambda problem, *_, **__: found.append(problem) or plan)

    class Run(RunShape):
        pass

    Run.context = context
    given = {"model.path": llama_folder, "data.path": "d", "data.max_length": 512, "output.output_dir": "o"}
    config = load_config(None, [f"--{key}={value}" for key, value in given.items()])
    _, run = planning.planned(Run(config=config, mesh=None, total_steps=1), outline_of(config))
    assert run.layout == plan.chosen.layout
    assert [problem.workload(1).context for problem in found] == [context or 512]


def test_the_most_of_a_plan_is_that_of_its_largest_program(plan):
    assert plan.most == 5 * GIB
    assert plan.beside("evaluation", GIB).most == 5 * GIB
    assert plan.beside("evaluation", 4 * GIB).most == 7 * GIB
    assert dataclasses.replace(plan, sizes={plan.chosen.layout: 6 * GIB}).most == 6 * GIB
