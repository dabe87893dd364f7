"""What a plan counts beside the training step."""

import dataclasses
import gc
import re
import shutil
import sys

import jax
import pytest
import yaml
from flax import nnx

from lorajax.config import OutputConfig, as_plain, load_config
from lorajax.errors import UserError
from lorajax.memory.analysis import Memory, gib
from lorajax.memory.costs import Rates
from lorajax.memory.plan import Plan, outline_of, problem_of
from lorajax.memory.planner import Breakdown, Estimate
from lorajax.memory.policy import Layout, Policy
from lorajax.models.checkpoint import load
from lorajax.models.decoder import LoRAParam
from lorajax.sharding import data_mesh
from lorajax.training import planning, program
from lorajax.training.fit import fit
from lorajax.training.inputs import RunShape
from lorajax.training.program import Program
from lorajax.training.weights import split_weights

GIB = 2**30
RATES = Rates(1e15, 4e12, 5e10)
# lorajax.training.fit is the function, in the package of that name.
fit_module = sys.modules[fit.__module__]


@pytest.fixture
def plan():
    """Of 8 GiB, of which weights and state take 3."""
    chosen = Estimate(Layout(1, Policy.of("full", 2)), 1, 1.0, Breakdown(2 * GIB, 0, GIB, GIB, GIB), 0)
    return Plan("some GPU", 8 * GIB, 0, 4096, [chosen], chosen)


@pytest.fixture
def output(tmp_path):
    return OutputConfig(output_dir=str(tmp_path), sample_prompts=["a", "b"])


@pytest.mark.parametrize("each, at_once", [(0.5, 8), (1, 4), (5, 1)])
def test_as_many_prompts_are_answered_at_a_time_as_fit(each, at_once, plan, output, monkeypatch):
    monkeypatch.setattr(
        planning, "answering_memory", lambda *_, batch_size, **__: int(each * batch_size * GIB)
    )
    found, number = planning.plan_answers(plan, output, None, None)
    assert number == at_once
    assert (
        found.others == {"generation": (3 + each * at_once) * GIB}
        and found.most == found.others["generation"]
    )
    assert "checkpoint 3.00G, generation" in found.lines()["other times"]


def test_answers_that_do_not_fit_are_refused_before_training(plan, output, monkeypatch):
    monkeypatch.setattr(planning, "answering_memory", lambda *_, **__: 6 * GIB)
    with pytest.raises(
        UserError, match=r"sample_prompts takes 6.00G .* \(3.00G\), the budget is 8.00G; shorten"
    ):
        planning.plan_answers(plan, output, None, None)


