"""The fenced blocks of the documents, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATED = {"docs/reference/commands.md", "docs/reference/plan.md"}
"""By `make reference`, from the commands and the plan's models."""
NOT_RUN = re.compile(r'title="not run by the tests: [^"]+"')
SHELLS = {"sh", "bash", "console"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the words after the fence, and its text."""

    page: str
    language: str
    info: str
    text: str

    @property
    def is_shell(self) -> bool:
        return self.language in SHELLS

    @property
    def is_run(self) -> bool:
        return NOT_RUN.search(self.info) is None

    @property
    def commands(self) -> list[list[str]]:
        """Its lines as words, joined where they go on and split at &&, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [part for line in lines for part in _split(shlex.split(line, comments=True))]


def _split(words: list[str]) -> Iterator[list[str]]:
    while "&&" in words:
        place = words.index("&&")
        yield words[:place]
        words = words[place + 1 :]
    if words:
        yield words


def pages() -> list[str]:
    """Every document that people write, relative to the repository."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("d*/**/*.md")]
    names = sorted(page.relative_to(ROOT).as_posix() for page in found)
    return [name for name in names if name not in GENERATED and not name.startswith("docs/results/")]


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, language, info.strip(), body) for language, info, body in found]


def inline_commands(page: str) -> list[list[str]]:
    """What stands in the text as `btm …`, as words."""
    text = re.sub(
        r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    spans = re.findall(r"`(btm [^`]+)`", text)
    return [shlex.split(span, comments=True) for span in spans]
