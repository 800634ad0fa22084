"""A source's documents become a text: split, without duplicates, in hash order, cut into shards by content.

A document's content hash (of its text without case and spacing) decides its split, its order and what is a
duplicate, so the result does not depend on file order. Memory: the documents pass through 256 spool files, of
which the distinct documents of one are held at a time, so a text of 100 GB needs about 0.4 GB.
"""

import bisect
import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from btm_cluster.data.documents import (
    NO_TEXT,
    NOT_UTF_8,
    TOO_LONG,
    WRONG_PARQUET,
    WRONG_TABLE,
    BadDocument,
    Document,
)
from btm_cluster.data.shards import ShardWriter
from btm_cluster.data.sources import SKIP, read_documents
from btm_cluster.data.streams import Count
from btm_cluster.errors import TextError
from btm_cluster.plan import ChatTemplate, ReadingPlan, TextPlan

SPLITS = ("train", "development", "test")
_HELD_OUT_FIRST = {"test": 0, "development": 1, "train": 2}
_RECORD = struct.Struct("<32sBBI")
_SPOOL_BUFFER_BYTES = 1 << 17
_NAME_THE_FIELD = "name the `field` that holds the text, or `messages` of chat data, "
_REMEDIES = {
    NO_TEXT: _NAME_THE_FIELD,
    WRONG_TABLE: _NAME_THE_FIELD,
    WRONG_PARQUET: _NAME_THE_FIELD,
    NOT_UTF_8: "convert it, such as by `iconv -f LATIN1 -t UTF-8`, ",
    TOO_LONG: "cut it by a `delimiter`, raise `reading.longest_document_characters`, ",
}
"""What else mends a bad document, by the beginning of its reason."""
OverParts: TypeAlias = Callable[[list[Path]], Iterable[Path]]


@dataclass
class Text:
    """A text that was written to a folder: its identity, what was counted, and its shard files."""

    identity: str
    facts: dict[str, Any]
    files: dict[str, Path]
    bad: Counter[str] = field(default_factory=Counter)
    """Documents skipped, by reason."""


def write_text(
    source: TextPlan,
    reading: ReadingPlan,
    is_target: bool,
    folder: Path,
    most_bytes: int | None = None,
    count: Count | None = None,
    sorting: OverParts = iter,
    template: ChatTemplate | None = None,
) -> Text:
    """Reads `source` and writes its shards below `folder`.

    A target's text is all held out: half development, half test. Elsewhere `reading` says the shares.
    `most_bytes` bounds a source that is not trusted, `count` is told what was read, and messages are tried on
    `template`, as in `read_documents`. `sorting` goes over the parts of the text while they are sorted.

    Raises:
        TextError: a bad document where the plan refuses them, or a split that needs text and has none.
    """
    bad: Counter[str] = Counter()
    shares = (0.5, 0.5) if is_target else (reading.development_share, reading.test_share)
    given = {"development": bool(source.development), "test": bool(source.test)}
    if source.dataset is not None:
        given = {
            "development": bool(source.dataset.development_split),
            "test": bool(source.dataset.test_split),
        }
    shares = (0.0 if given["development"] else shares[0], 0.0 if given["test"] else shares[1])
    if is_target and given["test"] and not given["development"]:
        shares = (1.0, 0.0)  # a target's remaining text can only be development text
    documents = usable_documents(
        source.name, read_documents(source, reading, most_bytes, count, template), reading, bad
    )
    spools, lowest = _spool(documents, shares, folder)
    text = _write_shards(sorting(spools), folder, fill_splits(lowest, shares))
    text.bad = bad
    _check_splits(source.name, text, is_target)
    return text


def write_random_part(
    documents: Iterable[Document], part: int, parts: int, random_seed: int, folder: Path
) -> Text:
    """Writes the documents that fall to one of `parts` equal parts, drawn by
    content and seed, as a text to train on."""

    def dealt(document: Document) -> bool:
        draw = hashlib.sha256(f"{random_seed}/".encode() + content_hash(document.text)).digest()
        return int.from_bytes(draw[:8], "big") % parts == part

    chosen = (replace(document, split="train") for document in documents if dealt(document))
    return _write_shards(_spool(chosen, (0.0, 0.0), folder)[0], folder, {})


