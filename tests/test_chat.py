"""The chat command: what it answers, what it remembers, and how it says what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lorajax.chat import main
from lorajax.config import Config, DataConfig, ModelConfig, OutputConfig, TrainConfig, save_config
from lorajax.data import load_tokenizer
from lorajax.errors import UserError
from lorajax.generation import generate
from lorajax.lora.config import LoRAConfig
from lorajax.lora.peft import load_adapter, save_adapter
from lorajax.models.checkpoint import load

OPTIONS = ["--max-new-tokens", "12", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    monkeypatch.setattr("lorajax.training.program.use_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def adapter(llama_folder, tmp_path_factory):
    """An adapter that changes the answers of the tiny Llama."""
    model = load(llama_folder, lora=LoRAConfig(rank=4, alpha=8), dtype="float32")
    for index, linear in enumerate(model.linears().values()):
        linear.lora_b[...] = 0.3 * jax.random.normal(jax.random.key(index), linear.lora_b[...].shape)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def answer(llama_folder, adapter):
    """answer(prompts, adapted=False, **options): what the library itself answers."""
    base, tokenizer = load(llama_folder, dtype="float32"), load_tokenizer(llama_folder)
    adapted_model = load_adapter(load(llama_folder, dtype="float32"), adapter)

    def answer(prompts, adapted=False, **options):
        model = adapted_model if adapted else base
        return generate(model, tokenizer, prompts, **{"max_new_tokens": 12, **options})

    return answer


@pytest.fixture
def chat(capsys):
    def chat(*arguments):
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return chat


def write_run(folder, model_path, mode="lora", tokenizer=None, chat_template=None):
    folder.mkdir(parents=True)
    config = Config(
        model=ModelConfig(path=str(model_path), tokenizer=tokenizer, dtype="float32"),
        data=DataConfig(path="org/data", chat_template=chat_template),
        train=TrainConfig(mode=mode),
        output=OutputConfig(output_dir=str(folder)),
    )
    save_config(config, folder / "config.yaml")
    return folder


def test_one_prompt(chat, llama_folder, answer):
    assert chat(llama_folder, "--prompt", "hello", *OPTIONS) == answer(["hello"])[0] + "\n"


def test_options_are_passed_on(chat, llama_folder, monkeypatch):
    given = {}

    def stream(model, tokenizer, prompt, **options):
        given.update(options, dtype=model.dtype)
        return iter(["so"])

    monkeypatch.setattr("lorajax.generation.stream", stream)
    options = ["--temperature", "1.5", "--top-p", "0.9", "--seed", "3"]
    assert chat(llama_folder, "--prompt", "hello", *OPTIONS, *options) == "so\n"
    assert given == {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.9, "seed": 3, "dtype": "float32"}


@pytest.mark.slow
def test_adapter(chat, llama_folder, adapter, answer):
    expected = answer(["hello"], adapted=True)[0]
    assert expected != answer(["hello"])[0]
    assert chat(llama_folder, "--adapter", adapter, "--prompt", "hello", *OPTIONS) == expected + "\n"


def test_text_file(chat, llama_folder, answer, tmp_path):
    (tmp_path / "prompts.txt").write_text("hello\n\n  What is the capital?\nthanks", encoding="utf-8")
    first, second, third = answer(["hello", "What is the capital?", "thanks"])
    out = chat(llama_folder, "--file", tmp_path / "prompts.txt", *OPTIONS)
    assert out == f"> hello\n{first}\n\n> What is the capital?\n{second}\n\n> thanks\n{third}\n\n"


def test_jsonl_file(chat, llama_folder, answer, write_rows):
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "thanks!"}]
    told = {"role": "assistant", "content": "you are welcome"}
    rows = [{"prompt": "hello"}, {"messages": [*question, told]}, {"prompt": question}]
    file = write_rows([*rows, {"prompt": "hello", "completion": "x"}])
    out = [json.loads(line) for line in chat(llama_folder, "--file", file, *OPTIONS).splitlines()]
    first, second, _ = answer(["hello", question, "thanks"])
    assert [row["answer"] for row in out] == [first, second, second, first]
    assert [row["prompt"] for row in out] == ["hello", question, question, "hello"]


@pytest.fixture
def say(monkeypatch):
    """say(line, ...): what the user types; an exception is raised instead."""

    def say(*lines):
        rest = iter(lines)

        def read(prompt):
            line = next(rest)
            if isinstance(line, type):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)

    return say


def test_dialogue_remembers_until_it_is_reset(chat, say, llama_folder, answer):
    say("hello", "", "  thanks ", "/reset", "thanks", "/exit", "hello")
    first = answer(["hello"])[0]
    history = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
    second = answer([[*history, {"role": "user", "content": "thanks"}]])[0]
    alone = answer(["thanks"])[0]
    assert alone != second
    assert chat(llama_folder, *OPTIONS) == f"{first}\n{second}\n{alone}\n"


@pytest.mark.parametrize("leave", [EOFError, KeyboardInterrupt])
def test_dialogue_ends_with_ctrl_d_and_ctrl_c(chat, say, llama_folder, answer, leave):
    say("hello", leave)
    assert chat(llama_folder, *OPTIONS) == f"{answer(['hello'])[0]}\n\n"


def test_ctrl_c_in_an_answer_leaves(say, llama_folder, monkeypatch):
    def interrupted(*arguments, **options):
        yield "some"
        raise KeyboardInterrupt

    monkeypatch.setattr("lorajax.generation.stream", interrupted)
    say("hello")
    assert main([str(llama_folder), *OPTIONS]) == 0


def test_dialogue_goes_on_after_what_is_too_long(say, llama_folder, answer, capsys):
    say("hello", "The quick brown fox " * 40, "thanks", EOFError)
    assert main([str(llama_folder), *OPTIONS]) == 0
    out, err = capsys.readouterr()
    first = answer(["hello"])[0]
    history = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
    assert out == f"{first}\n{answer([[*history, {'role': 'user', 'content': 'thanks'}]])[0]}\n\n"
    assert "over the model's context of 128" in err
    assert "/reset begins a new dialogue" in err


@pytest.mark.slow
def test_run_brings_model_adapter_and_template(chat, llama_folder, adapter, answer, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}?{% endfor %}")
    run = write_run(tmp_path / "run", llama_folder, chat_template=str(template))
    (run / "adapter").symlink_to(adapter)
    expected = answer(["hello"], adapted=True, chat_template=template.read_text())[0]
    assert expected != answer(["hello"], adapted=True)[0]
    assert chat(run, "--prompt", "hello", "--max-new-tokens", "12") == expected + "\n"


def test_run_of_full_training_is_the_model_that_it_wrote(chat, llama_folder, answer, tmp_path):
    run = write_run(tmp_path / "run", "org/base", mode="full", tokenizer="org/base")
    (run / "model").symlink_to(llama_folder)
    assert chat(run, "--prompt", "hello", "--max-new-tokens", "12") == answer(["hello"])[0] + "\n"


def test_arguments_win_over_the_run(chat, llama_folder, write_llama, adapter, answer, tmp_path):
    bare = write_llama(tmp_path / "bare")
    run = write_run(tmp_path / "run", bare, tokenizer="org/none")
    given = ["--adapter", adapter, "--tokenizer", llama_folder]
    expected = answer(["hello"], adapted=True)[0]
    assert chat(run, *given, "--prompt", "hello", "--max-new-tokens", "12") == expected + "\n"


@pytest.mark.parametrize(("mode", "missing"), [("lora", "adapter"), ("full", "model")])
def test_run_that_has_written_no_model(llama_folder, tmp_path, mode, missing):
    run = write_run(tmp_path / "run", llama_folder, mode=mode)
    with pytest.raises(UserError, match=f"the run has not written {missing}/ yet; let it finish, or go on"):
        main([str(run), "--prompt", "hello"])


def test_an_adapter_is_no_model(adapter):
    with pytest.raises(UserError, match=f"{adapter}: an adapter, not a model; give the run's folder"):
        main([str(adapter), "--prompt", "hello"])


def test_gguf_needs_a_tokenizer(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(
        UserError, match="brings no tokenizer here; name the original model's with --tokenizer"
    ):
        main([str(tmp_path / "model.gguf"), "--prompt", "hello"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.txt", None, r"--file: .*none\.txt cannot be read"),
        ("none.jsonl", None, r"--file: no such file or folder: .*none\.jsonl"),
        ("empty.txt", " \n\n", r"--file: .*empty\.txt holds no prompts"),
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt"', r"bad\.jsonl:2"),
        ("other.jsonl", '{"text": "a"}', r"other\.jsonl:1: asks nothing; a row needs a prompt, or messages"),
    ],
)
def test_files_that_hold_no_prompts(llama_folder, tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        main([str(llama_folder), "--file", str(tmp_path / name)])


def run_python(*arguments, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", ["chat", "merge"])
def test_help_needs_no_heavy_imports(tmp_path, command):
    result = run_python("-m", f"lorajax.{command}", "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "--adapter FOLDER" in result.stdout
    code = f"import sys, lorajax.{command}; print({{'jax', 'numpy', 'transformers'}} & set(sys.modules))"
    assert run_python("-c", code, cwd=tmp_path).stdout.strip() == "set()"


@pytest.mark.slow
def test_a_mistake_is_told_without_a_traceback(tmp_path):
    result = run_python("-m", "lorajax.chat", "./nowhere", "--prompt", "hello", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ./nowhere: no such file or folder")
    assert "Traceback" not in result.stderr
