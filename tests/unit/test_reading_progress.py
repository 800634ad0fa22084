"""How much of a source was read, as its progress counts it."""

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from btm_cluster.data.corpus import write_text
from btm_cluster.data.sources import read_documents
from btm_cluster.plan import ReadingPlan, TextPlan

DOCUMENTS = [f"document {i} with words" for i in range(400)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()


def _zstd(path: Path) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(LINES)


def _parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(LINES)),
    "a.jsonl.zst": _zstd,
    "a.csv": lambda path: path.write_text("text\n" + "\n".join(DOCUMENTS) + "\n"),
    "a.txt": lambda path: path.write_text("\n".join(DOCUMENTS)),
    "a.parquet": _parquet,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("most_bytes", [None, 10**9])
def test_what_is_read_of_a_file_adds_up_to_its_size(
    tmp_path: Path, name: str, most_bytes: int | None
) -> None:
    file = tmp_path / name
    WRITERS[name](file)
    counted: list[int] = []
    source = TextPlan(name="a", text=(str(file),))
    assert list(read_documents(source, ReadingPlan(), most_bytes, counted.append))
    size = file.stat().st_size
    assert size * 0.98 <= sum(counted) <= size  # rows of Parquet are taken for equally long


def test_a_text_is_sorted_part_by_part(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    seen: list[Path] = []

    def sorting(parts: list[Path]) -> list[Path]:
        seen.extend(parts)
        return parts

    source = TextPlan(name="a", text=(str(tmp_path / "a.jsonl"),))
    text = write_text(source, ReadingPlan(), False, tmp_path, sorting=sorting)
    assert 100 < len(seen) <= 256
    assert sum(one["documents"] for one in text.facts["splits"].values()) == len(DOCUMENTS)
