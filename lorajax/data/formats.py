"""Rows in the usual forms become conversations, completions or texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from lorajax.data.sources import Row
from lorajax.errors import UserError

Message: TypeAlias = dict[str, Any]

# The keys each form needs, and those it also reads; in the order in which they are looked for.
_FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("tools",)),
    "sharegpt": (("conversations",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "prompt_completion": (("prompt", "completion"), ("tools",)),
    "text": (("text",), ()),
}

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "ipython")},
}


@dataclass(frozen=True)
class Conversation:
    """Messages with "role" and "content"; the assistant's from index first_target on are to be learnt."""

    messages: list[Message]
    first_target: int = 0
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Completion:
    """Text that follows a prompt, with no template around either."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Text to be learnt as a whole."""

    text: str


Example: TypeAlias = Conversation | Completion | Text


def parse_row(
    row: Row, *, format: str = "auto", columns: Mapping[str, str] | None = None, train_on_prompt: bool = False
) -> Example:
    """Turn a row into an example.

    Args:
        row: the row and its origin.
        format: "auto" (by the row's keys), or one of "messages", "sharegpt", "alpaca", "prompt_completion",
            "text".
        columns: a form's name of a column -> the data's name of it, where they differ.
        train_on_prompt: also take conversations in which no turn is the assistant's.

    Raises:
        UserError: the row has not the keys or values its form needs, or no assistant's turn. The message
            names the row's origin.
    """
    fields = _rename(row, columns or {})
    name = _recognise(row.origin, fields) if format == "auto" else format
    missing = [key for key in _FORMATS[name][0] if fields.get(key) is None]
    if missing:
        what = "is null" if missing[0] in fields else "is missing"
        raise UserError(
            f"{row.origin}: {missing[0]!r} {what}; the row has {_names(fields)}, data.format {name} needs "
            f"{_names(_FORMATS[name][0])}. Name the right columns with data.columns"
        )
    if name == "text":
        return Text(_string(row.origin, "text", fields["text"]))
    if name == "prompt_completion":
        example = _completion(row.origin, fields)
    elif name == "alpaca":
        example = _alpaca(row.origin, fields)
    else:
        messages = _messages(row.origin, _FORMATS[name][0][0], fields[_FORMATS[name][0][0]])
        if name == "sharegpt":
            messages = _system(row.origin, fields) + messages
        example = Conversation(messages, tools=_tools(row.origin, fields))
    if isinstance(example, Conversation) and not train_on_prompt:
        roles = [message["role"] for message in example.messages[example.first_target :]]
        if "assistant" not in roles:
            raise UserError(
                f"{row.origin}: no turn is the assistant's, so there is nothing to learn; the roles are "
                f"{_names(message['role'] for message in example.messages) or 'none'}. Remove the row, or "
                "set data.train_on_prompt to learn every token"
            )
    return example


def _rename(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    if not columns:
        return row.fields
    absent = [name for name in columns.values() if name not in row.fields]
    if absent:
        raise UserError(
            f"{row.origin}: data.columns names the column {absent[0]!r}, but the row has {_names(row.fields)}"
        )
    taken = set(columns.values())
    kept = {name: value for name, value in row.fields.items() if name not in taken}
    return kept | {name: row.fields[column] for name, column in columns.items()}


def _recognise(origin: str, fields: Mapping[str, Any]) -> str:
    for name, (needed, _) in _FORMATS.items():
        if all(key in fields for key in needed):
            return name
    known = "; ".join(f"{' + '.join(needed)} ({name})" for name, (needed, _) in _FORMATS.items())
    raise UserError(
        f"{origin}: the row has {_names(fields)}, which is none of the known forms: {known}. Name the "
        "columns with data.columns, for example --data.columns.text=body"
    )


def _names(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def _string(origin: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{origin}: {key!r} must be text, not {type(value).__name__}")
    return value


def _decoded(value: Any) -> Any:
    """CSV cells hold lists as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _messages(origin: str, key: str, value: Any) -> list[Message]:
    turns = _decoded(value)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        found = type(turns).__name__
        if isinstance(turns, list):
            others = [type(turn).__name__ for turn in turns if not isinstance(turn, dict)]
            found = f"a list with {others[0]}" if others else "an empty list"
        raise UserError(
            f"{origin}: {key!r} must be a list of messages (objects with role and content), not {found}"
        )
    return [_message(origin, f"{key}[{index}]", turn) for index, turn in enumerate(turns)]


def _message(origin: str, place: str, turn: Mapping[str, Any]) -> Message:
    role_key = "from" if "from" in turn and "role" not in turn else "role"
    content_key = "value" if "value" in turn and "content" not in turn else "content"
    if turn.get(role_key) is None:
        raise UserError(
            f"{origin}: {place} has {_names(turn)}, but not 'role' and 'content' ('from' and 'value')"
        )
    role = turn[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(f"{origin}: {place} has the role {role!r}; known roles are {_names(_ROLES)}")
    # Parquet gives every message the keys of all: those without a value were not there.
    rest = {
        name: item for name, item in turn.items() if name not in (role_key, content_key) and item is not None
    }
    content = _content(origin, place, turn.get(content_key), optional=bool(rest.get("tool_calls")))
    return {"role": _ROLES[role], "content": content, **rest}


def _content(origin: str, place: str, value: Any, *, optional: bool) -> str:
    if value is None and optional:
        return ""
    if isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in value
    ):
        return "".join(_string(origin, f"{place}.text", part.get("text")) for part in value)
    if not isinstance(value, str):
        raise UserError(f"{origin}: the content of {place} must be text, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null or missing"
    return "parts other than text" if isinstance(value, list) else type(value).__name__


def _system(origin: str, fields: Mapping[str, Any]) -> list[Message]:
    text = fields.get("system")
    return [{"role": "system", "content": _string(origin, "system", text)}] if text else []


def _tools(origin: str, fields: Mapping[str, Any]) -> list[Any] | None:
    tools = _decoded(fields.get("tools"))
    if tools is None or tools == [] or tools == "":
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{origin}: 'tools' must be a list of JSON schemas")
    return tools


def _alpaca(origin: str, fields: Mapping[str, Any]) -> Conversation:
    question = _string(origin, "instruction", fields["instruction"])
    if fields.get("input"):
        question += "\n\n" + _string(origin, "input", fields["input"])
    answer = _string(origin, "output", fields["output"])
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(_system(origin, fields) + turns)


def _completion(origin: str, fields: Mapping[str, Any]) -> Conversation | Completion:
    prompt, completion = _chat(fields["prompt"]), _chat(fields["completion"])
    if isinstance(prompt, list) or isinstance(completion, list):
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        asked = _messages(origin, "prompt", prompt)
        answered = _messages(origin, "completion", completion)
        return Conversation(asked + answered, first_target=len(asked), tools=_tools(origin, fields))
    return Completion(_string(origin, "prompt", prompt), _string(origin, "completion", completion))


def _chat(value: Any) -> Any:
    """A cell of CSV is a chat only if it decodes to objects: a prompt may begin with a bracket."""
    decoded = _decoded(value)
    is_chat = isinstance(decoded, list) and decoded and all(isinstance(turn, dict) for turn in decoded)
    return decoded if is_chat else value
