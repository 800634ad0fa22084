"""The part of a plan that says what is read: texts, domains, and how files become documents."""

import os
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from btm_cluster.plan import text_rules
from btm_cluster.plan.folder import located
from btm_cluster.plan.section import Section
from btm_cluster.plan.values import (
    PLAN_FOLDER,
    File,
    Files,
    Location,
    Messages,
    Name,
    Positive,
    Share,
    Text,
)


class _Source(Section):
    """Files or folders that are named from the folder of the plan."""

    _folder: str = PrivateAttr("")

    def model_post_init(self, context: Any) -> None:
        if (folder := (context or {}).get(PLAN_FOLDER)) is not None:
            self._folder = folder

    @property
    def folder(self) -> str:
        """The folder at which relative paths begin; empty: the current one. No part of any identity."""
        return self._folder


class DatasetPlan(_Source):
    """A Hugging Face data set, by hub name or local folder, streamed through `datasets`."""

    rules: ClassVar = text_rules.dataset_rules
    name: Location
    """Hub name, or the path of a local folder."""
    configuration: Text | None = None
    """The data set's configuration, where it has several."""
    revision: Text | None = None
    """Commit or tag on the hub; state it to keep the text from changing under you."""
    split: Text = "train"
    """Split that is the text."""
    development_split: Text | None = None
    """Split that is development text; without it, a share of the text is."""
    test_split: Text | None = None
    """Split that is test text; without it, a share of the text is."""

    @property
    def opened_name(self) -> str:
        """The path of a local folder as it is opened, or else the name that it is for the hub."""
        path = located(self.folder, self.name)
        return path if os.path.isdir(path) else self.name


class TextPlan(_Source):
    """A named text.

    A document is a row of JSON lines, a table or Parquet, or a text file (or its parts, by a delimiter).
    """

    rules: ClassVar = text_rules.text_rules
    name: Name
    """Unique in the forest: lower-case letters, digits, - and _."""
    text: Files = ()
    """Files or globs, local or s3://: .jsonl .csv .tsv .parquet .txt and source text; .gz, .zst or .bz2.

    `**` follows links.
    """
    development: Files = ()
    """Development text from given files; without it, a share of `text` by content hash."""
    test: Files = ()
    """Test text from given files; without it, a share of `text` by content hash."""
    dataset: DatasetPlan | None = None
    """A Hugging Face data set instead of files."""
    field: Text = text_rules.DEFAULT_FIELD
    """Field or column of a row that holds the document, where files have rows."""
    messages: Messages | None = None
    """Instead of `field`, for chat data: field of a row that holds its messages, each with `role` and `content`,
    or `from` and `value`; or two fields, of a prompt and its completion.

    The tokenizer's chat template renders them. The loss is that of the assistant's turns.
    """
    delimiter: Text | None = None
    """Cuts text files into documents; without it, a file is a document.

    One that stands in none of them is refused.
    """


class DomainPlan(TextPlan):
    """A text that gets an expert of its own."""

    rules: ClassVar = text_rules.domain_rules


class ReadingPlan(Section):
    """How texts become documents. Part of a text's identity through the documents that result."""

    rules: ClassVar = text_rules.reading_rules
    development_share: Share = 0.02
    """Share of documents held out for everything that is fitted."""
    test_share: Share = 0.02
    """Share of documents held out for what is reported."""
    longest_document_characters: Annotated[Positive, Field(le=10**9)] = 1_000_000
    """Longer documents count as bad: such a line is usually a mistake."""
    bad_documents: Literal["refuse", "skip"] = "refuse"
    """A line that is not JSON, lacks the field, is not UTF-8, or is too long:
    refuse the text, or skip, count and report."""
    chat_template: File | None = None
    """File of a chat template (Jinja) that renders `messages`, instead of the tokenizer's own."""
