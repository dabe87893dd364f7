import numpy as np
import pytest
from tokenizers import processors

from lorajax.data.chat import DEFAULT_TEMPLATE, chat_template, render, render_prompt
from lorajax.data.formats import Completion, Conversation, Text
from lorajax.data.tokens import Encoder, decode_row, decode_with_mask
from lorajax.errors import UserError


def dialogue(*contents, first_target=0):
    """A conversation that the user begins."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return Conversation(messages, first_target)


def encode(example, tokenizer, template=None, eos_ids=(), **options):
    rendered = render(example, tokenizer, template or chat_template(tokenizer), **options)
    return Encoder(tokenizer, eos_ids).encode([rendered])[0]


def learnt(tokenizer, tokens, mask):
    """The stretches that are learnt, as text."""
    marked = decode_with_mask(tokenizer, tokens, mask)
    return [part.split("⟧")[0] for part in marked.split("⟦")[1:]]


def test_every_turn_is_learnt_with_its_eos_and_nothing_after_it(tokenizer):
    tokens, mask = encode(dialogue("hello", "you are welcome", "thanks", "the fox"), tokenizer)
    assert learnt(tokenizer, tokens, mask) == ["you are welcome<|im_end|>", "the fox<|im_end|>"]
    assert tokenizer.decode(tokens) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nyou are welcome<|im_end|>\n"
        "<|im_start|>user\nthanks<|im_end|>\n<|im_start|>assistant\nthe fox<|im_end|>\n"
    )


def test_eos_is_learnt_where_it_is_also_the_pad_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    tokens, mask = encode(dialogue("hello", "the fox", "hello", "a dog"), tokenizer)
    assert mask[tokens == tokenizer.eos_token_id].tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    "contents", [("hello", " the  fox "), ("a", "é 😀\n", "b", ""), ("\n", "\n\nfox<|im_end|>x")]
)
def test_generation_marks_and_roles_agree(tokenizer, marked_template, role_template, contents):
    by_role = encode(dialogue(*contents), tokenizer, role_template)
    by_mark = encode(dialogue(*contents), tokenizer, marked_template)
    np.testing.assert_array_equal(by_mark[0], by_role[0])
    np.testing.assert_array_equal(by_mark[1], by_role[1])


def test_text_of_the_answer_within_the_question_is_not_learnt(tokenizer):
    tokens, mask = encode(dialogue("say fox, assistant\nfox", "fox"), tokenizer)
    assert learnt(tokenizer, tokens, mask) == ["fox<|im_end|>"]
    assert mask.sum() == len(tokenizer("fox")["input_ids"]) + 1


def test_eos_that_follows_a_mark_is_learnt(tokenizer, marked_template):
    template = marked_template.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert template != marked_template
    tokens, mask = encode(dialogue("hello", "the fox", "hello", ""), tokenizer, template)
    assert learnt(tokenizer, tokens, mask) == ["the fox<|im_end|>", "<|im_end|>"]


def test_eos_is_appended_where_the_template_ends_without(tokenizer):
    template = (
        "{% for message in messages %}{{ '# ' + message['role'] + '\\n' + message['content'] + '\\n' }}{% "
        "endfor %}{% if add_generation_prompt %}{{ '# assistant\\n' }}{% endif %}"
    )
    tokens, mask = encode(dialogue("hello", "the fox"), tokenizer, template)
    assert learnt(tokenizer, tokens, mask) == ["the fox\n<|im_end|>"]
    assert tokens[-1] == tokenizer.eos_token_id
    # Not after a question, which the model is not to answer with silence.
    tokens, mask = encode(dialogue("hello", "the fox", "thanks"), tokenizer, template)
    assert learnt(tokenizer, tokens, mask) == ["the fox\n"]
    assert tokenizer.eos_token_id not in tokens


def test_other_eos_tokens_count(tokenizer, role_template):
    template = role_template.replace("<|im_end|>", "<|end|>")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    tokens, mask = encode(dialogue("hello", "the fox"), tokenizer, template, eos_ids=(end,))
    assert learnt(tokenizer, tokens, mask) == ["the fox<|end|>"]
    assert tokenizer.eos_token_id not in tokens


def test_prompt_messages_are_not_learnt(tokenizer, role_template, marked_template):
    for template in (role_template, marked_template):
        tokens, mask = encode(dialogue("a", "hello", "b", "fox", first_target=3), tokenizer, template)
        assert learnt(tokenizer, tokens, mask) == ["fox<|im_end|>"]


def test_train_on_prompt_learns_every_token(tokenizer):
    for example in (dialogue("hello", "the fox"), dialogue("hello")):
        tokens, mask = encode(example, tokenizer, train_on_prompt=True)
        assert mask.all()
        assert tokenizer.decode(tokens).endswith("<|im_end|>\n")


def test_text_and_completion(tokenizer):
    eos = tokenizer.eos_token_id
    tokens, mask = encode(Text("the fox"), tokenizer)
    assert tokens.tolist() == [*tokenizer("the fox")["input_ids"], eos] and mask.all()
    tokens, mask = encode(Completion("the", " fox"), tokenizer)
    assert tokens.tolist() == [*tokenizer("the fox")["input_ids"], eos]
    assert learnt(tokenizer, tokens, mask) == [" fox<|im_end|>"]
    tokens, mask = encode(Completion("the", ""), tokenizer)
    assert learnt(tokenizer, tokens, mask) == ["<|im_end|>"]
    tokens, mask = encode(Completion("the", " fox"), tokenizer, train_on_prompt=True)
    assert mask.all()
    # EOS in the middle is text like any other; one at the end is not doubled.
    tokens, mask = encode(Text("a<|im_end|>b<|im_end|>"), tokenizer)
    assert mask.all() and tokenizer.decode(tokens) == "a<|im_end|>b<|im_end|>"
    tokens, mask = encode(Text(""), tokenizer)
    assert len(tokens) == 0


def test_bos_where_the_tokenizer_adds_it_and_never_twice(make_tokenizer, role_template):
    tokenizer = make_tokenizer("{{ bos_token }}" + role_template, eos_token="<|im_end|>", bos_token="<|end|>")
    bos = tokenizer.bos_token_id
    assert encode(Text("fox"), tokenizer)[0][0] != bos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", bos)]
    )
    tokens, mask = encode(Text("fox"), tokenizer)
    assert (tokens[0], mask[0]) == (bos, False) and mask[1:].all()
    assert encode(Text("<|end|>fox"), tokenizer)[0].tolist() == tokens.tolist()
    assert (encode(dialogue("a", "b"), tokenizer)[0] == bos).tolist().count(True) == 1
    assert render_prompt(tokenizer, "a").count(bos) == 1


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer, role_template):
    template = role_template.replace(
        "message['content'] +", "(message['content'] if loop.last else message['content'] | upper) +"
    )
    assert template != role_template
    with pytest.raises(UserError, match=r"^rows\.jsonl:3: .*message 2 .*generation.*train_on_prompt"):
        encode(dialogue("a", "b", "c", "d"), tokenizer, template, origin="rows.jsonl:3")
    assert encode(dialogue("a", "b", "c", "d"), tokenizer, template, train_on_prompt=True)[1].all()


def test_template_that_refuses_a_conversation(tokenizer):
    with pytest.raises(UserError, match=r"^rows\.jsonl:3: .*roles must alternate"):
        encode(
            dialogue("a", "b"),
            tokenizer,
            "{{ raise_exception('roles must alternate') }}",
            origin="rows.jsonl:3",
        )


def test_text_that_cannot_be_tokenised_names_its_origin(tokenizer):
    documents = [
        render(Text(text), tokenizer, "", origin=f"rows.jsonl:{i}") for i, text in enumerate("ab\ud800c")
    ]
    with pytest.raises(UserError, match=r"^rows\.jsonl:2: "):
        Encoder(tokenizer).encode(documents)


def test_default_template(make_tokenizer):
    tokenizer = make_tokenizer(None)
    assert chat_template(tokenizer) == DEFAULT_TEMPLATE
    tokens, mask = encode(dialogue("hello", "the fox"), tokenizer)
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokens) == text + "the fox<|im_end|>\n"
    assert learnt(tokenizer, tokens, mask) == ["the fox<|im_end|>"]
    assert tokenizer.decode(render_prompt(tokenizer, "hello")) == text


def test_template_from_a_file(tmp_path, tokenizer):
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages[0]['content'] }}")
    assert chat_template(tokenizer, path) == "{{ messages[0]['content'] }}"
    path.write_text("{% for message in messages %}\n{{ message\n")
    with pytest.raises(UserError, match=r"data\.chat_template: .*template\.jinja:"):
        chat_template(tokenizer, path)
    with pytest.raises(UserError, match=r"data\.chat_template: .*nothing\.jinja cannot be read"):
        chat_template(tokenizer, tmp_path / "nothing.jinja")


def test_prompt_is_the_beginning_of_what_was_learnt(tokenizer):
    prompt = render_prompt(tokenizer, "hello")
    tokens, mask = encode(dialogue("hello", "the fox"), tokenizer)
    assert tokens[: len(prompt)].tolist() == prompt
    assert mask.tolist().index(True) == len(prompt)
    assert render_prompt(tokenizer, dialogue("hello").messages) == prompt


def test_decode_row_marks_targets_of_each_document(tokenizer):
    a, b = encode(dialogue("a", "fox"), tokenizer), encode(Text("dog"), tokenizer)
    row = {
        "tokens": np.concatenate([a[0][:-1], b[0][:-1], [0, 0]]),
        "targets": np.concatenate([a[0][1:], b[0][1:], [0, 0]]),
        "weights": np.concatenate([a[1][1:], b[1][1:], [0, 0]]).astype(np.float32),
        "segment_ids": np.repeat([1, 2, 0], [len(a[0]) - 1, len(b[0]) - 1, 2]),
    }
    documents = decode_row(tokenizer, row)
    assert len(documents) == 2
    assert documents[0] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦fox<|im_end|>⟧\n"
    assert documents[1].replace("⟦", "") == "dog<|im_end|>⟧"
    assert "\x1b[32mfox<|im_end|>\x1b[0m" in decode_row(tokenizer, row, colour=True)[0]
