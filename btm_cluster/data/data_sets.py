"""Hugging Face data sets: from the hub, from its cache, or from a local
folder, read as a stream of documents.

What `datasets` itself has saved is read from its Arrow files; all else through `datasets`, streaming. Its
errors are translated, since its remedies are Python calls.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow

from btm_cluster.data.documents import Read, RowForm, cell_value
from btm_cluster.data.files import find_below, stamp_of_file
from btm_cluster.errors import BtmError, TextError, one_line
from btm_cluster.plan import DatasetPlan, TextPlan

_STATE, _SPLITS = "state.json", "dataset_dict.json"
"""Files that `save_to_disk` writes beside the Arrow files of one data set, and beside several splits."""
_COMMIT = re.compile("[0-9a-f]{40}")
_PYTHON = re.compile(
    r"load_dataset|load_from_disk|save_to_disk|trust_remote_code|pip install|\w\(|\be\.g\.$|Example of usage"
)
Item = tuple[str | None, Read]


def stamp_of(name: str, dataset: DatasetPlan) -> dict[str, Any]:
    """Identifies the state of a data set: the files of a local folder, or the commit on the hub.

    Raises:
        TextError: it is not there, or the plan asks of a local folder what only the hub has.
    """
    if not Path(dataset.opened_name).is_dir():
        return {"files": [], "revision": dataset.revision or _hub_revision(name, dataset)}
    if dataset.revision is not None:
        raise TextError(
            f"`revision` cannot apply to the data set of {name!r}",
            found=f"{dataset.name}, a local folder",
            expected="a data set of the hub, which has commits",
            remedy="leave `revision` out",
        )
    found = find_below(Path(dataset.name), dataset.folder)
    return {"files": [stamp_of_file(file, dataset.folder) for file in found]}


def pinned(source: TextPlan, stamp: Mapping[str, Any]) -> TextPlan:
    """The source at the commit of its data set that its stamp names, whatever the hub has had since."""
    if source.dataset is None or "revision" not in stamp:
        return source
    return source.model_copy(
        update={"dataset": source.dataset.model_copy(update={"revision": stamp["revision"]})}
    )


def read_data_set(name: str, dataset: DatasetPlan, form: RowForm) -> Iterator[Item]:
    """The documents of the splits that the plan names, each with the split it
    was given for (None: the text itself).

    Raises:
        TextError: it cannot be read to its end.
    """
    splits = {None: dataset.split, "development": dataset.development_split, "test": dataset.test_split}
    read = _read_saved if _is_saved(Path(dataset.opened_name)) else _read_streaming
    for split, given in splits.items():
        if given is None:
            continue
        where = f"{dataset.name}, split {given}"
        try:
            for item in read(name, dataset, given, form):
                yield split, item
        except BtmError:
            raise
        except Exception as exc:  # of `datasets`, and of whatever it calls
            raise _unreadable(name, where, exc) from exc


def _is_saved(folder: Path) -> bool:
    return (folder / _STATE).is_file() or (folder / _SPLITS).is_file()


def _read_saved(name: str, dataset: DatasetPlan, split: str, form: RowForm) -> Iterator[Read]:
    """A split as `save_to_disk` wrote it.

    Through `datasets`, the files that it caches beside them would be read as well.
    """
    folder = Path(dataset.opened_name)
    if (folder / _SPLITS).is_file():
        splits = json.loads((folder / _SPLITS).read_text(encoding="utf-8"))["splits"]
        folder /= split
    else:
        splits = [json.loads((folder / _STATE).read_text(encoding="utf-8")).get("_split") or "train"]
    if split not in splits or dataset.configuration is not None:
        raise TextError(
            f"cannot read the data set of {name!r}",
            found=f"{dataset.name}, saved by `datasets`, has the splits: {', '.join(splits)}",
            expected=f"the split {split}" + (", and a configuration" if dataset.configuration else ""),
            remedy="name one of its splits, and no `configuration`, which nothing saved has",
        )
    number = 0
    for file in json.loads((folder / _STATE).read_text(encoding="utf-8"))["_data_files"]:
        with (
            pyarrow.memory_map(str(folder / Path(file["filename"]).name)) as data,
            pyarrow.ipc.open_stream(data) as batches,
        ):
            for batch in batches:
                columns = [
                    batch.column(field) if field in batch.schema.names else [None] * batch.num_rows
                    for field in form.fields
                ]
                for cells in zip(*columns, strict=True):
                    number += 1
                    values = [None if cell is None else cell_value(cell, form.longest) for cell in cells]
                    yield form.document(f"{dataset.name}, {split}, row {number}", values)


def _read_streaming(name: str, dataset: DatasetPlan, split: str, form: RowForm) -> Iterator[Read]:
    import datasets

    builder = datasets.load_dataset_builder(
        dataset.opened_name, dataset.configuration, revision=dataset.revision
    )
    cached = _cached_commit(builder)
    if cached and dataset.revision and cached != dataset.revision:
        raise TextError(  # without a network, `datasets` takes whatever its cache has
            f"cannot read the data set of {name!r}",
            found=f"the hub cannot be reached, and the cache has {dataset.name} at {cached}",
            expected=f"the revision {dataset.revision}",
            remedy=f"set `revision: {cached}`, or run it where the hub can be reached",
        )
    for number, row in enumerate(builder.as_streaming_dataset(split=split), start=1):
        values = [row.get(field) for field in form.fields]
        yield form.document(f"{dataset.name}, {split}, row {number}", values)


def _hub_revision(name: str, dataset: DatasetPlan) -> str:
    """The commit that a data set on the hub is at; where that cannot be
    reached, the one that its cache has."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().dataset_info(dataset.name, timeout=30).sha)
    except Exception as exc:  # the hub's own errors, and those of whatever HTTP library it uses
        answered = isinstance(exc, HfHubHTTPError) and exc.response.status_code < 500
        if not answered and (commit := _commit_in_cache(dataset)):
            return commit
        raise _unreadable(name, f"no folder {dataset.name}, and from the hub", exc) from exc


def _commit_in_cache(dataset: DatasetPlan) -> str:
    import datasets

    try:
        return _cached_commit(datasets.load_dataset_builder(dataset.opened_name, dataset.configuration))
    except Exception:  # as many kinds as there are reasons for not being there
        return ""


def _cached_commit(builder: Any) -> str:
    """The commit of a data set that comes from the cache; empty, if it comes from elsewhere."""
    from datasets.packaged_modules.cache.cache import Cache

    found = isinstance(builder, Cache) and _COMMIT.fullmatch(str(builder.hash))
    return str(builder.hash) if found else ""


def _unreadable(name: str, where: str, exc: Exception) -> TextError:
    return TextError(
        f"cannot read the data set of {name!r}",
        found=f"{where}: {_without_python(exc)}",
        expected="a local folder that `datasets` reads, or a name on a hub that can be reached or has been "
        "cached",
        remedy="check name, `configuration`, `split` and network; files with bad lines can be read as `text`",
    )


def _without_python(exc: Exception) -> str:
    """Another library's message without the sentences that tell a programmer what to call."""
    sentences = re.split(r"\n|(?<=[.!?])\s+", str(exc))
    kept = " ".join(sentence.strip() for sentence in sentences if not _PYTHON.search(sentence.strip()))
    return one_line(Exception(kept)) if kept.strip() else type(exc).__name__
