import pytest

from lorajax.data.formats import Completion, Conversation, Text, parse_row
from lorajax.data.sources import Row
from lorajax.errors import UserError

ASKED = {"role": "user", "content": "Hi"}
ANSWERED = {"role": "assistant", "content": "Hello"}


def parse(fields, **options):
    return parse_row(Row("rows.jsonl:7", fields), **options)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": [ASKED, ANSWERED], "id": 3}, Conversation([ASKED, ANSWERED])),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            Conversation([ASKED, ANSWERED]),
        ),
        ({"conversations": [ASKED, ANSWERED]}, Conversation([ASKED, ANSWERED])),
        (
            {"system": "Be kind", "conversations": [ASKED, ANSWERED]},
            Conversation([{"role": "system", "content": "Be kind"}, ASKED, ANSWERED]),
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, Conversation([ASKED, ANSWERED])),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            Conversation([{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]),
        ),
        ({"prompt": "Hi", "completion": " Hello"}, Completion("Hi", " Hello")),
        (
            {"prompt": [ANSWERED, ASKED], "completion": [ANSWERED]},
            Conversation([ANSWERED, ASKED, ANSWERED], first_target=2),
        ),
        ({"prompt": "Hi", "completion": [ANSWERED]}, Conversation([ASKED, ANSWERED], first_target=1)),
        ({"text": "Hi"}, Text("Hi")),
        # CSV holds lists as JSON; a prompt that begins with a bracket is no list of messages.
        ({"messages": '[{"role": "assistant", "content": "Hello"}]'}, Conversation([ANSWERED])),
        ({"prompt": "[1, 2]", "completion": "[3]"}, Completion("[1, 2]", "[3]")),
        # The text parts of a message; a key that is null is absent.
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "text", "text": "Hello"}], "name": None}
                ]
            },
            Conversation([ANSWERED]),
        ),
        (
            {"messages": [ANSWERED], "tools": [{"name": "search"}]},
            Conversation([ANSWERED], tools=[{"name": "search"}]),
        ),
    ],
)
def test_recognised_by_keys(fields, expected):
    assert parse(fields) == expected


def test_format_overrides_keys():
    assert parse({"messages": [ASKED, ANSWERED], "text": "Hi"}, format="text") == Text("Hi")


def test_columns_rename():
    columns = {"prompt": "question", "completion": "answer"}
    assert parse({"question": "Hi", "answer": "Hello"}, columns=columns) == Completion("Hi", "Hello")
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert parse({"prompt": "Hello", "completion": "Hi"}, columns=swapped) == Completion("Hi", "Hello")


def test_no_assistant_turn_is_fine_when_prompts_are_learnt():
    assert parse({"messages": [ASKED]}, train_on_prompt=True) == Conversation([ASKED])


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        (
            {"question": "Hi", "answer": "a"},
            {},
            "the row has 'question', 'answer', which is none of .*messages",
        ),
        ({"text": "a"}, {"format": "alpaca"}, "'instruction' is missing; the row has 'text'.*'output'"),
        ({"text": None}, {}, "'text' is null"),
        ({"text": 3}, {}, "'text' must be text, not int"),
        ({"body": "a"}, {"columns": {"text": "content"}}, "data.columns names the column 'content'.*'body'"),
        ({"messages": [ASKED]}, {}, "no turn is the assistant's.*'user'.*train_on_prompt"),
        ({"prompt": [ANSWERED], "completion": [ASKED]}, {}, "no turn is the assistant's"),
        ({"messages": []}, {}, "'messages' must be a list of messages .*, not an empty list$"),
        ({"messages": "Hi"}, {}, "'messages' must be a list of messages .*, not str$"),
        ({"messages": [ASKED, 3]}, {}, "'messages' must be a list of messages .*, not a list with int$"),
        ({"messages": [{"speaker": "user", "content": "Hi"}]}, {}, r"messages\[0\] has 'speaker', 'content'"),
        (
            {"messages": [ASKED, {"role": "asistant", "content": "a"}]},
            {},
            r"messages\[1\] has the role 'asistant'",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, {}, r"messages\[0\] must be text, not null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWERED]},
            {},
            r"messages\[0\] must be text, not parts other than text",
        ),
        ({"messages": [ANSWERED], "tools": "search"}, {}, "'tools' must be a list of JSON schemas"),
    ],
)
def test_unusable_rows_name_their_origin(fields, options, message):
    with pytest.raises(UserError, match=rf"^rows\.jsonl:7: .*{message}"):
        parse(fields, **options)
