"""Conversations as tokens, with marks of what the assistant says, which alone is predicted."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tokenizers import Encoding

from btm_cluster.data.blocks import END, READ, TEXT, TokenisedDocument, tokenised
from btm_cluster.data.chat_rendering import CannotRender, RenderedChat, render
from btm_cluster.data.conversations import ASSISTANT, Conversation
from btm_cluster.data.documents import Document
from btm_cluster.data.tokenizer import TextTokenizer
from btm_cluster.errors import TextError
from btm_cluster.plan import ChatTemplate

_BATCH_DOCUMENTS = 512


def tokenised_documents(
    documents: Iterable[Document], tokenizer: TextTokenizer, template: ChatTemplate | None
) -> Iterator[TokenisedDocument]:
    """Documents as tokens, in their order: plain ones as they are, conversations by the template.

    Raises:
        TextError: the template does not render a conversation.
    """
    if template is None:
        yield from tokenised((document.text for document in documents), tokenizer)
        return
    remaining = iter(documents)
    while batch := list(islice(remaining, _BATCH_DOCUMENTS)):
        plain = tokenised((one.text for one in batch if one.conversation is None), tokenizer)
        chats = _tokenised_chats([one.conversation for one in batch if one.conversation], tokenizer, template)
        streams = {True: iter(plain), False: iter(chats)}
        for one in batch:
            yield next(streams[one.conversation is None])


def _tokenised_chats(
    conversations: Sequence[Conversation], tokenizer: TextTokenizer, template: ChatTemplate
) -> Iterator[TokenisedDocument]:
    rendered = [_render(template, conversation) for conversation in conversations]
    special = tokenizer.special_tokens()
    encodings = tokenizer.encode_rendered([chat.text for chat in rendered])
    for conversation, chat, encoding in zip(conversations, rendered, encodings, strict=True):
        tokens = _Tokens.of(encoding)
        marks, size = _marks(chat, tokens, special)
        ids = tokens.ids
        if not _has_ended(chat, tokens, tokenizer.end_of_text):
            ids = [*ids, tokenizer.end_of_text]
            marks = np.append(marks, np.uint8(END if _must_end(conversation, marks) else READ))
        yield TokenisedDocument(ids, marks, size)


def _render(template: ChatTemplate, conversation: Conversation) -> RenderedChat:
    try:
        return render(template, conversation)
    except CannotRender as exc:
        raise TextError(
            "a conversation cannot be rendered",
            found=f"{exc}: {conversation.text[:80]!r}",
            remedy="leave it out of the text, or name a template that renders it as `reading.chat_template`",
        ) from exc


@dataclass(frozen=True)
class _Tokens:
    """Tokens of a text, each from its first character up to its last."""

    ids: list[int]
    starts: np.ndarray
    ends: np.ndarray

    @staticmethod
    def of(encoding: Encoding) -> "_Tokens":
        # Each of these is made anew whenever it is asked for.
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        return _Tokens(encoding.ids, starts, ends)


def _marks(chat: RenderedChat, tokens: _Tokens, special: frozenset[int]) -> tuple[np.ndarray, int]:
    """Marks of the tokens, uint8, and the bytes of the text that is predicted.

    A token that reaches into a turn is part of it, unless it is no text: some swallow the space after them.
    White space after the token that ends a turn is not.
    """
    marks = np.full(len(tokens.ids), READ, dtype=np.uint8)
    size = 0
    for start, end in chat.turns:
        first = int(np.searchsorted(tokens.ends, start, "right"))
        last = int(np.searchsorted(tokens.starts, end))
        if first < last and tokens.ids[first] in special and tokens.starts[first] < start:
            start, first = int(tokens.ends[first]), first + 1
        no_text = [i for i in range(first, last) if tokens.ids[i] in special]
        if no_text and not chat.text[tokens.ends[no_text[-1]] : end].strip():
            last, end = no_text[-1] + 1, min(end, int(tokens.ends[no_text[-1]]))
        marks[first:last] = TEXT
        marks[no_text] = END
        size += len(chat.text[start:end].encode())
        size -= sum(len(chat.text[tokens.starts[i] : min(end, tokens.ends[i])].encode()) for i in no_text)
    return marks, size


def _has_ended(chat: RenderedChat, tokens: _Tokens, end_of_text: int) -> bool:
    """Whether the template itself writes the end of text, with nothing but white space after it."""
    if end_of_text not in tokens.ids:
        return False
    last = len(tokens.ids) - 1 - tokens.ids[::-1].index(end_of_text)
    return not chat.text[tokens.ends[last] :].strip()


def _must_end(conversation: Conversation, marks: np.ndarray) -> bool:
    """Whether nothing but the end of text tells the model that the assistant has said all."""
    last_predicted = marks[marks != READ][-1:]
    return conversation.messages[-1]["role"] == ASSISTANT and bool((last_predicted == TEXT).any())
