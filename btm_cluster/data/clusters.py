"""Clusters of documents: found in a sample by TF-IDF, truncated SVD and balanced
k-means; saved, loaded, and asked.

Knows texts as strings, and nothing of where they come from or go to. A saved model is JSON and safetensors,
no pickle, and its `clusters.json` is for people too: the names there are the domains' in a plan.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.cluster import kmeans_plusplus
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.utils.extmath import randomized_svd

from btm_cluster.equations.clusters import balanced_kmeans, choose, mean_cost, squared_distances
from btm_cluster.errors import TextError, UserError
from btm_cluster.plan.values import Name

FEATURES = 100
"""c-BTM's."""
STARTS, FIRST_STEPS = 6, 10
"""k-means starts so often, goes so many steps from each, and then on from the best."""
VOCABULARY_WORDS = 50_000
READ_CHARACTERS = 8_000
"""Characters read from the start of a document: more say little more of what it is about."""
WORDS_SHOWN = 10
CLUSTERS_FILE, VOCABULARY_FILE, ARRAYS_FILE = "clusters.json", "vocabulary.json", "clusters.safetensors"

# Characters of scripts that are written without spaces are words of their own; else a word is two letters or
# more, with the marks that some scripts put between them, which Python counts as no part of a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u065f\u0900-\u0dff"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])(?:[^\W\d_]|[{_MARKS}])){{2,}}")


@dataclass(frozen=True)
class Clusters:
    """The embedding of documents, and the centres of the clusters.

    V words of the vocabulary, F features, E clusters.
    """

    names: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    """The most characteristic ones of each cluster."""
    vocabulary: tuple[str, ...]
    rarity_V: np.ndarray
    """Inverse document frequency, float32."""
    directions_FV: np.ndarray
    """Right singular vectors, float32."""
    centres_EF: torch.Tensor
    price_E: torch.Tensor

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors, float64 [D, F]; zero for a text without a word of the vocabulary."""
        return _embed(_weigh(_counter(self.vocabulary).transform(texts), self.rarity_V), self.directions_FV)

    def squared_distances(self, texts: Sequence[str]) -> torch.Tensor:
        """The squared distance of each text to each cluster's centre: [E, D].

        A text without a known word is equally far from all.
        """
        points_DF = self.embed(texts)
        return torch.where(points_DF.any(1), squared_distances(points_DF, self.centres_EF), 1.0)

    def costs(self, texts: Sequence[str]) -> torch.Tensor:
        """Squared distance and price, [E, D]: the cluster where it is smallest gets the text."""
        return self.squared_distances(texts) + self.price_E[:, None]


def find_clusters(texts: Sequence[str], clusters: int, random_seed: int) -> Clusters:
    """Clusters of equal size in a sample of distinct texts.

    Raises:
        TextError: there are fewer texts that can be told apart than clusters.
    """
    vocabulary, counts_DV = _count(texts, clusters)
    rarity_V = np.log(len(texts) / np.bincount(counts_DV.indices, minlength=len(vocabulary))).astype(
        np.float32
    )
    weights_DV = _weigh(counts_DV, rarity_V)
    features = min(FEATURES, *weights_DV.shape)
    _, _, directions_FV = randomized_svd(weights_DV, features, random_state=random_seed)
    directions_FV = np.ascontiguousarray(directions_FV, dtype=np.float32)
    points_DF = _embed(weights_DV, directions_FV)
    _check_enough(len(np.unique(points_DF.numpy().round(6), axis=0)), clusters)
    centres_EF, price_E = _best_centres(points_DF, clusters, random_seed)
    chosen_D = choose(squared_distances(points_DF, centres_EF), price_E).numpy()
    digits = len(str(clusters - 1))
    return Clusters(
        tuple(f"cluster-{i:0{digits}}" for i in range(clusters)),
        _characteristic_words(weights_DV, chosen_D, clusters, vocabulary),
        vocabulary,
        rarity_V,
        directions_FV,
        centres_EF,
        price_E,
    )


def save_clusters(clusters: Clusters, folder: Path) -> None:
    """Writes the model into an existing folder."""
    rows = [
        {"name": name, "words": words} for name, words in zip(clusters.names, clusters.words, strict=True)
    ]
    lines = ",\n ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / CLUSTERS_FILE).write_text(f"[{lines}]\n", encoding="utf-8")
    (folder / VOCABULARY_FILE).write_text(
        json.dumps(clusters.vocabulary, ensure_ascii=False), encoding="utf-8"
    )
    arrays = {
        "rarity": clusters.rarity_V,
        "directions": clusters.directions_FV,
        "centres": clusters.centres_EF.numpy(),
        "prices": clusters.price_E.numpy(),
    }
    save_file(arrays, folder / ARRAYS_FILE)


def load_clusters(folder: Path) -> Clusters:
    """The model in a folder, its names as they stand there now.

    Raises:
        UserError: there is none, or its parts do not fit together.
    """
    names = tuple(cluster_names(folder))
    try:
        arrays = load_file(folder / ARRAYS_FILE)
        clusters = Clusters(
            names,
            tuple(tuple(row["words"]) for row in _read_json(folder / CLUSTERS_FILE)),
            tuple(_read_json(folder / VOCABULARY_FILE)),
            arrays["rarity"],
            arrays["directions"],
            torch.from_numpy(arrays["centres"]),
            torch.from_numpy(arrays["prices"]),
        )
    except (OSError, SafetensorError, KeyError, TypeError) as exc:
        raise _no_clusters(folder, f"{type(exc).__name__}: {exc}") from exc
    _check_shapes(clusters, folder)
    return clusters


def cluster_names(folder: Path) -> list[str]:
    """The names alone, in order.

    Raises:
        UserError: there is no model, or a name that no domain could have.
    """
    rows = _read_json(folder / CLUSTERS_FILE)
    try:
        names = TypeAdapter(list[Name]).validate_python([row["name"] for row in rows])
    except (KeyError, TypeError) as exc:
        raise _no_clusters(folder, f"{CLUSTERS_FILE} without names") from exc
    except ValidationError as exc:
        raise _no_clusters(folder, f"{CLUSTERS_FILE} with the name {exc.errors()[0]['input']!r}") from exc
    if len(set(names)) < len(names):
        raise _no_clusters(folder, f"{CLUSTERS_FILE} with a name that stands twice")
    return names


def _counter(vocabulary: Sequence[str] | None, least_documents: int = 1) -> CountVectorizer:
    return CountVectorizer(
        preprocessor=_plain,
        tokenizer=_WORD.findall,
        token_pattern=None,
        vocabulary=vocabulary,
        min_df=least_documents,
        max_features=VOCABULARY_WORDS if vocabulary is None else None,
        dtype=np.float32,
    )


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text[:READ_CHARACTERS]).casefold()


def _count(texts: Sequence[str], clusters: int) -> tuple[tuple[str, ...], scipy.sparse.csr_matrix]:
    """The vocabulary, and how often each text has each word: [D, V]."""
    _check_enough(len(texts), clusters)
    # A word of a single text relates it to no other; in a handful of texts most words are such.
    counter = _counter(None, least_documents=2 if len(texts) >= 100 else 1)
    try:
        counts_DV = counter.fit_transform(texts)
    except ValueError as exc:  # scikit-learn's, for an empty vocabulary
        raise TextError(
            "no clusters can be found: the text has no words",
            found=f"{len(texts)} documents without two letters in a row, or without a word in common",
            expected="text in a written language",
            remedy="check `--field` and `--delimiter`",
        ) from exc
    return tuple(counter.get_feature_names_out()), counts_DV.tocsr()


def _check_enough(distinct: int, clusters: int) -> None:
    if distinct < clusters:
        raise TextError(
            f"no {clusters} clusters can be found",
            found=f"{distinct} documents that can be told apart",
            expected=f"at least {clusters}, and hundreds per cluster to be of use",
            remedy="give more text or ask for fewer `--clusters`; if a file holds many documents, name their "
            "`--delimiter`",
        )


def _weigh(counts_DV: scipy.sparse.csr_matrix, rarity_V: np.ndarray) -> scipy.sparse.csr_matrix:
    """TF-IDF with logarithmic counts, rows of length 1 or 0."""
    weights_DV = counts_DV.copy()
    weights_DV.data = (1 + np.log(weights_DV.data)) * rarity_V[weights_DV.indices]
    lengths_D = np.sqrt(np.asarray(weights_DV.multiply(weights_DV).sum(axis=1)).ravel())
    weights_DV.data /= np.repeat(np.maximum(lengths_D, 1e-12), np.diff(weights_DV.indptr)).astype(np.float32)
    return weights_DV


def _embed(weights_DV: scipy.sparse.csr_matrix, directions_FV: np.ndarray) -> torch.Tensor:
    points_DF = np.asarray(weights_DV @ directions_FV.T, dtype=np.float64)
    return torch.from_numpy(points_DF / np.maximum(np.linalg.norm(points_DF, axis=1, keepdims=True), 1e-6))


def _best_centres(
    points_DF: torch.Tensor, clusters: int, random_seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres [E, F] and prices [E] of the best of several runs of balanced k-means."""
    draws = np.random.RandomState(random_seed)
    starts = [kmeans_plusplus(points_DF.numpy(), clusters, random_state=draws)[0] for _ in range(STARTS)]
    tried = [balanced_kmeans(points_DF, torch.from_numpy(start), FIRST_STEPS) for start in starts]
    best_EF, _ = min(tried, key=lambda found: mean_cost(points_DF, *found))
    return balanced_kmeans(points_DF, best_EF)


