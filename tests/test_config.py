"""Configs: YAML, overrides, paths, round trips, and the message for each way to get them wrong."""

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorajax.config import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OutputConfig,
    TrainConfig,
    load_config,
    parse_arguments,
    parse_size,
    save_config,
    validate,
)
from lorajax.errors import UserError
from lorajax.lora.config import LoRAConfig
from lorajax.memory.policy import ACTIONS, ACTIVATIONS, PRESETS

MINIMAL = """\
model:
  path: org/model
data:
  path: org/data
output:
  output_dir: run
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message(folder: Path, text: str, *overrides: str) -> str:
    """The error of loading a config, with its file's path shortened to its name."""
    path = write(folder, text)
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    return str(error.value).replace(str(path), "run.yaml")


def in_section(section: str, *lines: str) -> str:
    """MINIMAL with lines in a section; the first of them is on line 3 (model), 5 (data), 7 (output) or 8."""
    body = "".join(f"  {line}\n" for line in lines)
    before, header, after = MINIMAL.partition(f"{section}:\n")
    if not header:
        return f"{MINIMAL}{section}:\n{body}"
    first, _, rest = after.partition("\n")
    return f"{before}{header}{first}\n{body}{rest}"


def built(**sections) -> Config:
    given = {
        "model": ModelConfig("org/model"),
        "data": DataConfig("org/data"),
        "output": OutputConfig("/run"),
    }
    return Config(**(given | sections))


# --- reading ---


def test_defaults_and_values(tmp_path):
    config = load_config(write(tmp_path, MINIMAL + "lora:\n  rank: 8\n  target_modules: [q_proj, v_proj]\n"))
    assert config.model == ModelConfig(path="org/model")
    assert config.lora == LoRAConfig(rank=8, target_modules=("q_proj", "v_proj"))
    assert config.train == TrainConfig()
    assert config.memory == MemoryConfig(checkpointing="auto")


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("2E-4", 2e-4), ("1.5e-3", 1.5e-3), (".5e-3", 5e-4), ("1e+0", 1.0), ("1", 1.0)],
)
def test_numbers_as_people_write_them(tmp_path, text, value):
    rate = load_config(write(tmp_path, in_section("train", f"learning_rate: {text}"))).train.learning_rate
    assert isinstance(rate, float) and rate == value


def test_empty_section_means_defaults(tmp_path):
    assert load_config(write(tmp_path, MINIMAL + "lora:\n  # rank: 8\n")).lora == LoRAConfig()


def test_text_stays_text(tmp_path):
    text = in_section("output", 'sample_prompts: ["1e5", "true", "Name: x", "[a]"]', "report_to: [wandb]")
    config = load_config(write(tmp_path, text), ["--model.path", "123"])
    assert config.output.sample_prompts == ["1e5", "true", "Name: x", "[a]"]
    assert config.output.report_to == ["wandb"]
    assert config.model.path == "123"
    assert load_config(write(tmp_path, MINIMAL.replace("org/model", "2024-01-01"))).model.path == "2024-01-01"


def test_a_regex_for_target_modules_stays_text(tmp_path):
    text = in_section("lora", r"target_modules: '[qv]_proj|.*\.down_proj'")
    assert load_config(write(tmp_path, text)).lora.target_modules == r"[qv]_proj|.*\.down_proj"


def test_overrides_win_over_the_file(tmp_path):
    path = write(tmp_path, in_section("train", "max_steps: 5", "learning_rate: 1e-3"))
    overrides = [
        "--train.max_steps",
        "3",
        "--lora.rank=4",
        "--lora.target_modules=[q_proj]",
        "--data.packing=false",
    ]
    overrides += [
        "--data.columns.prompt",
        "question",
        "--output.sample_prompts+",
        "Hello",
        "--memory.checkpointing=none",
    ]
    config = load_config(path, overrides)
    assert config.train == TrainConfig(max_steps=3, learning_rate=1e-3)
    assert config.lora == LoRAConfig(rank=4, target_modules=("q_proj",))
    assert config.data == DataConfig(path="org/data", packing=False, columns={"prompt": "question"})
    assert config.output.sample_prompts == ["Hello"]
    assert config.memory.checkpointing == "none"


def test_overrides_alone_are_enough():
    config = load_config(overrides=["--model.path=org/m", "--data.path=org/d", "--output.output_dir=/run"])
    assert config == built(model=ModelConfig("org/m"), data=DataConfig("org/d"))


