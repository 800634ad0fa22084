"""Workers that commit stand-ins at once, and a forest of stand-in experts to expand: for benchmarks of all that
is not training.

Fits are real. Scores are those of a few made-up experts, repeated: a development text has SCORED tokens.
"""

import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from btm_cluster.algorithm import grow
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.port import Outcome
from btm_cluster.forest import Expert, Forest, merge_into
from btm_cluster.identity import Ref, identity_by, identity_of
from btm_cluster.ledger import Artifact, Ledger, Origin
from btm_cluster.plan import Plan
from btm_cluster.requests import (
    AverageRequest,
    FitText,
    ReadText,
    ScoreRequest,
    StepRequest,
    Tokenize,
    TrainRequest,
)
from btm_cluster.steps.average import weights_of
from btm_cluster.steps.fit import fit_text
from btm_cluster.workers.in_process import LocalControl

ARRIVE = 8
"""Experts of a version, as expansions add them."""
BLOCKS, TOKENS = 8, 256
SCORED = BLOCKS * TOKENS
_FEW = 8
_SPLITS = ("train", "development", "test")


class StandIns:
    """The workers' port: what each request asks for, of the right form and without its content."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.fits: list[FitText] = []
        """The fits that were made."""

    def get_ready(self, trainings: Sequence[StepRequest]) -> None:
        """Nothing: there is no process to start."""

    def run(self, requests: Sequence[StepRequest]) -> Iterator[tuple[StepRequest, Outcome]]:
        """Each request with its artifact."""
        yield from ((request, self.make(request)) for request in requests)

    def make(self, request: StepRequest) -> Artifact:
        """One artifact."""
        if isinstance(request, FitText):
            self.fits.append(request)
            return fit_text(request, self._ledger, LocalControl(lambda _: None, threading.Event()))
        if isinstance(request, ScoreRequest):
            return self._commit(request, _scores(int(request.model.identity[:8], 16) % _FEW))
        if isinstance(request, TrainRequest):
            return self._commit(request, _weights(request), {"role": request.role, "origin": "0" * 64})
        if isinstance(request, AverageRequest):
            facts = {"role": "average", "weights": weights_of(request, self._ledger)}
            return self._commit(request, _weights(request), facts)
        if isinstance(request, ReadText):
            return self._read(request)
        if isinstance(request, Tokenize):
            owners = np.tile(np.arange(BLOCKS)[:, None], TOKENS)
            return self._commit(
                request, {"tokens.npy": owners, "documents.npy": owners}, {"blocks": BLOCKS, "tokens": SCORED}
            )
        return self._commit(request, {})

    def _read(self, request: ReadText) -> Artifact:
        text = commit_text(self._ledger, request.label)
        return self._ledger.commit(request, {}, {"skipped": {}}, {"name": request.label}, parts=[text])

    def _commit(
        self,
        request: StepRequest | Origin,
        arrays: Mapping[str, np.ndarray],
        facts: Mapping[str, object] | None = None,
    ) -> Artifact:
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder, name) for name in arrays}
            for name, array in arrays.items():
                with files[name].open("wb") as file:
                    np.save(file, array)
            return self._ledger.commit(request, files, facts or {})


@contextmanager
def without_waiting_for_disk() -> Iterator[None]:
    """A store that is thrown away need not be safe from a power cut."""
    flush, os.fsync = os.fsync, lambda _: None
    try:
        yield
    finally:
        os.fsync = flush


def plan_for(folder: Path, domains: Sequence[str]) -> Plan:
    """A plan of these domains, whose store is below `folder`."""
    named = []
    for name in domains:
        text = folder / f"{name}.jsonl"
        if not text.exists():  # a text that was written anew is read anew
            documents = [json.dumps({"text": f"{name} {number} " * 40}) for number in range(200)]
            text.write_text("\n".join(documents) + "\n")
        named.append({"name": name, "text": str(text)})
    fields = {
        "name": "many-experts",
        "store": str(folder / "store"),
        "domains": named,
        "targets": [],
        "tokenizer": {"train": {"vocabulary": 320}},
        "model": {"config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}},
        "training": {
            "block_tokens": TOKENS,
            "updates": 12,
            "seed_share": 0.5,
            "blocks_per_domain_update": 4,
            "learning_rate": 3e-3,
        },
        "cluster": {"seed_cpus": 1, "cpus_per_expert": 1},
    }
    return Plan.model_validate(fields)


def grow_many(plan: Plan, ledger: Ledger, experts: int) -> Forest:
    """A forest that the plan's domains founded, and to which stand-in experts came a few at a time."""
    with without_waiting_for_disk():
        forest = grow(plan, Driver(ledger, StandIns(ledger))).forest
        while len(forest.experts) < experts:
            first, last = len(forest.experts), min(len(forest.experts) + ARRIVE, experts)
            forest = append(ledger, forest, [f"domain-{number}" for number in range(first, last)])
    return forest


