"""Conversations: the messages of a row, in the forms that chat data comes in, as one form.

Knows nothing of how a template renders them (`chat_rendering.py`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
_OTHER_NAMES = {"human": "user", "gpt": ASSISTANT, "observation": "tool", "function_response": "tool"}
"""As ShareGPT's `from` has them."""
MOST_NESTED = 100
"""Lists and mappings of a message within each other."""


class BadMessages(ValueError):
    """A row whose messages cannot be used, and why."""


@dataclass(frozen=True)
class Conversation:
    """The messages of a row, as chat templates take them."""

    messages: Sequence[Mapping[str, Any]]
    """Each with `role`, and with `content` or `tool_calls`; what else a row says of it is kept, as far as JSON has
    it."""

    @property
    def text(self) -> str:
        """All that is said, without roles and template: what decides its split, its duplicates and its length."""
        return "\n\n".join(map(_said, self.messages))

    def to_json(self) -> str:
        """The same text for the same messages; `Conversation.of` reads it."""
        return json.dumps(self.messages, ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def of(stored: str) -> "Conversation":
        """The conversation that `to_json` wrote."""
        return Conversation(json.loads(stored))


def conversation_of(values: Sequence[Any], fields: Sequence[str]) -> Conversation:
    """The conversation in a row's fields: one with messages, or two, with a prompt and its completion.

    Raises:
        BadMessages: there is none, a message of an unknown role or without text, or nothing that the assistant
            says.
    """
    if len(values) == 2:
        rows = _prompt_and_completion(values, fields)
    else:
        rows = _parsed(values[0])
        if not isinstance(rows, list) or not rows:
            raise BadMessages(f"a row without messages in the field {fields[0]!r}")
    messages = [_message(row) for row in rows]
    if not any(message["role"] == ASSISTANT for message in messages):
        raise BadMessages("messages without a turn of the assistant")
    return Conversation(messages)


def _prompt_and_completion(values: Sequence[Any], fields: Sequence[str]) -> list[Any]:
    if not all(isinstance(value, str) for value in values):
        shown = " and ".join(map(repr, fields))
        raise BadMessages(f"a row without text in the fields {shown}")
    return [{"role": role, "content": value} for role, value in zip(("user", ASSISTANT), values, strict=True)]


def _parsed(value: Any) -> Any:
    """A list as it is, or written as JSON, as tables have it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _message(row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise BadMessages("a message without a role and content")
    others = _as_json(row, MOST_NESTED)
    names = ("from", "value") if "role" not in others and "from" in others else ("role", "content")
    given, content = others.pop(names[0], None), _content(others.pop(names[1], None))
    role = _OTHER_NAMES.get(given, given) if isinstance(given, str) else given
    if role not in ROLES:
        raise BadMessages(f"a message of the unknown role {str(given)[:40]!r}; known are {', '.join(ROLES)}")
    calls = others.get("tool_calls")
    if content is None and not calls:
        raise BadMessages(f"a message of the {role} without text")
    if role == ASSISTANT and not (content or "").strip() and not calls:
        raise BadMessages("an empty turn of the assistant")
    return {"role": role, **({} if content is None else {"content": content}), **others}


def _as_json(value: Any, levels: int) -> Any:
    """The value as JSON has it: what JSON has not, such as a time or bytes, is null.

    A mapping is without its nulls, with which Parquet fills what is not there.

    Raises:
        BadMessages: it is nested more than `levels` deep.
    """
    if not levels:
        raise BadMessages(f"a message that is nested more than {MOST_NESTED} deep")
    if isinstance(value, Mapping):
        items = {str(name): _as_json(item, levels - 1) for name, item in value.items()}
        return {name: item for name, item in items.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_as_json(item, levels - 1) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int) else None


def _content(content: Any) -> str | None:
    """Text, or parts that are all text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if parts and len(texts) == len(parts) and all(isinstance(text, str) for text in texts):
        return "".join(map(str, texts))
    return None


def _said(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    called = json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else ""
    return f"{message.get('content', '')}{called}"
