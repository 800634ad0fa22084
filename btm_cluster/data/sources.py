"""Sources of text: files and data sets, read as a stream of documents.

Files are found by `files.py` and read by `readers.py`; data sets are read by `data_sets.py`. Knows nothing of
duplicates or tokens.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow

from btm_cluster.data.data_sets import read_data_set, stamp_of
from btm_cluster.data.documents import BadDocument, Delimiter, Document, Read, RowForm
from btm_cluster.data.files import S3, SourceFile, find_files, opened, readable, stamp_of_file
from btm_cluster.data.readers import read_file
from btm_cluster.data.streams import Budget, Count
from btm_cluster.errors import TextError, one_line
from btm_cluster.plan import ChatTemplate, ReadingPlan, TextPlan
from btm_cluster.plan.folder import located
from btm_cluster.plan.kinds import CONVERT, Kind, ending, kind_of
from btm_cluster.plan.text_rules import idle_reading, messages_rules

Files = Mapping[str, list[SourceFile]]
SKIP = "set `reading: {bad_documents: skip}` in the plan, or `--bad-documents skip` where there is none,"
"""Part of a remedy: how bad documents are skipped."""


def fingerprint(source: TextPlan) -> dict[str, Any]:
    """The fingerprint by which a change of a source is seen: path, size and
    modification time of its files; revision of a data set. Paths are those of the plan, wherever it lies.

    Raises:
        TextError: a pattern that matches no file, files that cannot be listed, a data set that is not there.
    """
    if source.dataset is not None:
        return {"dataset": source.dataset.model_dump()} | stamp_of(source.name, source.dataset)
    files = source_files(source)
    stamp = {split: [stamp_of_file(f, source.folder) for f in given] for split, given in files.items()}
    # Tables were once read as plain text: what was read then does not stand for what they hold.
    return stamp | ({"tables": "rows"} if "table" in _kinds(files) else {})


def source_files(source: TextPlan) -> Files:
    """The files of a source by the split they are given for; `text` is split by content hash. Relative paths
    begin at its folder.

    Raises:
        TextError: files that cannot be listed, a pattern that matches none, a field of the plan that applies
        to none.
    """
    patterns = {"text": source.text, "development": source.development, "test": source.test}
    files = {
        split: sorted({file for pattern in given for file in _expand(source, pattern)})
        for split, given in patterns.items()
    }
    kinds = _kinds(files)
    problems = [*idle_reading(source.field, source.delimiter, kinds)]
    for problem in (*problems, *messages_rules(source.messages, source.field, kinds)):
        raise TextError(f"`{problem.at}` cannot apply to the text of {source.name!r}", **problem.words)
    return files


def opened_files(source: TextPlan) -> Iterator[str]:
    """The paths by which the files of its `text` are opened.

    Raises:
        TextError: as `source_files` does.
    """
    return (opened(file, source.folder) for file in source_files(source)["text"])


def refuse_unread(source: TextPlan, stamp: Mapping[str, Any]) -> None:
    """Refuses a text with files of kinds that are not read, by its fingerprint, before any is opened.

    Raises:
        TextError: naming one of each kind.
    """
    paths = [file[0] for split in ("text", "development", "test") for file in stamp.get(split, ())]
    unread = {ending(path): path for path in reversed(paths) if kind_of(path) == "unread"}
    if unread:
        raise TextError(
            f"the text of {source.name!r} has files that are not read",
            found=", ".join(unread[end] for end in sorted(unread)),
            expected="JSON lines, CSV, TSV, Parquet or plain text; .gz, .zst or .bz2",
            remedy=f"{CONVERT}; or {SKIP} to skip and count such files",
        )


def refuse_together(errors: Sequence[TextError]) -> None:
    """Raises the errors of several texts as one; nothing where there is none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        listed = "\n".join(map(str, errors))
        raise TextError(f"{len(errors)} texts cannot be read\n{listed}", remedy="correct each of them")


