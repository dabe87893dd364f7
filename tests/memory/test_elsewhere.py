"""Steps compiled for GPUs that are not here, and plans made from them."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from lorajax_kernels import choose_attention, choose_lora, device
from lorajax_kernels.triton_call import load_kernels, triton_call

from lorajax.config import load_config
from lorajax.errors import UserError
from lorajax.memory import elsewhere
from lorajax.memory.elsewhere import Compiled, Failed, Variant, compile_elsewhere, compile_variants
from lorajax.memory.plan import refusal
from lorajax.memory.policy import LayerPolicy, Layout, Policy
from lorajax.memory.targets import find_target
from lorajax.plan import main
from lorajax.training.planning import plan_memory

HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None
needs_plugin = pytest.mark.skipif(not HAS_PLUGIN, reason="JAX' CUDA plugin is not installed (lorajax[plan])")


@pytest.fixture
def config_of(tmp_path):
    """config_of(**settings): a run of a small Llama whose weights cannot be read."""
    shape = {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")

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
        Variant(Layout(2, "full"), 1),
        Variant(Layout(3, "full"), 1),
        Variant(Layout(3, "full"), 1, micro_batches=2),
        Variant(Layout(4, "none"), 2),
        Variant(Layout(4, "none"), 5),
        Variant(Layout(4, "full", 4), 1),
    ]
    found = list(compile_variants(config_of(), find_target("l4"), variants))
    whole, half, uneven, other, deeper, deepest, in_chunks = found
    assert half.temporaries < 0.7 * whole.temporaries and half.arguments == whole.arguments
    assert in_chunks.temporaries < 0.8 * whole.temporaries
    assert half.temporaries < other.temporaries < whole.temporaries
    assert other.arguments > whole.arguments  # six rows, not four
    assert deeper.temporaries > 1.3 * whole.temporaries and deeper.arguments > other.arguments
    # What cannot be compiled does not stop the others.
    assert uneven == Failed("4 rows cannot be cut into micro-batches of 3")
    assert deepest == Failed("the model has 4 layers, not 5")
    assert all(isinstance(each, Compiled) for each in (whole, half, other, deeper))


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
    assert "tokens/s a GPU  kept" in out
    assert "advice" not in out


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
    with pytest.raises(UserError, match="weights, adapters and optimizer alone take .* of Tesla T4"):
        plan_memory(config_of(memory__budget="8MiB"), "t4", compiles=False)


def test_offloading_without_host_memory_is_refused(config_of):
    config = config_of(memory__checkpointing="offload", memory__host_budget="1MiB")
    plan = plan_memory(config, "l4", compiles=False)
    assert not plan.fits(plan.chosen)


def test_what_is_asked_for_and_does_not_fit_is_answered_with_what_does(config_of):
    config = config_of(
        memory__checkpointing="none", memory__budget="120MiB", train__per_device_train_batch_size=8
    )
    plan = plan_memory(config, "l4", compiles=False)
    assert plan.chosen.layout.rows == 8 and not plan.fits(plan.chosen)
    lines = refusal(plan).splitlines()
    assert len(lines) > 2 and "What fits:" in lines[0]
    assert all("--memory.checkpointing auto --train.per_device_train" in line for line in lines[1:])


def test_without_a_gpu_one_has_to_be_named(config_of):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="there is no GPU at hand; name one with --device: v100, .*t4"):
        plan_memory(config_of())
