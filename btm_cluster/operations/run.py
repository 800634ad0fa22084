"""`btm run`: a whole run of a plan, from texts to verdict."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from btm_cluster.algorithm import Alongside, Grown, grow
from btm_cluster.driver.driver import Driver, steps_line
from btm_cluster.driver.port import Failure
from btm_cluster.driver.prepared_plan import (
    PreparedPlan,
    PreparedText,
    block_requests,
    overlap_requests,
    with_forests_texts,
)
from btm_cluster.driver.recipes import expert_request, seed_start
from btm_cluster.errors import StepError, StoreError
from btm_cluster.evaluation.cluster_ensemble import check_clusters
from btm_cluster.evaluation.evaluate import comparer_of, evaluate
from btm_cluster.evaluation.systems import CALIBRATED
from btm_cluster.evaluation.texts import TextReport, left_out_of_comparison, report_texts
from btm_cluster.evaluation.verdict import Verdict, verdict
from btm_cluster.forest import Expert, Forest, describe_forest
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.mixing.fit_file import Fitted
from btm_cluster.mixing.fitting import Mixing
from btm_cluster.plan import Plan
from btm_cluster.requests import Start, StepRequest, TrainRequest


@dataclass(frozen=True)
class Run:
    """The outcome of a run."""

    forest: Forest
    texts: tuple[TextReport, ...]
    wanted_development_blocks: int
    priors: Mapping[str, Mapping[str, float]]
    """The fitted prior of each expert's domain, by text."""
    evidence_weights: Mapping[str, float]
    """β of the calibrated posterior, by text."""
    verdict: Verdict
    passed_over: tuple[str, ...]
    """Domains of the plan that were taken out of the forest."""
    trained_otherwise: tuple[str, ...]
    """Domains of the plan whose expert was trained under another `branching`, and stays."""
    missing_baselines: tuple[str, ...]
    """Baselines of the plan that are not trained: the verdict goes without them."""
    failures: tuple[Failure, ...]
    made: Mapping[str, int]
    reused: Mapping[str, int]

    @property
    def steps_line(self) -> str:
        """How many steps ran, and how many were there already."""
        return steps_line(self.made, self.reused)

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        return {
            "forest": describe_forest(self.forest),
            "texts": [asdict(text) for text in self.texts],
            "priors": {text: dict(prior) for text, prior in self.priors.items()},
            "evidence_weights": dict(self.evidence_weights),
            "verdict": self.verdict.to_json(),
            "passed_over": list(self.passed_over),
            "trained_otherwise": list(self.trained_otherwise),
            "missing_baselines": list(self.missing_baselines),
            "failures": [asdict(failure) for failure in self.failures],
            "steps": {"run": dict(self.made), "reused": dict(self.reused)},
        }


def run_plan(plan: Plan, driver: Driver) -> Run:
    """Grows the forest and evaluates it.

    Raises:
        StepError: not one expert could be trained.
        UserError: `merging.clusters` does not fit the domains.
    """
    grown = grow_and_evaluate(plan, driver)
    if not grown.forest.experts:
        causes = "\n".join(f"- {failure.label}: {failure.cause}" for failure in grown.failures)
        raise StepError(
            f"no expert could be trained\n{causes}", remedy="mend the causes and run the plan again"
        )
    return evaluated(plan, grown, driver)


