"""A whole study of tiny models in this process: what it measures, that
nothing is made twice, and its page."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.port import Outcome
from btm_cluster.driver.prepared_plan import PreparedText, text_of
from btm_cluster.driver.recipes import expert_request, seed_request, seed_start, transformer_lm_request
from btm_cluster.equations import learned_gate
from btm_cluster.equations.gates import fit_discounts
from btm_cluster.equations.learned_gate import LearnedGate, TextScores, fit_gate_for_all, tune_gate
from btm_cluster.equations.mixture import log_mixture
from btm_cluster.errors import StepError, TrainingError, UserError
from btm_cluster.evaluation.fitting import fit_for
from btm_cluster.evaluation.rows import (
    BEST_MILESTONE,
    CALIBRATED_DEMIX,
    CALIBRATED_ENSEMBLE,
    GATED_ENSEMBLE,
    PAPER_DEMIX,
    PAPER_ENSEMBLE,
    SEED,
    SEEDED_ENSEMBLE,
    SEEDED_GATE,
    TRANSFORMER_LM,
)
from btm_cluster.evaluation.scoring import stack_of
from btm_cluster.evaluation.systems import CALIBRATED, GATE, MANY_METHODS, PAPERS, PRIOR_ALONE, Ensemble
from btm_cluster.language_model import soup
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.mixing.fit_file import FIT_FILE, open_fits, write_fits
from btm_cluster.mixing.fitting import fit_mixing, shared_mixing
from btm_cluster.operations.report import write_report
from btm_cluster.operations.run import run_plan
from btm_cluster.operations.study import open_place, results_of, write_studies
from btm_cluster.plan import MergingPlan, Plan, StudyPlan
from btm_cluster.report.figures import of_every_share
from btm_cluster.report.results import check_nothing_is_lost, read_results, write_results
from btm_cluster.report.study_page import write_page
from btm_cluster.requests import MixingMethod, StepRequest, TrainRequest
from btm_cluster.requests.progress import Control
from btm_cluster.steps.fit import fit_methods, fit_together, for_all_of
from btm_cluster.steps.stored import documents_of
from btm_cluster.steps.train import train
from btm_cluster.study.controls import random_part_requests, transformer_lm_at_experts_rate_request
from btm_cluster.study.models import train_repeat
from btm_cluster.study.repeat import train as train_requests
from btm_cluster.study.repeats import repeats_of
from btm_cluster.study.run import Study, run_study
from tests.conftest import DOMAINS, in_process, plan_fields
from tests.integration.test_milestones import overtrained_fields
from tests.made import origin


@dataclass(frozen=True)
class Studied:
    """A finished study, to be read only."""

    plan: Plan
    driver: Driver
    study: Study

    def entry(self, **wanted: Any) -> dict[str, Any]:
        (found,) = [e for e in self.study.entries if all(e[name] == value for name, value in wanted.items())]
        return dict(found)


def study_plan(texts: dict[str, Path], store: Path, **study: Any) -> Plan:
    fields = plan_fields(texts, store)
    fields["domains"] = fields["domains"][:2]
    fields["training"] |= {"updates": 12, "seed_share": 0.5, "learning_rate": 1e-2}
    return Plan.model_validate(fields | {"study": study})


def studied_by(plan: Plan, driver: Driver) -> Study:
    """What is known in the end."""
    return list(run_study(plan, driver))[-1]


@contextmanager
def short_searches() -> Iterator[None]:
    """Searches of a few steps: what they find is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (soup, learned_gate):
            patch.setattr(module, "LOOKS", 1)
            patch.setattr(module, "STEPS_BETWEEN_LOOKS", 1)
        yield


@pytest.fixture(scope="module", autouse=True)
def _short_searches() -> Iterator[None]:
    with short_searches():
        yield


