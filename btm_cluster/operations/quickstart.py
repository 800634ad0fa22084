"""`btm quickstart`: a small plan, and text for it that every installation has, without a download.

Holds where a domain's text comes from and how it becomes the lines {"text": ...} of a file. The same versions
of the packages give the same bytes; a file that exists is left alone.
"""

import ast
import gzip
import hashlib
import html
import importlib.util
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

from btm_cluster.errors import UserError

QUICKSTART_PLAN = """\
# The quickstart: real text that every installation already has, a small model, two cores, no download.
# Written by `btm quickstart` together with its text; `btm run quickstart.yaml` runs it.
name: quickstart
store: forests/quickstart

domains:                      # an expert each
  - {name: python, text: forests/quickstart-text/python.jsonl}
  - {name: cpp, text: forests/quickstart-text/cpp.jsonl}
  - {name: aws, text: forests/quickstart-text/aws.jsonl}    # prose: descriptions of services
  - {name: mathematics, text: forests/quickstart-text/mathematics.jsonl}
targets:                      # evaluated, never trained on
  - {name: arrow, text: forests/quickstart-text/arrow.jsonl}
  - {name: networkx, text: forests/quickstart-text/networkx.jsonl}
reading: {development_share: 0.03, test_share: 0.05}

tokenizer: {train: {vocabulary: 2048}}
model: {config: {model_type: gpt2, n_layer: 2, n_embd: 128, n_head: 4}}
training:
  block_tokens: 128
  updates: 200
  seed_share: 0.5
  blocks_per_domain_update: 8
  learning_rate: 3.0e-3
baselines: [transformer-lm]
cluster: {seed_cpus: 2, cpus_per_expert: 1}
"""
PLAN_FILE, TEXT_FOLDER = Path("quickstart.yaml"), Path("forests/quickstart-text")

# domain: at most this many MB, of these texts. Experts are trained on the first five.
TEXTS: dict[str, tuple[float, Callable[[], Iterable[str]]]] = {
    "python": (3.0, lambda: sources(Path(sysconfig.get_path("stdlib")), "*.py")),
    "cpp": (3.0, lambda: sources(package("torch") / "include", "*.h")),
    "aws": (3.0, lambda: services(package("botocore") / "data")),
    "mathematics": (3.0, lambda: docstrings(package("sympy"))),
    "arrays": (3.0, lambda: docstrings(package("numpy"), package("pandas"))),
    # Evaluated only: near one domain, between several, and near none.
    "arrow": (0.35, lambda: sources(package("pyarrow") / "include", "*.h")),
    "networkx": (0.35, lambda: sources(package("networkx"), "*.py")),
    "reference": (0.35, topics.values),
}
# Tests, other packages, tables, and torch's 7,000 generated operator headers.
SKIPPED = re.compile(r"/(test\w*|benchmarks|\w+-packages|idlelib|pydoc_data|lib2to3|encodings|ops)/")
TORCH_GUARD = re.compile(r"(?m)^(?:#else\n)?#(?:if|error|endif).*TORCH_STABLE_ONLY.*\n?")
OPENING_COMMENT = re.compile(r"\A(?:\s+|//.*\n|#(?:[ !].*)?\n|/\*(?s:.*?)\*/)+")
WHOLE_LINES = re.compile(r"(?m)^(?=[ \t]*\S)[^\ud800-\udfff]{300,8000}$")  # surrogates break tokenizers


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(
            f"the quickstart's text comes from the package {name!r}",
            found="it is not installed",
            remedy="install btm-cluster with its dependencies",
        )
    return Path(spec.origin).parent


def walk(folder: Path, pattern: str) -> Iterator[Path]:
    """Files below the folder, in order, without those of SKIPPED folders."""
    paths = sorted(folder.rglob(pattern))
    return (path for path in paths if not SKIPPED.search(f"/{path.relative_to(folder)}"))