def content_hash(text: str) -> bytes:
    """32 bytes that two documents share if they differ only in case and spacing."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()


def usable_documents(
    name: str, items: Iterable[Document | BadDocument], reading: ReadingPlan, bad: Counter[str]
) -> Iterator[Document]:
    """The documents with text in them; what else there is, is counted in `bad` by reason.

    Raises:
        TextError: a bad document where `reading` refuses them.
    """
    for item in items:
        if isinstance(item, Document):
            if item.text.strip():
                yield item
            else:
                bad["an empty document"] += 1
        elif reading.bad_documents == "refuse":
            other = next((remedy for start, remedy in _REMEDIES.items() if item.reason.startswith(start)), "")
            raise TextError(
                f"the text of {name!r} has a bad document",
                found=f"{item.where}: {item.reason}",
                remedy=f"{other}mend it, or {SKIP} to skip and count such documents",
            )
        else:
            bad[item.reason] += 1


def fill_splits(
    lowest: Mapping[str, Sequence[bytes]], shares: tuple[float, float]
) -> dict[bytes, tuple[str, str]]:
    """Documents that change their split, from which to which, so that none that
    is asked for stays empty by bad luck.

    `lowest` has the three lowest hashes of each split, of documents that were split by their hash; `shares`
    are those of development and test text, and train has what they leave. A text whose splits all have
    documents stays as it is.
    """
    asked = {"test": shares[1], "development": shares[0], "train": 1 - sum(shares)}
    held = {split: list(lowest.get(split, ())) for split, share in asked.items() if share > 0}
    moved = {}
    for empty in [split for split in held if not held[split]]:
        giver = max(reversed(held), key=lambda split: len(held[split]))
        # A target needs test text alone, so it may have its only document.
        if len(held[giver]) > (empty != "test" or "train" in held):
            key = held[giver].pop(0)
            held[empty].append(key)
            moved[key] = (giver, empty)
    return moved


def _spool(
    documents: Iterable[Document], shares: tuple[float, float], folder: Path
) -> tuple[list[Path], dict[str, list[bytes]]]:
    """Spreads the documents over at most 256 files, by the first byte of their content hash and in its order.

    Also returns, of those that are split by it, the lowest hashes of each split, as `fill_splits` needs them.
    """
    lowest: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    paths = [folder / f"spool-{i:03d}" for i in range(256)]
    waiting = [bytearray() for _ in paths]
    for document in documents:
        key = content_hash(document.text)
        split = document.split or _split_by_hash(key, *shares)
        if document.split is None:
            _keep_lowest(lowest[split], key)
        conversation = document.conversation
        data = (document.text if conversation is None else conversation.to_json()).encode()
        form = conversation is not None
        waiting[key[0]] += _RECORD.pack(key, _HELD_OUT_FIRST[split], form, len(data)) + data
        if len(waiting[key[0]]) >= _SPOOL_BUFFER_BYTES:
            _append(paths[key[0]], waiting[key[0]])
    for path, rest in zip(paths, waiting, strict=True):
        _append(path, rest)
    return [path for path in paths if path.exists()], lowest


def _keep_lowest(lowest: list[bytes], key: bytes) -> None:
    if key not in lowest and (len(lowest) < len(SPLITS) or key < lowest[-1]):
        bisect.insort(lowest, key)
        del lowest[len(SPLITS) :]


def _append(path: Path, waiting: bytearray) -> None:
    if waiting:
        # Opened for each piece: 256 open files are all that some machines allow.
        with path.open("ab") as file:
            file.write(waiting)
        waiting.clear()


def _split_by_hash(key: bytes, development_share: float, test_share: float) -> str:
    # The last bytes: the first ones order the documents, and a split should not be one stretch of that order.
    position = int.from_bytes(key[-8:], "big") / 2**64
    if position < test_share:
        return "test"
    return "development" if position < test_share + development_share else "train"


def _unspool(path: Path) -> tuple[list[tuple[bytes, int, int, bytes]], int]:
    """The spool's documents (content hash, split, whether a conversation, UTF-8), one per hash, held-out
    splits first; and how many it held."""
    best: dict[bytes, tuple[int, int, bytes]] = {}
    count = 0
    with path.open("rb") as file:
        while header := file.read(_RECORD.size):
            key, split, form, size = _RECORD.unpack(header)
            found = (split, form, file.read(size))
            best[key] = min(best.get(key, found), found)
            count += 1
    path.unlink()
    return [(key, *best[key]) for key in sorted(best)], count


def _write_shards(spools: Iterable[Path], folder: Path, moved: Mapping[bytes, tuple[str, str]]) -> Text:
    """Shard files by split, and the text's identity: a hash over the documents,
    whose order is that of their hashes.

    `moved` documents go from one split to another, but for those that the other split's own files have.
    """
    identity = hashlib.sha256()
    writers = {split: ShardWriter(split, folder) for split in SPLITS}
    read = kept = 0
    for spool in spools:
        survivors, count = _unspool(spool)
        read, kept = read + count, kept + len(survivors)
        for key, rank, is_conversation, data in survivors:
            split = ("test", "development", "train")[rank]
            if key in moved and split == moved[key][0]:
                split = moved[key][1]
            kind = b"messages" if is_conversation else b""
            identity.update(split.encode() + kind + hashlib.sha256(data).digest())
            writers[split].write(data.decode(), bool(is_conversation))
    files = {name: path for writer in writers.values() for name, path in writer.close().items()}
    facts = {
        "duplicates": read - kept,
        "splits": {
            split: {
                "documents": writer.documents,
                "characters": writer.characters,
                "words": writer.words,
                "shards": writer.names,
            }
            for split, writer in writers.items()
        },
    }
    if any(writer.conversations for writer in writers.values()):
        facts["conversations"] = sum(writer.conversations for writer in writers.values())
    return Text(identity.hexdigest(), facts, files)


def _check_splits(name: str, text: Text, is_target: bool) -> None:
    needed = ("test",) if is_target else SPLITS
    empty = [split for split in needed if not text.facts["splits"][split]["documents"]]
    if empty:
        counts = ", ".join(f"{split} {text.facts['splits'][split]['documents']}" for split in SPLITS)
        skipped = ", ".join(f"{count} × {reason}" for reason, count in sorted(text.bad.items())) or "none"
        documents = sum(split["documents"] for split in text.facts["splits"].values())
        more = "give more text, raise `reading.development_share` and `reading.test_share`, "
        if is_target or documents < len(SPLITS):
            more = "give more documents (a file of plain text is one, unless a `delimiter` cuts it), "
        raise TextError(
            f"the text of {name!r} has no document for: {', '.join(empty)}",
            found=f"distinct documents: {counts}; duplicates: {text.facts['duplicates']}; skipped: {skipped}",
            expected="at least one document in each",
            remedy=f"{more}or name files for the splits",
        )
