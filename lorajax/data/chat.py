"""Chat templates: rendering, and which characters of the rendered text are to be learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorajax.data.formats import Completion, Conversation, Example, Message, Text
from lorajax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEFAULT_TEMPLATE = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% else %}
{{ message['content'] + eos_token }}
{%- endif %}
{{ '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A document as text.

    Attributes:
        text: everything the model reads, but for bos and the EOS that is appended.
        spans: [start, end) in characters of what is to be learnt, in order.
        ends_in_target: the last span is to end in an EOS token, and gets one where it has none.
        origin: where the row stands.
        spans_are_turns: each span is a turn of the assistant, learnt as far as its EOS token.
        add_bos: put the tokenizer's bos before it, if the tokenizer normally does.
    """

    text: str
    spans: list[tuple[int, int]]
    ends_in_target: bool
    origin: str
    spans_are_turns: bool = False
    add_bos: bool = False


def chat_template(tokenizer: PreTrainedTokenizerFast, path: str | Path | None = None) -> str:
    """The Jinja template to use: of the file at path, else the tokenizer's own, else a ChatML-like default.

    Raises:
        UserError: the file cannot be read, or is not a template.
    """
    if path is None:
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return template or DEFAULT_TEMPLATE
    try:
        template = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template: {path} cannot be read: {error}") from error
    import jinja2

    try:
        _render(tokenizer, template, [])
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"data.chat_template: {path}:{error.lineno}: {error.message}") from error
    except Exception:  # a template may refuse an empty conversation
        pass
    return template


def render(
    example: Example,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    *,
    origin: str = "the conversation",
    train_on_prompt: bool = False,
) -> Rendered:
    """Turn an example into text and the spans to be learnt.

    The spans are those of the template's {% generation %} marks. In a template without marks they are found
    by role: what a turn of the assistant adds to the text that asks for it. Text is never searched for.

    Raises:
        UserError: the template refuses the conversation, or gives no prefix of a conversation when given its
            first messages, so that turns cannot be told apart.
    """
    if isinstance(example, Text):
        return Rendered(example.text, [(0, len(example.text))], True, origin, add_bos=True)
    if isinstance(example, Completion):
        text = example.prompt + example.completion
        start = 0 if train_on_prompt else len(example.prompt)
        return Rendered(text, [(start, len(text))], True, origin, add_bos=True)
    try:
        return _render_conversation(example, tokenizer, template, origin, train_on_prompt)
    except UserError:
        raise
    except Exception as error:  # a template may raise anything, with raise_exception or by mistake
        raise UserError(f"{origin}: the chat template fails: {error}") from error


def _render_conversation(
    example: Conversation,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    origin: str,
    train_on_prompt: bool,
) -> Rendered:
    messages, tools = example.messages, example.tools
    text, spans = _render(tokenizer, template, messages, tools=tools)
    ends_in_target = bool(messages) and messages[-1]["role"] == "assistant"
    if train_on_prompt:
        return Rendered(text, [(0, len(text))], ends_in_target, origin)
    if _GENERATION_MARK.search(template):
        if any(message["role"] == "assistant" for message in messages[: example.first_target]):
            asked = _render(tokenizer, template, messages[: example.first_target], tools=tools)[0]
            _check_prefix(text, asked, example.first_target - 1, origin)
            spans = [span for span in spans if span[0] >= len(asked)]
        return Rendered(text, spans, ends_in_target, origin, spans_are_turns=True)
    spans = []
    for index in range(example.first_target, len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        asked = _render(tokenizer, template, messages[:index], tools=tools, ask=True)[0]
        answered = _render(tokenizer, template, messages[: index + 1], tools=tools)[0]
        _check_prefix(answered, asked, index, origin)
        _check_prefix(text, answered, index, origin)
        spans.append((len(asked), len(answered)))
    return Rendered(text, spans, ends_in_target, origin, spans_are_turns=True)


def _check_prefix(whole: str, part: str, index: int, origin: str) -> None:
    if not whole.startswith(part):
        raise UserError(
            f"{origin}: the chat template writes the text up to message {index + 1} otherwise when messages "
            "follow, so the assistant's turns cannot be told apart by role. Put "
            "{% generation %} ... {% endgeneration %} around them in the template (data.chat_template), or "
            "set data.train_on_prompt to learn every token"
        )


def _render(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    messages: Sequence[Message],
    *,
    tools: list[Any] | None = None,
    ask: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    marked = _GENERATION_MARK.search(template) is not None
    variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
    # Annotated as a string, but it gives the texts and the spans of all conversations.
    texts, spans = cast(
        Any,
        render_jinja_template(
            [list(messages)],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=ask,
            **variables,
        ),
    )
    return texts[0], [(start, end) for start, end in spans[0]] if marked else []


def render_prompt(
    tokenizer: PreTrainedTokenizerFast, prompt: str | Sequence[Message], template: str | None = None
) -> list[int]:
    """Tokens that ask the model for an answer.

    Args:
        tokenizer: the model's.
        prompt: the user's question, or the messages so far.
        template: a chat template as text; None: the tokenizer's own, or the default.

    Raises:
        UserError: the template refuses the messages.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    try:
        text, _ = _render(tokenizer, template or chat_template(tokenizer), messages, ask=True)
    except Exception as error:
        raise UserError(f"the chat template fails on the prompt: {error}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]
