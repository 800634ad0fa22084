"""Conversations as tokens, with marks of what the assistant says, which alone is predicted."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from tokenizers import Encoding

from btm_cluster.data.blocks import END, READ, TEXT, TokenisedDocument, tokenised
from btm_cluster.data.chat_rendering import CannotRender, RenderedChat, render
from btm_cluster.data.conversations import ASSISTANT, Conversation
from btm_cluster.data.documents import Document
from btm_cluster.data.tokenizer import BATCH_DOCUMENTS, TextTokenizer
from btm_cluster.errors import TextError
from btm_cluster.plan import ChatTemplate


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
    while batch := list(islice(remaining, BATCH_DOCUMENTS)):
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
        marks, size = _marks(chat, encoding, special)
        ids = list(encoding.ids)
        if not _has_ended(chat, encoding, tokenizer.end_of_text):
            ids.append(tokenizer.end_of_text)
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


def _marks(chat: RenderedChat, encoding: Encoding, special: frozenset[int]) -> tuple[np.ndarray, int]:
    """Marks of the tokens, uint8, and the bytes of the text that is predicted.

    A token that reaches into a turn is part of it. White space after the token that ends a turn is not.
    """
    marks = np.full(len(encoding.ids), READ, dtype=np.uint8)
    size = 0
    starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    for turn in chat.turns:
        places = np.flatnonzero((ends > turn[0]) & (starts < turn[1]))
        no_text = [i for i in places.tolist() if encoding.ids[i] in special]
        start, end = turn
        if no_text and not chat.text[ends[no_text[-1]] : end].strip():
            places, end = places[places <= no_text[-1]], int(ends[no_text[-1]])
        marks[places] = TEXT
        marks[no_text] = END
        size += len(chat.text[start:end].encode())
        size -= sum(len(chat.text[starts[i] : ends[i]].encode()) for i in no_text)
    return marks, size


def _has_ended(chat: RenderedChat, encoding: Encoding, end_of_text: int) -> bool:
    """Whether the template itself writes the end of text, with nothing but white space after it."""
    last = next((i for i in range(len(encoding.ids) - 1, -1, -1) if encoding.ids[i] == end_of_text), None)
    return last is not None and not chat.text[encoding.offsets[last][1] :].strip()


def _must_end(conversation: Conversation, marks: np.ndarray) -> bool:
    """Whether nothing but the end of text tells the model that the assistant has said all."""
    return conversation.messages[-1]["role"] == ASSISTANT and bool(marks[-1] == TEXT)
