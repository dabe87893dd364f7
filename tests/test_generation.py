"""Generation: the tokens of a plain loop over the full forward pass, in any batch, to the row's own end."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import generation
from lorajax.data import render_prompt
from lorajax.errors import UserError
from lorajax.generation import answering_memory, generate, stream
from lorajax.lora.adapter import add_lora
from lorajax.lora.config import LoRAConfig
from lorajax.models.checkpoint import load

STEPS = 20
PROMPTS = [
    "hello",
    "What is the capital of France?",
    "The quick brown fox " * 20,
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "thanks!"}],
]


@pytest.fixture(scope="module")
def make_model(write_llama, tmp_path_factory):
    def make(dtype="float32", adapter=False, **config):
        folder = write_llama(tmp_path_factory.mktemp("llama"), **{"max_position_embeddings": 256, **config})
        model = load(folder, dtype=dtype)
        if adapter:
            add_lora(model, LoRAConfig(rank=4, alpha=8, dropout=0.5), seed=1)
            for index, linear in enumerate(model.linears().values()):
                b = jax.random.normal(jax.random.key(index), linear.lora_b[...].shape)
                linear.lora_b[...] = 0.3 * b
        return model

    return make


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture
def ids_tokenizer(make_tokenizer):
    """A tokenizer that spells an answer as a list of token ids."""
    tokenizer = make_tokenizer()
    tokenizer.decode = lambda ids, **options: json.dumps(ids)
    return tokenizer


def answers_of(model, tokenizer, prompts, **options):
    return [json.loads(text) for text in generate(model, tokenizer, prompts, max_new_tokens=STEPS, **options)]


def forward_loop(model, tokenizer, prompts, width=None):
    """Greedy answers from the full forward pass; rows are `width` long, by default prompt and STEPS.

    What follows the newest token of a row cannot change it, except that dynamic RoPE sees the row's length.
    """
    answers = []
    for prompt in prompts:
        tokens = render_prompt(tokenizer, prompt)
        row = np.zeros((1, width or len(tokens) + STEPS), np.int32)
        row[0, : len(tokens)] = tokens
        for end in range(len(tokens), len(tokens) + STEPS):
            row[0, end] = np.argmax(model(row)[0, end - 1])
        answers.append(row[0, len(tokens) : len(tokens) + STEPS].tolist())
    return answers


def cut(answers, *eos_ids):
    """Each answer up to its first EOS."""
    return [list(itertools.takewhile(lambda token: token not in eos_ids, answer)) for answer in answers]


@pytest.fixture(scope="module")
def expected(model, make_tokenizer):
    """The answers of `model` to PROMPTS, without a look at EOS."""
    return forward_loop(model, make_tokenizer(), PROMPTS, width=256)


def test_greedy_tokens_are_those_of_the_full_forward_pass(model, ids_tokenizer, expected):
    lengths = {len(render_prompt(ids_tokenizer, prompt)) for prompt in PROMPTS}
    assert len(lengths) == 4 and min(lengths) < 32 and max(lengths) > 64
    assert len(set(map(tuple, expected))) == 4
    assert max(map(len, map(set, expected))) > 8
    assert answers_of(model, ids_tokenizer, PROMPTS) == cut(expected, 2)


@pytest.mark.slow
def test_adapters_are_applied(make_model, ids_tokenizer, expected):
    model = make_model(adapter=True)
    adapted = forward_loop(model, ids_tokenizer, PROMPTS, width=256)
    assert adapted != expected
    assert answers_of(model, ids_tokenizer, PROMPTS, batch_size=3) == cut(adapted, 2)


@pytest.mark.slow
def test_dynamic_rope_has_the_frequencies_of_the_final_length(make_model, ids_tokenizer):
    scaling = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0}
    model = make_model(rope_parameters=scaling, max_position_embeddings=32)
    prompts = PROMPTS[1:3]
    answers = answers_of(model, ids_tokenizer, prompts)
    assert answers == cut(forward_loop(model, ids_tokenizer, prompts), 2)
    assert answers != cut(forward_loop(model, ids_tokenizer, prompts, width=256), 2)


@pytest.mark.slow
def test_half_precision_tokens_are_among_the_most_likely(make_model, ids_tokenizer):
    model = make_model(dtype="bfloat16", adapter=True)
    for prompt, answer in zip(PROMPTS, answers_of(model, ids_tokenizer, PROMPTS), strict=True):
        tokens = render_prompt(ids_tokenizer, prompt)
        row = np.zeros((1, 256), np.int32)
        row[0, : len(tokens) + len(answer)] = tokens + answer
        logits = np.asarray(model(row)[0, len(tokens) - 1 :][: len(answer)])
        chosen = logits[np.arange(len(answer)), answer]
        assert len(answer) > 0
        np.testing.assert_array_less(logits.max(-1) - chosen, 0.15)


@pytest.mark.parametrize("named_by", ["model", "tokenizer"])
def test_each_row_ends_at_its_own_eos(make_model, ids_tokenizer, expected, named_by):
    model = make_model()
    eos = expected[1][5]
    assert any(eos not in answer for answer in expected)
    if named_by == "model":
        model.eos_token_ids = (340, eos)
    else:
        ids_tokenizer.eos_token = ids_tokenizer.convert_ids_to_tokens(eos)
    answers = answers_of(model, ids_tokenizer, PROMPTS)
    assert answers == cut(expected, eos, ids_tokenizer.eos_token_id, *model.eos_token_ids)
    assert len(answers[1]) <= 5


@pytest.mark.slow
def test_writing_stops_once_every_row_has_ended(make_model, tokenizer):
    model = make_model()
    model.eos_token_ids = tuple(range(350))
    settings = generation._settings(model, tokenizer, 50, 0.0, 1.0)
    weights = nnx.split(model)
    state = generation._start(weights, settings, [[5, 6], [7]], [0, 1], 4, 0)
    assert int(generation._decode(*weights, state, 50, settings.sampling).count) == 1


def test_text_has_no_special_tokens(model, tokenizer):
    settings = generation._settings(model, tokenizer, 8, 0.0, 1.0)
    hello = tokenizer("hello thanks")["input_ids"]
    written = np.array([1, *hello, 2, -1, -1])
    assert generation._text(tokenizer, settings, written) == "hello thanks"


def test_a_question_is_a_conversation_of_one_message(model, ids_tokenizer):
    question, conversation = "hello", [{"role": "user", "content": "hello"}]
    answers = answers_of(model, ids_tokenizer, [question, PROMPTS[2], conversation])
    assert answers[0] == answers[2]


@pytest.mark.slow
def test_a_template_in_place_of_the_tokenizers(model, ids_tokenizer):
    template = "{% for message in messages %}{{ message['content'] }}?{% endfor %}"
    answers = answers_of(model, ids_tokenizer, ["hello"], chat_template=template)
    ids_tokenizer.chat_template = template
    assert answers == cut(forward_loop(model, ids_tokenizer, ["hello"], width=256), 2)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"temperature": 1.5, "top_p": 0.7}, id="drawn", marks=pytest.mark.slow),
    ],
)
def test_other_prompts_change_nothing(model, ids_tokenizer, options):
    answer = answers_of(model, ids_tokenizer, PROMPTS, **options)[1]
    others = ["Paris", PROMPTS[1], "a lazy dog " * 30, "system"]
    assert answers_of(model, ids_tokenizer, others, **options)[1] == answer


@pytest.mark.slow
def test_the_batch_size_changes_nothing(model, ids_tokenizer, expected):
    assert answers_of(model, ids_tokenizer, PROMPTS, batch_size=1) == cut(expected, 2)


@pytest.mark.slow
def test_draws_follow_the_seed_and_the_place(model, ids_tokenizer):
    def draw(seed):
        prompts = [PROMPTS[2], "hello", "hello", "hello"]
        return generate(model, ids_tokenizer, prompts, temperature=1.0, top_p=0.9, seed=seed)[1:]

    assert draw(3) == draw(3)
    assert len({*draw(3), *draw(4)}) == 6


@pytest.mark.slow
def test_each_token_is_a_draw_of_its_own(make_model, ids_tokenizer):
    model = make_model()
    model.head.weight[...] = jnp.zeros_like(model.head.weight[...])  # all tokens are equally likely
    answers = answers_of(model, ids_tokenizer, PROMPTS, temperature=1.0, top_p=0.9)
    drawn = list(itertools.chain(*answers))
    assert len(drawn) > 2 * STEPS
    assert len(set(drawn)) > 0.7 * len(drawn)


def test_drawing_from_nothing_but_the_best_is_greedy(model, ids_tokenizer):
    greedy = answers_of(model, ids_tokenizer, PROMPTS)
    assert answers_of(model, ids_tokenizer, PROMPTS, temperature=2.0, top_p=1e-6) == greedy


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, None, [0.1, 0.2, 0.4, 0.3]),
        (0.5, None, [1 / 30, 4 / 30, 16 / 30, 9 / 30]),
        (1.0, 0.65, [0, 0, 4 / 7, 3 / 7]),
        (1.0, 0.75, [0, 2 / 9, 4 / 9, 3 / 9]),
        (0.5, 0.5, [0, 0, 1, 0]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(temperature, top_p, expected):
    draws = 20000
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.1, 0.2, 0.4, 0.3])) + 5, (draws, 4))
    sampling = generation._Sampling(temperature, top_p, jnp.zeros(0, jnp.int32))
    tokens = generation._choose(logits, jax.random.split(jax.random.key(0), draws), sampling)
    shares = np.bincount(np.asarray(tokens), minlength=4) / draws
    np.testing.assert_allclose(shares, expected, atol=0.012)
    assert (shares[np.array(expected) == 0] == 0).all()


@pytest.fixture
def compilations():
    """The seconds that each compilation took."""
    seconds = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_new_weights_compile_nothing(make_model, ids_tokenizer, compilations):
    model = make_model(adapter=True)
    before = answers_of(model, ids_tokenizer, PROMPTS)
    for linear in model.linears().values():
        linear.lora_b[...] = -linear.lora_b[...]
    expected = forward_loop(model, ids_tokenizer, PROMPTS, width=256)
    compiled = len(compilations)
    assert compiled > 2
    after = answers_of(model, ids_tokenizer, PROMPTS)
    assert after == cut(expected, 2)
    assert after != before
    answers_of(model, ids_tokenizer, ["hello", PROMPTS[2], "lazy"])  # numbers and lengths are rounded up
    assert len(compilations) == compiled


def test_a_stream_gives_the_same_text_in_pieces(model, tokenizer):
    text = generate(model, tokenizer, ["hello"], max_new_tokens=30)[0]
    pieces = list(stream(model, tokenizer, "hello", max_new_tokens=30))
    assert "".join(pieces) == text
    assert len(pieces) > 2


def test_a_stream_waits_for_whole_characters(model, tokenizer, monkeypatch):
    tokens = tokenizer("é日x", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 6

    def decode(graph, weights, state, stop, sampling):
        row = np.full((1, 64), generation.NO_TOKEN)
        row[0, :stop] = tokens[:stop]
        return generation.replace(state, tokens=row)

    monkeypatch.setattr(generation, "_decode", decode)
    assert list(stream(model, tokenizer, "hello", max_new_tokens=6, chunk=1)) == ["é", "日", "x"]


def test_nothing_asked_nothing_answered(model, tokenizer):
    assert generate(model, tokenizer, []) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("hello", {}, r"prompts is a list of questions or of conversations; put \[ \] around"),
        ({"role": "user", "content": "a"}, {}, r"put \[ \] around a single one"),
        ([{"role": "user", "content": "a"}], {}, r"put \[ \] around a single one"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        (["a"], {"temperature": -1.0}, "temperature must be 0 or above, not -1.0"),
        (["a"], {"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        (["a"], {"batch_size": 0}, "batch_size must be at least 1, not 0"),
        (["a"], {"chat_template": "{{ nothing }}"}, "prompt 1: the chat template makes no text of it"),
        (
            ["a"],
            {"chat_template": "{{ raise_exception('no') }}"},
            "the chat template fails on the prompt: no",
        ),
    ],
)
def test_what_cannot_be_asked(model, tokenizer, prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(model, tokenizer, prompts, **options)


@pytest.mark.parametrize(("scaling", "context"), [("default", 256), ("dynamic", 1024)])
def test_too_long_for_the_context(make_model, tokenizer, scaling, context):
    model = make_model(rope_parameters={"rope_type": scaling, "factor": 4.0, "rope_theta": 10000.0})
    length = len(render_prompt(tokenizer, "hello"))
    most = context - length
    stream(model, tokenizer, "hello", max_new_tokens=most)
    sum_ = f"{length} tokens and max_new_tokens {most + 1} are {context + 1}, over the model's context of"
    with pytest.raises(UserError, match=f"prompt 2: {sum_} {context}; shorten"):
        generate(model, tokenizer, ["", "hello"], max_new_tokens=most + 1)
    with pytest.raises(UserError, match=f"prompt 1: {sum_} {context}; shorten"):
        stream(model, tokenizer, "hello", max_new_tokens=most + 1)


def test_the_tokenizer_of_another_model(make_model, tokenizer):
    with pytest.raises(UserError, match="gives token 3[0-9]+, but the model knows only 300 tokens"):
        generate(make_model(vocab_size=300), tokenizer, ["The quick brown fox"])


@pytest.mark.slow
def test_what_answering_takes_grows_with_the_prompts_and_answers(make_model, make_tokenizer):
    model, tokenizer = make_model(), make_tokenizer()
    options = model.options

    def taken(prompts, batch_size=8, new=STEPS):
        return answering_memory(model, tokenizer, prompts, max_new_tokens=new, batch_size=batch_size)

    def caches(rows, tokens):
        return 2 * 4 * options.num_layers * rows * tokens * options.num_kv_heads * options.head_dim

    one, long = PROMPTS[:1], PROMPTS[2:3]
    prompt = generation.bucket(len(render_prompt(tokenizer, long[0])))
    # Both lengths are rounded up to a power of two, 64 at least.
    assert caches(1, 64 + 64) < taken(one) < taken(long)
    assert taken(long) > caches(1, prompt + 64)
    assert taken(8 * one, batch_size=2) == taken(2 * one) < taken(8 * one)
    assert taken(8 * one) - taken(one) >= caches(7, 64 + 64)
    assert taken(one, new=65) - taken(one) >= caches(1, 64)


def test_what_is_compiled_to_see_what_answering_takes_then_answers(make_model, make_tokenizer, monkeypatch):
    """The same programs, so that the compilation cache has them."""
    texts = {"_prefill": [], "_decode": []}

    class Noted:
        def __init__(self, name):
            self.name, self.function = name, getattr(generation, name)

        def lower(self, *arguments):
            lowered = self.function.lower(*arguments)
            texts[self.name].append(lowered.as_text())
            return lowered

        def __call__(self, *arguments):
            self.lower(*arguments)
            return self.function(*arguments)

    model, tokenizer = make_model(adapter=True), make_tokenizer()
    for name in texts:
        monkeypatch.setattr(generation, name, Noted(name))
    shapes = jax.eval_shape(lambda: model)
    answering_memory(shapes, tokenizer, PROMPTS, max_new_tokens=STEPS, batch_size=8)
    generate(model, tokenizer, PROMPTS, max_new_tokens=STEPS)
    assert all(len(each) == 2 and each[0] == each[1] for each in texts.values())
