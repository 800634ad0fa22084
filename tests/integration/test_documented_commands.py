"""The commands of the documents run, page by page, in a folder that holds what a page takes for granted:
grown forests of tiny models, texts and files. Blocks that say `not run by the tests` are left out.

Commands run in this process: `btm` without Ray, `curl` as a request of ours. `btm serve` is replaced by what it
does, in a thread and at a free port, until the page ends.
"""

import json
import shlex
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pyarrow
import pytest
import typer
import yaml

from btm_cluster.cli import app, run_command
from btm_cluster.operations.run import run_plan
from btm_cluster.operations.serve import mixture_to_serve
from btm_cluster.plan import read_plan
from tests.conftest import in_process, made_up_documents, plan_fields, write_jsonl
from tests.documented import ROOT, blocks, pages
from tests.integration.test_serving import Server, serving

FORESTS = {
    "plan.yaml": ("forests/my-forest", ("legal", "code"), ("contracts",)),
    "quickstart.yaml": ("forests/quickstart", ("python", "cpp", "aws", "mathematics"), ("arrow",)),
}
"""Of each plan the store, the domains and the targets."""
GOES_ON_FROM = {"docs/how-to/removal.md": "docs/how-to/expansion.md"}
"""Pages whose forest is the one that another page leaves behind."""
PAGES = [
    page
    for page in pages()
    if any(block.is_shell and block.is_run for block in blocks(page)) and page not in GOES_ON_FROM.values()
]
COMMANDS: Any = typer.main.get_command(app)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every page finds. To be copied."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for file, (store, domains, targets) in FORESTS.items():
            texts = folder / f"{store}-text"
            for name in (*domains, *targets, "arrays", "reference"):
                write_jsonl(texts / f"{name}.jsonl", made_up_documents(name, 60))
            fields = tiny_plan(store, domains, targets)
            baselines = ["transformer-lm"] if file == "plan.yaml" else []
            Path(file).write_text(yaml.safe_dump(fields | {"baselines": baselines}))
            plan = read_plan(Path(file))
            run_plan(plan, in_process(plan))
    for name in ("my-notes.txt", "notes.txt", "report.txt", "prompts.txt"):
        (folder / name).write_text("egal cod legal\ndoc code\n")
    write_jsonl(folder / "notes" / "a.jsonl", made_up_documents("notes", 3))
    lines = write_jsonl(
        folder / "new" / "a.jsonl", made_up_documents("legal", 30) + made_up_documents("rust", 30)
    )
    (folder / "text").mkdir()
    with pyarrow.output_stream(folder / "text" / "a.jsonl.zst", compression="zstd") as compressed:
        compressed.write(lines.read_bytes())
    (folder / "S").symlink_to("forests/my-forest")
    for study, copy in (("3m-scale-1", "results"), ("10m-scale-1", "other-results")):
        shutil.copytree(ROOT / "docs" / "results" / study, folder / copy)
    return folder


def tiny_plan(store: str, domains: tuple[str, ...], targets: tuple[str, ...]) -> dict[str, Any]:
    files = {name: Path(f"{store}-text/{name}.jsonl") for name in (*domains, *targets)}
    named = [{"name": name, "text": str(file)} for name, file in files.items()]
    fields = plan_fields(dict.fromkeys(("kitchen", "harbour", "orchard", "market"), Path()), Path(store))
    count = len(domains)
    return fields | {"domains": named[:count], "targets": named[count:]}


class Page:
    """A page that is being read: the current folder is its own, and what it serves stays open."""

    def __init__(self, capsys: pytest.CaptureFixture[str], opened: ExitStack) -> None:
        self._capsys, self._opened = capsys, opened
        self._server: Server | None = None

    def run(self, words: list[str]) -> None:
        program, *arguments = words
        if words[:2] == ["btm", "serve"]:
            self._serve(Path(arguments[1]))
        elif program == "btm":
            self._btm(arguments)
        elif program == "curl":
            self._curl(arguments)
        elif words[:2] == ["python", "-c"]:
            exec(compile(arguments[1], "python -c", "exec"), {})
        else:
            subprocess.run(words, check=True, capture_output=True)

    def _btm(self, arguments: list[str]) -> None:
        known = [option for parameter in COMMANDS.commands[arguments[0]].params for option in parameter.opts]
        without_ray = ["--in-process"] if "--in-process" in known and "--in-process" not in arguments else []
        code = run_command(lambda: app([*arguments, *without_ray]))
        said = self._capsys.readouterr()
        assert code == 0, f"btm {shlex.join(arguments)}\n{said.out}{said.err}"

    def _serve(self, plan_path: Path) -> None:
        plan = read_plan(plan_path)
        mixture = mixture_to_serve(plan, in_process(plan), None)
        self._server = self._opened.enter_context(serving(plan.store, mixture))

    def _curl(self, arguments: list[str]) -> None:
        assert self._server is not None, "curl before btm serve"
        (url,) = (word for word in arguments if word.startswith("http"))
        body = json.loads(arguments[arguments.index("-d") + 1])
        answer = httpx2.post(url.replace("http://127.0.0.1:8000", self._server.url), json=body, timeout=60)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_run_one_after_the_other(
    name: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "home"
    shutil.copytree(home, folder, symlinks=True)
    monkeypatch.chdir(folder)
    with ExitStack() as opened:
        page = Page(capsys, opened)
        for one in [GOES_ON_FROM[name], name] if name in GOES_ON_FROM else [name]:
            for block in blocks(one):
                if block.is_shell and block.is_run:
                    for words in block.commands:
                        page.run(words)
