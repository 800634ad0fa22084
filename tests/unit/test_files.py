"""Files found by path and glob: links, odd names, folders that cannot be read."""

import json
import os
from pathlib import Path

import pytest

from btm_cluster.data.files import find_below, find_files
from btm_cluster.data.sources import fingerprint
from btm_cluster.errors import TextError
from btm_cluster.identity import identity_of
from btm_cluster.plan import ReadingPlan, TextPlan
from tests.reading import read, reasons, refusal, texts


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(path.name)
    return path


def found(folder: Path, pattern: str) -> list[str]:
    return [os.path.relpath(file.path, folder) for file in find_files(f"{folder}/{pattern}")]


def test_both_wildcards_follow_links_to_folders_outside(tmp_path: Path) -> None:
    put(tmp_path / "corpus/2019/a.txt")
    put(tmp_path / "elsewhere/deep/b.txt")
    (tmp_path / "corpus/2020").symlink_to("../elsewhere")
    assert found(tmp_path, "corpus/**/*.txt") == ["corpus/2019/a.txt", "corpus/2020/deep/b.txt"]
    assert found(tmp_path, "corpus/*/*/*.txt") == ["corpus/2020/deep/b.txt"]
    assert found(tmp_path, "corpus/**/deep/*") == ["corpus/2020/deep/b.txt"]
    assert [file.path for file in find_below(tmp_path / "corpus")] == [
        str(tmp_path / "corpus/2019/a.txt"),
        str(tmp_path / "corpus/2020/deep/b.txt"),
    ]


def test_a_file_that_several_links_lead_to_is_found_once_by_its_own_path_if_that_is_below(
    tmp_path: Path,
) -> None:
    put(tmp_path / "corpus/z/a.txt")
    put(tmp_path / "corpus/z/deep/b.txt")
    (tmp_path / "corpus/latest").symlink_to("z")
    (tmp_path / "corpus/z/deep/again").symlink_to("../../latest")
    (tmp_path / "corpus/a.txt").symlink_to("z/a.txt")
    (tmp_path / "corpus/chain").symlink_to("latest")
    assert found(tmp_path, "corpus/**/*.txt") == ["corpus/z/a.txt", "corpus/z/deep/b.txt"]
    assert found(tmp_path, "corpus/**/**/b.txt") == ["corpus/z/deep/b.txt"]
    assert found(tmp_path, "corpus/latest/**") == ["corpus/latest/a.txt", "corpus/latest/deep/b.txt"]


def test_links_that_lead_up_or_nowhere_or_to_each_other_end(tmp_path: Path) -> None:
    put(tmp_path / "a/a.txt")
    put(tmp_path / "b/b.txt")
    for where, to in (
        ("a/b", "../b"),
        ("b/a", "../a"),
        ("a/up", ".."),
        ("a/loop", "loop"),
        ("b/gone.lock", "nowhere"),
    ):
        (tmp_path / where).symlink_to(to)
    assert found(tmp_path, "**/*.txt") == ["a/a.txt", "b/b.txt"]
    assert found(tmp_path, "a/**/*.txt") == ["a/a.txt", "a/b/b.txt"]


def test_a_link_whose_disk_is_away_is_named_whether_it_led_to_a_file_or_to_a_folder(tmp_path: Path) -> None:
    put(tmp_path / "corpus/2019/a.txt")
    (tmp_path / "corpus/2019/b.txt").symlink_to("/mnt/away/b.txt")
    (tmp_path / "corpus/2019/unmatched.lock").symlink_to("nowhere")
    assert reasons(read(tmp_path / "corpus/**/*.txt")) == ["a link that leads nowhere"]
    (tmp_path / "corpus/2020").symlink_to("/mnt/away")
    for pattern in ("corpus/**/*.txt", "corpus/*/*.txt"):
        assert "corpus/2020 is a link that leads nowhere" in refusal(tmp_path / pattern)


def test_hard_links_with_names_of_their_own_are_files_of_their_own(tmp_path: Path) -> None:
    os.link(put(tmp_path / "a.txt"), tmp_path / "b.txt")
    assert found(tmp_path, "*.txt") == ["a.txt", "b.txt"]


def test_a_file_named_as_a_pattern_hides_no_other_file(tmp_path: Path) -> None:
    for name in ("*.txt", "a.txt", "b.txt"):
        put(tmp_path / name)
    assert found(tmp_path, "*.txt") == ["*.txt", "a.txt", "b.txt"]


def test_a_name_that_is_not_utf_8_is_read_and_can_be_written(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xe9t\xe9"
    os.mkdir(folder)
    for name, data in (
        (b"a\xe9.txt", b"text"),
        (b"b\xe9.jsonl", b'{"text": "line"}\nnot json\n'),
        (b"c.x\xe9", b"c"),
    ):
        with open(folder + b"/" + name, "wb") as file:
            file.write(data)
    source = TextPlan(name="a", text=(f"{tmp_path}/**",))
    stamp = fingerprint(source)
    assert identity_of(stamp)
    assert [Path(path).name for path, *_ in stamp["text"]] == ["a\\xe9.txt", "b\\xe9.jsonl", "c.x\\xe9"]
    items = read(tmp_path / "**")
    assert texts(items) == ["text", "line", "c"]
    assert reasons(items) == ["a line that is not JSON in UTF-8"]
    assert json.dumps([str(item) for item in items], ensure_ascii=False).encode()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a moment")
def test_a_folder_that_cannot_be_listed_is_named_and_not_passed_over(tmp_path: Path) -> None:
    """`os.walk` and `glob.glob` take a folder without permission for an empty one."""
    put(tmp_path / "open/a.txt")
    put(tmp_path / "closed/b.txt")
    (tmp_path / "closed").chmod(0o700)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        for pattern in ("**/*.txt", "*/*.txt"):
            assert "closed" in refusal(tmp_path / pattern)
    finally:
        os.seteuid(0)


def test_brackets_of_a_folder_are_brackets_in_a_plan_too(tmp_path: Path) -> None:
    put(tmp_path / "data [v2]/2019/a.txt")
    assert texts(read(tmp_path / "data [v2]/**", ReadingPlan())) == ["a.txt"]
    with pytest.raises(TextError, match="matches no file"):
        read(tmp_path / "data [v3]/**")
