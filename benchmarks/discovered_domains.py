"""Are the domains that `btm discover` finds those that a person would have named?

Purity against eight labelled domains.

    python benchmarks/discovered_domains.py ../shared/corpus --per-domain 1500 --clusters 8
    python benchmarks/discovered_domains.py ../shared/corpus --clusters 8        # all documents: uneven domains

Mixes the documents of the folders in CORPUS/train_domains (`train.jsonl.zst`) in one unlabelled file,
discovers clusters in it, and prints for each cluster its documents by domain. Purity is the share of
documents whose cluster mostly holds their domain. The peer is scikit-learn's plain k-means on the same sample
and embedding, which keeps no balance. Prints that there is nothing to do where there is no such corpus.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans

from btm_cluster.data.clusters import load_clusters
from btm_cluster.data.corpus import content_hash, read_shard
from btm_cluster.operations.discover import Discovery, discover, draw_sample
from btm_cluster.plan import ReadingPlan, TextPlan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", nargs="?", type=Path, default=Path("../shared/corpus"))
    parser.add_argument("--per-domain", type=int, help="documents drawn from each domain; without it, all")
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--random-seed", type=int, default=0)
    arguments = parser.parse_args()
    files = sorted(arguments.corpus.glob("train_domains/*/train.jsonl.zst"))
    if not files:
        print(f"skipped: no train_domains/*/train.jsonl.zst in {arguments.corpus}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        text, labels = Path(scratch, "unlabelled.jsonl"), dict[bytes, str]()
        characters = mix(files, arguments.per_domain, text, labels)
        started = time.monotonic()
        source = TextPlan(name="unlabelled", text=(str(text),))
        found = discover(
            source, ReadingPlan(), arguments.clusters, Path(scratch, "found"), arguments.random_seed
        )
        seconds = time.monotonic() - started
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(
            f"{len(labels):,} documents, {characters / 1e6:.0f} MB: {seconds:.0f} s, {usage.ru_utime:.0f} s "
            "of CPU time "
            f"with imports and mixing, at most {usage.ru_maxrss / 2**10:.0f} MiB"
        )
        ours = by_domain(found, labels)
        for cluster, counts in zip(found.clusters, ours, strict=True):
            most = ", ".join(f"{domain} {count}" for domain, count in counts.most_common(4))
            print(f"{cluster.name:>12} {cluster.documents:7,}  {most}\n{'':22}({', '.join(cluster.words)})")
        print(f"btm discover:   {report(ours)}")
        print(
            f"plain k-means:  {report(plain(text, Path(scratch, 'found'), arguments, labels))} (of the "
            "sample)"
        )


def mix(files: list[Path], per_domain: int | None, text: Path, labels: dict[bytes, str]) -> int:
    """Writes the documents in an order of their hashes, notes the domain of each, and
    returns how many characters there are."""
    documents = []
    for file in files:
        held = list(read_shard(file))
        chosen = held if per_domain is None else random.Random(0).sample(held, min(per_domain, len(held)))
        labels |= {content_hash(document): file.parent.name for document in chosen}
        documents += chosen
    documents.sort(key=content_hash)
    with text.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    return sum(map(len, documents))


def by_domain(found: Discovery, labels: dict[bytes, str]) -> list[Counter[str]]:
    """Each cluster's documents by domain."""
    return [
        Counter(labels[content_hash(text)] for text in read_shard(Path(str(c.file)))) for c in found.clusters
    ]


def plain(
    text: Path, folder: Path, arguments: argparse.Namespace, labels: dict[bytes, str]
) -> list[Counter[str]]:
    """The same for scikit-learn's k-means, on the sample that the clusters were found in."""
    documents = [json.loads(line)["text"] for line in text.open(encoding="utf-8")]
    starts = {document[:8000]: labels[content_hash(document)] for document in documents}
    sample = draw_sample(documents, 20_000, arguments.random_seed).texts
    points = load_clusters(folder).embed(sample).numpy()
    chosen = KMeans(arguments.clusters, n_init=4, random_state=arguments.random_seed).fit_predict(points)
    return [
        Counter(starts[sample[i]] for i in np.flatnonzero(chosen == c)) for c in range(arguments.clusters)
    ]


def report(counts: list[Counter[str]]) -> str:
    sizes = [sum(count.values()) for count in counts]
    purity = sum(max(count.values()) for count in counts) / sum(sizes)
    even = sum(sizes) / len(sizes)
    return f"purity {purity:.3f}; sizes {min(sizes) / even:.2f} to {max(sizes) / even:.2f} of an even share"


if __name__ == "__main__":
    main()
