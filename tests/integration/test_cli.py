"""The command line: what it answers, with which exit code, and what it does not import to say so."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml

from btm_cluster import __version__
from btm_cluster.algorithm import grow
from btm_cluster.cli import app, forest_app, run_command
from btm_cluster.errors import PlanError, StepError, Stopped, StoreError
from btm_cluster.plan import Plan, read_plan
from tests.chatting import write_conversations
from tests.conftest import in_process

HEAVY = (
    "torch",
    "ray",
    "transformers",
    "datasets",
    "numpy",
    "boto3",
    "pyarrow",
    "tokenizers",
    "huggingface_hub",
)

WATCHED = f"""
import sys
from btm_cluster import __version__
from btm_cluster.cli import app, forest_app, run_command
code = run_command(lambda: app(sys.argv[1:]))
print("imported:", *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""


def fresh(*arguments: str | Path, folder: Path) -> tuple[int, str, list[str]]:
    """Exit code, output, and the heavy modules that a command imported in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr, done.stderr.rpartition("imported:")[2].split()


@pytest.fixture
def btm(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: exit code, output and errors."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command(lambda: app([str(argument) for argument in arguments]))
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--help",), 0, "Branch-Train-Merge"),
        (("run", "--help"), 0, "--in-process"),
        (("discover", "--help"), 0, "--clusters"),
        (("score", "--help"), 0, "--text"),
        (("score", "a.txt"), 2, "btm score needs a forest"),
        (("score", "a.txt", "--plan", "broken.yaml"), 2, "did you mean `updates`?"),
        (("export", "--help"), 0, "--push-to-hub"),
        (("export", "--seed", "--to", "x"), 2, "btm export needs a forest"),
        (("export", "broken.yaml", "--seed", "--to", "x"), 2, "did you mean `updates`?"),
        (("discover", "text.jsonl"), 2, "neither --clusters nor --model"),
        (("schema",), 0, '"additionalProperties": false'),
        (("schema", "--markdown"), 0, "## `training`"),
        (("init", "new.yaml"), 0, "wrote new.yaml"),
        (("plan", "broken.yaml"), 2, "did you mean `updates`?"),
        (("run", "broken.yaml"), 2, "did you mean `updates`?"),
        (("merge", "broken.yaml", "--to", "x"), 2, "did you mean `updates`?"),
        (("run", "none.yaml"), 2, "cannot read the plan"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_help_schema_starter_and_a_refused_plan_import_nothing_heavy(
    arguments: tuple[str, ...], code: int, part: str, tmp_path: Path
) -> None:
    """They answer in a third of a second for that reason; importing torch alone takes two."""
    (tmp_path / "broken.yaml").write_text("training: {updats: 1}")
    found, shown, imported = fresh(*arguments, folder=tmp_path)
    assert found == code, shown
    assert part in shown
    assert imported == []


def test_a_preview_starts_no_ray(
    fields: dict[str, Any], write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    code, shown, imported = fresh("plan", write_plan(fields), folder=tmp_path)
    assert code == 0
    assert "What a run would do" in shown
    assert "torch" in imported
    assert "ray" not in imported
    assert not Path(fields["store"]).exists()


def test_every_command_has_help(btm: Callable[..., tuple[int, str, str]]) -> None:
    _, listing, _ = btm("--help")
    for command in ("init", "plan", "schema", "run", "evaluate", "merge", "export", "discover", "forest"):
        assert command in listing
        code, shown, _ = btm(command, "--help")
        assert code == 0
        assert "Usage:" in shown


FOREST_COMMANDS: dict[str, tuple[str, ...]] = {
    "export": ("--seed", "--to", "new"),
    "generate": ("--in-process",),
    "score": ("--text", "a", "--in-process"),
    "serve": ("--in-process",),
    "forest contributions": (),
    "forest diff": ("0", "1"),
    "forest gc": (),
    "forest log": (),
    "forest pin": ("0",),
    "forest remove": ("kitchen",),
    "forest rollback": ("0",),
    "forest show": (),
    "forest verify": (),
}
"""Every command that reads a forest, with what else it needs."""


def test_the_commands_that_read_a_forest_are_known() -> None:
    found = {
        f"{prefix}{command.callback.__name__}"
        for group, prefix in ((app, ""), (forest_app, "forest "))
        for command in group.registered_commands
        if command.callback is not None and "store" in signature(command.callback).parameters
    }
    assert found == FOREST_COMMANDS.keys()


@pytest.mark.parametrize("command", FOREST_COMMANDS)
def test_a_forest_is_named_by_its_plan_or_its_store_in_every_command(
    command: str,
    fields: dict[str, Any],
    write_plan: Callable[..., Path],
    btm: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    call, path = [*command.split(), *FOREST_COMMANDS[command]], write_plan(fields)
    plan = ["--plan", path] if command == "score" else [path]
    for wrong in ([], [*plan, "--store", "elsewhere"]):
        code, out, err = btm(*call, *wrong)
        assert (code, out) == (2, "")
        assert f"btm {command} needs a forest" in err

    def said(*options: str | Path) -> tuple[int, str, str]:
        code, out, err = btm(*call, *options)
        return code, out, re.sub(r"(?m)^\d{4}-\S+ \S+ INFO", "INFO", err)  # its lines have times

    by_store = said("--store", fields["store"])
    assert "needs a forest" not in by_store[2]
    monkeypatch.setenv("BTM_STORE", fields["store"])
    assert said() == by_store
    monkeypatch.setenv("BTM_STORE", "elsewhere")
    by_plan = said(*plan)
    assert "elsewhere" not in by_plan[2], "who names a plan means its store"
    assert by_plan == by_store or not command.startswith("forest")


def test_versions_are_said_and_nothing_is_imported_for_it(tmp_path: Path) -> None:
    code, shown, imported = fresh("--version", folder=tmp_path)
    assert (code, imported) == (0, [])
    assert re.match(
        rf"btm {__version__} \(Python 3\.\d+\.\d+, torch \S+, transformers \S+, ray \S+\)\n", shown
    )


@pytest.mark.parametrize("command", ["", "run", "forest", "forest show"])
def test_h_is_help(command: str, btm: Callable[..., tuple[int, str, str]]) -> None:
    assert btm(*command.split(), "-h") == btm(*command.split(), "--help")


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    """By the script that `btm --install-completion bash` writes, in a bash of its own."""
    home = tmp_path / "home"
    home.mkdir()
    environment = os.environ | {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    from_bash = [
        "bash",
        "-c",
        "btm --install-completion && true",
    ]  # which shell it is for, it asks its parent
    installed = subprocess.run(from_bash, env=environment, capture_output=True, text=True, check=True)
    assert "completion installed" in installed.stdout
    (script,) = (home / ".bash_completions").glob("btm.sh")
    complete = f"source {script}; COMP_WORDS=(btm forest ro); COMP_CWORD=2; _btm_completion btm; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(
        ["bash", "-c", complete], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["rollback"]


def test_init_writes_a_plan_that_reads_and_never_over_another(
    btm: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    path = tmp_path / "new.yaml"
    assert btm("init", path)[0] == 0
    assert read_plan(path).name == "my-forest"
    path.write_text("mine")
    for existing in (path, tmp_path):
        code, _, err = btm("init", existing)
        assert code == 2
        assert "already exists" in err
    assert path.read_text() == "mine"


def test_init_sizes_a_plan_to_the_texts_that_are_named_and_no_preview_of_it_warns(
    texts: dict[str, Path],
    btm: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("kitchen", "harbour", "market"):
        (tmp_path / "text" / name).mkdir(parents=True)
        shutil.copy(texts[name], tmp_path / "text" / name / "a.jsonl")
    harbour = tmp_path / "text" / "harbour" / "a.jsonl"
    harbour.write_text(harbour.read_text().replace('"text"', '"body"'))
    (tmp_path / "plans").mkdir()
    # YAML would take the second name for false.
    named = [
        f"--text={name}=text/{source}/*.jsonl" for name, source in (("kitchen", "kitchen"), ("no", "harbour"))
    ]
    code, out, _ = btm("init", "plans/mine.yaml", *named, "--target", "market=text/market/a.jsonl")
    assert code == 0
    assert "its updates read" in out
    monkeypatch.chdir("/")
    path = tmp_path / "plans" / "mine.yaml"
    plan = read_plan(path)
    assert [text.name for text in plan.texts] == ["kitchen", "no", "market"]
    assert plan.domains[0].text == ("../text/kitchen/*.jsonl",)
    assert [domain.field for domain in plan.domains] == ["text", "body"]
    seen = json.loads(btm("plan", path, "--json")[1])
    assert all(0 < use["passes"] <= 4 for use in seen["texts"])
    assert seen["notes"] == []


def test_init_and_plan_tell_of_rows_with_messages(
    texts: dict[str, Path],
    btm: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_conversations(tmp_path / "chat.jsonl", "kitchen", 200)
    shutil.copy(texts["harbour"], "plain.jsonl")
    assert btm("init", "plan.yaml", "--text=chat=chat.jsonl", "--text=plain=plain.jsonl")[0] == 0
    plan = read_plan(tmp_path / "plan.yaml")
    assert [domain.messages for domain in plan.domains] == [("messages",), None]
    code, out, err = btm("plan", "plan.yaml", "--json")
    assert code == 0, err
    assert not [note for note in json.loads(out)["notes"] if "messages" in note]
    written = (tmp_path / "plan.yaml").read_text()
    (tmp_path / "plan.yaml").write_text(written.replace(', messages: "messages"', ""))
    for command in (("plan",), ("run", "--in-process")):
        code, _, err = btm(*command, "plan.yaml")
        assert code == 2
        assert "the rows of 'chat' have messages" in err
        assert "`messages: messages`" in err
    (tmp_path / "plan.yaml").write_text(written.replace("  chat_template: chat_template.jinja", "  #"))
    code, _, err = btm("plan", "plan.yaml")
    assert code == 2
    assert "messages need a chat template" in err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--text", "kitchen"), "NAME=FILES"),
        (("--text", "Kitchen=a.jsonl"), "lower-case letters"),
        (("--text", "kitchen=none/*.jsonl"), "the text of 'kitchen' matches no file"),
        (("--text", "kitchen=a.pdf"), "files that are not read"),
        (("--text", "kitchen=a.txt"), "a document that is not UTF-8"),
        (("--target", "kitchen=a.pdf"), "only --target"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_texts_that_init_cannot_read_are_refused_and_nothing_is_written(
    arguments: tuple[str, ...],
    part: str,
    btm: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pdf").touch()
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    code, _, err = btm("init", "new.yaml", *arguments)
    assert code == 2
    assert part in err
    assert not (tmp_path / "new.yaml").exists()


def test_init_in_a_folder_that_is_not_there_is_refused(
    btm: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, _, err = btm("init", tmp_path / "none" / "new.yaml")
    assert code == 2
    assert "none" in err


def test_the_schema_is_that_of_a_plan(btm: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = btm("schema")
    assert (code, err) == (0, "")
    assert json.loads(out)["properties"].keys() == Plan.model_fields.keys()


def test_a_preview_is_a_table_or_json(
    fields: dict[str, Any], write_plan: Callable[..., Path], btm: Callable[..., tuple[int, str, str]]
) -> None:
    path = write_plan(set_price(fields))
    code, table, _ = btm("plan", path)
    assert code == 0
    for part in (
        "read kitchen",
        "expert harbour",
        "unknown until its text is read",
        "GPU-hours",
        "at 2.5 per GPU-hour",
    ):
        assert part in table
    code, out, err = btm("plan", path, "--json")
    assert (code, err) == (0, "")
    seen = json.loads(out)
    assert {"name", "state", "updates", "tokens", "stored_bytes", "device_hours"} <= seen["steps"][0].keys()
    assert seen["money"] == pytest.approx(2.5 * seen["gpu_hours"])


def test_a_preview_says_what_this_machine_could_never_do_unless_a_cluster_is_named(
    fields: dict[str, Any], write_plan: Callable[..., Path], btm: Callable[..., tuple[int, str, str]]
) -> None:
    """It may be planned on a laptop for a cluster: a note, where a run would refuse."""
    path = write_plan(fields | {"cluster": {"seed_cpus": 100_000}})
    code, out, _ = btm("plan", path)
    assert code == 0
    assert re.search(
        r"note: seed asks for 1 worker\(s\) with 100000 CPU, 0 GPU each, and this machine has \d+ CPU", out
    )
    seen = json.loads(btm("plan", path, "--json")[1])
    assert [note.split(" asks")[0] for note in seen["notes"]] == ["seed"]
    assert seen["asks"][0]["how"]["cpus_per_worker"] == 100_000
    assert "note:" not in btm("plan", path, "--address", "auto")[1]


def test_a_store_in_the_jobs_own_copy_of_its_folder_is_refused(
    fields: dict[str, Any],
    btm: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was grown, and deleted with the job."""
    folder = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "plan.yaml").write_text(yaml.safe_dump(fields | {"store": "forests/lost"}))
    monkeypatch.chdir(folder)
    for command in ("run", "plan"):
        code, _, err = btm(command, "plan.yaml")
        assert code == 2
        assert "what is written would be deleted with this job" in err