@pytest.fixture
def config_of(llama_folder):
    """config_of(**settings): a run of a tiny Llama, on rows of 64 tokens."""

    def make(**settings):
        given = {
            "model.path": llama_folder,
            "data.path": "d",
            "data.max_length": 64,
            "output.output_dir": "o",
        }
        given |= {name.replace("__", "."): value for name, value in settings.items()}
        return load_config(None, [f"--{key}={value}" for key, value in given.items()])

    return make


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is imagined, of 1 GiB and as much host memory."""
    monkeypatch.setattr(planning, "gpu_limit", lambda budget: GIB)
    monkeypatch.setattr(planning, "host_limit", lambda budget: GIB)
    monkeypatch.setattr(planning, "offloads", lambda: True)
    monkeypatch.setattr(planning, "machine_rates", lambda: RATES)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_what_stays_is_counted_to_the_byte(mode, config_of, llama_folder):
    config = config_of(train__mode=mode, model__dtype="bfloat16", train__per_device_train_batch_size=3)
    problem = problem_of(config, outline_of(config), rates=RATES, offloads=True)
    full = mode == "full"
    model = load(
        llama_folder,
        lora=None if full else config.lora,
        dtype="bfloat16",
        param_dtype="float32" if full else None,
    )
    _, trainable, frozen = split_weights(model, mode)
    weights, adapters, optimizer = problem.fixed
    assert weights == sum(leaf.nbytes for leaf in frozen.values())
    assert adapters == sum(leaf.nbytes for leaf in trainable.values()) > 0
    batch = 5 * 4 * 3 * 64  # tokens, targets, positions, segments, weights
    assert optimizer == 2 * adapters + batch
    outside = [leaf.size for path, leaf in trainable.items() if "layers" not in path]
    assert problem.workload(1).outside == sum(outside) and bool(outside) == full


@pytest.mark.parametrize("context", [None, 100])
def test_attention_is_planned_for_the_documents_that_there_are(context, plan, config_of, gpu, monkeypatch):
    found = []
    monkeypatch.setattr(planning, "make_plan", lambda problem, *_, **__: found.append(problem) or plan)

    class Run(RunShape):
        pass

    Run.context = context
    config = config_of(data__max_length=512)
    _, run = planning.planned(Run(config=config, mesh=None, total_steps=1), outline_of(config))
    assert run.layout == plan.chosen.layout
    assert [problem.workload(1).context for problem in found] == [context or 512]


def test_the_most_of_a_plan_is_that_of_its_largest_program(plan):
    assert plan.most == 5 * GIB
    assert plan.beside("evaluation", GIB).most == 5 * GIB
    assert plan.beside("evaluation", 4 * GIB).most == 7 * GIB
    assert dataclasses.replace(plan, sizes={plan.chosen.layout: 6 * GIB}).most == 6 * GIB


def test_an_evaluation_is_compiled_once_for_layouts_of_the_same_rows(plan, config_of, monkeypatch):
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
    config = config_of()
    run = RunShape(config=config, mesh=data_mesh(), total_steps=1)
    plan = dataclasses.replace(plan, options=[first, second, third], chosen=first)
    run, found, plan = program.compile_planned(run, plan, outline_of(config), evaluates=True)
    assert evaluations == [2, 1]
    assert found.step == run.layout == third.layout and found.evaluate == 1
    assert found.memory.total == 6 * GIB == plan.taken and plan.others == {"evaluation": 6 * GIB}


# --- on the GPU itself, which is imagined ---


@pytest.fixture
def calls(gpu, monkeypatch):
    """What planning asks of JAX and the machine, in order."""
    calls = []

    def noted(name, answer):
        def call(*arguments, **named):
            calls.append((name, *arguments, *named.items()) if name == "claim" else name)
            return answer(*arguments, **named)

        return call

    monkeypatch.setattr(planning, "claim_gpu_memory", noted("claim", lambda budget: None))
    monkeypatch.setattr(planning, "use_compilation_cache", noted("cache", lambda: None))
    monkeypatch.setattr(planning, "outline_of", noted("outline", planning.outline_of))
    monkeypatch.setattr(planning, "data_mesh", noted("devices", planning.data_mesh))
    return calls


def compiled_as(monkeypatch, *, step=1, host=0, evaluation=0, answer=0):
    """What programs are found to take, in MiB; of an evaluation for a row, of answers for a prompt."""
    mib = 2**20

    def compile_step(run, *_):
        return Program(run.layout, Memory(0, step * mib, host * mib))

    def compile_evaluation(run, *_):
        return None, Memory(0, evaluation * run.layout.rows * mib, 0)

    def answering_memory(model, tokenizer, prompts, *, batch_size, **_):
        assert tokenizer.chat_template is not None
        return answer * batch_size * mib

    monkeypatch.setattr(program, "compile_step", compile_step)
    monkeypatch.setattr(program, "compile_evaluation", compile_evaluation)
    monkeypatch.setattr(planning, "answering_memory", answering_memory)


def test_a_plan_claims_the_memory_that_a_run_claims(config_of, calls, monkeypatch):
    compiled_as(monkeypatch)
    plan = planning.plan_memory(config_of(memory__budget="512MiB"))
    assert calls[:2] == [("claim", "512MiB"), "cache"] and {"outline", "devices"} <= set(calls[2:])
    assert plan.compiled == 2**20 and plan.others == {}


def test_a_plan_for_another_gpu_claims_nothing(config_of, calls):
    planning.plan_memory(config_of(), "l4", compiles=False)
    assert calls == ["outline"]


def test_a_plan_is_made_of_a_yaml_file(config_of, calls, tmp_path):
    config = config_of(output__sample_prompts='["how much?"]')
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(as_plain(config)))
    plan = planning.plan_memory(tmp_path / "run.yaml", "l4", compiles=False)
    assert plan.chosen == planning.plan_memory(config, "l4", compiles=False).chosen
    # What an answer takes is known to what is offered in place of a budget that is too small.
    assert plan.others["generation"] == plan.fixed + plan.problem.answering


def test_evaluation_and_answers_are_in_the_plan_of_the_gpu_itself(config_of, calls, monkeypatch):
    compiled_as(monkeypatch, step=1, evaluation=2, answer=200)
    config = config_of(data__eval_fraction=0.5, output__sample_prompts='["a", "b", "c", "d", "e"]')
    plan = planning.plan_memory(config)
    rows = plan.chosen.layout.rows
    assert plan.compiled == plan.taken == 2 * rows * 2**20
    assert plan.others == {
        "evaluation": plan.fixed + 2 * rows * 2**20,
        "generation": plan.fixed + 800 * 2**20,  # four at a time, as a run would
    }
    compiled_as(monkeypatch, answer=2000)
    with pytest.raises(UserError, match="answering one of output.sample_prompts takes 1.95G"):
        planning.plan_memory(config)


def test_host_memory_of_the_compiled_step_is_in_the_plan(config_of, calls, monkeypatch):
    compiled_as(monkeypatch, host=3)
    config = config_of(memory__checkpointing="offload")
    assert planning.plan_memory(config).chosen.host == 3 * 2**20
    compiled_as(monkeypatch, host=1500)
    with pytest.raises(UserError, match="1.46G of host memory, over memory.host_budget, 1.00G"):
        planning.plan_memory(config)


def test_answers_are_estimated_where_there_is_no_tokenizer(
    config_of, calls, monkeypatch, tmp_path, llama_folder
):
    compiled_as(monkeypatch)
    (tmp_path / "shapes").mkdir()
    shutil.copy(llama_folder / "config.json", tmp_path / "shapes")
    config = config_of(model__path=tmp_path / "shapes", output__sample_prompts="[a]")
    monkeypatch.setattr(planning, "answering_bytes", lambda *_, **__: 5 * 2**20)
    plan = planning.plan_memory(config)
    assert plan.others == {"generation": plan.fixed + 5 * 2**20}


# --- a run with a plan, on a GPU that is imagined ---


def test_a_run_tells_its_plan_and_holds_no_more(gpu, quick_config, monkeypatch, capsys):
    """Before the first step, beside the bar, and at the end; adapters once, whenever Python collects."""
    claimed, alive = [], []

    def note(function):
        def noted(*arguments, **options):
            alive.append(sum(array.nbytes for array in jax.live_arrays()) - others)
            return function(*arguments, **options)

        return noted

    for name in ("_answers", "banner"):
        monkeypatch.setattr(fit_module, name, note(getattr(fit_module, name)))
    monkeypatch.setattr(fit_module, "claim_gpu_memory", claimed.append)
    config = quick_config(
        lora={"rank": 32},
        train={"max_steps": 2},
        output={"sample_prompts": ["a"], "sample_max_new_tokens": 2},
        memory={"budget": "700MiB", "checkpointing": "auto"},
    )
    gc.collect()
    others = sum(array.nbytes for array in jax.live_arrays())
    gc.disable()
    try:
        result = fit(config)
    finally:
        gc.enable()
    printed = capsys.readouterr()
    assert claimed == ["700MiB"]
    assert re.search(r"plan +1 x 2 rows on .* tokens/s a GPU", printed.out)
    assert re.search(r"GPU memory +[\d.]+[MG] of 1.00G \(compiled\): weights", printed.out)
    assert re.search(r"saved +every activation", printed.out)
    assert re.search(r"loss \d.*tokens/s, peak \d+\.\d\d GiB", printed.err)
    peak, plan = gib(result.peak_memory_bytes), gib(result.planned_memory_bytes)
    assert f"peak memory {peak}, planned {plan}" in printed.out
    # While prompts are answered, steps are made, and prompts are answered again.
    before, training, after = alive
    adapters = sum(array.nbytes for array in jax.tree.leaves(nnx.state(result.model, LoRAParam)))
    weights = sum(array.nbytes for array in jax.tree.leaves(nnx.state(result.model))) - adapters
    assert before == weights + adapters
    assert weights + 3 * adapters <= training < weights + 3.1 * adapters  # and two moments
    assert after - before in (0, adapters)  # on a CPU they may be views of the layer's vector


# --- where there is no host memory to offload to ---


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(planning, "gpu_limit", lambda budget: None)
    monkeypatch.setattr(planning, "offloads", lambda: False)


@pytest.mark.parametrize("asked", ["offload", "{gate: offload}", "{gradient: offload}"])
def test_offloading_is_refused_where_there_is_nothing_to_offload_to(asked, config_of, cpu):
    config = config_of(memory__checkpointing=asked)
    run = RunShape(config=config, mesh=data_mesh(), total_steps=1)
    with pytest.raises(
        UserError, match=r"memory.checkpointing is .*offload.* no pinned host memory .*; set it to auto"
    ):
        planning.planned(run, outline_of(config))


def test_a_gpu_without_pinned_host_memory_refuses_it_too(config_of, gpu, monkeypatch):
    monkeypatch.setattr(planning, "offloads", lambda: False)
    config = config_of(memory__checkpointing="offload")
    run = RunShape(config=config, mesh=data_mesh(), total_steps=1)
    with pytest.raises(UserError, match=r"memory.checkpointing is offload, .* no pinned host memory"):
        planning.planned(run, outline_of(config))
    config = config_of()
    plan, _ = planning.planned(dataclasses.replace(run, config=config), outline_of(config))
    assert plan.lines()["host memory"] == "none to offload to"


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["auto", "none"])
def test_auto_says_that_it_plans_for_gpus(asked, quick_config, cpu, capsys):
    fit(quick_config(train={"max_steps": 1}, memory={"checkpointing": asked}))
    said = "checkpointing none: auto plans for a GPU, and there is none"
    assert (said in capsys.readouterr().out) == (asked == "auto")
