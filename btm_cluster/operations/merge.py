"""`btm merge`: one averaged model as a Hugging Face folder that
`AutoModelForCausalLM.from_pretrained` opens."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from btm_cluster.algorithm import Grown
from btm_cluster.driver.driver import Driver
from btm_cluster.errors import UserError
from btm_cluster.ledger import Artifact, Ref
from btm_cluster.mixing.text_weights import ModelWeight, TextWeights
from btm_cluster.operations.averages import Average, check_average, make_average
from btm_cluster.operations.evaluate import check_text_is_known, find_grown
from btm_cluster.operations.given_text import GivenText, weights_for
from btm_cluster.operations.model_folder import (
    ForestModel,
    chat_template_of_forest,
    parts_of,
    results_of,
    write_folder,
)
from btm_cluster.plan import Plan
from btm_cluster.requests import AverageRequest
from btm_cluster.storage.new_folder import check_new_folder

FROM_BLOCKS = ("argmax", "posterior")
"""Weights that can be taken from a given text; searches need blocks that are stored."""


@dataclass(frozen=True)
class Merged:
    """The model that was written."""

    weights: Mapping[str, float | None]
    """The weight of each domain's expert, and of the seed where it has a part, largest first; None where a
    method gives its models no weights."""
    text: TextWeights | None = None
    """A given text's evidence for each expert, in order of `experts`."""
    experts: tuple[str, ...] = ()

    @property
    def spread(self) -> dict[str, ModelWeight]:
        """A given text's evidence for each expert, the largest weight first."""
        models = zip(self.experts, self.text.models if self.text else (), strict=True)
        return dict(sorted(models, key=lambda one: -one[1].weight))


def check_merge_call(plan: Plan, asked: Average, text: GivenText | None, to: Path) -> None:
    """Refuses a call that cannot be met, before anything starts.

    Raises:
        UserError: saying what is wrong with it.
    """
    check_average(asked, "--weights", [text.name for text in plan.texts], needs_target=text is None)
    if text is not None:
        if asked.target is not None:
            raise UserError(
                "there are two texts to merge for",
                found=f"--text and --for {asked.target}",
                remedy="leave out one of the two",
            )
        if asked.weights not in FROM_BLOCKS:
            raise UserError(
                f"--weights {asked.weights} takes nothing from --text",
                expected=" or ".join(f"--weights {name}" for name in FROM_BLOCKS),
                remedy="leave --text out, or name the text as a target in the plan, and say --for",
            )
        text.check()
    check_new_folder(to)


def write_merged_model(
    plan: Plan, asked: Average, to: Path, driver: Driver, text: GivenText | None = None
) -> Merged:
    """Averages the forest's experts (by the merge actor, if that was not done) and
    writes the model to the folder `to`.

    Of a given text, the weights are in the store afterwards, and nothing else.

    Raises:
        UserError: no forest yet, or a text that is unknown, was taken out, or has nothing to search weights
        on.
    """
    if asked.target is not None:
        check_text_is_known(plan, asked.target, driver.ledger)
    grown = find_grown(plan, driver)
    forest, ledger = grown.forest, driver.ledger
    template = chat_template_of_forest(forest, plan, ledger)
    found = None if text is None else _weights_for(grown, asked, text, driver)
    average = make_average(grown, asked, driver) if found is None else _averaged(grown, found, driver)
    label = f"{asked.weights} for a given text" if text is not None else asked.label
    one = ForestModel(label, average, results_of(grown, average.ref, ledger), chat_template=template)
    write_folder(ledger, forest, plan.name, one, to)
    weights = {part.name: part.weight for part in parts_of(forest, average)}
    return Merged(weights, found, forest.domains if found is not None else ())


def _weights_for(grown: Grown, asked: Average, text: GivenText, driver: Driver) -> TextWeights:
    merging = grown.prepared.plan.merging
    prior = merging.average_prior if asked.weights == "posterior" else None
    return weights_for(text, grown.forest, driver.ledger, merging.development_blocks, prior)


def _averaged(grown: Grown, found: TextWeights, driver: Driver) -> Artifact:
    """The average by these weights. Its recipe has them, and says nothing of the text."""
    models = tuple(Ref("model", expert.identity) for expert in grown.forest.experts)
    weights = tuple(model.weight for model in found.models)
    return driver.require([AverageRequest("weights for a given text", models, weights)])[0]
