"""A report of a run that never was: as many experts and texts as a test asks for, with everything measured."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from btm_cluster.curve import Curve, DevelopmentCurve
from btm_cluster.evaluation.rows import (
    CALIBRATED_ENSEMBLE,
    POSTERIOR_AVERAGE,
    SEED,
    TRANSFORMER_LM,
    UNIFORM_AVERAGE,
)
from btm_cluster.evaluation.texts import TextReport
from btm_cluster.evaluation.verdict import SplitResult, verdict
from btm_cluster.forest import Expert, Forest, Foundation, Parent
from btm_cluster.ledger.timelines import Event, Node, Timeline
from btm_cluster.mixing.parts import Parts
from btm_cluster.plan import Plan
from btm_cluster.report.measured import Piece, TextParts, Training, excerpt_length, tops_of
from btm_cluster.report.run_page import Evaluated, RunReport

FACTORS = {
    SEED: 1.05,
    TRANSFORMER_LM: 1.0,
    UNIFORM_AVERAGE: 1.1,
    POSTERIOR_AVERAGE: 0.97,
    CALIBRATED_ENSEMBLE: 0.93,
}
HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>"
"""Text of a document that would take over a page which does not escape it."""


def made_report(
    experts: int = 4,
    targets: int = 2,
    words: Sequence[str] = ("tide ", "and ", HOSTILE),
    excerpt_tokens: int | None = None,
) -> RunReport:
    """The same for the same numbers."""
    rng = random.Random(experts)
    domains = [f"domain-{number:02d}" for number in range(experts)]
    names = [*domains, *(f"target-{number:02d}" for number in range(targets))]
    versions = made_versions(domains)
    length = excerpt_length(len(names)) if excerpt_tokens is None else excerpt_tokens
    cycled = [words[n % len(words)] for n in range(length)]
    parts = [_parts(name, name not in domains, experts, rng, cycled) for name in names]
    results = [_split_result(name, name not in domains, number) for number, name in enumerate(names)]
    costs = dict.fromkeys(FACTORS, 1) | {CALIBRATED_ENSEMBLE: experts}
    texts = [_text(name, name not in domains, rng) for name in names]
    overlaps = {name: {domain: rng.random() ** 4 for domain in domains} for name in names}
    plan = Plan.model_validate(
        {
            "name": "made-up",
            "store": "s3://key:secret@bucket/made-up",
            "domains": [{"name": name, "text": f"{name}.jsonl"} for name in domains],
            "targets": [{"name": name, "text": f"{name}.jsonl"} for name in names[experts:]],
            "tokenizer": {"train": {"vocabulary": 512}},
            "model": {"preset": "gpt3-125m"},
            "training": {
                "updates": 600,
                "blocks_per_domain_update": 8,
                "learning_rate": 1e-3,
                "seed_share": 0.5,
            },
            "cluster": {"price_per_gpu_hour": 2.5, "gpus_per_expert": 0.5, "seed_gpus": 1},
        }
    )
    trainings = [Training("seed", "seed", _curve(0, 300, rng))]
    trainings += [Training(name, "expert", _curve(300, 600, rng)) for name in domains]
    trainings += [Training("Transformer-LM", "transformer-lm", _curve(300, 600, rng))]
    evaluated = Evaluated(versions[-1], verdict(results, costs=costs), texts, parts, overlaps)
    runs = [("20260102-030405-host-7", made_timeline(domains, names))]
    return RunReport(plan, versions, evaluated, "", trainings, runs, "s3://key:secret@bucket/made-up/logs/")


def made_versions(domains: Sequence[str]) -> list[Forest]:
    """Founded, grown, one expert added that branches from two others, and one taken out."""
    foundation = Foundation(
        "seed-model", "tokenizer", "model", 128, tuple((name, f"text of {name}") for name in domains)
    )
    *founding, last = [
        Expert(name, f"model of {name}", "", f"text of {name}", (Parent("seed-model", 1.0),))
        for name in domains
    ]
    parents = (Parent(founding[0].identity, 0.7), Parent(founding[-1].identity, 0.3))
    added = Expert(last.domain, last.identity, "", last.text, parents)
    lost = Expert("lost", "model of lost", "", "text of lost", (Parent("seed-model", 1.0),))
    return [
        Forest(0, foundation, (), {}, "founded by made-up"),
        Forest(1, foundation, (*founding, lost), {}, "added them"),
        Forest(2, foundation, (*founding, added, lost), {}, f"added {last.domain}"),
        Forest(3, foundation, (*founding, added), {}, "removed lost", withdrawn=("lost",)),
    ]


def _event(what: str, label: str, began: float, ended: float, **more: Any) -> Event:
    return Event.model_validate(
        {
            "what": what,
            "kind": "train",
            "label": label,
            "process": label,
            "began": began,
            "ended": ended,
            **more,
        }
    )


def made_timeline(domains: Sequence[str], texts: Sequence[str]) -> Timeline:
    """Two machines of a GPU: the seed, experts in turn on both, of which one fails once and waits, then scores."""
    events = [
        _event("step", texts[0], 1000, 1002, kind="read_text", node="a", process="task", cpus=1),
        _event("start", "seed", 1002, 1005, node="a", gpus=1),
        _event("step", "seed", 1005, 1065, node="a", gpus=1),
        _event("checkpoint", "seed", 1030, 1031, node="a"),
        _event("failure", domains[0], 1065, 1066, node="a", gpus=1, cause="out of memory"),
        _event("wait", domains[-1], 1065, 1066.5),
        _event("wait", texts[0], 999.5, 1000, kind="read_text", process="task"),
        _event("wait", texts[-1], 999.7, 1000.5, kind="read_text", process="task"),
    ]
    for number, name in enumerate(domains):
        began = 1066 + 30 * (number // 2)
        events.append(
            _event("step", name, began, began + 29, node="ab"[number % 2], gpus=1, attempt=2 - (number > 0))
        )
    end = max(event.ended for event in events)
    pairs = [f"{text} under {name}" for text in texts for name in domains]
    events += [
        _event(
            "step", pair, end + n / 100, end + (n + 1) / 100, kind="score", node="b", process="task", gpus=0.5
        )
        for n, pair in enumerate(pairs)
    ]
    events.sort(key=lambda event: event.began)
    return Timeline(
        command="run",
        began=999.5,
        ended=events[-1].ended,
        outcome="done",
        nodes={letter: Node(name=f"host-{letter}", gpus=1, cpus=8) for letter in "ab"},
        events=events,
        gpu_seconds=sum(event.gpus * event.seconds for event in events if event.holds),
        cpu_seconds=2,
    )


def _parts(name: str, is_target: bool, experts: int, rng: random.Random, words: Sequence[str]) -> TextParts:
    own = int(name[-2:]) if not is_target else rng.randrange(experts)
    weights = [rng.random() * 0.1 + (n == own) for n in range(experts)]
    total = sum(weights)
    alone = tuple(40 - 8 * (n == own) + rng.random() for n in range(experts))
    parts = Parts(
        perplexity=30.0,
        alone=alone,
        weights=tuple(weight / total for weight in weights),
        without=tuple(30.0 + 3 * (n == own) for n in range(experts)),
        of_top=tuple(31 - 0.1 * n for n, _ in enumerate(tops_of(experts))),
        tokens=10_000,
    )
    pieces = tuple(
        Piece(word, own if rng.random() < 0.7 else rng.randrange(experts), 0.3 + 0.7 * rng.random())
        for word in words
    )
    return TextParts(name, is_target, 45.0, parts, True, pieces)


def _split_result(name: str, is_target: bool, number: int) -> SplitResult:
    generator = torch.Generator().manual_seed(number)
    tokens_D = torch.randint(10, 100, (50,), generator=generator).double()
    logp_D = -tokens_D * (2 + 3 * torch.rand(50, generator=generator, dtype=torch.float64))
    sums_UD, sizes_UD = torch.stack([logp_D, logp_D]), torch.stack([tokens_D, 4 * tokens_D])
    return SplitResult(
        name, is_target, "test", {n: factor * sums_UD for n, factor in FACTORS.items()}, sizes_UD
    )


def _text(name: str, is_target: bool, rng: random.Random) -> TextReport:
    splits = {"development": 10, "test": 20} | ({} if is_target else {"train": 500})
    tokens = {split: count * rng.randrange(400, 900) for split, count in splits.items()}
    return TextReport(name, is_target, splits, tokens, tokens, 3, {"too long": 1}, 9, 0, 100, 2)


def _curve(first: int, last: int, rng: random.Random) -> Curve:
    updates = list(range(first + 1, last + 1))
    return Curve(
        updates=updates,
        loss=[3 + 4 / (1 + update / 50) + 0.1 * rng.random() for update in updates],
        learning_rate=[1e-3 * (1 - update / 700) for update in updates],
        gradient_norm=[0.5 + 0.2 * rng.random() for _ in updates],
        tokens=[1024 * update for update in updates],
        development=DevelopmentCurve(updates=[last - 100, last], loss=[3.4, 3.3]),
    )
