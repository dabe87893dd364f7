"""What a plan counts beside the training step."""

import dataclasses
from types import SimpleNamespace

import pytest

from lorajax.config import OutputConfig, load_config
from lorajax.errors import UserError
from lorajax.memory.analysis import Memory
from lorajax.memory.costs import Rates
from lorajax.memory.plan import Plan, outline_of
from lorajax.memory.planner import Breakdown, Estimate
from lorajax.memory.policy import Layout, Policy
from lorajax.sharding import data_mesh
from lorajax.training import planning, program
from lorajax.training.inputs import RunShape
from lorajax.training.program import Program

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


def test_an_evaluation_is_compiled_once_for_layouts_of_the_same_rows(plan, llama_folder, monkeypatch):
    """Of three layouts the first two do not fit, one for its step, one for its evaluation; a row is GiB."""
    first, second, third = (
        dataclasses.replace(plan.chosen, layout=Layout(rows, Policy.of(kept, 2)), seconds=seconds)
        for rows, kept, seconds in ((2, "none", 1.0), (2, "full", 2.0), (1, "full", 3.0))
    )
    evaluations = []

    def compile_evaluation(run, *_):
        evaluations.append(run.layout.rows)
        return run.layout.rows, Memory(0, 3 * run.layout.rows * GIB, 0)

    def compile_step(run, *_):
        kept_all = run.layout.checkpointing == Policy.of("none", 2)
        return Program(run.layout, Memory(3 * GIB, (6 if kept_all else 1) * GIB, 0))

    monkeypatch.setattr(program, "compile_evaluation", compile_evaluation)
    monkeypatch.setattr(program, "compile_step", compile_step)
    given = {"model.path": llama_folder, "data.path": "d", "data.max_length": 64, "output.output_dir": "o"}
    config = load_config(None, [f"--{key}={value}" for key, value in given.items()])
    run = RunShape(config=config, mesh=data_mesh(), total_steps=1)
    plan = dataclasses.replace(plan, options=[first, second, third], chosen=first)
    run, found, plan = program.compile_planned(run, plan, outline_of(config), evaluates=True)
    assert evaluations == [2, 1]
    assert found.step == run.layout == third.layout and found.evaluate == 1
    assert found.memory.total == 6 * GIB == plan.taken and plan.others == {"evaluation": 6 * GIB}