def test_required_keys_may_come_from_the_command_line(tmp_path):
    path = write(tmp_path, MINIMAL.replace("  path: org/data\n", ""))
    assert load_config(path, ["--data.path", "org/other"]).data.path == "org/other"


def test_command_line(tmp_path):
    path = str(write(tmp_path, MINIMAL))
    config, arguments = parse_arguments([path, "--train.max_steps", "3", "--dry-run"])
    assert config.train.max_steps == 3
    assert arguments.dry_run
    assert not parse_arguments([path])[1].dry_run


def test_settings_are_frozen(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.max_steps = 3


def test_help_lists_every_key_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"], prog="the-command", description="What it does.")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: the-command CONFIG.yaml" in text and "What it does." in text
    for section in dataclasses.fields(Config):
        for key in dataclasses.fields(getattr(built(), section.name)):
            described = text.partition(f"--{section.name}.{key.name} ")[2].partition("(type: ")[0]
            assert len(described.split()) > 4, key.name
    assert "Highest learning rate of AdamW. (type: float, default: 0.0002)" in text
    described = text.partition("--memory.checkpointing ")[2].partition("(type: ")[0]
    assert all(name in described for name in ("auto", *PRESETS, *ACTIONS, *ACTIVATIONS))


# --- paths ---


def test_paths_in_a_file_are_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "configs" / "weights").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = """\
model: {path: weights, tokenizer: ../tokenizer}
data: {path: train.jsonl, eval_path: ./held_out, chat_template: chat.jinja, cache_dir: cache}
train: {resume_from_checkpoint: checkpoints/3}
output: {output_dir: ../runs/a}
"""
    config = load_config("../configs/" + write(tmp_path / "configs", text).name)
    assert config.model.path == str(tmp_path / "configs/weights")
    assert config.model.tokenizer == str(tmp_path / "tokenizer")
    assert config.data.path == str(tmp_path / "configs/train.jsonl")
    assert config.data.eval_path == str(tmp_path / "configs/held_out")
    assert config.data.chat_template == str(tmp_path / "configs/chat.jinja")
    assert config.data.cache_dir == str(tmp_path / "configs/cache")
    assert config.train.resume_from_checkpoint == str(tmp_path / "configs/checkpoints/3")
    assert config.output.output_dir == str(tmp_path / "runs/a")


def test_paths_in_overrides_are_relative_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "configs", MINIMAL)
    config = load_config(
        path, ["--model.path=weights", "--data.path", "d.jsonl", "--output.output_dir", "out"]
    )
    assert config.model.path == str(tmp_path / "weights")
    assert config.data.path == str(tmp_path / "d.jsonl")
    assert config.output.output_dir == str(tmp_path / "out")


def test_hub_ids_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder of that name here is not what the file means
    config = load_config(write(tmp_path / "configs", MINIMAL))
    assert (config.model.path, config.data.path) == ("org/model", "org/data")


def test_auto_resume_is_no_path(tmp_path):
    path = write(tmp_path, in_section("train", "resume_from_checkpoint: auto"))
    assert load_config(path).train.resume_from_checkpoint == "auto"


def test_home_is_expanded(tmp_path):
    path = write(tmp_path, MINIMAL.replace("org/model", "~/weights"))
    assert load_config(path).model.path == str(Path.home() / "weights")


# --- round trip ---


def test_round_trip_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config(
        write(tmp_path, in_section("train", "learning_rate: 3e-5", "adam_epsilon: 1e-9")),
        [
            "--lora.target_modules=[q_proj]",
            "--data.columns.prompt=q",
            "--data.path=./d",
            "--output.report_to+=wandb",
        ],
    )
    save_config(config, "run/config.yaml")
    monkeypatch.chdir(tmp_path / "run")
    assert load_config("config.yaml") == config


def test_saving_makes_relative_paths_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = built(data=DataConfig("train.jsonl"), output=OutputConfig("out"))
    save_config(config, tmp_path / "config.yaml")
    loaded = load_config(tmp_path / "config.yaml")
    assert loaded.data.path == str(tmp_path / "train.jsonl")
    assert loaded.output.output_dir == str(tmp_path / "out")


