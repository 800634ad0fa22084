"""Broken plans, texts and calls through the real `btm` command: one clear
error, exit code 2, nothing half-written."""

import dataclasses
import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from btm_cluster.algorithm import grow
from btm_cluster.cli import app, run_command
from btm_cluster.ledger import Ledger
from btm_cluster.plan import Plan
from tests.conftest import in_process, made_up_documents, plan_fields, write_jsonl

Fields = dict[str, Any]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in made_up_documents("kitchen", 50)).encode()


def set_at(fields: Fields, path: str, value: Any) -> Fields:
    """The fields with one of them changed, such as domains.0.text."""
    *above, last = (int(part) if part.isdigit() else part for part in path.split("."))
    section: Any = fields
    for part in above:
        section = section[part] if isinstance(part, int) else section.setdefault(part, {})
    section[last] = value
    return fields


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_store(store: Path) -> None:
    """Only whole artifacts: every manifest's blobs are there and are what it says, and nothing else is."""
    if not store.is_dir():
        return
    ledger, named = Ledger.open(str(store)), set()
    for manifest in (store / "artifacts").rglob("*"):
        if manifest.is_file():
            artifact = next(
                a for a in ledger.list_artifacts(manifest.parent.name) if a.identity == manifest.stem
            )
            for blob in artifact.blobs:
                data = (store / "blobs" / blob.sha256).read_bytes()
                assert (len(data), hashlib.sha256(data).hexdigest()) == (blob.size_bytes, blob.sha256)
                named.add(f"blobs/{blob.sha256}")
    stray = [
        name
        for name in files_below(store)
        if name not in named
        and not name.startswith(("artifacts/", "forest/"))
        and not re.fullmatch(r"logs/[^/]+/timeline\.json", name)
    ]
    assert not stray


@dataclasses.dataclass
class Outcome:
    """What a command answered."""

    code: int
    out: str
    err: str