def commit_text(ledger: Ledger, domain: str) -> Ref:
    """A text without documents, which says that it has some."""
    identity = identity_of({"text": domain})
    shards = {"documents": BLOCKS, "characters": 4 * SCORED, "words": SCORED}
    splits = {split: shards | {"shards": [f"{split}-00000.jsonl.zst"]} for split in _SPLITS}
    text = Origin(Ref("text", identity), {"documents": identity}, {})
    return ledger.commit(text, {}, {"duplicates": 0, "splits": splits}).ref


def append(ledger: Ledger, forest: Forest, domains: Sequence[str]) -> Forest:
    """The next version, with an expert for each of these domains: its text, its blocks, its model, and its scores
    on its own text."""
    made = [_expert(ledger, forest, domain) for domain in domains]
    manifests = {model.identity: model.manifest_hash for _, model in made}
    grown = merge_into(forest, [expert for expert, _ in made], manifests, "added " + ", ".join(domains))
    ledger.log.append(grown)
    return grown


def _expert(ledger: Ledger, forest: Forest, domain: str) -> tuple[Expert, Artifact]:
    workers, tokenizer = StandIns(ledger), Ref("tokenizer", forest.foundation.tokenizer)
    text = commit_text(ledger, domain)
    source = Ref("source", identity_by("source", {"of": domain}, {}))
    ledger.commit(Origin(source, {"of": domain}, {}), {}, {}, {"name": domain}, parts=[text])

    def made(kind: str, inputs: Mapping[str, tuple[Ref, ...]], facts: Mapping[str, object]) -> Artifact:
        origin = Origin(Ref(kind, identity_by(kind, {"of": domain}, inputs)), {"of": domain}, inputs)
        return workers._commit(origin, _weights(origin), facts)

    tokens = made(
        "tokens", {"text": (text,), "tokenizer": (tokenizer,)}, {"blocks": BLOCKS, "tokens": SCORED}
    )
    inputs = {
        "texts": (text,),
        "tokenizer": (tokenizer,),
        "start": (Ref("model", forest.foundation.seed),),
    }
    model = made("model", inputs, {"role": "expert", "origin": "0" * 64})
    made("scores", {"model": (model.ref,), "tokens": (tokens.ref,)}, {})
    return Expert(domain, model.identity, model.blobs[0].sha256, text.identity, ()), model


def _weights(request: StepRequest | Origin) -> dict[str, np.ndarray]:
    return {"model.safetensors": np.frombuffer(bytes.fromhex(request.ref.identity), np.uint8)}


def _scores(number: int) -> dict[str, np.ndarray]:
    """Log-probabilities of every token by one of a few experts, each of which knows some tokens better."""
    surprise = np.random.default_rng(0).gamma(2.0, 2.0, (BLOCKS, TOKENS))
    gain = np.random.default_rng(number + 1).uniform(0.5, 1.5, (BLOCKS, TOKENS))
    logp = -(surprise * gain).astype(np.float32)
    return {"logp.npy": logp, "entropy.npy": -logp}