TEXT = st.one_of(
    st.text(st.characters(blacklist_categories=("Cs",)), max_size=20),
    st.sampled_from(
        [
            "2e-4",
            "1_0e5",
            "null",
            "~",
            "yes",
            "=",
            "<<",
            "0x1",
            "1:30",
            "2024-01-01",
            "a\x85b",
            "[a",
            "- a",
            "a: b",
        ]
    ),
)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.lists(TEXT, max_size=3), st.dictionaries(TEXT, TEXT, max_size=2), POSITIVE, st.integers(0, 2**32 - 1)
)
def test_round_trip_of_any_values(tmp_path_factory, prompts, columns, rate, seed):
    config = built(
        data=DataConfig("org/data", columns=columns),
        train=TrainConfig(learning_rate=rate, seed=seed),
        output=OutputConfig("/run", sample_prompts=prompts),
    )
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config


# --- unknown keys ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            MINIMAL + "learning_rate: 1\n",
            "run.yaml:7: unknown key learning_rate; did you mean train.learning_rate?",
        ),
        (in_section("model", "rank: 1"), "run.yaml:3: unknown key model.rank; did you mean lora.rank?"),
        (
            in_section("train", "learning_rat: 1"),
            "run.yaml:8: unknown key train.learning_rat; did you mean train.learn",
        ),
        (
            in_section("lora", "lora_alpha: 1"),
            "run.yaml:8: unknown key lora.lora_alpha; did you mean lora.alpha?",
        ),
        (
            in_section("data", "max_seq_length: 1"),
            "unknown key data.max_seq_length; did you mean data.max_length?",
        ),
        (
            in_section("lora", "learningrate: 1"),
            "unknown key lora.learningrate; did you mean train.learning_rate?",
        ),
        (in_section("lora", "r: 1"), "unknown key lora.r; did you mean lora.rank?"),
        (in_section("train", "lr: 1"), "unknown key train.lr; did you mean train.learning_rate?"),
        (MINIMAL + "lr: 1\n", "unknown key lr; did you mean train.learning_rate?"),
        (
            in_section("train", "batch_size: 1"),
            "unknown key train.batch_size; did you mean train.per_device_train_batch_size?",
        ),
        (in_section("model", "model_name: a"), "unknown key model.model_name; did you mean model.path?"),
        (MINIMAL + "training: {}\n", "run.yaml:7: unknown key training; did you mean train?"),
        (in_section("lora", "zzz: 1"), "unknown key lora.zzz; lora has rank, alpha, dropout, target_modules"),
        (MINIMAL + "zzz: 1\n", "unknown key zzz; the sections are model, lora, data, train, memory, output"),
        (in_section("lora", "1: 2"), "unknown key lora.1; lora has rank"),
    ],
)
def test_unknown_key_in_a_file(tmp_path, text, expected):
    assert expected in message(tmp_path, text)


def test_every_unknown_key_is_named(tmp_path):
    text = message(tmp_path, in_section("lora", "rnk: 1", "alhpa: 2"))
    assert text.splitlines() == [
        "run.yaml:8: unknown key lora.rnk; did you mean lora.rank?",
        "run.yaml:9: unknown key lora.alhpa; did you mean lora.alpha?",
    ]


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--train.max_step=3", "command line: unknown key train.max_step; did you mean train.max_steps?"),
        ("--max_steps", "command line: unknown key max_steps; did you mean train.max_steps?"),
        ("--dryrun", "command line: unknown key dryrun; did you mean --dry-run?"),
        ("--train=3", "command line: unknown key train; train is a section: give --train.KEY VALUE"),
        ("second.yaml", "command line: unrecognized arguments: second.yaml"),
    ],
)
def test_unknown_flag(tmp_path, flag, expected):
    assert message(tmp_path, MINIMAL, flag) == expected


def test_a_misspelt_flag_of_the_command_itself(tmp_path):
    def refused(flag):
        with pytest.raises(UserError) as error:
            parse_arguments([str(write(tmp_path, MINIMAL)), flag, "h200"], own_flags=("device", "plot"))
        return str(error.value)

    assert refused("--devise") == "command line: unknown key devise; did you mean --device?"
    assert refused("--dryrun").endswith("did you mean --dry-run?")
    assert "did you mean" not in message(tmp_path, MINIMAL, "--devise=h200")


def test_a_flag_is_no_key_of_a_file(tmp_path):
    assert "did you mean" not in message(tmp_path, MINIMAL + "dry_run: true\n")


# --- types ---


