"""Rules between the fields of a plan's texts, and between texts."""

from collections import Counter
from collections.abc import Iterator, Set
from typing import Any

from btm_cluster.plan.broken_rules import Broken, Given, entries_of, field_of, is_given, numbers_of
from btm_cluster.plan.kinds import ROWS, Kind, kind_of_pattern

DEFAULT_FIELD = "text"


def text_rules(given: Given) -> Iterator[Broken]:
    """A text comes from files or from a data set; what says how files are read applies to some of them."""
    files = [name for name in ("text", "development", "test") if is_given(given.get(name))]
    both = [*files, "dataset"] if is_given(given.get("dataset")) else files
    if not both or (files and both != files):
        found = " and ".join(f"`{name}`" for name in both) or "neither"
        yield Broken(
            "",
            found,
            "either files (`text`) or a `dataset`",
            "keep one of them" if both else "add `text: FILE-OR-GLOB`",
        )
        return
    field, delimiter = given.get("field"), given.get("delimiter")
    if not files and delimiter is not None:
        expected = "nothing beside a `dataset`, whose rows are documents"
        yield Broken("delimiter", repr(delimiter), expected, "leave `delimiter` out")
    patterns = [p for name in files for p in (entries_of(given[name]) or [given[name]]) if isinstance(p, str)]
    kinds = {kind_of_pattern(pattern) for pattern in patterns}
    yield from idle_reading(field, delimiter, kinds)
    yield from messages_rules(given.get("messages"), field, kinds)


def idle_reading(field: Any, delimiter: Any, kinds: Set[Kind | None]) -> Iterator[Broken]:
    """Fields on how files are read that apply to none of them, where their kinds
    are known (None: one that is not)."""
    if not kinds or None in kinds:
        return
    found = f"for files of these kinds: {', '.join(sorted(map(str, kinds)))}"
    if isinstance(field, str) and field != DEFAULT_FIELD and not kinds & ROWS:
        expected = "a field only where files have rows: JSON lines, CSV, TSV or Parquet"
        yield Broken(
            "field", f"{field!r} {found}", expected, "leave `field` out, or name files that have rows"
        )
    if isinstance(delimiter, str) and "plain text" not in kinds:
        expected = "a delimiter only for plain text, which it cuts into documents"
        yield Broken(
            "delimiter",
            f"{delimiter!r} {found}",
            expected,
            "leave `delimiter` out, or name files of plain text",
        )


def messages_rules(messages: Any, field: Any, kinds: Set[Kind | None]) -> Iterator[Broken]:
    """Messages stand in rows, and instead of a field."""
    if messages is None:
        return
    if field not in (None, DEFAULT_FIELD):
        expected = "either a `field` that holds a document, or `messages`"
        yield Broken("field", repr(field), expected, "leave one of them out")
    if "plain text" in kinds:
        expected = "messages only in files with rows: JSON lines, CSV, TSV or Parquet"
        yield Broken("messages", "files of plain text", expected, "leave `messages` out, or name other files")


def inbox_rules(given: Given) -> Iterator[Broken]:
    """A delivery has documents or messages."""
    yield from messages_rules(given.get("messages"), given.get("field"), set())


def domain_rules(given: Given) -> Iterator[Broken]:
    """Like any text; and a domain has training text."""
    yield from text_rules(given)
    held_out = [name for name in ("development", "test") if is_given(given.get(name))]
    if held_out and not is_given(given.get("text")) and not is_given(given.get("dataset")):
        found = f"only {' and '.join(f'`{name}`' for name in held_out)}"
        yield Broken("", found, "training text for a domain", "add `text: FILE-OR-GLOB`")


def dataset_rules(given: Given) -> Iterator[Broken]:
    """Training, development and test text come from different splits."""
    splits = {name: given.get(name) for name in ("split", "development_split", "test_split")} | {
        "split": given.get("split", "train")
    }
    for split, count in Counter(str(value) for value in splits.values() if value is not None).items():
        if count > 1:
            yield Broken(
                "",
                f"the split {split!r} {count} times",
                "every split once",
                "leave out what has none of its own",
            )


def reading_rules(given: Given) -> Iterator[Broken]:
    """Something is left to train on."""
    shares = numbers_of(given, development_share=0.02, test_share=0.02)
    if shares and sum(shares) >= 1 and max(shares) < 1:
        found = f"development_share + test_share = {sum(shares):g}"
        yield Broken("", found, "less than 1, so that training text is left", "lower one of them")


def held_out_texts(given: Given) -> Iterator[Broken]:
    """Every domain has development and test text."""
    for split in ("development", "test"):
        without = [
            str(field_of(domain, "name"))
            for domain in entries_of(given.get("domains"))
            if not is_given(field_of(domain, split))
            and not field_of(field_of(domain, "dataset"), f"{split}_split")
        ]
        if field_of(given.get("reading"), f"{split}_share") == 0 and without:
            found = f"{split}_share 0, and no {split} text given for {', '.join(without)}"
            remedy = f"raise the share, or name `{split}` files for each domain"
            yield Broken("reading", found, f"{split} text for every domain", remedy)


def same_texts(texts: list[Any]) -> Iterator[Broken]:
    """Every name has a text of its own."""
    first_with: dict[str, str] = {}
    for text in texts:
        files, dataset = field_of(text, "text"), field_of(text, "dataset")
        if is_given(files) or is_given(dataset):
            source = [
                entries_of(files) or [files],
                dataset,
                field_of(text, "field"),
                field_of(text, "delimiter"),
                field_of(text, "messages"),
            ]
            name = str(field_of(text, "name"))
            first = first_with.setdefault(repr(source), name)
            if first != name:
                found = f"{first!r} and {name!r} have the same text"
                yield Broken(
                    "domains, targets", found, "a text of its own for each", "leave out all but one of them"
                )
