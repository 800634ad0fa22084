"""A first look into a text's files, which takes a moment: refuses what reading them would refuse at once.

A small text is read whole. Of a larger one, each file is looked at for as long as its first documents take, so
that a fault further on is found by the run alone.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from btm_cluster.data.corpus import usable_documents, write_text
from btm_cluster.data.documents import BadDocument, Delimiter, Read, longer_than
from btm_cluster.data.fields import fields_with_messages
from btm_cluster.data.files import S3, SourceFile, opened, readable
from btm_cluster.data.readers import read_file
from btm_cluster.data.shards import read_shard
from btm_cluster.data.sources import as_document, opened_files, refuse_together, source_files
from btm_cluster.errors import TextError
from btm_cluster.plan import ChatTemplate, ReadingPlan, TextPlan
from btm_cluster.plan.kinds import codec, kind_of
from btm_cluster.plan.text_rules import DEFAULT_FIELD
from btm_cluster.storage.scratch import scratch_folder

SMALL_BYTES = 1 << 20
"""A text of files of so many bytes together is read whole, in a fraction of a second."""
HEAD_BYTES = 1 << 16
MOST_BYTES_OF_A_CHARACTER = 8
"""Those of a line end, CR and LF, in UTF-32."""
MOST_FILES, MOST_REMOTE_FILES = 1000, 8
"""Files of a text that are opened; each in a bucket takes several calls."""


@dataclass(frozen=True)
class Unread:
    """A text that is to be read, and how."""

    source: TextPlan
    reading: ReadingPlan
    is_target: bool
    template: ChatTemplate | None = None


def look_into(texts: Iterable[Unread], block_tokens: int = 0) -> None:
    """Looks into the files of texts; data sets are not looked at.

    Raises:
        TextError: naming every text that reading or tokenising would refuse, as they do.
    """
    refused: list[TextError] = []
    for text in texts:
        try:
            _refuse_messages(text)
            most = None if text.source.dataset else _look_into(text)
            if not text.is_target and most is not None and most < block_tokens:
                raise fills_no_block(text.source.name, "train", block_tokens)
        except TextError as exc:
            refused.append(exc)
    refuse_together(refused)


def fills_no_block(name: str, split: str, block_tokens: int, is_founded: bool = False) -> TextError:
    """The error on a split of a text that is too short. In a forest, blocks cannot become smaller."""
    return TextError(
        f"the {split} text of {name!r} fills no block",
        expected=f"at least {block_tokens} tokens",
        remedy="give it more text" + ("" if is_founded else ", or lower `training.block_tokens`"),
    )


def _refuse_messages(text: Unread) -> None:
    """Refuses rows that have messages and no text, where the plan names no messages."""
    source, reading = text.source, text.reading
    if source.dataset or source.messages or source.field != DEFAULT_FIELD or reading.bad_documents == "skip":
        return
    first = next(opened_files(source), "")
    if first and (fields := fields_with_messages(first)):
        raise TextError(
            f"the rows of {source.name!r} have messages, and no field `{DEFAULT_FIELD}`",
            found=f"{' and '.join(fields)}, in the first row of {readable(first)}",
            remedy=f"`messages: {fields[0] if len(fields) == 1 else list(fields)}` instead of `field` learns what "
            "the assistant says",
        )


def _look_into(text: Unread) -> int | None:
    """The most tokens that the training text of a small text can have; None where that is not known."""
    source, reading = text.source, text.reading
    files = [(split, file) for split, given in source_files(source).items() for file in given]
    is_remote = any(file.path.startswith(S3) for _, file in files)
    most_files = MOST_REMOTE_FILES if is_remote else MOST_FILES
    if len(files) <= most_files and sum(file.size_bytes for _, file in files) <= SMALL_BYTES:
        with scratch_folder() as scratch:
            read = write_text(source, reading, text.is_target, scratch, template=text.template)
            shards = [path for name, path in read.files.items() if name.startswith("train")]
            return sum(map(_most_tokens, shards)) if source.messages is None else None
    items = (
        as_document(item, None if split == "text" else split)
        for split, file in islice(files, most_files)
        for item in _first_documents(file, text)
    )
    for _ in usable_documents(source.name, items, reading, Counter()):
        pass
    return None


def _most_tokens(shard: Path) -> int:
    """No token is shorter than a byte, but for those at both ends of a document."""
    return sum(len(document.text.encode()) + 2 for document in read_shard(shard))


def _first_documents(file: SourceFile, text: Unread) -> Iterator[Read]:
    """The documents that begin in a file's first HEAD_BYTES, about."""
    source, longest = text.source, text.reading.longest_document_characters
    path = opened(file, source.folder)
    delimiter = Delimiter(source.delimiter) if source.delimiter else None
    is_one = kind_of(path) == "plain text" and delimiter is None and codec(path) is None
    if is_one and file.size_bytes > MOST_BYTES_OF_A_CHARACTER * (longest + 1):  # a byte-order mark
        yield BadDocument(readable(path), longer_than(longest))
        return
    head_bytes = None if is_one and file.size_bytes > longest else HEAD_BYTES
    seen = 0
    for item in read_file(path, source, longest, delimiter, template=text.template, head_bytes=head_bytes):
        yield item
        seen += 0 if isinstance(item, BadDocument) else len(item if isinstance(item, str) else item.text)
        if seen >= HEAD_BYTES:
            return
