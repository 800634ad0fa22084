"""Transformer-LM and forest, trained on the development blocks that priors are fitted on.

A forest that uses development text must be held against a baseline that uses it as well. The Transformer-LM is
carried on over the blocks; the forest gets a new expert, branched from its average for the text, as for any
new domain. A fifth of the blocks is left out of training: on it the learning rate and the number of passes
are chosen, and the forest's new prior is fitted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.driver.recipes import train_request
from btm_cluster.evaluation.comparison import Comparison, Part, Rows
from btm_cluster.evaluation.fitting import averaged_starts
from btm_cluster.evaluation.scoring import score_requests, stack_of
from btm_cluster.evaluation.systems import Ensemble, System
from btm_cluster.ledger import Ref
from btm_cluster.mixing.fitting import fit_mixing
from btm_cluster.requests import Start, TrainingText, TrainRequest
from btm_cluster.study.repeat import Repeat, marked

BLOCKS_PER_UPDATE = 8
RATES = (0.1, 0.3)
"""Learning rates, as shares of the plan's peak."""
PASSES = (1, 2, 4, 8)
"""Over the blocks."""


@dataclass(frozen=True)
class Adapted:
    """A model trained on a text's development blocks: every stage that may
    be chosen, the start among them."""

    text: PreparedText
    held_in: int
    """Development blocks that were trained on; those after them choose."""
    requests: tuple[TrainRequest, ...]
    start: Ref

    @property
    def stages(self) -> dict[Ref, str]:
        """The models by name."""
        named = {self.start: f"the start for {self.text.name}"}
        for request in self.requests:
            for update in (*request.milestones, request.last_update):
                named[request.until(update).ref] = f"{request.label} at update {update}"
        return named


def adapt(repeat: Repeat, transformer_lm: Ref, forest: Ensemble, driver: Driver) -> Comparison:
    """Trains both on every text's development blocks; their sums on test text."""
    prepared = repeat.prepared
    held_in = {text.name: _held_in(prepared, text, driver) for text in prepared.texts}
    texts = [text for text in prepared.texts if held_in[text.name]]
    whole = Start(transformer_lm, keep_optimizer=False)
    branched = averaged_starts(prepared, forest, texts, driver)
    carried_on = [(text, held_in[text.name], whole) for text in texts]
    new = [(text, held_in[text.name], start) for text, start in zip(texts, branched, strict=True)]
    requests = [
        *(_adapted_requests(repeat, "transformer-lm", *one) for one in carried_on),
        *(_adapted_requests(repeat, "average", *one) for one in new),
    ]
    driver.require([request for both in requests for request in both])
    adapted = [
        Adapted(text, blocks, tuple(both), start.model)
        for (text, blocks, start), both in zip((*carried_on, *new), requests, strict=True)
    ]
    return _rows(prepared, adapted[: len(texts)], adapted[len(texts) :], forest, driver)


def _adapted_requests(
    repeat: Repeat, start_name: str, text: PreparedText, blocks: int, start: Start
) -> list[TrainRequest]:
    """One for each learning rate, with milestones after the first numbers of passes."""
    prepared = repeat.prepared
    at_once = min(BLOCKS_PER_UPDATE, blocks)
    epoch = -(-blocks // at_once)
    trained_on = TrainingText(text.identity, text.tokens["development"], "development", blocks)
    requests = []
    for rate in RATES:
        peak = rate * prepared.plan.training.learning_rate
        fields = {"updates": PASSES[-1] * epoch, "blocks_per_domain_update": at_once, "learning_rate": peak}
        label = f"{text.name}-from-{start_name}-at-{peak:g}"
        request = train_request(prepared, label, "expert", (trained_on,), (0, PASSES[-1] * epoch), start)
        how = replace(request.how, compile=False)  # too short to be worth it
        training = prepared.plan.training.model_copy(update=fields)
        milestones = tuple(passes * epoch for passes in PASSES[:-1])
        requests.append(replace(request, training=training, milestones=milestones, how=how))
    return marked(repeat, requests)


def _held_in(prepared: PreparedPlan, text: PreparedText, driver: Driver) -> int:
    """Development blocks to train on: four fifths, none where that leaves none to choose on."""
    blocks = sum(driver.ledger.get(ref).facts["blocks"] for ref in text.tokens["development"])
    blocks = min(blocks, prepared.plan.merging.development_blocks)
    return max(1, blocks * 4 // 5) if blocks >= 2 else 0


def _rows(
    prepared: PreparedPlan,
    carried_on: Sequence[Adapted],
    new: Sequence[Adapted],
    forest: Ensemble,
    driver: Driver,
) -> Comparison:
    driver.require(
        [score for one in (*carried_on, *new) for score in score_requests(prepared, one.stages, [one.text])]
    )

    def left_out(one: Adapted, models: Sequence[Ref]) -> tuple[torch.Tensor, torch.Tensor]:
        stack = stack_of(driver.ledger, models, one.text, "development")
        return stack.take(one.held_in, prepared.plan.merging.development_blocks)

    def best(one: Adapted) -> Ref:
        stages = list(one.stages)
        return stages[int(left_out(one, stages)[0].sum((1, 2)).argmax())]

    rows: Rows = {}
    sizes: dict[Part, torch.Tensor] = {}
    costs: dict[System, int] = {}
    for baseline, expert in zip(carried_on, new, strict=True):
        part, combined = (expert.text.name, "test"), [*forest.refs, best(expert)]
        single = stack_of(driver.ledger, [best(baseline), best(expert)], expert.text, "test")
        names = ("transformer-lm on development text", "expert on development text")
        for system, sums_UD in zip(map(System, names), single.sums(), strict=True):
            rows.setdefault(system, {})[part], costs[system] = sums_UD, 1
        mixing = fit_mixing("calibrated", "fitted", *left_out(expert, combined), prepared.plan.merging)
        stack = stack_of(driver.ledger, combined, expert.text, "test")
        system = System("forest with an expert on development text", posterior="calibrated", prior="fitted")
        sums_UD = stack.mixture_sums(mixing.log_prior_E, mixing.posterior)
        rows.setdefault(system, {})[part], costs[system] = sums_UD, len(combined)
        sizes[part] = single.sizes()
    return Comparison(rows, sizes, costs)