def evaluated(plan: Plan, grown: Grown, driver: Driver) -> Run:
    """Evaluates a forest that has experts, and reports on it."""
    prepared = blocks_of_forest(grown.prepared, grown.forest, driver)
    driver.listener.say("comparing the systems")
    evaluation = evaluate(prepared, grown.forest, grown.baseline, driver, grown.demix)
    texts = report_texts(prepared, driver)
    domains = grown.forest.domains
    calibrated = {text: _mixing(fits[CALIBRATED]) for text, fits in evaluation.fits.items()}
    return Run(
        forest=grown.forest,
        texts=tuple(texts),
        wanted_development_blocks=plan.merging.development_blocks,
        priors={
            text: dict(zip(domains, fit.log_prior_E.exp().tolist(), strict=True))
            for text, fit in calibrated.items()
        },
        evidence_weights={text: fit.posterior.weight for text, fit in calibrated.items()},
        verdict=verdict(
            evaluation.results,
            left_out_of_comparison(prepared, grown.forest, driver),
            evaluation.milestones,
            evaluation.costs,
            evaluation.rise,
        ),
        passed_over=tuple(d.name for d in plan.domains if d.name in grown.forest.withdrawn),
        trained_otherwise=_trained_otherwise(grown.prepared, grown.forest, driver.ledger),
        missing_baselines=_missing_baselines(plan, grown),
        failures=grown.failures,
        made=driver.made,
        reused=driver.reused,
    )


def grow_and_evaluate(plan: Plan, driver: Driver) -> Grown:
    """Grows the forest, with every step of its evaluation asked for alongside.

    Raises:
        UserError: `merging.clusters` does not fit the domains, or what any run refuses.
    """
    check_forests_clusters(plan, driver.ledger)
    return grow(plan, driver, _evaluation_steps(driver.ledger))


def check_forests_clusters(plan: Plan, ledger: Ledger) -> None:
    """Refuses `merging.clusters` that do not fit the domains of plan and forest.

    Raises:
        UserError: naming the domains that have no cluster.
    """
    forest = ledger.log.newest()
    check_clusters(
        plan, list(dict.fromkeys([*(d.name for d in plan.domains), *(forest.domains if forest else ())]))
    )


def _evaluation_steps(ledger: Ledger) -> Alongside:
    """The steps of the evaluation and the report, so that none of them waits for the last training."""

    def steps(
        prepared: PreparedPlan, forest: Forest, baselines: Sequence[TrainRequest]
    ) -> Iterator[StepRequest]:
        if not forest.experts:
            return
        try:
            whole = with_forests_texts(prepared, forest, ledger)
        except StoreError:  # a text is lost: the evaluation says so, once the forest is grown
            return
        yield from block_requests(replace(whole, texts=whole.texts[len(prepared.texts) :]))
        baseline = next((one.ref for one in baselines if not one.is_demix), None)
        demix = [part.ref for one in baselines for part in one.parts]
        yield from comparer_of(whole, forest, baseline, demix).requests()
        yield from overlap_requests(whole.texts, whole.domains)

    return steps


def _mixing(fit: Fitted) -> Mixing:
    assert isinstance(fit, Mixing)
    return fit


def _missing_baselines(plan: Plan, grown: Grown) -> tuple[str, ...]:
    trained = {"transformer-lm": grown.baseline is not None, "demix": bool(grown.demix)}
    return tuple(name for name in plan.baselines if not trained[name])


def _trained_otherwise(prepared: PreparedPlan, forest: Forest, ledger: Ledger) -> tuple[str, ...]:
    """A plan that changes anything else of an expert's recipe is refused by the foundation."""
    from_seed = seed_start(prepared, Ref("model", forest.foundation.seed))

    def is_as_asked(domain: PreparedText, expert: Expert) -> bool:
        model = ledger.get(Ref("model", expert.identity))
        (start,) = model.inputs["start"]
        asked = expert_request(
            prepared, domain, from_seed if start == from_seed.model else Start(start, False)
        )
        return asked.ref.identity == expert.identity

    experts = {(expert.domain, expert.text): expert for expert in forest.experts}
    found = [(domain, experts.get((domain.name, domain.identity))) for domain in prepared.domains]
    return tuple(
        sorted(domain.name for domain, expert in found if expert and not is_as_asked(domain, expert))
    )


def blocks_of_forest(prepared: PreparedPlan, forest: Forest, driver: Driver) -> PreparedPlan:
    """The prepared plan with the texts of all domains of the forest, whose token
    blocks are made where they are missing."""
    whole = with_forests_texts(prepared, forest, driver.ledger)
    driver.require(block_requests(replace(whole, texts=whole.texts[len(prepared.texts) :])))
    return whole