@pytest.mark.parametrize(
    ("section", "line", "expected"),
    [
        (
            "memory",
            "budget: 24",
            "run.yaml:8: memory.budget must be a size with its unit, such as 24GiB, not 24",
        ),
        (
            "memory",
            "host_budget: 1.5",
            "8: memory.host_budget must be a size with its unit, such as 24GiB, not",
        ),
        ("train", "learning_rate: fast", "run.yaml:8: train.learning_rate must be a number, not 'fast'"),
        ("train", "max_steps: 1.5", "run.yaml:8: train.max_steps must be a whole number, not 1.5"),
        ("train", "max_steps: true", "run.yaml:8: train.max_steps must be a whole number, not True"),
        ("train", "max_steps: null", "run.yaml:8: train.max_steps must be a whole number, not null"),
        ("data", "packing: 3", "run.yaml:5: data.packing must be true or false, not 3"),
        (
            "data",
            "overlong: cut",
            "run.yaml:5: data.overlong must be one of truncate, drop, split, not 'cut'",
        ),
        (
            "data",
            "columns: {a: 1}",
            "run.yaml:5: data.columns must be a mapping from text to text, not {'a': 1}",
        ),
        ("model", "dtype: bf16", "model.dtype must be one of bfloat16, float16, float32, not 'bf16'"),
        ("model", "tokenizer: 3", "run.yaml:3: model.tokenizer must be text or null, not 3"),
        (
            "lora",
            "target_modules: {a: b}",
            "lora.target_modules must be text or a list of text, not {'a': 'b'}",
        ),
        (
            "output",
            "report_to: [mlflow]",
            "report_to must be a list of one of tensorboard, wandb, not ['mlflow']",
        ),
        ("output", "sample_prompts: Hello", "output.sample_prompts must be a list of text, not 'Hello'"),
    ],
)
def test_wrong_type_in_a_file(tmp_path, section, line, expected):
    assert expected in message(tmp_path, in_section(section, line))


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--train.max_steps=x", "command line: train.max_steps must be a whole number, not 'x'"),
        (
            "--model.dtype=bf16",
            "command line: model.dtype must be one of bfloat16, float16, float32, not 'bf16'",
        ),
        ("--train.mode=null", "command line: train.mode must be one of lora, full, not 'None'"),
        ("--train.max_steps", "command line: --train.max_steps needs a value"),
        ("--data.columns=[1]", "command line: data.columns must be a mapping from text to text, not '[1]'"),
    ],
)
def test_wrong_type_in_a_flag(tmp_path, flag, expected):
    assert message(tmp_path, MINIMAL, flag) == expected