@pytest.fixture
def btm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """The command line in this process, without a hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = run_command(lambda: app([str(argument) for argument in arguments]))
        return Outcome(code, *capsys.readouterr())

    return call


def is_refused(outcome: Outcome, *parts: str) -> None:
    """One error that names the thing, and what to do about it."""
    assert outcome.code == 2, outcome
    assert outcome.err.count("error: ") == 1, outcome.err
    assert "remedy:" in outcome.err
    assert "Traceback" not in outcome.err
    assert "object at 0x" not in outcome.err
    for part in parts:
        assert part in outcome.err


# Broken texts: how the file of the first domain is written, and what the error says besides the file's name.


def parquet(folder: Path, **columns: list[Any]) -> bytes:
    pq.write_table(pa.table(columns), folder / "made.parquet")
    return (folder / "made.parquet").read_bytes()


TEXTS: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "binary under a text name": ("a.jsonl", lambda _: bytes(range(256)) * 50, "is not JSON in UTF-8"),
    "compressed under a plain name": ("a.jsonl", lambda _: gzip.compress(LINES), "is not JSON in UTF-8"),
    "plain under a compressed name": ("a.jsonl.gz", lambda _: LINES, "Not a gzipped file"),
    "a gzip file cut short": ("a.jsonl.gz", lambda _: gzip.compress(LINES)[:-9], "ended before the end"),
    "a zstandard file cut short": (
        "a.jsonl.zst",
        lambda _: pa.Codec("zstd").compress(LINES, asbytes=True)[:-9],
        "Truncated",
    ),
    "a Parquet file cut short": (
        "a.parquet",
        lambda folder: parquet(folder, text=["a"] * 99)[:-9],
        "Parquet",
    ),
    "a Parquet file of other columns": (
        "a.parquet",
        lambda folder: parquet(folder, body=["a"]),
        "no column 'text'",
    ),
    "a Parquet file of numbers": ("a.parquet", lambda folder: parquet(folder, text=[1]), "the field 'text'"),
    "JSON lines of other fields": ("a.jsonl", lambda _: b'{"body": "a"}\n', "the field 'text'"),
    "one JSON array": ("a.json", lambda _: b'[{"text": "a"}]', "one JSON array"),
    "a line cut short": ("a.jsonl", lambda _: LINES[:-5], ":50: a line that is not JSON"),
    "a monstrous line": (
        "a.jsonl",
        lambda _: b'{"text": "' + b"x" * 20_000_000 + b'"}\n' + LINES,
        "longer than",
    ),
    "a monstrous document": ("a.txt", lambda _: b"x" * 5_000_000, "longer than 1,000,000 characters"),
    "UTF-16 without a mark": ("a.txt", lambda _: "hello".encode("utf-16-le"), "a binary file"),
    "UTF-16 cut short": (
        "a.txt",
        lambda _: "hello".encode("utf-16")[:-1],
        "not UTF-16, which its first bytes say",
    ),
    "a table of other columns": ("a.csv", lambda _: b"id,body\n1,a\n", "no column 'text'"),
    "a page": ("a.html", lambda _: b"<p>a</p>", "files that are not read"),
    "a JSON array": ("a.json", lambda _: b'[\n{"text": "a"}\n]', "one JSON value over several lines"),
    "Latin-1": ("a.txt", lambda _: "Größe".encode("latin-1"), "not UTF-8"),
    "an archive": ("a.tar.gz", lambda _: gzip.compress(b"x"), "unpack it, or convert it"),
    "nothing": ("a.jsonl", lambda _: b"", "has no document for: train, development, test"),
    "blank documents": ("a.jsonl", lambda _: b'{"text": " "}\n' * 9, "skipped: 9 × an empty document"),
    "one document many times": ("a.jsonl", lambda _: LINES[: LINES.index(b"\n") + 1] * 99, "duplicates: 98"),
    "three short documents": ("a.jsonl", lambda _: LINES[: LINES.index(b"\n") + 1], "has no document for"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_run_on_a_broken_text_is_refused(
    name: str,
    fields: Fields,
    tmp_path: Path,
    write_plan: Callable[[Fields], Path],
    btm: Callable[..., Outcome],
) -> None:
    file, make, part = TEXTS[name]
    (tmp_path / file).write_bytes(make(tmp_path))
    fields["domains"] = [{"name": "broken", "text": str(tmp_path / file)}, *fields["domains"][1:2]]
    outcome = btm("run", "--in-process", write_plan(fields))
    is_refused(outcome, "'broken'", part)
    check_store(Path(fields["store"]))


def test_skipping_bad_documents_runs_and_reports_each_reason(
    fields: Fields, tmp_path: Path, write_plan: Callable[[Fields], Path], btm: Callable[..., Outcome]
) -> None:
    good = Path(fields["domains"][0]["text"]).read_bytes()
    (tmp_path / "a.jsonl").write_bytes(b"not json\n[]\n" + good + b'{"text": "\\ud800"}\n{"te')
    set_at(set_at(fields, "domains.0.text", str(tmp_path / "a.jsonl")), "reading.bad_documents", "skip")
    fields["domains"] = fields["domains"][:1]
    outcome = btm("run", "--in-process", write_plan(fields))
    assert outcome.code == 0, outcome.err
    for notice in (
        "kitchen: skipped 2 × a line that is not JSON in UTF-8",
        "kitchen: skipped 1 × a line that is not a JSON object",
        "kitchen: skipped 1 × a document that is not UTF-8",
    ):
        assert notice in outcome.out
    (tmp_path / "a.jsonl").write_bytes(b"not json\n" * 9)
    outcome = btm("run", "--in-process", write_plan(fields | {"store": str(tmp_path / "other")}))
    is_refused(outcome, "'kitchen'", "skipped: 9 × a line that is not JSON in UTF-8")


# Broken plans: the field that is changed, its value, and what the error says. The same for `btm plan` and
# `btm run`.

SMALL = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}
PLANS: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "a missing file": ("domains.0.text", "none.jsonl", ("'kitchen'", "none.jsonl")),
    "a glob of nothing": ("domains.0.text", "none/**/*.txt", ("'kitchen'", "none/**/*.txt")),
    "a folder as text": ("domains.0.text", "/tmp", ("'kitchen' is a folder", "/tmp", "such as '/tmp/*")),
    "a link to itself": ("domains.0.text", "loop", ("'kitchen'", "loop")),
    "a path out of the world": ("domains.0.text", "../" * 99 + "none", ("'kitchen'", "matches no file")),
    "a name as long as a file system": ("domains.0.text", "x" * 5000, ("'kitchen'", "matches no file")),
    "an address of no storage": ("domains.0.text", "ftp://host/a", ("domains[0].text[0]", "s3://")),
    "an address without a bucket": ("domains.0.text", "s3:///a.jsonl", ("'kitchen'", "AWS_ENDPOINT_URL")),
    "a data set on a hub out of reach": (
        "domains.0",
        {"name": "far", "dataset": {"name": "some/corpus"}},
        ("'far'", "some/corpus", "hub"),
    ),
    "a target of the same name": ("targets.0.name", "kitchen", ("the name 'kitchen' 2 times",)),
    "a name of other letters": ("domains.0.name", "Küche/../x", ("domains[0].name",)),
    "a misspelt key": ("training.updats", 3, ("training.updats", "did you mean `updates`?")),
    "not a number": ("training.learning_rate", float("nan"), ("training.learning_rate", "finite")),
    "an endless number": ("training.weight_decay", float("inf"), ("training.weight_decay", "finite")),
    "a negative number": ("training.updates", -1, ("training.updates",)),
    "an enormous number": ("training.updates", 10**400, ("training.updates",)),
    "no text for the store": ("store", "", ("store",)),
    "a store of no known kind": ("store", "ftp://host/prefix", ("ftp://",)),
    "a model without a type": ("model.config", {"n_layer": 2}, ("model.config", "model_type")),
    "a model of an unknown type": ("model.config", {"model_type": "gtp2"}, ("model_type", "gtp2")),
    "a misspelt model field": ("model.config", SMALL | {"n_heads": 2}, ("n_heads", "did you mean `n_head`?")),
    "heads that do not divide": ("model.config", SMALL | {"n_head": 3}, ("gpt2",)),
    "no heads": ("model.config", SMALL | {"n_head": 0}, ("gpt2",)),
    "a width in words": ("model.config", SMALL | {"n_embd": "wide"}, ("gpt2",)),
    "a model that is no language model": ("model.config", {"model_type": "vit"}, ("vit",)),
    "blocks longer than positions": (
        "model.config",
        SMALL | {"n_positions": 16},
        ("block_tokens", "at most 16"),
    ),
    "a tokenizer that is not there": ("tokenizer", {"pretrained": "./none"}, ("./none", "from the hub")),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_broken_plan_is_refused_by_plan_and_run_alike_and_leaves_no_store(
    name: str,
    fields: Fields,
    tmp_path: Path,
    write_plan: Callable[[Fields], Path],
    btm: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    field, value, parts = PLANS[name]
    path = write_plan(set_at(fields, field, value))
    before = files_below(tmp_path)
    is_refused(btm("plan", path), *parts)
    is_refused(btm("run", "--in-process", path), *parts)
    assert files_below(tmp_path) == before


def test_a_pretrained_model_that_is_not_there_is_refused(
    fields: Fields, tmp_path: Path, write_plan: Callable[[Fields], Path], btm: Callable[..., Outcome]
) -> None:
    source = {"pretrained": str(tmp_path / "none")}
    is_refused(
        btm("run", "--in-process", write_plan(fields | {"model": source, "tokenizer": source})), "none"
    )
    assert not Path(fields["store"]).exists()


FILES = {
    "nothing": b"",
    "a list": b"- a\n- b\n",
    "tabs": b"name: a\n\tstore: b\n",
    "a key twice": b"name: a\nname: b\n",
    "two documents": b"name: a\n---\nname: b\n",
    "zeros": bytes(100),
    "UTF-16": "name: a".encode("utf-16"),
    "brackets": b"[" * 1200,
    "code": b"!!python/object/apply:os.system [ls]",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_plan_is_refused_by_name(
    name: str, tmp_path: Path, btm: Callable[..., Outcome]
) -> None:
    (tmp_path / "broken.yaml").write_bytes(FILES[name])
    is_refused(btm("run", tmp_path / "broken.yaml"), "broken.yaml")


def test_a_path_that_is_no_plan_is_refused_by_name(tmp_path: Path, btm: Callable[..., Outcome]) -> None:
    for path in (tmp_path / "none.yaml", tmp_path, Path("/dev/zero")):
        is_refused(btm("run", path), str(path))


def test_text_too_small_for_its_vocabulary_is_refused_with_the_largest_that_works(
    fields: Fields, write_plan: Callable[[Fields], Path], btm: Callable[..., Outcome]
) -> None:
    outcome = btm("run", "--in-process", write_plan(set_at(fields, "tokenizer.train.vocabulary", 500_000)))
    is_refused(outcome, "tokenizer.train.vocabulary = 500000", "or less")
    check_store(Path(fields["store"]))


def test_text_shorter_than_its_blocks_is_refused_by_name(
    fields: Fields, write_plan: Callable[[Fields], Path], btm: Callable[..., Outcome]
) -> None:
    outcome = btm("run", "--in-process", write_plan(set_at(fields, "training.block_tokens", 1_000_000)))
    is_refused(outcome, "the train text of 'kitchen' fills no block", "at least 1000000 tokens")
    check_store(Path(fields["store"]))


def test_two_domains_of_the_same_file_are_refused(
    fields: Fields, write_plan: Callable[[Fields], Path], btm: Callable[..., Outcome]
) -> None:
    outcome = btm(
        "run", "--in-process", write_plan(set_at(fields, "domains.1.text", fields["domains"][0]["text"]))
    )
    is_refused(outcome, "'kitchen' and 'harbour' have the same text")


def test_two_domains_of_the_same_documents_are_refused(
    fields: Fields, tmp_path: Path, write_plan: Callable[[Fields], Path], btm: Callable[..., Outcome]
) -> None:
    copied = shutil.copy(fields["domains"][0]["text"], tmp_path / "copy.jsonl")
    outcome = btm("run", "--in-process", write_plan(set_at(fields, "domains.1.text", str(copied))))
    is_refused(outcome, "kitchen", "harbour")


def test_a_store_that_is_a_file_or_lies_below_one_is_refused_and_stays(
    fields: Fields, tmp_path: Path, write_plan: Callable[[Fields], Path], btm: Callable[..., Outcome]
) -> None:
    (tmp_path / "file").write_text("mine")
    for store in ("file", "file/below"):
        path = write_plan(set_at(fields, "store", str(tmp_path / store)))
        is_refused(btm("plan", path), str(tmp_path / store))
        is_refused(btm("run", "--in-process", path), str(tmp_path / store))
        assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("store", ["loop", "x" * 5000], ids=["a link to itself", "a name too long"])
def test_a_store_that_cannot_be_a_folder_is_refused(
    store: str,
    fields: Fields,
    tmp_path: Path,
    write_plan: Callable[[Fields], Path],
    btm: Callable[..., Outcome],
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    path = write_plan(set_at(fields, "store", str(tmp_path / store)))
    is_refused(btm("plan", path), "store")
    is_refused(btm("run", "--in-process", path), "store")


# A store with a forest, and plans that do not fit it.


@pytest.fixture(scope="module")
def grown(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the forest of a tiny plan."""
    store = tmp_path_factory.mktemp("forest") / "store"
    plan = Plan.model_validate(plan_fields(texts, store))
    grow(plan, in_process(plan))
    return store


