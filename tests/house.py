"""A store with an artifact of every kind, made without training: for tests
of what is collected and purged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btm_cluster.algorithm import merge
from btm_cluster.forest import Expert, Forest, Foundation, Parent, take_out
from btm_cluster.ledger import Artifact, Inputs, Ledger, Origin, Ref, identity_by
from btm_cluster.ledger.records import (
    Baseline,
    BranchPoint,
    Held,
    hold,
    quarantine,
    record_baseline,
    settle_branch_point,
)
from btm_cluster.requests import Start
from btm_cluster.storage import Storage


def named(kind: str, recipe: Mapping[str, Any], inputs: Inputs) -> Origin:
    return Origin(Ref(kind, identity_by(kind, recipe, inputs)), recipe, inputs)


class House:
    """A store of a forest that was founded on law and code: an expert of each, and one
    of news that started from their average."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        self.storage, self.ledger, self.folder = storage, Ledger(storage), folder
        self.refs: dict[str, Ref] = {}

    def commit(
        self, name: str, kind: str, inputs: Mapping[str, Any], parts: tuple[str, ...] = (), **facts: Any
    ) -> Artifact:
        """Commits an artifact of one file, whose bytes are its name. Inputs and parts are given by name."""
        return self.ledger.commit(
            self.origin(name, kind, inputs),
            self.files(name),
            facts,
            {"name": name},
            tuple(self.refs[part] for part in parts),
        )

    def origin(self, name: str, kind: str, inputs: Mapping[str, Any]) -> Origin:
        by_role = {role: tuple(self.refs[one] for one in names) for role, names in inputs.items()}
        if kind == "text":
            identity = identity_by("text", {"of": name}, {})
            made = Origin(Ref("text", identity), {"documents": identity}, {})
        else:
            made = named(kind, {"of": name}, by_role)
        self.refs[name] = made.ref
        return made

    def files(self, name: str) -> dict[str, Path]:
        path = self.folder / f"file of {name}"
        if not path.exists():
            path.write_bytes(f"bytes of {name}".encode())
        shared = self.folder / "shared"
        if not shared.exists():
            shared.write_bytes(b"everybody's")
        return {"own": path, "shared": shared}

    def read(self, domain: str) -> None:
        self.commit(f"{domain} text", "text", {})
        self.ledger.commit(
            self.origin(f"{domain} source", "source", {}),
            {},
            {},
            {"name": domain},
            [self.refs[f"{domain} text"]],
        )
        self.commit(f"{domain} tokens", "tokens", {"text": [f"{domain} text"], "tokenizer": ["tokenizer"]})

    def train(
        self, name: str, texts: list[str], role: str, start: tuple[str, ...] = (), parts: tuple[str, ...] = ()
    ) -> None:
        self.commit(name, "model", self.training(texts, start), parts, role=role)

    def training(self, texts: list[str], start: tuple[str, ...] = ()) -> dict[str, Any]:
        return {"texts": [f"{text} text" for text in texts], "tokenizer": ["tokenizer"], "start": start}

    def score(self, model: str, text: str) -> str:
        name = f"{model} on {text}"
        self.commit(name, "scores", {"model": [model], "tokens": [f"{text} tokens"]})
        return name

    def expert(self, domain: str, *parents: str) -> Expert:
        weights = tuple(Parent(self.refs[parent].identity, 1 / len(parents)) for parent in parents)
        return Expert(
            domain, self.refs[f"{domain} expert"].identity, "", self.refs[f"{domain} text"].identity, weights
        )

    def found(self) -> None:
        """The seed, its rivals, and the experts of law and code."""
        for domain in ("law", "code"):
            self.commit(f"{domain} text", "text", {})
        self.commit("tokenizer", "tokenizer", {"texts": ["law text", "code text"]})
        for domain in ("law", "code"):
            self.read(domain)
        self.train("seed", ["law", "code"], "seed")
        self.train("transformer-lm", ["law", "code"], "transformer-lm")
        whole = self.origin("demix", "model", self.training(["law", "code"]))
        for domain in ("law", "code"):
            self.commit(
                f"{domain} part",
                "model",
                {"demix": ["demix"], "texts": [f"{domain} text"]},
                role="demix-part",
            )
        parts = [self.refs["law part"], self.refs["code part"]]
        self.ledger.commit(whole, self.files("demix"), {"role": "demix"}, {}, parts)
        seed, log = self.refs["seed"].identity, self.ledger.log
        domains = tuple((domain, self.refs[f"{domain} text"].identity) for domain in ("code", "law"))
        foundation = Foundation(seed, self.refs["tokenizer"].identity, "config", 32, domains)
        log.append(
            Forest(0, foundation, (), {seed: self.ledger.get(self.refs["seed"]).manifest_hash}, "founded")
        )
        for domain in ("law", "code"):
            self.train(f"{domain} expert", [domain], "expert", ("seed",))
        self.merge(self.expert("law", "seed"), self.expert("code", "seed"))
        for name in ("transformer-lm", "demix"):
            record_baseline(self.ledger, Baseline(name, self.refs[name].identity, 1))

    def merge(self, *experts: Expert) -> Forest:
        newest = self.ledger.log.newest()
        assert newest is not None
        return merge(newest, experts, self.ledger)

    def live(self) -> None:
        """All that is made of them, and news, whose expert started from an
        average that was fitted on its text."""
        self.read("news")
        experts = ["law expert", "code expert"]
        for text in ("law", "code", "news"):
            scores = [self.score(expert, text) for expert in experts]
            self.commit(f"fit for {text}", "fit", {"models": experts, "scores": scores, "for_all": []})
            self.commit(f"mixture for {text}", "mixture", {"fit": [f"fit for {text}"], "scores": scores})
            self.commit(
                f"average for {text}",
                "model",
                {"models": experts, "fit": [f"fit for {text}"]},
                role="average",
            )
        self.commit("soup", "soup", {"models": experts, "tokens": ["news tokens"], "fit": []})
        self.commit("overlap", "overlap", {"text": ["code text"], "tests": ["law text", "news text"]})
        self.score("seed", "law")
        self.score("code part", "code")
        self.train("news expert", ["news"], "expert", ("average for news",))
        self.settle("news", "average for news")
        self.merge(self.expert("news", "law expert", "code expert"))

    def settle(self, domain: str, start: str) -> BranchPoint:
        seed, text = self.refs["seed"].identity, self.refs[f"{domain} text"].identity
        return settle_branch_point(
            self.ledger, BranchPoint(domain, text, seed, 1, "", Start(self.refs[start], False), "")
        )

    def fill(self) -> None:
        """What lies about: an inbox, a refusal, curves, a checkpoint, an open
        branch point that was held back."""
        for key in (
            "inbox/law/a.jsonl",
            "inbox/law/READY",
            "logs/run/law/curves",
            "logs/run/code/curves",
            "logs/run/timeline.json",
            "logs/run/report.html",
            "logs/run of law/timeline.json",  # it mentions law
            "inbox/lawyers/a.txt",
        ):
            self.storage.create(key, b"bytes of " + key.encode())
        quarantine(self.ledger, "law", "7" * 64, "a link")
        self.read("poems")
        point = self.settle("poems", "average for law")
        hold(self.ledger, Held(point.identity, "0" * 64, 1, 0.5, "worse"))
        for domain in ("law", "poems"):
            again = named(
                "model",
                {"again": domain},
                self.origin("", "model", self.training([domain], ("seed",))).inputs,
            )
            self.ledger.save_training(again, 3, self.files(f"checkpoint of {domain}"), {"how": {}})

    def remove(self, domain: str) -> Forest:
        newest = self.ledger.log.newest()
        assert newest is not None
        self.ledger.log.append(take_out(newest, domain, f"removed {domain}"))
        after = self.ledger.log.newest()
        assert after is not None
        return after

    def is_there(self, name: str) -> bool:
        return self.ledger.find(self.refs[name]) is not None