def test_a_dry_run_is_a_preview(
    fields: dict[str, Any], write_plan: Callable[..., Path], btm: Callable[..., tuple[int, str, str]]
) -> None:
    path = write_plan(set_price(fields))  # whose rate is not measured anew each time
    assert btm("run", path, "--dry-run", "--json") == btm("plan", path, "--json")
    assert not Path(fields["store"]).exists()
    code, _, err = btm("forest", "gc", path, "--dry-run", "--delete")
    assert code == 2
    assert "exclude each other" in err


def set_price(fields: dict[str, Any]) -> dict[str, Any]:
    cluster = {"gpus_per_expert": 1, "seed_gpus": 1, "tokens_per_gpu_second": 1, "price_per_gpu_hour": 2.5}
    return fields | {"cluster": cluster}


def test_an_error_goes_to_standard_error_alone_json_or_not(
    btm: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"name": "n"}))
    for command in (("plan",), ("plan", "--json"), ("run",), ("run", "--json"), ("evaluate", "--json")):
        code, out, err = btm(command[0], tmp_path / "plan.yaml", *command[1:])
        assert (code, out) == (2, "")
        assert err.startswith("error: the plan ")
        assert err.count("remedy:") == 4


def test_results_that_cannot_be_written_are_refused_before_anything_starts(
    fields: dict[str, Any],
    write_plan: Callable[..., Path],
    btm: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    plan, here = write_plan(fields), set(tmp_path.rglob("*"))
    for to, part in (
        (plan, f"{plan}, a file"),
        (plan / "x", f"{plan}, a file"),
        ("/proc/x", "cannot write to /proc/x"),
    ):
        for command in (("study", plan), ("report", tmp_path), ("report", plan)):
            code, _, err = btm(*command, "--to", to)
            assert code == 2
            assert part in err
    assert set(tmp_path.rglob("*")) == here


@pytest.mark.parametrize(
    ("error", "code"),
    [(PlanError("x"), 2), (StoreError("x"), 1), (StepError("x"), 1), (Stopped("x"), 130), (SystemExit(3), 3)],
    ids=lambda value: type(value).__name__,
)
def test_each_kind_of_error_has_its_exit_code(error: BaseException, code: int) -> None:
    def fail() -> None:
        raise error

    assert run_command(fail) == code


def test_a_forest_is_shown_with_its_versions(
    fields: dict[str, Any], btm: Callable[..., tuple[int, str, str]]
) -> None:
    plan = Plan.model_validate(fields | {"domains": fields["domains"][:1], "targets": []})
    grow(plan, in_process(plan))
    code, table, _ = btm("forest", "show", "--store", plan.store)
    assert code == 0
    assert "kitchen" in table
    shown = json.loads(btm("forest", "show", "--store", plan.store, "--json")[1])
    assert [expert["domain"] for expert in shown["experts"]] == ["kitchen"]
    log = json.loads(btm("forest", "log", "--store", plan.store, "--json")[1])
    assert [(entry["version"], entry["experts"]) for entry in log] == [(1, 1), (0, 0)]
    code, _, err = btm("forest", "show", "--store", plan.store, "--version", "7")
    assert code == 2
    assert "there is no forest version 7" in err
    for command in ("show", "log"):
        code, out, err = btm("forest", command, "--store", f"{plan.store}-none")
        assert (code, out) == (2, "")
        assert "no forest in" in err


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "cli, btm_cluster.terminal.verdict, btm_cluster.operations.remove, btm_cluster.ledger.purge",
            {"torch", "transformers"},
        ),
        (
            "workers.on_ray.workers, btm_cluster.steps.read, btm_cluster.steps.tokenize",
            {"torch", "ray.train"},
        ),
    ],
)
def test_what_needs_no_torch_answers_without_it(modules: str, absent: set[str]) -> None:
    code = f"import sys; import btm_cluster.{modules}; print(*{absent} & sys.modules.keys())"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        == "\n"
    )


@pytest.mark.parametrize("given", ["argument", "standard input"])
def test_a_prompt_that_is_no_utf8_is_refused(
    given: str,
    fields: dict[str, Any],
    write_plan: Callable[..., Path],
    btm: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Text is read as UTF-8 whatever the terminal's encoding is, so that a prompt
    means what the same text in a file does."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "latin-1"))
    prompt = "-" if given == "standard input" else os.fsdecode(b"caf\xe9")
    code, _, err = btm("generate", write_plan(fields), "--prompt", prompt)
    assert code == 2
    assert "the prompt is no UTF-8" in err
