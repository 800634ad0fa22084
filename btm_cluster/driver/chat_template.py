"""The chat template of a plan: what renders its texts' messages."""

from collections.abc import Sequence

import pyarrow

from btm_cluster.data.chat_rendering import check_template
from btm_cluster.data.streams import open_stream
from btm_cluster.data.tokenizer import TRAINED_SPECIAL_TOKENS
from btm_cluster.errors import PlanError, one_line
from btm_cluster.language_model.pretrained import pretrained_tokenizer
from btm_cluster.plan import ChatTemplate, Plan


def chat_template_of(plan: Plan) -> ChatTemplate:
    """The template that renders the plan's messages: its own, or else that of the pretrained tokenizer.

    Raises:
        PlanError: there is none, or it cannot be used.
    """
    tokenizer = plan.tokenizer.pretrained
    own = None if tokenizer is None else pretrained_tokenizer(tokenizer, plan.tokenizer.first_token)[1]
    named = TRAINED_SPECIAL_TOKENS if own is None else own.special_tokens_by_name
    if plan.reading.chat_template is not None:
        return _template_in(plan.reading.chat_template, named)
    if own is None or own.chat_template is None:
        raise PlanError(
            "messages need a chat template",
            found="a tokenizer that is trained here"
            if own is None
            else f"none with the tokenizer {tokenizer}",
            expected="a template in Jinja that writes them as text",
            remedy="name its file as `reading.chat_template`",
        )
    check_template(own.chat_template)
    return own.chat_template


def _template_in(file: str, special_tokens: Sequence[tuple[str, str]]) -> ChatTemplate:
    """The template in a file, local or in S3.

    Raises:
        PlanError: it cannot be read, or not be used.
    """
    try:
        with open_stream(file) as stream:
            source = stream.read().decode()
    except (OSError, ValueError, pyarrow.ArrowException) as exc:
        raise PlanError(
            f"cannot read the chat template {file}",
            found=one_line(exc),
            expected="a file of Jinja in UTF-8",
            remedy="correct `reading.chat_template`",
        ) from exc
    template = ChatTemplate(source, tuple(special_tokens), f"the chat template {file}")
    check_template(template)
    return template