# --- files ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:\n\tpath: x\n", "run.yaml:2: not valid YAML: found character '\\t'"),
        ("model: [a\ndata: 1\n", "run.yaml:2: not valid YAML"),
        ("model:\n  path: =\n", "run.yaml:2: not valid YAML"),
        (
            "- model\n",
            "run.yaml: must hold the sections model, lora, data, train, memory, output, not ['model']",
        ),
        ("model: gpt2\n", "run.yaml:1: model must be a section of keys, not 'gpt2'"),
        (MINIMAL + "model:\n  path: a\n", "run.yaml:7: model is given twice, here and at run.yaml:1"),
        (in_section("model", "path: b"), "run.yaml:3: model.path is given twice, here and at run.yaml:2"),
    ],
)
def test_file_that_is_no_config(tmp_path, text, expected):
    assert expected in message(tmp_path, text)


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such config file \(looked in /"):
        load_config("nowhere.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.yaml: not a text file in UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_missing_required_keys(tmp_path):
    assert message(tmp_path, "model:\n  path:\n").splitlines() == [
        "run.yaml:2: model.path is missing; set it in the config file or with --model.path VALUE",
        "run.yaml: data.path is missing; set it in the config file or with --data.path VALUE",
        "run.yaml: output.output_dir is missing; set it in the config file or with --output.output_dir VALUE",
    ]


# --- ranges and contradictions ---


@pytest.mark.parametrize(
    ("section", "lines", "expected"),
    [
        ("lora", ["rank: 0"], "run.yaml:8: lora.rank must be a whole number of at least 1, not 0"),
        ("lora", ["alpha: 0"], "lora.alpha must be a number above 0, not 0"),
        ("lora", ["dropout: 1.0"], "lora.dropout must be a number of at least 0 and below 1, not 1.0"),
        ("lora", ["dropout: -0.1"], "lora.dropout must be a number of at least 0 and below 1, not -0.1"),
        ("lora", ["target_modules: []"], "run.yaml:8: lora.target_modules is empty"),
        ("data", ["max_length: 1"], "run.yaml:5: data.max_length must be at least 2, not 1"),
        ("data", ["max_segments: 0"], "data.max_segments must be at least 1, not 0"),
        ("memory", ["mlp_chunks: 0"], "memory.mlp_chunks must be in 1..64, not 0"),
        ("memory", ["mlp_chunks: 65"], "memory.mlp_chunks must be in 1..64, not 65"),
        (
            "memory",
            ["mlp_chunks: 2", "checkpointing: {up: save}"],
            "memory.checkpointing keeps up, which an MLP in memory.mlp_chunks makes again",
        ),
        (
            "memory",
            ["mlp_chunks: 2", "checkpointing: half"],
            "run.yaml:9: memory.checkpointing must be one of auto, none, full, offload, or a mapping from "
            "activations to save, offload, recompute, not 'half'",
        ),
        (
            "memory",
            ["checkpointing: {gaet: save}"],
            "run.yaml:8: memory.checkpointing: 'gaet' is no activation of a layer; known: block_input",
        ),
        (
            "memory",
            ["checkpointing: {gate: keep}"],
            "run.yaml:8: memory.checkpointing: gate: 'keep' is not one of save, offload, recompute",
        ),
        (
            "memory",
            ["budget: 24 gibs"],
            "run.yaml:8: memory.budget must be a size with its unit, such as 24GiB",
        ),
        ("data", ["eval_fraction: 1"], "data.eval_fraction must be at least 0 and below 1, not 1"),
        ("train", ["per_device_train_batch_size: 0"], "train.per_device_train_batch_size must be at least 1"),
        (
            "train",
            ["gradient_accumulation_steps: -1"],
            "train.gradient_accumulation_steps must be at least 1",
        ),
        ("train", ["learning_rate: 0"], "train.learning_rate must be above 0, not 0"),
        ("train", ["learning_rate: .nan"], "train.learning_rate must be above 0, not nan"),
        ("train", ["learning_rate: .inf"], "train.learning_rate must be above 0, not inf"),
        ("train", ["warmup_steps: -1"], "train.warmup_steps must be at least 0, not -1"),
        ("train", ["adam_beta2: 1"], "train.adam_beta2 must be at least 0 and below 1, not 1"),
        ("train", ["max_grad_norm: -1"], "train.max_grad_norm must be at least 0, not -1"),
        ("train", ["seed: 4294967296"], "train.seed must be below 2**32, not 4294967296"),
        ("train", ["seed: -1"], "train.seed must be at least 0, not -1"),
        ("train", ["max_steps: 0"], "train.max_steps must be at least 1, or -1 to train by epochs, not 0"),
        (
            "train",
            ["num_train_epochs: 0"],
            "train.num_train_epochs must be at least 1 where train.max_steps is not",
        ),
        (
            "train",
            ["max_steps: 3", "warmup_steps: 4"],
            "run.yaml:9: train.warmup_steps (4) is more than train.max_steps (3); lower the one, or raise",
        ),
        ("train", ["init: random"], "run.yaml:8: train.init is random, but an adapter needs"),
        (
            "train",
            ["eval_steps: 3"],
            "run.yaml:8: train.eval_steps is set, but not data.eval_path or data.eval_fraction",
        ),
        (
            "data",
            ["eval_path: org/e", "eval_fraction: 0.1"],
            "run.yaml:6: data.eval_fraction and data.eval_path are b",
        ),
        ("model", ["quantization: nf4"], "run.yaml:3: model.quantization is 'nf4', which is not supported"),
        ("output", ["save_total_limit: 0"], "output.save_total_limit must be at least 1, not 0"),
        ("output", ["logging_steps: 0"], "output.logging_steps must be at least 1, not 0"),
        ("output", ["save_steps: -5"], "output.save_steps must be at least 0, not -5"),
        ("output", ["sample_max_new_tokens: 0"], "output.sample_max_new_tokens must be at least 1, not 0"),
    ],
)
def test_values_that_make_no_sense(tmp_path, section, lines, expected):
    assert expected in message(tmp_path, in_section(section, *lines))


def test_an_mlp_has_no_more_parts_than_a_row_has_tokens(tmp_path):
    flags = "--memory.mlp_chunks=17", "--data.max_length=16"
    assert "memory.mlp_chunks is 17, rows have 16 tokens" in message(tmp_path, MINIMAL, *flags)
    assert len(message(tmp_path, MINIMAL, "--memory.mlp_chunks=200", flags[1]).splitlines()) == 1


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--memory.checkpointing=half", "command line: memory.checkpointing must be one of auto, none, full"),
        ("--memory.checkpointing.gaet=save", "command line: memory.checkpointing: 'gaet' is no activation"),
        (
            "--memory.budget=24",
            "command line: memory.budget must be a size with its unit, such as 24GiB, not '24'",
        ),
    ],
)
def test_flags_that_make_no_sense_are_named_as_flags(tmp_path, flag, expected):
    text = in_section("memory", "checkpointing: full" if "=half" in flag else "checkpointing: {gate: save}")
    assert message(tmp_path, text, flag).startswith(expected)