def sources(folder: Path, pattern: str) -> Iterator[str]:
    """Source files, without the comment they open with: it is a licence more often than not."""
    for path in walk(folder, pattern):
        yield OPENING_COMMENT.sub("", TORCH_GUARD.sub("", path.read_text("utf-8", "replace")))


def docstrings(*folders: Path) -> Iterator[str]:
    """Docstrings of modules, classes and functions; empty where there is none."""
    for path in (path for folder in folders for path in walk(folder, "*.py")):
        nodes: list[ast.Module | ast.ClassDef | ast.FunctionDef] = [ast.parse(path.read_bytes())]
        for node in nodes:  # the list grows under way: ast.walk would visit every expression too
            nodes += [child for child in node.body if isinstance(child, ast.ClassDef | ast.FunctionDef)]
            yield ast.get_docstring(node) or ""


def services(folder: Path) -> Iterator[str]:
    """Descriptions of operations and shapes in each AWS service's latest model, without the HTML."""
    latest = {path.relative_to(folder).parts[0]: path for path in walk(folder, "service-2.json.gz")}
    for path in latest.values():
        model = json.loads(gzip.decompress(path.read_bytes()))
        described = [model, *model["operations"].values(), *model["shapes"].values()]
        markup = "\n\n".join(dict.fromkeys(item.get("documentation", "") for item in described))
        text = html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"</(p|li|h\d|pre|dt|dd)>", "\n", markup)))
        yield re.sub(r"\n{3,}", "\n\n", "\n".join(" ".join(line.split()) for line in text.split("\n")))


def digest(text: str) -> bytes:
    """SHA-256 of a text, by which texts are put in order."""
    return hashlib.sha256(text.encode()).digest()


def sample(limit_megabytes: float, texts: Iterable[str]) -> Iterator[str]:
    """Documents in hash order, at most 3 a text; no tables (few letters), no copies (most lines known)."""
    known: set[str] = set()
    pieces = {piece for text in texts for piece in sorted(WHOLE_LINES.findall(text), key=digest)[:3]}
    for document in sorted(pieces, key=digest):
        long_lines = [line for line in map(str.strip, document.splitlines()) if len(line) >= 20]
        is_copy = sum(len(line) for line in long_lines if line in known) > 0.5 * sum(map(len, long_lines))
        is_table = sum(map(str.isalpha, document)) < 0.5 * len("".join(document.split()))
        if is_copy or is_table:
            continue
        limit_megabytes -= len(document.encode()) / 1e6
        if limit_megabytes < 0:
            return
        known.update(long_lines)
        yield document


def write_text(path: Path) -> str:
    """Writes a domain's file unless it is there, and says what it holds."""
    if not path.exists():
        limit_megabytes, texts = TEXTS[path.stem]
        rows = [json.dumps({"text": text}) + "\n" for text in sample(limit_megabytes, texts())]
        if not rows:
            raise UserError(
                f"the quickstart has no text for {path.stem!r}",
                found="a package without its sources",
                remedy="install btm-cluster's dependencies anew",
            )
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text("".join(rows))
        unfinished.replace(path)
    content = path.read_bytes()
    return f"{path.stem:12} {content.count(10):5} documents {len(content) / 1e6:5.2f} MB"


def write_quickstart() -> Iterator[str]:
    """Writes plan and text into the current folder; yields a line for each file.

    Raises:
        UserError: a package that the text comes from is missing, or the folder cannot be written.
    """
    try:
        TEXT_FOLDER.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor() as processes:
            yield from processes.map(write_text, [TEXT_FOLDER / f"{domain}.jsonl" for domain in TEXTS])
        if not PLAN_FILE.exists():
            PLAN_FILE.write_text(QUICKSTART_PLAN, encoding="utf-8")
    except OSError as exc:
        raise UserError(
            "the quickstart cannot be written here", found=str(exc), remedy="cd to another folder"
        ) from exc