@pytest.fixture(scope="module")
def studied(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Studied:
    plan = study_plan(texts, tmp_path_factory.mktemp("study") / "store", seed_shares=[0, 0.25])
    driver = in_process(plan)
    return Studied(plan, driver, studied_by(plan, driver))


def test_every_system_is_measured_on_all_texts(studied: Studied) -> None:
    systems = {entry["system"] for entry in studied.study.entries}
    assert systems == {
        "transformer-lm",
        "seed",
        "forest",
        "forest with its seed",
        "forest stopped early",
        "own expert of forest stopped early",
        "demix",
        "demix-from-seed",
        "random-split",
        "best single expert",
        "own expert",
        "average",
        "average of random-split",
        "transformer-lm on development text",
        "expert on development text",
        "forest with an expert on development text",
    }
    for entry in studied.study.entries:
        assert entry["train"] > 1, entry
        assert entry["system"].startswith("own expert") or entry["eval"] > 1, entry
    shares = {entry["seed_share"] for entry in studied.study.entries if entry["system"] == "forest"}
    assert shares == {0.5, 0.25, 0.0}
    assert studied.entry(system="transformer-lm")["difference"] is None
    for system in ("forest", "forest with its seed"):
        gate = {"posterior": "gate", "prior": "fitted", "development_blocks": None}
        assert studied.entry(system=system, seed_share=0.5, **gate)["all"] > 1
    assert studied.entry(system="demix", posterior="full")["non_embedding_parameters"] > 12_768


def test_experts_that_are_best_at_their_end_are_not_stopped(studied: Studied) -> None:
    calibrated = {"posterior": "calibrated", "prior": "fitted", "seed_share": 0.5}
    stopped = studied.entry(system="forest stopped early", **calibrated)
    whole = studied.entry(system="forest", development_blocks=None, top_k=None, **calibrated)
    assert stopped["stopped_at"] == {"kitchen": 12, "harbour": 12}
    assert stopped["per_domain"] == whole["per_domain"]


def test_the_mean_over_all_texts_is_that_of_the_single_ones(studied: Studied) -> None:
    for entry in studied.study.entries:
        if entry["all"] is not None:
            values = entry["per_domain"].values()
            assert entry["all"] == pytest.approx(sum(values) / len(values), rel=1e-4)


SHOWN_AS = {
    "seed": ("seed", None, None),
    "Transformer-LM": ("transformer-lm", None, None),
    BEST_MILESTONE: ("transformer-lm at its best milestone", None, None),
    "best single expert": ("best single expert", None, None),
    "the domain's own expert": ("own expert", None, None),
    "average, uniform": ("average", None, "uniform"),
    "average, argmax": ("average", None, "argmax"),
    "average, posterior": ("average", None, "fitted"),
    PAPER_ENSEMBLE: ("forest", "full", "ema"),
    CALIBRATED_ENSEMBLE: ("forest", "calibrated", "fitted"),
    GATED_ENSEMBLE: ("forest", "gate", "fitted"),
    SEEDED_ENSEMBLE: ("forest with its seed", "calibrated", "fitted"),
    SEEDED_GATE: ("forest with its seed", "gate", "fitted"),
    PAPER_DEMIX: ("demix", "full", "ema"),
    CALIBRATED_DEMIX: ("demix", "calibrated", "fitted"),
}
"""What a run calls a row, and what a study calls it: system, posterior, prior."""


@pytest.mark.parametrize(
    "merging", [{}, {"posterior": "gate"}, {"posterior": "gate", "with_seed": True}], ids=str
)
def test_a_run_and_a_study_of_the_same_plan_give_the_same_rows_to_the_last_digit(
    studied: Studied, merging: dict[str, Any], tmp_path: Path
) -> None:
    fields = studied.plan.model_dump(mode="json", exclude={"study"}, exclude_defaults=True)
    plan = Plan.model_validate(
        fields
        | {"store": str(tmp_path / "store"), "baselines": ["transformer-lm", "demix"], "merging": merging}
    )
    found = run_plan(plan, in_process(plan)).verdict
    names = [row.system for row in found.rows["test"]]
    assert {*SHOWN_AS, "ensemble, top-1"} >= {*names}
    assert len(names) >= 12
    for row in found.rows["test"]:
        if row.system not in SHOWN_AS:
            continue
        system, posterior, prior = SHOWN_AS[row.system]
        share = None if system.startswith(("transformer-lm", "demix")) else 0.5
        wanted = {
            "seed_share": share,
            "posterior": posterior,
            "prior": prior,
            "top_k": None,
            "development_blocks": None,
        }
        entry = studied.entry(system=system, **wanted)
        rounded = {text: round(cell.perplexity, 4) for text, cell in row.cells.items()}
        assert {text: value for text, value in entry["per_domain"].items() if value is not None} == rounded, (
            row.system
        )


def test_a_study_compares_with_the_transformer_lm_at_its_best_milestone_as_a_run_does(
    texts: dict[str, Path], tmp_path: Path
) -> None:
    plan = Plan.model_validate(
        overtrained_fields(texts, tmp_path, 0.17)
        | {"study": {"systems": ["early-stopping"], "seed_shares": [0.5]}}
    )
    study = studied_by(plan, driver := in_process(plan))
    entries = {entry["system"]: entry for entry in study.entries if entry["seed_share"] in (None, 0.17)}
    finished, best = entries["transformer-lm"], entries["transformer-lm at its best milestone"]
    assert (finished["milestones"]["best"], finished["milestones"]["last"]) == (11, 24)
    assert best["difference"] is None
    assert finished["difference"] == pytest.approx(finished["all"] / best["all"] - 1, rel=1e-3)
    # Its experts get worse just so, and are stopped just so. Both were chosen among all of their training.
    for chosen, whole in (
        ("transformer-lm at its best milestone", "transformer-lm"),
        ("forest stopped early", "forest"),
        ("own expert of forest stopped early", "own expert"),
    ):
        assert entries[chosen]["cost"]["training_tokens"] == entries[whole]["cost"]["training_tokens"]
    assert entries["forest stopped early"]["stopped_at"] == {"kitchen": 11, "harbour": 11}
    for domain, perplexity in entries["own expert"]["per_domain"].items():
        stopped = entries["own expert of forest stopped early"]["per_domain"][domain]
        assert (stopped is None and perplexity is None) or stopped < perplexity

    def trained() -> set[str]:
        models = driver.ledger.list_artifacts("model")
        return {model.identity for model in models if model.facts["role"] != "average"}

    by_the_study = trained()
    found = run_plan(plan, driver).verdict
    assert trained() == by_the_study
    rows = {row.system: row.cells for row in found.rows["test"]}
    for entry, name in ((best, BEST_MILESTONE), (finished, TRANSFORMER_LM), (entries["seed"], SEED)):
        assert entry["per_domain"] == {text: round(cell.perplexity, 4) for text, cell in rows[name].items()}
    assert found.milestones is not None
    development = {str(update): round(value, 4) for update, value in found.milestones.perplexities.items()}
    assert finished["milestones"]["development"] == development
    write_page(results := results_of(plan, study), tmp_path / "one")
    page = (tmp_path / "one" / "README.md").read_text()
    assert "Differences are to the Transformer-LM at update 11 of 24, its best milestone" in page
    assert page.count("| Transformer-LM at its best milestone |") == 5, (
        "tables 1, 2, 8, that of the posteriors and that of costs"
    )
    assert f"| {finished['all']:.1f} | {finished['bits_per_byte']['all']:.4f} | 1x |" in page
    assert "A lower learning rate may do better" not in page
    rise = {"size": study.entries[0]["size"], "training": "an-expert", "lowest": 3.0, "at": 7, "last": 4.0}
    write_page(replace(results, rises=(rise,)), tmp_path / "risen")
    assert (
        "A lower learning rate may do better: an-expert: training loss rose from 3.00 around update 7 to 4.00 at the "
        "end." in (tmp_path / "risen" / "README.md").read_text()
    )
    # Of an earlier version there are none.
    newer = ("bits_per_byte", "inference_cost", "cost", "at_equal_cost")
    bare = [{k: v for k, v in e.items() if k not in newer} for e in study.entries]
    write_page(replace(results, entries=tuple(bare)), tmp_path / "bare")
    page = (tmp_path / "bare" / "README.md").read_text()
    assert "bits per byte" not in page
    assert "GPU-seconds" not in page
    # With another random seed the finished one is the best: it is the baseline there, and differs by nothing
    # from itself.
    others = [e | {"random_seed": 1} for e in study.entries if e is not best and e is not finished]
    alone = finished | {
        "random_seed": 1,
        "difference": None,
        "milestones": finished["milestones"] | {"best": 24},
    }
    older = {name: value for name, value in alone.items() if name != "milestones"} | {"random_seed": 2}
    write_page(replace(results, entries=(*study.entries, *others, alone, older)), tmp_path / "several")
    page = (tmp_path / "several" / "README.md").read_text()
    assert "with random seed 1 to the finished Transformer-LM, which is its best milestone" in page
    assert "with random seed 2 to the finished Transformer-LM; its milestones were not compared" in page
    assert "| Transformer-LM at its best milestone (random seed 0) |" in page
    assert f"{100 * finished['difference'] / 3:+.1f} ± " in page


def test_mixtures_are_those_of_fits_on_development_text_made_by_hand(studied: Studied) -> None:
    prepared = repeats_of(studied.plan, studied.driver)[0].prepared
    merging, ledger = prepared.plan.merging, studied.driver.ledger
    target = prepared.texts[-1]
    seed = seed_request(prepared).ref
    experts = [
        expert_request(prepared, domain, seed_start(prepared, seed)).ref for domain in prepared.domains
    ]

    def sample(text: PreparedText) -> TextScores:
        return stack_of(ledger, experts, text, "development").sample(merging.development_blocks)

    test = stack_of(ledger, experts, target, "test")
    own = sample(target)
    calibrated = fit_mixing("calibrated", "fitted", own.logp_EBT, own.mask_BT, merging)
    for_all = fit_gate_for_all([sample(domain) for domain in prepared.domains])
    plain = fit_mixing("none", "fitted", own.logp_EBT, own.mask_BT, merging)
    best = int(calibrated.log_prior_E.argmax())
    samples = [sample(domain) for domain in prepared.domains]
    shared = shared_mixing([(one.logp_EBT, one.mask_BT) for one in samples], merging)
    together = (
        torch.cat([one.logp_EBT for one in samples], dim=1),
        torch.cat([one.mask_BT for one in samples]),
    )
    for_all_prior = "uniform, one setting for all"
    wanted = {
        ("calibrated", for_all_prior, None): test.mixture_sums(shared.log_prior_E, shared.posterior),
        ("discounts", for_all_prior, None): test.gated_sums(fit_discounts(*together, fits_prior=False)),
        ("none", "fitted", None): test.mixture_sums(plain.log_prior_E, plain.posterior),
        ("calibrated", "fitted", None): test.mixture_sums(calibrated.log_prior_E, calibrated.posterior),
        ("calibrated", "fitted", 1): test.sums()[best],
        ("gate", for_all_prior, None): test.gated_sums(for_all),
        ("gate", "fitted", None): test.gated_sums(tune_gate(own, for_all)),
    }
    sizes_UD = test.sizes()
    for (posterior, prior, top_k), sums_UD in wanted.items():
        entry = studied.entry(
            system="forest",
            seed_share=0.5,
            posterior=posterior,
            prior=prior,
            top_k=top_k,
            development_blocks=None,
        )
        perplexity, nats_per_byte = -sums_UD.sum(1) / sizes_UD.sum(1)
        assert entry["per_domain"][target.name] == pytest.approx(math.exp(perplexity), rel=1e-5), (
            posterior,
            prior,
        )
        bits = entry["bits_per_byte"]["per_domain"][target.name]
        assert bits == pytest.approx(float(nats_per_byte) / math.log(2), rel=1e-4), (posterior, prior)
        assert entry["inference_cost"] == (top_k or len(experts))


@pytest.mark.parametrize("method", [*MANY_METHODS, MixingMethod("calibrated", "mean", top_k=2)], ids=str)
def test_a_fit_is_read_back_as_it_was(method: MixingMethod, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    logp_EBT = -torch.rand(3, 4, 32, generator=generator, dtype=torch.float64)
    sample = TextScores(logp_EBT, -logp_EBT.flip(0), torch.ones(4, 32, dtype=torch.bool))
    merging = MergingPlan(window_tokens=7, discount=0.9)
    for_all = {for_all_of(p): fit_together(p, [sample], merging) for p in ("calibrated", "discounts", "gate")}
    (fitted,) = fit_methods([method], sample, merging, for_all).values()
    if isinstance(fitted, LearnedGate):
        moved = {name: torch.rand_like(tensor) for name, tensor in vars(fitted).items() if tensor is not None}
        fitted = replace(fitted, **moved)
    ledger = Ledger.open(str(tmp_path / "store"))
    recipe = {"methods": [asdict(method)], "window_tokens": 7, "discount": 0.9}
    write_fits([fitted], tmp_path / "fit")
    artifact = ledger.commit(origin("fit", recipe), {FIT_FILE: tmp_path / "fit"}, {})
    found = open_fits(ledger, artifact)
    assert list(found) == [method]
    assert type(found[method]) is type(fitted)
    expected = fitted.log_weights(logp_EBT, sample.entropy_EBT)
    assert torch.equal(found[method].log_weights(logp_EBT, sample.entropy_EBT), expected)


def test_a_text_without_development_text_gets_what_was_fitted_for_all_and_uniform_priors(
    studied: Studied,
) -> None:
    prepared = repeats_of(studied.plan, studied.driver)[0].prepared
    seed = seed_request(prepared).ref
    models = tuple(
        (d.name, expert_request(prepared, d, seed_start(prepared, seed)).ref) for d in prepared.domains
    )
    methods = (PAPERS, CALIBRATED, GATE, PRIOR_ALONE)
    ensemble, target = Ensemble("forest", models, methods), prepared.texts[-1]
    bare = replace(target, tokens={**target.tokens, "development": ()})
    unknown, without = (fit_for(prepared, ensemble, text, studied.driver) for text in (None, bare))
    fitted = fit_for(prepared, ensemble, target, studied.driver)
    for method in methods:
        sample = stack_of(studied.driver.ledger, ensemble.refs, target, "test").sample(10)
        weights = [
            f[method].log_weights(sample.logp_EBT, sample.entropy_EBT) for f in (unknown, without, fitted)
        ]
        assert torch.equal(weights[0], weights[1])
        assert not torch.allclose(weights[0], weights[2]), method
        assert weights[0][:, 0, 0].exp().tolist() == pytest.approx(
            [0.5, 0.5], abs=0.2 if method == GATE else 1e-9
        )


def test_the_command_writes_after_each_random_seed_but_replaces_results_by_finished_ones_alone(
    studied: Studied, tmp_path: Path
) -> None:
    plan = studied.plan.model_copy(update={"study": StudyPlan(systems=(), random_seeds=(0, 1))})
    for times in (2, 1):
        written = list(write_studies(plan, open_place(str(tmp_path)), in_process(plan)))
        assert [one.page for one in written] == [str(tmp_path / "README.md")] * times
    told = json.loads(json.dumps(written[-1].to_json()))
    assert told["entries"] == json.loads((tmp_path / "summary.json").read_text())
    assert {
        name: told[name] for name in ("texts", "speeds", "trials", "runs", "growth", "rises")
    } == json.loads((tmp_path / "study.json").read_text())
    (run,) = told["runs"]
    assert run["repeats_left"] == 0
    assert {entry["random_seed"] for entry in json.loads((tmp_path / "summary.json").read_text())} == {0, 1}
    assert "Not finished" not in (tmp_path / "README.md").read_text()
    first = next(iter(run_study(plan, in_process(plan))))
    write_page(results_of(plan, first), tmp_path)
    assert "Not finished: written with 1 of" in (tmp_path / "README.md").read_text()


def test_what_is_known_is_told_after_each_random_seed(studied: Studied) -> None:
    plan = studied.plan.model_copy(update={"study": StudyPlan(systems=(), random_seeds=(0, 1))})
    first, both = run_study(plan, in_process(plan))
    assert {entry["random_seed"] for entry in first.entries} == {0}
    assert {entry["random_seed"] for entry in both.entries} == {0, 1}
    assert both.entries[: len(first.entries)] == first.entries


def test_a_study_that_is_run_again_makes_nothing_and_says_the_same(studied: Studied) -> None:
    again = in_process(studied.plan)
    assert studied_by(studied.plan, again).entries == studied.study.entries
    assert not again.made


def test_all_seeds_lie_on_the_transformer_lms_way(studied: Studied) -> None:
    prepared = repeats_of(studied.plan, studied.driver)[0].prepared
    whole = studied.driver.ledger.get(transformer_lm_request(prepared, seed_request(prepared).ref).ref)
    models = [
        m for m in studied.driver.ledger.list_artifacts("model") if m.facts["origin"] == whole.facts["origin"]
    ]
    assert sorted(model.recipe["last_update"] for model in models if model.facts["role"] == "seed") == [3, 6]


def test_random_splits_deal_every_document_once(studied: Studied) -> None:
    ledger = studied.driver.ledger
    prepared = repeats_of(studied.plan, studied.driver)[0].prepared
    dealt = [text_of(ledger.get(request.ref)) for request in random_part_requests(prepared)]
    parts = [list(documents_of(ledger, text, "train")) for text in dealt]
    whole = [
        document
        for text in (d.identity for d in prepared.domains)
        for document in documents_of(ledger, text, "train")
    ]
    assert sorted(document for part in parts for document in part) == sorted(whole)
    assert all(0.25 * len(whole) < len(part) < 0.75 * len(whole) for part in parts)
    for part, domain in zip(parts, DOMAINS, strict=False):
        own = set(
            documents_of(ledger, next(d.identity for d in prepared.domains if d.name == domain), "train")
        )
        assert 0.2 < sum(document in own for document in part) / len(part) < 0.8, "a part is of both domains"


def test_results_are_read_back_and_those_of_several_seeds_make_one_page(
    studied: Studied, tmp_path: Path
) -> None:
    trial = {
        "size": "model",
        "learning_rate": 0.01,
        "updates": 12,
        "blocks_per_domain_update": 4,
        "development": 9.87,
    }
    lower = {**trial, "learning_rate": 0.001, "development": 12.3, "chosen": False}
    diverged = {**lower, "size": "large", "development": None}
    larger = {**trial, "size": "larger", "blocks_per_domain_update": 8, "chosen": True}
    smaller = {**larger, "blocks_per_domain_update": 4, "chosen": False}
    stopped = {**lower, "learning_rate": 0.0001, "development": 45.6, "share": 0.125}
    scale = {"size": "model", "learning_rate_scale": 2.0, "development": 8.76, "chosen": True}
    slower = {**scale, "learning_rate_scale": 1.0, "development": 8.9, "chosen": False}
    calibrated = {"posterior": "calibrated", "prior": "fitted", "development_blocks": None, "top_k": None}
    step = {"step": 1, "change": "added harbour", "domains": ["kitchen", "harbour"], "known": 4.2}
    step |= {"unknown": None, "tokens": 1024, "tokens_so_far": 9216, "gpu_seconds": 1.5}
    step |= {"gpu_seconds_so_far": 4.5}
    grown = studied.entry(system="forest", seed_share=0.5, **calibrated) | step | {"bits_per_byte": 2.5}
    trials = ({**trial, "chosen": True}, lower, diverged, stopped, larger, smaller, slower, scale)
    study = replace(studied.study, trials=trials, growth=(grown,))
    results = results_of(studied.plan, study)
    write_results(results, tmp_path / "one")
    other = [
        entry | {"random_seed": 1, "all": entry["all"] and 2 * entry["all"]} for entry in results.entries
    ]
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "summary.json").write_text(json.dumps(other))
    (tmp_path / "two" / "study.json").write_text((tmp_path / "one" / "study.json").read_text())
    assert list(read_results([tmp_path / "one"]).entries) == json.loads(json.dumps(list(results.entries)))
    folders = [tmp_path / "one", tmp_path / "two"]
    write_report(folders, tmp_path / "page")
    together = read_results(folders)
    assert len(together.entries) == len(other) + len(results.entries)
    assert read_results([tmp_path / "page"]) == together
    with pytest.raises(UserError, match="would be replaced by those of all"):
        write_report(folders, tmp_path / "two")
    with pytest.raises(UserError, match=rf"would be lost\n.*{len(other)} entries"):
        write_report(folders[:1], tmp_path / "two")
    assert together.growth == (json.loads(json.dumps(grown)),), "the same row in both"
    assert list(together.trials) == list(trials)
    write_results(replace(results, growth=()), tmp_path / "without")
    with pytest.raises(UserError, match=r"would be lost\n.*1 entries and rows of growth"):
        check_nothing_is_lost(tmp_path / "one", read_results([tmp_path / "without"]))
    write_report([*folders, *folders], tmp_path / "page")
    assert read_results([tmp_path / "page"]) == together, "a folder that is named twice counts once"
    page = (tmp_path / "page" / "README.md").read_text()
    all_texts = studied.entry(system="transformer-lm")["all"]
    assert f"{1.5 * all_texts:.1f} ± {all_texts / 2**0.5:.1f}" in page
    for heading in (
        "Table 1",
        "Table 2",
        "Table 7",
        "Table 8",
        "What a posterior is worth",
        "Figure 1",
        "Top-k",
        "Speed",
        "| 2 domains, added harbour | forest, calibrated | 4.2 | – |",
        "| 1,024 | 9,216 | 1.5 |",
        "| model | 0.01 | 12 | 4 | **9.87** |",
        "| large | 0.001 | 12 | 4 | diverged |",
        "| model | 0.0001 | 12 | 4 | 45.60, stopped at 0.125 of its updates |",
        "| model | 2 | **8.76** |",
        "The highest learning rate tried for model is the best",
        "The highest scale tried for model is the best",
        "The highest number of blocks of a domain per update tried for larger is the best",
        "| forest, experts stopped early, calibrated |",
        "with random seed 0, kitchen at 12, harbour at 12",
    ):
        assert heading in page
    for figure in ("seed-share-model", "top-k-model"):
        drawing = ElementTree.fromstring((tmp_path / "page" / f"{figure}.svg").read_text())
        assert {"Transformer-LM", "ensemble, calibrated"} & {one.text for one in drawing.findall("{*}text")}
    html = (tmp_path / "page" / "report.html").read_text()
    assert f"{1.5 * all_texts:.1f} ± {all_texts / 2**0.5:.1f}" in html
    assert html.count("<svg ") == page.count(".svg)")


def test_a_study_in_the_store_of_a_forest_that_was_founded_on_other_domains_is_refused(
    founded_plan: Plan, texts: dict[str, Path]
) -> None:
    # The Transformer-LM would learn from the two founding domains, and the forest from all three.
    domains = [{"name": name, "text": str(texts[name])} for name in DOMAINS]
    plan = Plan.model_validate(founded_plan.model_dump(mode="json") | {"domains": domains, "study": {}})
    with pytest.raises(UserError, match="compares what learned from the same domains"):
        repeats_of(plan, driver := in_process(plan))
    assert not driver.made


def test_a_curve_over_seed_shares_is_of_random_seeds_that_all_of_them_have(studied: Studied) -> None:
    # One share alone had three random seeds: its point was their mean, the others' of one, and the line the
    # mean of three.
    entries = results_of(studied.plan, studied.study).entries
    main = studied.plan.training.seed_share
    again = [
        e | {"random_seed": 1, "all": e["all"] and 2 * e["all"]}
        for e in entries
        if e["seed_share"] in (None, main)
    ]
    shares = sorted({entry["seed_share"] for entry in entries if entry["seed_share"] is not None})
    swept, seeds = of_every_share([*entries, *again], shares)
    assert (swept, seeds) == (list(entries), [0])
    assert of_every_share(again, [main])[1] == [1]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"random_seed": 1, "tokens": 5}, "tokens: "),
        ({"random_seed": 1, "experts": 5}, "experts: "),
        ({"random_seed": 1, "per_domain": {"elsewhere": 2.0}}, "texts: "),
        ({"all": 5.0}, "the Transformer-LM's perplexity with random seed 0: "),
    ],
)
def test_studies_that_cannot_stand_in_one_table_are_not_joined(
    change: dict[str, Any], found: str, studied: Studied, tmp_path: Path
) -> None:
    results = results_of(studied.plan, studied.study)
    write_results(results, tmp_path / "one")
    write_results(
        replace(results, entries=tuple(entry | change for entry in results.entries)), tmp_path / "two"
    )
    with pytest.raises(UserError, match="cannot stand in one table") as refused:
        read_results([tmp_path / "one", tmp_path / "two"])
    assert found in refused.value.found
    apart = tuple(entry | change | {"size": "another"} for entry in results.entries)
    write_results(replace(results, entries=apart), tmp_path / "two")
    assert len(read_results([tmp_path / "one", tmp_path / "two"]).entries) == 2 * len(results.entries)


