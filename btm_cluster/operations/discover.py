"""`btm discover`: domains in unlabelled text.

Finds clusters in a sample, then streams the text into a file for each.

The text is read twice: once to draw the sample, once to place its documents; never more than the sample and
two batches of it in memory. The sample, and so the clusters, follow from content, whatever the order of
files; so does a document's cluster, but for those that a full one turns away.
"""

import hashlib
import heapq
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import torch

from btm_cluster.data.batches import batches
from btm_cluster.data.clusters import READ_CHARACTERS, Clusters, find_clusters, load_clusters, save_clusters
from btm_cluster.data.corpus import content_hash, usable_documents
from btm_cluster.data.sources import read_documents
from btm_cluster.errors import TextError
from btm_cluster.plan import ReadingPlan, TextPlan
from btm_cluster.storage.new_folder import new_folder

SAMPLE_DOCUMENTS = 20_000
SLACK = 0.1
"""How much more than its even share of the documents a cluster takes before it turns away the next."""
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 4_000_000
PLAN_FILE = "domains.yaml"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Cluster:
    """A cluster in numbers, with the words that it can be named by."""

    name: str
    words: tuple[str, ...]
    documents: int
    characters: int
    file: str | None
    """Where its documents were written."""


@dataclass(frozen=True)
class Discovery:
    """The clusters that were found in a text, or in which it was placed."""

    clusters: tuple[Cluster, ...]
    sampled: int
    skipped: dict[str, int]
    """Documents left out, by reason."""

    @property
    def plan_snippet(self) -> str:
        """The clusters as `domains:` of a plan, wherever that is."""
        lines = ["domains:"]
        for cluster in self.clusters:
            lines.append(f"  # {cluster.documents:,} documents: {', '.join(cluster.words)}")
            file = cluster.file and os.path.abspath(cluster.file)
            lines.append(f"  - {{name: {json.dumps(cluster.name)}, text: {json.dumps(file)}}}")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Sample:
    """Distinct documents of a text, cut to what clusters are found by, and
    how many documents it has in all."""

    texts: list[str]
    documents: int


def discover(
    source: TextPlan,
    reading: ReadingPlan,
    clusters: int,
    to: Path,
    random_seed: int = 0,
    sample_documents: int = SAMPLE_DOCUMENTS,
    say: Say = lambda _: None,
) -> Discovery:
    """Finds clusters in a text and writes its documents, the model and a plan's
    `domains` into the new folder `to`.

    Raises:
        TextError: the text cannot be read, or has too few documents.
    """
    sample = draw_sample(_documents(source, reading, Counter()), sample_documents, random_seed)
    say(
        f"read {sample.documents:,} documents; looking for {clusters} clusters in {len(sample.texts):,} of "
        "them"
    )
    found = find_clusters(sample.texts, clusters, random_seed)
    room = math.ceil((1 + SLACK) * sample.documents / clusters)
    say("placing the documents")
    with new_folder(to) as folder:
        save_clusters(found, folder)
        bad: Counter[str] = Counter()
        placed = place(found, _documents(source, reading, bad), room, folder, to)
        discovery = Discovery(placed, len(sample.texts), dict(sorted(bad.items())))
        _check_unchanged(source.name, sample.documents, sum(cluster.documents for cluster in placed))
        (folder / PLAN_FILE).write_text(discovery.plan_snippet, encoding="utf-8")
    return discovery


def assign(source: TextPlan, reading: ReadingPlan, model: Path, to: Path | None) -> Discovery:
    """Places the documents of another text in the clusters of a saved model, each
    where it fits best, however many go there.

    They are counted, and written into the new folder `to` if one is given.

    Raises:
        UserError: no model, or a text that cannot be read.
    """
    found, bad = load_clusters(model), Counter[str]()
    documents = _documents(source, reading, bad)
    if to is None:
        placed = place(found, documents, None)
        return Discovery(placed, 0, dict(sorted(bad.items())))
    with new_folder(to) as folder:
        placed = place(found, documents, None, folder, to)
        discovery = Discovery(placed, 0, dict(sorted(bad.items())))
        (folder / PLAN_FILE).write_text(discovery.plan_snippet, encoding="utf-8")
    return discovery


def draw_sample(documents: Iterable[str], size: int, random_seed: int) -> Sample:
    """The `size` distinct documents with the smallest hashes of content and
    seed: in whatever order, the same ones."""
    key = random_seed.to_bytes(8, "little")
    largest_first: list[tuple[int, str]] = []
    kept: set[int] = set()
    count = 0
    for text in documents:
        count += 1
        rank = -int.from_bytes(hashlib.blake2b(content_hash(text), digest_size=16, key=key).digest(), "big")
        if rank in kept or (len(largest_first) == size and rank < largest_first[0][0]):
            continue
        kept.add(rank)
        if len(largest_first) < size:
            heapq.heappush(largest_first, (rank, text[:READ_CHARACTERS]))
        else:
            kept.remove(heapq.heapreplace(largest_first, (rank, text[:READ_CHARACTERS]))[0])
    return Sample([text for _, text in sorted(largest_first, reverse=True)], count)


def _documents(source: TextPlan, reading: ReadingPlan, bad: Counter[str]) -> Iterator[str]:
    return (
        document.text
        for document in usable_documents(source.name, read_documents(source, reading), reading, bad)
    )


def place(
    clusters: Clusters,
    documents: Iterable[str],
    room: int | None,
    folder: Path | None = None,
    to: Path | None = None,
) -> tuple[Cluster, ...]:
    """Streams the documents into their clusters' files in `folder`, which will become
    `to`; counts them, if none is given.

    A document that finds its cluster holding `room` documents goes to the next best one.
    """
    count, characters = [0] * len(clusters.names), [0] * len(clusters.names)
    with ExitStack() as open_files:
        files = [str(folder / _file_name(name)) for name in clusters.names] if folder else []
        streams = [
            open_files.enter_context(pyarrow.output_stream(file, compression="zstd")) for file in files
        ]
        full_E = torch.zeros(len(clusters.names), 1, dtype=torch.bool)
        for batch in batches(documents, len, BATCH_CHARACTERS, BATCH_DOCUMENTS):
            costs_ED = clusters.costs(batch)
            for i, text in enumerate(batch):
                chosen = int(costs_ED[:, i : i + 1].masked_fill(full_E, torch.inf).argmin())
                count[chosen] += 1
                characters[chosen] += len(text)
                full_E[chosen] = room is not None and count[chosen] >= room
                if streams:
                    streams[chosen].write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    written = [str(to / _file_name(name)) if to else None for name in clusters.names]
    rows = zip(clusters.names, clusters.words, count, characters, written, strict=True)
    return tuple(Cluster(*row) for row in rows)


def _file_name(name: str) -> str:
    return f"{name}.jsonl.zst"


def _check_unchanged(name: str, first: int, second: int) -> None:
    if first != second:
        raise TextError(
            f"the text of {name!r} changed while it was read",
            found=f"{second} documents the second time",
            expected=f"the {first} of the first",
            remedy="wait until the text is complete, and run it again",
        )