def read_documents(
    source: TextPlan,
    reading: ReadingPlan,
    most_bytes: int | None = None,
    count: Count | None = None,
    template: ChatTemplate | None = None,
) -> Iterator[Document | BadDocument]:
    """The documents of a source, in the order of its files; never more than one of them in memory.

    `most_bytes` is for a source that is not trusted: so much is read of it, decompressed, and no link is
    followed. Messages are tried on the `template`.

    Raises:
        TextError: a file or data set that cannot be read to its end, or a delimiter that stands in no file.
    """
    longest = reading.longest_document_characters
    if source.dataset is not None:
        form = RowForm.of(source, longest, template)
        for split, item in read_data_set(source.name, source.dataset, form):
            yield as_document(item, split)
            if count is not None:
                count(1)
        return
    budget = None if most_bytes is None else Budget(most_bytes)
    delimiter = Delimiter(source.delimiter) if source.delimiter else None
    files = source_files(source)
    for split, given in files.items():
        for file in given:
            path = opened(file, source.folder)
            for item in read_file(path, source, longest, delimiter, budget, count, template):
                yield as_document(item, None if split == "text" else split)
    if delimiter and not delimiter.occurs:
        _refuse_delimiter(
            source, [f for given in files.values() for f in given if kind_of(f.path) == "plain text"]
        )


def as_document(item: Read, split: str | None) -> Document | BadDocument:
    """A document as its file has it, with the split that the file was given for."""
    if isinstance(item, BadDocument):
        return item
    return Document(item, split) if isinstance(item, str) else Document(item.text, split, item)


def _refuse_delimiter(source: TextPlan, plain: list[SourceFile]) -> None:
    raise TextError(
        f"the `delimiter` of {source.name!r} stands in none of its text files",
        found=f"no {source.delimiter!r} in {len(plain)} files, such as {readable(plain[0].path)}",
        expected="what separates documents; without it, each file would be one document",
        remedy="correct it (in YAML, \\n is a line end in double quotes only), or leave it out where a file "
        "is a document",
    )


def _kinds(files: Files) -> set[Kind | None]:
    return {kind_of(file.path) for given in files.values() for file in given}


def _expand(source: TextPlan, pattern: str) -> list[SourceFile]:
    try:
        found = find_files(pattern, source.folder)
    except (OSError, pyarrow.ArrowException) as exc:
        of_s3 = "check the address, and AWS_ENDPOINT_URL, AWS_REGION and the credentials in the environment"
        raise TextError(
            f"cannot list the text of {source.name!r}",
            found=f"{pattern}: {one_line(exc)}",
            remedy=of_s3
            if pattern.startswith(S3)
            else "give the account that runs this the right to read the folder",
        ) from exc
    if not found:
        raise _matches_nothing(source, pattern)
    return found


def _is_no_regular_file(path: str) -> bool:
    """Whether something else than a file or folder is there, such as what a shell makes of `<(zcat a.gz)`."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _matches_nothing(source: TextPlan, pattern: str) -> TextError:
    place = located(source.folder, pattern)
    folder = os.path.expanduser(place)
    if _is_no_regular_file(folder):
        return TextError(
            f"the text of {source.name!r} is no regular file",
            found=f"{place}, a pipe or a device",
            expected="a file, which may be read more than once",
            remedy="write what it gives to a file, and name that",
        )
    if not os.path.isdir(folder):
        return TextError(
            f"the text of {source.name!r} matches no file",
            found=place,
            expected="at least one file",
            remedy="check the path or glob",
        )
    names = os.listdir(folder) if os.access(folder, os.R_OK) else []
    endings = Counter(os.path.splitext(name)[1] for name in names if not name.startswith("."))
    likely = max(endings, key=lambda end: endings[end], default="") or ".jsonl"
    return TextError(
        f"the text of {source.name!r} is a folder",
        found=place,
        expected="files, or a glob that matches some",
        remedy=f"name its files, such as '{pattern.rstrip('/')}/*{likely}'",
    )
