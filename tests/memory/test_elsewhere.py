"""Steps compiled for GPUs that are not here, and plans made from them."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from lorajax_kernels import choose_attention, choose_lora, device
from lorajax_kernels.triton_call import load_kernels, triton_call

from lorajax.command import run_command
from lorajax.config import load_config
from lorajax.errors import UserError
from lorajax.memory import elsewhere
from lorajax.memory.costs import Rates
from lorajax.memory.elsewhere import Compiled, Failed, Variant, compile_elsewhere, compile_variants
from lorajax.memory.plan import outline_of, problem_of
from lorajax.memory.policy import LayerPolicy, Layout, Policy
from lorajax.memory.targets import find_target
from lorajax.plan import main
from lorajax.training import planning
from lorajax.training.planning import plan_memory

HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None
RATES = Rates(1e15, 4e12, 5e10)
AWAY = {"block_input": "offload"}
needs_plugin = pytest.mark.skipif(not HAS_PLUGIN, reason="JAX' CUDA plugin is not installed (lorajax[plan])")


@pytest.fixture
def config_of(write_outline, tmp_path):
    """config_of(**settings): a run of a small Llama whose weights cannot be read."""
    write_outline(
        tmp_path,
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=2048,
        num_hidden_layers=4,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )

    def make(**settings):
        given = {
            "model.path": tmp_path,
            "data.path": "none.jsonl",
            "data.max_length": 1024,
            "train.per_device_train_batch_size": 4,
            "output.output_dir": "none",
        }
        settings = {name.replace("__", "."): value for name, value in settings.items()}
        return load_config(None, [f"--{name}={value}" for name, value in (given | settings).items()])

    return make


# --- kernels for a device that is not here ---


def test_ops_choose_as_they_would_there():
    def chosen(name):
        q = jax.ShapeDtypeStruct((2, 1024, 8, 64), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((2, 1024, 2, 64), jnp.bfloat16)
        ids = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
        with device.assume(find_target(name).device):
            attention = choose_attention(q, k, k, ids, max_segments=5)
            return attention.name, choose_lora(jnp.bfloat16, 32).name

    assert chosen("t4") == chosen("v100") == ("xla", "xla")
    assert chosen("rtx4090") == chosen("b200") == ("triton", "triton")
    hopper = "mosaic" if jax.__version_info__ >= (0, 11) else "triton"
    assert chosen("h100") == ("triton", hopper)
    assert not device.is_assumed()


def test_a_stand_in_has_the_operands_results_and_aliases_of_the_kernel():
    def run(x, y):
        kernel = load_kernels("no.module").any_kernel
        aliases = {0: 0}
        return triton_call(
            kernel,
            *(x, y, 7),
            out_shape=(x, jax.ShapeDtypeStruct((3,), jnp.float32)),
            grid=(1,),
            num_warps=4,
            num_stages=1,
            input_output_aliases=aliases,
            BLOCK=16,
        )

    shapes = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16), jax.ShapeDtypeStruct((5,), jnp.int32)
    with device.assume(find_target("h200").device):
        lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in lowered.splitlines() if "custom_call" in line]
    assert "@triton_kernel_call" in call
    assert "output_tuple_indices = [0], operand_index = 0" in call
    assert "(tensor<8x4xbf16>, tensor<5xi32>) -> (tensor<8x4xbf16>, tensor<3xf32>)" in call


# --- whole steps ---


@pytest.mark.slow
@needs_plugin
@pytest.mark.parametrize("name", ["t4", "l4", "a100-40gb", "h100"])
def test_steps_compile_for_gpus_that_are_not_here(name, config_of):
    config = config_of(
        model__dtype="float16" if name == "t4" else "bfloat16", train__gradient_accumulation_steps=2
    )
    some = LayerPolicy.of({"block_input": "offload", "gate": "save"})
    layout = Layout(4, Policy((some, LayerPolicy.of({}))))
    found = compile_elsewhere(config, find_target(name), Variant(layout, 2))
    rows = 4 * 1024 * 256 * 2  # bytes of an activation of the hidden size
    assert found.host == rows
    assert found.temporaries > 10 * rows and found.arguments > 2 * 4096 * 256


@pytest.mark.slow
@needs_plugin
def test_memory_grows_with_rows_layers_and_what_is_kept(config_of):
    variants = [
        Variant(Layout(4, "full"), 1),
        Variant(Layout(2, "full"), 1, micro_batches=3),
        Variant(Layout(3, "full"), 1),
        Variant(Layout(4, "none"), 2),
        Variant(Layout(4, "none"), 5),
        Variant(Layout(4, "full", 4), 1),
        Variant(Layout(4, AWAY), 2),
        Variant(Layout(4, AWAY), 4),
    ]
    config = config_of()
    found = list(compile_variants(config, find_target("l4"), variants))
    whole, half, uneven, deeper, deepest, in_chunks, *offloaded = found
    assert half.temporaries < 0.7 * whole.temporaries
    assert half.arguments > whole.arguments  # six rows, not four
    assert in_chunks.temporaries < 0.8 * whole.temporaries
    assert deeper.temporaries > 1.3 * whole.temporaries and deeper.arguments > whole.arguments
    # What is trained has float32 gradients, which are temporary; nothing else grows with the layers.
    a_layer = problem_of(config, outline_of(config), rates=RATES, offloads=True).workload(4).trainable // 4
    few, many = (
        each.temporaries - 4 * a_layer * layers for each, layers in zip(offloaded, (2, 4), strict=True)
    )
    assert many == pytest.approx(few, rel=0.02)
    # What cannot be compiled does not stop the others.
    assert uneven == Failed("4 rows cannot be cut into micro-batches of 3")
    assert deepest == Failed("the model has 4 layers, not 5")
    assert all(isinstance(each, Compiled) for each in (whole, half, deeper, in_chunks))


@pytest.mark.slow
@needs_plugin
def test_what_takes_too_long_is_given_up(config_of):
    with pytest.raises(UserError, match="compiling for t4 took more than 0 s"):
        compile_elsewhere(config_of(), find_target("t4"), Variant(Layout(4, "full")), timeout=0.1)


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"jaxlib": "0.11.2"}, "needs JAX' CUDA plugin, which needs no GPU"),
        (
            {"jaxlib": "0.11.2", "jax-cuda13-plugin": "0.10.2"},
            "jax-cuda13-plugin 0.10.2 does not fit jaxlib 0.11.2",
        ),
        ({"jaxlib": "0.11.2", "jax-cuda13-plugin": "0.11.2"}, "needs CUDA's assembler, ptxas"),
    ],
)
def test_what_has_to_be_installed_is_said(versions, message, config_of, monkeypatch):
    monkeypatch.setattr(elsewhere, "_version", versions.get)
    monkeypatch.setattr(elsewhere.shutil, "which", lambda name: None)
    monkeypatch.setattr(elsewhere, "_TOOLKITS", ())
    with pytest.raises(UserError, match=rf"{message}.*pip install 'lorajax\[plan\]'"):
        compile_elsewhere(config_of(), find_target("t4"), Variant(Layout(4, "full")))


@pytest.mark.slow
@needs_plugin
def test_a_plan_is_what_the_compiled_step_takes(config_of):
    plan = plan_memory(config_of(memory__budget="120MiB"), "RTX 4090")
    assert plan.compiled is not None and plan.compiled <= plan.budget == 120 * 2**20
    assert plan.device == "NVIDIA GeForce RTX 4090"


# --- the command ---


def test_estimates_need_no_plugin(config_of, capsys, tmp_path):
    arguments = [f"--model.path={tmp_path}", "--data.path=x.jsonl", "--output.output_dir=none"]
    config_of()
    shape = ["--data.max_length=1024", "--train.per_device_train_batch_size=8"]
    assert main([*arguments, *shape, "--device=l4", "--budget=1GiB", "--estimate"]) == 0
    out = capsys.readouterr().out
    assert "1 x 8 rows on NVIDIA L4" in out and "of 1.00G (estimated)" in out
    assert re.search("tokens/s a GPU +kept", out)
    assert "advice" not in out


def test_a_budget_of_more_than_there_is_is_named(config_of, caplog):
    plan_memory(config_of(memory__budget="22GiB"), "l4", compiles=False)
    assert re.fullmatch(r"memory.budget is 22GiB, the GPU has 2[01]\.\d\dG for it", caplog.messages[-1])
    caplog.clear()
    plan_memory(config_of(memory__budget="8GiB"), "l4", compiles=False)
    assert not caplog.messages


def test_a_gpu_without_bfloat16_is_told_of_float16(config_of):
    def advice(device, dtype):
        return plan_memory(config_of(model__dtype=dtype), device, compiles=False).lines().get("advice")

    said = "Tesla T4 has units for float16 and none for bfloat16: set model.dtype to float16"
    assert advice("t4", "bfloat16") == said
    assert advice("t4", "float16") is advice("a100-40gb", "bfloat16") is None


@pytest.mark.slow
def test_the_shapes_of_a_large_model_come_along(capsys, tmp_path):
    config = Path(__file__).parents[2] / "configs" / "llama31_8b.yaml"
    picture = tmp_path / "plan.png"
    arguments = [str(config), "--device", "rtx4090", "--estimate"]
    if importlib.util.find_spec("matplotlib") is not None:
        arguments += ["--plot", str(picture)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "rows on NVIDIA GeForce RTX 4090" in out and "block_input" in out
    assert "--plot" not in arguments or picture.stat().st_size > 10_000


def test_a_budget_below_the_weights_is_refused(config_of):
    with pytest.raises(UserError, match="weights, adapters, optimizer and batch alone take .* of Tesla T4"):
        plan_memory(config_of(memory__budget="8MiB"), "t4", compiles=False)


def test_an_evaluation_that_does_not_fit_is_answered_with_what_does(config_of, monkeypatch):
    """In place of advice that a step alone would do with."""
    monkeypatch.setattr("lorajax.memory.plan._evaluation_bytes", lambda model, layout, length: 2**30)
    settings = {"data__eval_fraction": 0.5, "memory__checkpointing": "auto"}
    with pytest.raises(UserError, match=r"an evaluation takes 1.00G beside weights and state \(") as error:
        plan_memory(config_of(**settings, memory__budget="900MiB"), "t4", compiles=False)
    _, first, *_ = str(error.value).splitlines()
    budget = first.split("--memory.budget ")[1]
    plan = plan_memory(config_of(**settings, memory__budget=budget), "t4", compiles=False)
    assert plan.others["evaluation"] > 2**30


def test_offloading_without_host_memory_is_refused(config_of):
    config = config_of(memory__checkpointing="offload", memory__host_budget="1MiB")
    with pytest.raises(
        UserError, match=r"offload: a step takes .* and 0.01G of host memory, over memory.host_budget"
    ):
        plan_memory(config, "l4", compiles=False)


def test_what_is_asked_for_and_does_not_fit_is_answered_with_what_does(config_of):
    settings = {"memory__budget": "120MiB", "train__per_device_train_batch_size": 8}
    with pytest.raises(
        UserError, match=r"checkpointing none: a step takes .* \(estimated\), over memory.b"
    ) as error:
        plan_memory(config_of(memory__checkpointing="none", **settings), "l4", compiles=False)
    lines = [line.split(" tokens/s: ")[1] for line in str(error.value).splitlines()[1:]]
    assert len(lines) == 3 and lines[0] == "--memory.checkpointing auto"
    for flags in lines:
        words = shlex.split(flags.partition(" (where")[0])
        given = {
            flag[2:].replace(".", "__"): value for flag, value in zip(words[::2], words[1::2], strict=True)
        }
        config = config_of(**({"memory__checkpointing": "none"} | settings | given))
        plan = plan_memory(config, "l4", compiles=False)
        assert plan.most <= plan.budget


def test_an_estimate_that_does_not_fit_ends_with_an_error(config_of, monkeypatch, tmp_path, capsys):
    config_of()
    arguments = [f"--model.path={tmp_path}", "--data.path=x.jsonl", "--output.output_dir=none"]
    arguments += ["--data.max_length=1024", "--memory.checkpointing=none", "--budget=60MiB"]
    monkeypatch.setattr(sys, "argv", ["plan", *arguments, "--device=l4", "--estimate"])
    assert run_command(main) == 2
    assert "error: memory.checkpointing none: a step takes" in capsys.readouterr().err


@pytest.mark.parametrize("compiles", [True, False])
def test_answers_that_do_not_fit_are_refused(compiles, config_of, monkeypatch):
    def plan(new, prompts):
        config = config_of(
            memory__budget="120MiB",
            output__sample_prompts=json.dumps(["a question"] * prompts),
            output__sample_max_new_tokens=new,
        )
        return plan_memory(config, "l4", compiles=compiles)

    def compiled(config, target, variant):
        answers = variant.answering
        return Compiled(30 * 2**20, 2**20 if answers is None else answers.rows * answers.new * 2**15, 0, 1.0)

    monkeypatch.setattr(planning, "compile_elsewhere", compiled)
    # What is estimated is half of that, and decides where nothing is compiled.
    share = 2**14 if compiles else 2**15
    monkeypatch.setattr(planning, "answering_bytes", lambda *_, rows, new, **__: rows * new * share)
    # 128 MiB for eight, but a run answers four at a time then.
    small, large = plan(512, 4).others["generation"], plan(512, 8).others["generation"]
    assert 64 * 2**20 < small == large <= 120 * 2**20
    message = (
        r"answering one of output.sample_prompts takes 0.1\dG .*output.sample_max_new_tokens, which is 4000"
    )
    with pytest.raises(UserError, match=message):
        plan(4000, 8)


def test_an_evaluation_counts_before_a_layout_is_settled_on(config_of, monkeypatch):
    """That of more than one row does not fit."""
    compiled = []

    def compile_elsewhere(config, target, variant):
        compiled.append((variant.layout.rows, variant.evaluates))
        temporaries = 40 * variant.layout.rows if variant.evaluates else 1
        return Compiled(30 * 2**20, temporaries * 2**20, 0, 1.0)

    monkeypatch.setattr(planning, "compile_elsewhere", compile_elsewhere)
    settings = {"memory__budget": "72MiB", "data__eval_fraction": 0.1}
    plan = plan_memory(config_of(**settings), "l4")
    assert plan.chosen.layout.rows == 1 and compiled.count((1, True)) == 1
    assert plan.taken == 70 * 2**20 and plan.others["evaluation"] == plan.fixed + 40 * 2**20
    with pytest.raises(
        UserError, match=r"checkpointing full: a step takes 0.19G .* \(compiled\), over memory.budget"
    ):
        plan_memory(config_of(**settings, memory__checkpointing="full"), "l4")


def test_an_estimated_evaluation_decides_over_layouts_too(config_of):
    """Of a row alone there is room for more than with all four."""
    settings = {"memory__checkpointing": "full", "data__eval_fraction": 0.1}

    def estimated(**more):
        return plan_memory(config_of(**settings | more), "l4", compiles=False)

    four, one = estimated(), estimated(train__per_device_train_batch_size=1)
    between = (four.others["evaluation"] + one.others["evaluation"]) // 2
    assert between > one.taken
    with pytest.raises(UserError, match="memory.checkpointing full: a step takes"):
        estimated(memory__budget=f"{between} B")
    auto = estimated(memory__checkpointing="auto", memory__budget=f"{between} B")
    assert auto.chosen.layout.rows < 4 and auto.most <= between


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="cuDNN has no grouped queries there")
def test_estimates_count_what_cudnn_holds_for_many_documents(config_of):
    settings = {"memory__checkpointing": "full", "model__dtype": "bfloat16", "data__max_length": 1024}

    def taken(attention, documents):
        config = config_of(**settings, model__attention=attention, data__max_segments=documents)
        plan = plan_memory(config, "h100", compiles=False)
        return plan, plan.chosen.device.workspace

    plan, many = taken("cudnn", 1001)
    o, tokens = plan.problem.workload(4).options, plan.tokens
    grouped = 4 * o.head_dim * (o.num_kv_heads != o.num_heads)
    more = 1000 * tokens * o.num_heads * (4 * o.head_dim + grouped + 4)
    assert more < many < 1.1 * more + taken("cudnn", 1)[1]
    assert taken("triton", 1001)[1] == taken("triton", 1)[1] == taken("cudnn", 1)[1]


@pytest.mark.slow
@needs_plugin
@pytest.mark.parametrize("chunks", (1, 4))
def test_an_evaluation_takes_about_what_is_estimated(chunks, config_of):
    config = config_of(data__eval_fraction=0.1, data__max_length=4096, memory__mlp_chunks=chunks)
    plan = plan_memory(config, "h100", compiles=False)
    layout = Layout(plan.chosen.layout.rows, "none", chunks)
    found = compile_elsewhere(config, find_target("h100"), Variant(layout, evaluates=True))
    assert plan.others["evaluation"] - plan.fixed == pytest.approx(found.temporaries, rel=0.25)


@pytest.mark.slow
@needs_plugin
def test_answers_take_about_what_is_estimated(config_of):
    new = 3000
    config = config_of(output__sample_prompts="[a, b, c]", output__sample_max_new_tokens=new)
    estimated, compiled = (plan_memory(config, "h100", compiles=compiles) for compiles in (False, True))
    found, expected = (plan.others["generation"] - plan.fixed for plan in (estimated, compiled))
    assert found == pytest.approx(expected, rel=0.3)
    caches = 2 * 4 * 4 * (64 + new) * 2 * 64 * 2  # layers, rows, tokens, key heads, their size, bytes
    assert expected > caches


def test_the_estimate_is_printed_before_anything_is_compiled(config_of, monkeypatch, tmp_path, capsys):
    config_of()
    seen = []

    def compile_elsewhere(*_):
        seen.append(capsys.readouterr().out)
        return Compiled(30 * 2**20, 2**20, 2**10, 1.0)

    monkeypatch.setattr(planning, "compile_elsewhere", compile_elsewhere)
    arguments = [f"--model.path={tmp_path}", "--data.path=x.jsonl", "--output.output_dir=none", "--device=l4"]
    assert main([*arguments, "--data.max_length=1024"]) == 0
    assert "(estimated)" in seen[0] and "Estimated, before it is compiled:" in seen[0]
    out = capsys.readouterr().out
    assert "(compiled)" in out and "(estimated)" not in out and "What else there is" in out


@pytest.mark.parametrize(
    "picture, message",
    [
        ("none/plan.png", "plan.png cannot be drawn: there is no folder .*none; make it first"),
        ("plan.docx", "plan.docx cannot be drawn: it must end in one of .*png"),
        ("plan", "plan cannot be drawn: it must end in one of .*png"),
        ("", "cannot be drawn: it is a folder; name a file in it"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused_at_once(picture, message, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(planning, "plan_memory", lambda *_, **__: pytest.fail("planned"))
    arguments = [f"--model.path={tmp_path}", "--data.path=x.jsonl", "--output.output_dir=none", "--device=l4"]
    with pytest.raises(UserError, match=message):
        main([*arguments, "--plot", str(tmp_path / picture)])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"data__max_length": 4097}, "data.max_length is 4097, but the model's context is 4096 tokens"),
        (
            {"output__sample_prompts": "[a]", "output__sample_max_new_tokens": 4096},
            "output.sample_max_new_tokens is 4096, but the model's context is 4096 tokens",
        ),
    ],
)
def test_what_the_model_does_not_take_is_not_planned(settings, message, config_of):
    with pytest.raises(UserError, match=message):
        plan_memory(config_of(**settings), "l4", compiles=False)


def test_without_a_gpu_one_has_to_be_named(config_of):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="there is no GPU at hand; name one with --device: v100, .*t4"):
        plan_memory(config_of())
