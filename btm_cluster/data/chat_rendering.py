"""Conversations rendered by a chat template, and where in the text the assistant speaks.

Templates are rendered by transformers, in its sandbox, as `apply_chat_template` does.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from btm_cluster.data.conversations import ASSISTANT, Conversation
from btm_cluster.errors import PlanError, one_line
from btm_cluster.plan import ChatTemplate

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK_IT = "mark what the assistant says by {% generation %} in a copy of it"
_DATE = "26 Jul 2024"
"""For templates that write the date, which are given this one, Llama's own default: a text must stay the same."""
_CLOCK = "{{% macro strftime_now(format) %}}{date}{{% endmacro %}}"
"""Takes the place of transformers' own, which gives the time of now."""
_SAMPLES = [
    [{"role": role, "content": "text"} for role in roles]
    for roles in (("user",), ("user", ASSISTANT), ("system", "user"), ("system", "user", ASSISTANT))
]
"""Conversations on which a template's clock is tried: some templates refuse those with a system message."""


class CannotRender(ValueError):
    """A conversation that a template does not render, and why."""


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as a model reads it."""

    text: str
    turns: Sequence[tuple[int, int]]
    """The assistant's turns: from which character, up to which."""


def check_template(template: ChatTemplate) -> None:
    """Refuses a template that cannot be used, before a text is read.

    Raises:
        PlanError: it is not Jinja, or writes today's date.
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    remedy = "mend it, or name another file as `reading.chat_template`"
    if _changes_with_the_day(template):
        raise PlanError(
            f"{template.origin} writes today's date (`strftime_now`), so that a text would change with the day",
            expected="a template that renders the same each day",
            remedy="save it with a fixed date, and name the file as `reading.chat_template`",
        )
    try:
        render_jinja_template([[]], chat_template=template.source)
    except jinja2.TemplateSyntaxError as exc:
        raise PlanError(
            f"{template.origin} is not Jinja", found=f"line {exc.lineno}: {one_line(exc)}", remedy=remedy
        ) from exc
    except Exception:  # of a template that wants messages, as it may
        return


def _changes_with_the_day(template: ChatTemplate) -> bool:
    """Whether it writes a conversation otherwise by one clock than by another."""
    if "strftime_now" not in template.source:
        return False
    clocks = [
        replace(template, source=_CLOCK.format(date=date) + template.source) for date in ("1 Jan 1970", _DATE)
    ]
    for messages in _SAMPLES:
        for asks in (False, True):
            try:
                one, other = (_rendered(clock, messages, add_generation_prompt=asks)[0] for clock in clocks)
            except CannotRender:  # it wants other messages, or is no Jinja
                continue
            if one != other:
                return True
    return False


def render(template: ChatTemplate, conversation: Conversation) -> RenderedChat:
    """The conversation by the template, and the assistant's turns in it.

    These are what `{% generation %}` encloses. A template without it is rendered turn by turn: a turn is what
    its message adds to the prompt for it.

    Raises:
        CannotRender: the template refuses the conversation, or what it writes of a turn depends on later ones.
    """
    messages = conversation.messages
    if _GENERATION.search(template.source):
        text, turns = _rendered(template, messages, marks_turns=True)
    else:
        text = _rendered(template, messages)[0]
        turns = list(_turns_by_prefixes(template, messages, text))
    if not turns or any(start >= end for start, end in turns):
        raise CannotRender("the chat template writes nothing for a turn of the assistant")
    return RenderedChat(text, turns)


def _turns_by_prefixes(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], whole: str
) -> Iterator[tuple[int, int]]:
    for i, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        is_last = i + 1 == len(messages)
        before = _prompt(template, messages[:i])
        after = whole if is_last else _rendered(template, messages[: i + 1])[0]
        if not after.startswith(before):
            raise CannotRender(
                "the chat template begins a turn of the assistant otherwise than its prompt for one, as where the "
                f"prompt opens a thought; {_MARK_IT}"
            )
        if not whole.startswith(after):
            raise CannotRender(f"the chat template writes a turn otherwise once others follow; {_MARK_IT}")
        yield len(before), len(after)


def _prompt(template: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt for the assistant's turn after these messages."""
    if messages:
        return _rendered(template, messages, add_generation_prompt=True)[0]
    try:
        prompt = _rendered(template, [], add_generation_prompt=True)[0]
    except CannotRender:  # there is no first message to look at
        prompt = ""
    if not prompt.strip():
        raise CannotRender(
            "the conversation begins with the assistant, for which the chat template writes no prompt: what it "
            f"writes before such a turn would be learned; {_MARK_IT}"
        )
    return prompt


def _rendered(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    marks_turns: bool = False,
    add_generation_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = dict(template.special_tokens) | (
        {"date_string": _DATE} if "date_string" in template.source else {}
    )
    try:
        (text,), turns = render_jinja_template(
            [list(messages)],
            chat_template=template.source,
            return_assistant_tokens_mask=marks_turns,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except Exception as exc:  # a template raises what it likes
        raise CannotRender(f"the chat template refuses the messages: {one_line(exc)}") from exc
    return text, [(start, end) for start, end in (turns[0] if marks_turns else [])]
