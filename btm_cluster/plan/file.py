"""A plan's file as plain values: YAML, read strictly. Knows nothing of what a plan is made of."""

import stat
from pathlib import Path
from typing import Any

import yaml

from btm_cluster.errors import PlanError, one_line

_LARGEST_PLAN_BYTES = 1 << 20
_MERGE_TAG = "tag:yaml.org,2002:merge"


def is_plan_file(path: Path) -> bool:
    """Whether a place that is a plan's or a folder's is a plan's: by its name, `.yaml` or `.yml`."""
    return path.suffix in (".yaml", ".yml") and not path.is_dir()


def read_plan_file(path: Path) -> tuple[dict[Any, Any], str]:
    """The keys and values of the YAML file at `path`, and its text.

    Raises:
        PlanError: it cannot be read, is not YAML, writes a key twice, or holds no keys and values.
    """
    text = _read_text(path)
    try:
        raw = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.MarkedYAMLError as exc:
        raise PlanError(f"the plan {path} is not YAML", found=_place(exc), remedy=_yaml_remedy(exc)) from exc
    # Such as the date 2024-13-13, or 5,000 brackets.
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        found = one_line(exc, 200)
        raise PlanError(
            f"the plan {path} is not YAML", found=found, remedy="`btm init` writes a starter"
        ) from exc
    if not isinstance(raw, dict):
        found = (
            "nothing"
            if raw is None
            else {"str": "one text", "list": "a list"}.get(type(raw).__name__, repr(raw))
        )
        expected, remedy = "keys such as name, store, domains", "`btm init` writes a starter"
        raise PlanError(f"the plan {path} is not a plan", found=found, expected=expected, remedy=remedy)
    return raw, text


def _read_text(path: Path) -> str:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            found = "a folder" if stat.S_ISDIR(status.st_mode) else "no file"
            inside = next(iter(sorted(path.glob("*.y*ml"))), None) if path.is_dir() else None
            remedy = "name a YAML file" + (f", such as {inside}" if inside else "")
            raise PlanError(f"cannot read the plan {path}", found=found, remedy=remedy)
        if status.st_size > _LARGEST_PLAN_BYTES:
            found, expected = f"{status.st_size} bytes", f"a YAML file of at most {_LARGEST_PLAN_BYTES}"
            raise PlanError(
                f"cannot read the plan {path}", found=found, expected=expected, remedy="name the plan itself"
            )
        with path.open(encoding="utf-8", newline="") as file:  # as it is, with its line ends
            return file.read()
    except (OSError, ValueError) as exc:
        raise PlanError(
            f"cannot read the plan {path}",
            found=str(exc),
            expected="a YAML file in UTF-8",
            remedy="check the path; `btm init` writes a starter",
        ) from exc


def _place(exc: yaml.MarkedYAMLError) -> str:
    mark = exc.problem_mark or exc.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + (exc.problem or exc.context or "")


def _yaml_remedy(exc: yaml.MarkedYAMLError) -> str:
    problem = exc.problem or ""
    if "\\t" in problem:
        return "indent with spaces, not tabs"
    return (
        "keep one of them"
        if "stands twice" in problem
        else "check the indentation, and quote text with : or # in it"
    )


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which plain YAML loaders let the later one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key in (
                key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG
            ):
                if key.value in seen:
                    what = f"the key `{key.value}` stands twice"
                    raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)