@pytest.fixture
def after(grown: Path, fields: Fields) -> Fields:
    """The plan's fields, on a copy of that store."""
    shutil.copytree(grown, fields["store"])
    return fields


CHANGES = {
    "the model": ("model.config.n_embd", 64, "found:    model.config.n_embd: 32 → 64\n"),
    "the tokenizer": ("tokenizer.train.vocabulary", 330, "found:    tokenizer.train.vocabulary: 320 → 330\n"),
    "the block length": ("training.block_tokens", 16, "found:    training.block_tokens: 32 → 16\n"),
    "the seed's recipe": (
        "training.learning_rate",
        1e-3,
        "found:    training.learning_rate: 0.003 → 0.001\n",
    ),
    "the seed's number": ("training.random_seed", 7, "found:    training.random_seed: 0 → 7\n"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_plan_that_changes_what_a_forest_was_founded_on_is_refused(
    name: str, after: Fields, write_plan: Callable[[Fields], Path], btm: Callable[..., Outcome]
) -> None:
    field, value, part = CHANGES[name]
    path, store = write_plan(set_at(after, field, value)), Path(after["store"])
    before = files_below(store)
    is_refused(btm("plan", path), part, "take another `store`")
    assert files_below(store) == before
    is_refused(btm("run", "--in-process", path), part, "take another `store`")
    is_refused(btm("evaluate", "--in-process", path), part, "take another `store`")
    kept = {
        key: data
        for key, data in files_below(store).items()
        if key.startswith(("forest/", "artifacts/model/"))
    }
    assert kept == {
        key: data for key, data in before.items() if key.startswith(("forest/", "artifacts/model/"))
    }
    check_store(store)


def test_a_founding_domain_of_other_text_is_refused(
    after: Fields, tmp_path: Path, write_plan: Callable[[Fields], Path], btm: Callable[..., Outcome]
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", made_up_documents("elsewhere", 100))
    path = write_plan(set_at(after, "domains.0.text", str(other)))
    for command in ("run", "evaluate"):
        is_refused(btm(command, "--in-process", path), "'kitchen'", "`store`")
    check_store(Path(after["store"]))


def test_a_merge_that_cannot_be_met_is_refused_before_it_starts(
    after: Fields, tmp_path: Path, write_plan: Callable[[Fields], Path], btm: Callable[..., Outcome]
) -> None:
    path, to = write_plan(after), tmp_path / "merged"
    before = files_below(tmp_path)
    for arguments, part in {
        ("--to", to, "--weights", "mean"): "argmax, posterior, greedy, learned",
        ("--to", to): "kitchen",
        ("--to", to, "--for", "cellar"): "kitchen",
        ("--to", to, "--weights", "argmax", "--for", ""): "kitchen",
        ("--to", to, "--weights", "uniform", "--for", "kitchen"): "the same for every text",
        ("--to", "/proc/merged", "--weights", "uniform"): "cannot write to /proc/merged",
        ("--to", tmp_path, "--weights", "uniform"): "already exists",
        ("--to", path, "--weights", "uniform"): "already exists",
    }.items():
        outcome = btm("merge", path, "--in-process", *arguments)
        assert outcome.code == 2
        assert part in outcome.err
        assert outcome.err.count("error: ") == 1
    assert files_below(tmp_path) == before


def test_a_merge_below_a_file_is_refused(
    after: Fields, write_plan: Callable[[Fields], Path], btm: Callable[..., Outcome]
) -> None:
    path = write_plan(after)
    is_refused(btm("merge", path, "--in-process", "--weights", "uniform", "--to", path / "merged"), "merged")


@pytest.mark.parametrize("command", [("evaluate",), ("merge", "--weights", "uniform", "--to", "merged")])
def test_a_store_without_a_forest_is_refused_and_not_made(
    command: tuple[str, ...],
    fields: Fields,
    tmp_path: Path,
    write_plan: Callable[[Fields], Path],
    btm: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    is_refused(btm(*command, "--in-process", write_plan(fields)), "no forest", "`btm run`")
    assert not Path(fields["store"]).exists()
    assert not Path("merged").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("grow", "plan.yaml"), "No such command 'grow'"),
        (("plan",), "Missing argument"),
        (("run", "plan.yaml", "--in-proces"), "No such option: --in-proces"),
        (("merge", "plan.yaml"), "Missing option '--to'"),
        (("forest", "show"), "neither a plan nor --store"),
        (("forest", "show", "--store", "x", "--version", "one"), "Invalid value for '--version'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_call_that_is_wrong_is_refused(
    arguments: tuple[str, ...], part: str, btm: Callable[..., Outcome]
) -> None:
    outcome = btm(*arguments)
    assert outcome.code == 2
    assert part in " ".join(outcome.err.split())
    assert outcome.out == ""


def test_the_installed_command_refuses_without_a_traceback(fields: Fields, tmp_path: Path) -> None:
    """All of the above run in this process; these go through `btm` itself."""
    (tmp_path / "a.jsonl").write_bytes(bytes(range(255, 127, -1)) * 8)
    (tmp_path / "0.yaml").write_text(
        yaml.safe_dump(fields | {"domains": [{"name": "binary", "text": "a.jsonl"}]})
    )
    (tmp_path / "1.yaml").write_text(yaml.safe_dump(fields | {"tokeniser": {}}))
    command = [Path(sys.executable).with_name("btm"), "run", "--in-process", "--json"]
    for i, parts in enumerate((("binary", "a.jsonl:1"), ("did you mean `tokenizer`?",))):
        done = subprocess.run(
            [*command, f"{i}.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        is_refused(Outcome(done.returncode, done.stdout, done.stderr), *parts)
        assert done.stdout == ""
    check_store(Path(fields["store"]))


def test_names_with_spaces_brackets_and_other_letters_are_no_trouble(
    fields: Fields, tmp_path: Path, write_plan: Callable[[Fields], Path], btm: Callable[..., Outcome]
) -> None:
    source, names = (
        Path(fields["domains"][0]["text"]),
        ("with space [1].jsonl", "küche 厨房.jsonl", "per%41cent#.jsonl"),
    )
    lines = source.read_bytes().splitlines(keepends=True)
    (tmp_path / "tëxts ").mkdir()
    for i, name in enumerate(names):
        (tmp_path / "tëxts " / name).write_bytes(b"".join(lines[i::3]))
    fields["domains"] = [{"name": "kitchen", "text": [str(tmp_path / "tëxts " / name) for name in names]}]
    outcome = btm(
        "run", "--in-process", write_plan(fields | {"store": str(tmp_path / "störe "), "targets": []})
    )
    assert outcome.code == 0, outcome.err
    whole = btm(
        "run", "--in-process", write_plan(set_at(fields, "domains.0.text", str(source)) | {"targets": []})
    )
    assert outcome.out.splitlines()[-20:-2] == whole.out.splitlines()[-20:-2]  # the same verdict