def test_a_host_may_have_nothing_to_offload_to(tmp_path):
    loaded = load_config(write(tmp_path, MINIMAL), ["--memory.host_budget=0GiB"])
    assert loaded.memory.host_budget == "0GiB"
    assert "memory.budget must be above 0, not '0GiB'" in message(tmp_path, MINIMAL, "--memory.budget=0GiB")


@pytest.mark.parametrize(
    ("text", "size"), [("24G", 24 * 2**30), ("24 gib", 24 * 2**30), ("1.5e3MB", 1500 * 10**6), ("7 B", 7)]
)
def test_sizes(text, size):
    """G is what plans print for GiB."""
    assert parse_size(text) == size


def test_contradictions_name_where_each_was_written(tmp_path):
    text = message(tmp_path, in_section("train", "mode: full") + "lora:\n  rank: 4\n", "--train.eval_steps=3")
    assert [line.partition(";")[0] for line in text.splitlines()] == [
        "run.yaml:8: train.mode is full, which trains no adapter, but the lora section is set",
        "command line: train.eval_steps is set, but not data.eval_path or data.eval_fraction",
    ]


def test_overwriting_what_is_to_be_resumed(tmp_path):
    flags = ["--output.overwrite_output_dir=true", "--train.resume_from_checkpoint=auto"]
    assert "train.resume_from_checkpoint needs; to go on, add --output.overwrite_output_dir false" in message(
        tmp_path, MINIMAL, *flags
    )
    load_config(write(tmp_path, MINIMAL), [flags[0], "--train.resume_from_checkpoint=other/checkpoints/3"])


def test_sensible_combinations_are_accepted(tmp_path):
    for flags in (
        ["--train.mode=full", "--train.init=random"],
        ["--train.max_steps=3", "--train.warmup_steps=3", "--train.num_train_epochs=0"],
        ["--train.eval_steps=3", "--data.eval_fraction=0.1"],
        ["--train.eval_steps=3", "--data.eval_path=org/held_out"],
    ):
        load_config(write(tmp_path, MINIMAL), flags)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"model": ModelConfig("a", dtype="bf16")},
            "model.dtype must be one of bfloat16, float16, float32, not 'bf16'",
        ),
        ({"data": DataConfig("a", packing=None)}, "data.packing must be true or false, not null"),
        ({"data": DataConfig("")}, "data.path is missing"),
        (
            {"output": OutputConfig("a", report_to=["mlflow"])},
            "output.report_to must be a list of one of tensorboard",
        ),
        ({"train": TrainConfig(learning_rate=math.nan)}, "train.learning_rate must be above 0, not nan"),
        (
            {"train": TrainConfig(eval_steps=3)},
            "train.eval_steps is set, but not data.eval_path or data.eval_fraction",
        ),
    ],
)
def test_configs_built_in_code_are_checked_alike(sections, expected):
    validate(built())
    with pytest.raises(UserError) as error:
        validate(built(**sections))
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rank": 0}, "lora.rank must be a whole number of at least 1, not 0"),
        ({"rank": 2.5}, "lora.rank must be a whole number of at least 1, not 2.5"),
        ({"rank": "8"}, "lora.rank must be a whole number of at least 1, not '8'"),
        ({"alpha": "x"}, "lora.alpha must be a number above 0, not 'x'"),
        ({"alpha": math.nan}, "lora.alpha must be a number above 0, not nan"),
        ({"dropout": None}, "lora.dropout must be a number of at least 0 and below 1, not None"),
    ],
)
def test_adapter_settings_are_checked_where_they_are_made(settings, expected):
    with pytest.raises(UserError) as error:
        LoRAConfig(**settings)
    assert str(error.value) == expected


def test_target_modules_may_be_a_list():
    assert LoRAConfig(target_modules=["q_proj"]) == LoRAConfig(target_modules=("q_proj",))