def _characteristic_words(
    weights_DV: scipy.sparse.csr_matrix, chosen_D: np.ndarray, clusters: int, vocabulary: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """For each cluster, the words that weigh most above their mean over all documents."""
    mean_V = np.asarray(weights_DV.mean(axis=0)).ravel()
    found = []
    for cluster in range(clusters):
        rows = np.flatnonzero(chosen_D == cluster)
        above_V = np.asarray(weights_DV[rows].sum(axis=0)).ravel() / max(1, len(rows)) - mean_V
        found.append(tuple(vocabulary[i] for i in np.argsort(-above_V)[:WORDS_SHOWN] if above_V[i] > 0))
    return tuple(found)


def _read_json(path: Path) -> list[Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise _no_clusters(path.parent, f"{path.name}: {exc}") from exc
    if not isinstance(value, list):
        raise _no_clusters(path.parent, f"{path.name}, which is no list")
    return value


def _check_shapes(clusters: Clusters, folder: Path) -> None:
    words, features, count = len(clusters.vocabulary), clusters.centres_EF.shape[-1], len(clusters.names)
    shapes = [
        clusters.rarity_V.shape,
        clusters.directions_FV.shape,
        clusters.centres_EF.shape,
        clusters.price_E.shape,
    ]
    if [tuple(s) for s in shapes] != [(words,), (features, words), (count, features), (count,)]:
        raise _no_clusters(folder, f"{count} names, {words} words, and arrays of shapes {shapes}")


def _no_clusters(folder: Path, found: str) -> UserError:
    return UserError(
        f"there is no cluster model in {folder}",
        found=" ".join(found.split())[:300],
        expected=f"{CLUSTERS_FILE}, {VOCABULARY_FILE} and {ARRAYS_FILE}, as `btm discover` writes them",
        remedy="check the folder, or run `btm discover` again",
    )