@pytest.mark.parametrize("summary", [None, "{", "7", "[7]", "{}", '[{"random_seed": 0}]'])
def test_results_that_are_not_there_or_are_others_are_one_clear_error(
    summary: str | None, tmp_path: Path
) -> None:
    if summary is not None:
        (tmp_path / "summary.json").write_text(summary)
        (tmp_path / "study.json").write_text("{}")
    with pytest.raises(UserError, match=r"summary\.json"):
        read_results([tmp_path])


@pytest.mark.parametrize(
    ("study", "words"),
    [
        ({"seed_shares": [0.99]}, "leaves the seed or the experts"),
        ({"seed_shares": [0.01]}, "leaves the seed or the experts"),
    ],
)
def test_shares_that_leave_no_update_are_refused_before_a_text_is_read(
    texts: dict[str, Path], tmp_path: Path, study: dict[str, Any], words: str
) -> None:
    plan = study_plan(texts, tmp_path / "store", **study)
    with pytest.raises(UserError, match=words):
        studied_by(plan, in_process(plan))
    assert not (tmp_path / "store").exists()


def test_all_systems_are_trained_by_the_recipe_that_the_transformer_lm_does_best_with(
    texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    better = {"learning_rate": 1e-2, "updates": 6, "blocks_per_domain_update": 8}
    trials = [{"learning_rate": 1e-4}, better, {"learning_rate": 1e30}]
    plan = study_plan(texts, tmp_path / "store", trials=trials, systems=[], random_seeds=[3, 4])
    driver = in_process(plan)
    first, second = repeats_of(plan, driver)
    assert [trial["chosen"] for trial in first.trials] == [False, True, False]
    assert first.trials[2]["development"] is None, "it diverged, and is out of the running"
    assert first.trials[1]["development"] < first.trials[0]["development"]
    assert second.trials == ()
    for repeat, random_seed in ((first, 3), (second, 4)):
        training = repeat.prepared.plan.training
        assert (training.learning_rate, training.updates, training.random_seed) == (1e-2, 6, random_seed)
    whole = driver.ledger.get(first.transformer_lm().ref)
    seed = driver.ledger.get(first.seeds[0.5].ref)
    assert seed.facts["origin"] == whole.facts["origin"], "the trial is the study's Transformer-LM"
    made, asked, ask = driver.made.copy(), list[StepRequest](), driver.workers.run

    def asking(requests: Sequence[StepRequest]) -> Iterator[tuple[StepRequest, Outcome]]:
        asked.extend(requests)
        return ask(requests)

    monkeypatch.setattr(driver.workers, "run", asking)
    assert repeats_of(plan, driver)[0].trials == first.trials
    rates = [request.training.learning_rate for request in asked if isinstance(request, TrainRequest)]
    assert rates == [1e30], "only what diverged is tried again"
    assert driver.made == made, "and it is not counted as made"


def test_the_transformer_lm_at_the_experts_rate_is_the_transformer_lm_but_for_the_rate(
    texts: dict[str, Path], tmp_path: Path
) -> None:
    plan = study_plan(texts, tmp_path / "store")
    driver = in_process(plan)
    repeat = repeats_of(plan, driver)[0]
    seed = repeat.seeds[0.5].ref
    (_, whole), *_ = train_requests(repeat, [repeat.transformer_lm()], driver)
    asked = [transformer_lm_at_experts_rate_request(repeat.scaled(scale).prepared, seed) for scale in (1, 2)]
    (_, same), (_, faster) = train_requests(repeat, asked, driver)
    weights = [model.blob("model.safetensors").sha256 for model in (whole, same, faster)]
    assert weights[0] == weights[1] != weights[2]


def test_a_study_of_experts_at_another_rate_has_that_control_unless_it_diverges(
    texts: dict[str, Path], tmp_path: Path
) -> None:
    fields = plan_fields(texts, tmp_path / "store")
    fields["domains"] = fields["domains"][:2]

    def at(scale: float) -> tuple[Plan, Driver]:
        study = {"systems": ["demix-from-seed", "early-stopping"], "random_seeds": [3]}
        plan = Plan.model_validate(fields | {"branching": {"learning_rate_scale": scale}, "study": study})
        return plan, in_process(plan)

    study = studied_by(*at(2.0))
    found = {entry["system"]: entry["all"] for entry in study.entries}
    assert found["transformer-lm at the experts' rate"] not in (found["transformer-lm"], found["seed"])
    assert found["demix-from-seed at the experts' rate"] not in (found["demix-from-seed"], found["seed"])
    others = [entry | {"random_seed": 4} for entry in study.entries if "experts' rate" not in entry["system"]]
    results = results_of(at(2.0)[0], replace(study, entries=(*study.entries, *others)))
    write_page(results, tmp_path / "page")
    page = (tmp_path / "page" / "README.md").read_text()
    assert "| Transformer-LM, from the seed on at the experts' rate (random seed 3) |" in page
    assert "| DEMix from the seed at the experts' rate, calibrated (random seed 3) |" in page
    assert "| Transformer-LM |" in page

    plan, driver = at(1e30)
    repeat = repeats_of(plan, driver)[0]
    with pytest.raises(StepError, match="not finite"):
        train_repeat(repeat, driver)
    train_requests(repeat, [repeat.transformer_lm()], driver)
    control = transformer_lm_at_experts_rate_request(repeat.prepared, repeat.seeds[0.5].ref)
    assert train_requests(repeat, [], driver, [control]) == []


def test_all_forests_take_the_experts_learning_rate_that_their_ensemble_does_best_with(
    texts: dict[str, Path], tmp_path: Path
) -> None:
    scales = [0.01, 1.5, 1e30]
    plan = study_plan(
        texts, tmp_path / "store", learning_rate_scales=scales, systems=["random-split"], random_seeds=[3, 4]
    )
    driver = in_process(plan)
    first, second = repeats_of(plan, driver)
    assert [(trial["learning_rate_scale"], trial["chosen"]) for trial in first.trials] == [
        (0.01, False),
        (1.5, True),
        (1e30, False),
    ]
    assert first.trials[2]["development"] is None, "it diverged, and is out of the running"
    assert second.trials == ()
    for repeat in (first, second):
        _, trained = train_repeat(repeat, driver)
        rates = {(request.role, request.training.learning_rate) for request, _ in trained}
        rivals = {("transformer-lm", 1e-2), ("transformer-lm", 1.5e-2)}
        assert rates == {("expert", 1.5e-2), *rivals}, (
            "random splits too; the Transformer-LM as it was, and a control"
        )
    # By hand, on the first: each half of a domain's blocks under what was fitted on the other.
    models, _ = train_repeat(first, driver)
    experts, prepared = list(models.ensembles[0].refs), first.prepared
    perplexities = []
    for text in prepared.domains:
        logp_EBT, mask_BT = stack_of(driver.ledger, experts, text, "development").take(0, 100)
        total = 0.0
        for fitted, measured in ((0, 1), (1, 0)):
            mixing = fit_mixing(
                "calibrated", "fitted", logp_EBT[:, fitted::2], mask_BT[fitted::2], MergingPlan()
            )
            logp_BT = log_mixture(logp_EBT[:, measured::2], mixing.log_prior_E, mixing.posterior)
            total += float(logp_BT[mask_BT[measured::2]].sum())
        perplexities.append(math.exp(-total / int(mask_BT.sum())))
    assert first.trials[1]["development"] == pytest.approx(sum(perplexities) / len(perplexities), rel=1e-4)


def train_but_the_third(request: TrainRequest, ledger: Ledger, control: Control) -> Artifact:
    if request.label.endswith("trial-3"):
        raise TrainingError("no room")
    return train(request, ledger, control)


def test_a_study_whose_trials_all_fail_or_one_other_than_by_diverging_fails(
    texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [{"learning_rate": 1e30}, {"learning_rate": 1e29}]
    plan = study_plan(texts, tmp_path / "store", trials=trials, systems=[])
    with pytest.raises(StepError, match=r"2 step\(s\) failed(.|\n)*trial-1(.|\n)*not finite"):
        repeats_of(plan, in_process(plan))
    plan = study_plan(texts, tmp_path / "store", trials=[*trials, {"learning_rate": 1e-3}], systems=[])
    monkeypatch.setattr("btm_cluster.steps.train.train", train_but_the_third)
    with pytest.raises(StepError, match="no room"):
        repeats_of(plan, in_process(plan))


def test_a_recipe_of_other_compute_is_refused_before_a_text_is_read(
    texts: dict[str, Path], tmp_path: Path
) -> None:
    plan = study_plan(texts, tmp_path / "store", trials=[{"updates": 24}])
    with pytest.raises(UserError, match="costs other compute"):
        studied_by(plan, in_process(plan))
    assert not (tmp_path / "store").exists()


def test_a_plan_without_a_study_is_studied_with_all_rivals_and_controls(studied: Studied) -> None:
    plan = studied.plan.model_copy(update={"study": None})
    again = in_process(plan)
    found = studied_by(plan, again).entries
    assert [e for e in studied.study.entries if e["seed_share"] in (None, 0.5)] == list(found)
    assert not again.made, "it is part of the one that also swept the seed share"


def test_a_page_of_no_results_is_one_clear_error(tmp_path: Path) -> None:
    for name in ("summary.json", "study.json"):
        (tmp_path / name).write_text(
            '{"texts": [], "speeds": [], "trials": [], "runs": []}' if name == "study.json" else "[]"
        )
    with pytest.raises(UserError, match="no results"):
        read_results([tmp_path])
