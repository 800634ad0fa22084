"""Conversations rendered by a chat template, and where in the text the assistant speaks.

Templates are rendered by transformers, in its sandbox, as `apply_chat_template` does.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from btm_cluster.data.conversations import ASSISTANT, Conversation
from btm_cluster.errors import PlanError, one_line
from btm_cluster.plan import ChatTemplate

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = "26 Jul 2024"
"""For templates that write the date, which are given this one, Llama's own default: a text must stay the same."""


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
    if "strftime_now" in template.source and "date_string" not in template.source:
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
        before = _rendered(template, messages[:i], add_generation_prompt=True)[0]
        after = whole if is_last else _rendered(template, messages[: i + 1])[0]
        if not after.startswith(before) or not whole.startswith(after):
            raise CannotRender(
                "the chat template writes a turn otherwise once others follow; mark what the assistant says by "
                "{% generation %} in a copy of it"
            )
        yield len(before), len(after)


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
