"""The wheel: what it holds, and that it works without the repository, beside the packages that it needs."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import btm_cluster
from btm_cluster.operations.quickstart import PLAN_FILE, TEXT_FOLDER, TEXTS

ROOT = Path(__file__).parents[2]
SOURCES = ("btm_cluster", "pyproject.toml", "README.md", "LICENSE")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build in the tree would take up what an earlier one left behind."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(tree), str(tree))
    (built,) = tree.glob("*.whl")
    return built


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run([*command, "--no-deps", "--no-index"], env=ENVIRONMENT, check=True)


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Callable[..., str]:
    """Runs a program of an environment that has the wheel; this environment's other packages are lent to it."""
    folder = wheel.parent / "environment"
    venv.create(folder)
    pip("--python", str(folder / "bin" / "python"), "install", str(wheel))
    (packages,) = folder.glob("lib/*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(program: str, *arguments: str, cwd: Path) -> str:
        command = [str(folder / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "btm_cluster").rglob("*") if path.is_file())
    assert held == {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"}
    assert "btm_cluster/py.typed" in held


def test_the_documents_name_every_extra_and_the_workflow_every_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs" / "how-to" / "install.md").read_text(encoding="utf-8")
    assert [extra for extra in project["optional-dependencies"] if f"`{extra}`" not in page] == []
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (job,) = yaml.safe_load(workflow)["jobs"].values()
    supported = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert job["strategy"]["matrix"]["python"] == supported
    assert ".ci/run" in job["steps"][-1]["run"]
    assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in job["steps"][:-1])


def test_the_installed_package_is_this_version(installed: Callable[..., str], tmp_path: Path) -> None:
    file = installed("python", "-c", "import btm_cluster; print(btm_cluster.__file__)", cwd=tmp_path)
    assert not Path(file).is_relative_to(ROOT)
    assert btm_cluster.__version__ in installed("btm", "--version", cwd=tmp_path)


def test_the_quickstart_runs_from_the_installed_package(
    installed: Callable[..., str], texts: dict[str, Path], tmp_path: Path
) -> None:
    """Most of its text is there already, short and made up, and its plan is cut short: this takes seconds."""
    folder = tmp_path / TEXT_FOLDER
    folder.mkdir(parents=True)
    for domain in TEXTS.keys() - {"reference"}:
        shutil.copy(texts["kitchen" if domain == "python" else "harbour"], folder / f"{domain}.jsonl")
    assert "btm run quickstart.yaml" in installed("btm", "quickstart", cwd=tmp_path)
    assert (folder / "reference.jsonl").stat().st_size > 200_000
    plan = yaml.safe_load((tmp_path / PLAN_FILE).read_text())
    plan |= {"domains": plan["domains"][:2], "targets": [], "baselines": []}
    plan["training"] |= {"updates": 4, "block_tokens": 32}
    plan["tokenizer"] = {"train": {"vocabulary": 320}}
    (tmp_path / PLAN_FILE).write_text(yaml.safe_dump(plan))
    assert "ensemble" in installed("btm", "run", str(PLAN_FILE), "--in-process", cwd=tmp_path)
    assert "python" in installed("btm", "forest", "show", "--store", plan["store"], cwd=tmp_path)
