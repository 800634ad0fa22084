"""The comparison engine: models and ensembles in, the summed log-probability of
every document under every system out.

Runs, studies and trials ask it for different rows of the same table. Everything is asked for in one call, and
the workers start each step once its inputs are there. Whatever is fitted or chosen is so on development text.
U is tokens and bytes, as `equations/perplexity.py` has them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import HELD_OUT, PreparedPlan, PreparedText
from btm_cluster.equations.perplexity import TOKENS
from btm_cluster.evaluation.fitting import (
    average_request,
    fit_request,
    fit_requests,
    mix_request,
    weight_requests,
    weights_request,
)
from btm_cluster.evaluation.milestones import choose_milestone, milestone_scores
from btm_cluster.evaluation.rows import Milestones
from btm_cluster.evaluation.scoring import by_ref, score_requests, stack_of
from btm_cluster.evaluation.systems import BEST_TRANSFORMER_LM, Ensemble, System
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.mixing.fit_file import SUMS
from btm_cluster.mixing.fitting import each_in_one_thread
from btm_cluster.mixing.scores import ScoreStack
from btm_cluster.requests import StepRequest

Part: TypeAlias = tuple[str, str]
"""A text by name, and one of its splits."""
Rows: TypeAlias = dict[System, dict[Part, torch.Tensor]]
"""Summed log-probability by document [U, D], by text and split, of each system."""


@dataclass(frozen=True)
class Comparison:
    """Every system's sums, and the tokens and bytes of each document [U, D], by text and split."""

    rows: Rows
    sizes: Mapping[Part, torch.Tensor]
    costs: Mapping[System, float]
    """Forward passes of a model that a system takes for a token, by parameters."""
    milestones: Milestones | None = None
    """The Transformer-LM's, of which the best has a row of its own where it is not the finished one."""
    models: Mapping[System, "SystemModels"] = field(default_factory=dict)
    """By which a system's cost is told. None are known of systems that have models of their own for each text."""

    def with_rows(self, other: "Comparison") -> "Comparison":
        """The rows of another comparison on the same texts beside these."""
        return replace(
            self,
            rows={**self.rows, **other.rows},
            costs={**self.costs, **other.costs},
            models={**self.models, **other.models},
        )

    def charging(self, whole: Mapping[str, tuple[Ref, ...]]) -> "Comparison":
        """The comparison with these as the models that were trained for systems, by name. What is taken at its best
        milestone was chosen among all of its training, and has cost all of it."""
        models = {
            system: replace(models, trained=whole.get(system.system, models.trained))
            for system, models in self.models.items()
        }
        return replace(self, models=models)


@dataclass(frozen=True)
class SystemModels:
    """The models that were trained for a system, and those that it is made of once it is used: an average is one
    model of several that were trained. Where it is another for each text, that of the first."""

    trained: tuple[Ref, ...]
    used: tuple[Ref, ...]


@dataclass(frozen=True)
class Comparer:
    """Single models by system, and ensembles, to be compared.

    The first ensemble is the forest; the best of its experts gets a row too.
    """

    prepared: PreparedPlan
    single: Mapping[System, Ref]
    ensembles: Sequence[Ensemble]
    splits: Sequence[str] = HELD_OUT
    milestones: Mapping[int, Ref] = field(default_factory=dict)
    """The Transformer-LM's models by update, the finished one among them."""
    mixtures: Mapping[System, Sequence[StepRequest]] = field(default_factory=dict)
    """The steps that make a mixture of experts, itself last, by its system; a single model once it is made."""

    def __post_init__(self) -> None:
        mixtures = {system: steps[-1].ref for system, steps in self.mixtures.items()}
        object.__setattr__(self, "single", {**self.single, **mixtures})

    @property
    def parts(self) -> list[tuple[PreparedText, str]]:
        """Texts and splits that rows are made for."""
        return [(text, split) for split in self.splits for text in self.prepared.texts if text.tokens[split]]

    def requests(self) -> Iterator[StepRequest]:
        """Every step that the comparison takes; some come up twice."""
        prepared = self.prepared
        named = {model: name for one in reversed(self.ensembles) for model, name in one.names.items()}
        models = named | {model: system.name for system, model in self.single.items()}
        yield from (step for steps in self.mixtures.values() for step in steps)
        yield from score_requests(prepared, models, prepared.texts)
        yield from milestone_scores(prepared, self.milestones)
        for ensemble in self.ensembles:
            if ensemble.methods:
                yield from (fit for text in prepared.texts for fit in fit_requests(prepared, ensemble, text))
                yield from (mix_request(prepared, ensemble, *part) for part in self.parts)
            averages = list(self.averages(ensemble))
            for weights, text in averages:
                yield from weight_requests(prepared, ensemble, weights, text)
            for weights, text in averages:  # once all weights are there, so that they can be made together
                if weights != "argmax":  # which is one of the models
                    average = average_request(prepared, ensemble, weights, text)
                    yield average
                    yield from score_requests(
                        prepared,
                        {average.ref: f"average {average.label}"},
                        [text] if text else prepared.texts,
                        self.splits,
                    )

    def compare(self, driver: Driver) -> Comparison:
        """Makes what is missing and reads the rows.

        The best milestone is known, and scored on all texts, last.
        """
        made = by_ref(driver.require(list(self.requests())))
        milestones = choose_milestone(self.prepared, self.milestones, driver.ledger, made)
        asked = self
        if milestones is not None and not milestones.is_finished_best:
            best = self.milestones[milestones.best]
            asked = replace(self, single={**self.single, BEST_TRANSFORMER_LM: best})
            scores = score_requests(
                self.prepared, {best: BEST_TRANSFORMER_LM.name}, self.prepared.texts, self.splits
            )
            made |= by_ref(driver.require([request for request in scores if request.ref not in made]))
        return replace(_Reader(asked, driver.ledger, made).read(), milestones=milestones)

    def averages(self, ensemble: Ensemble) -> Iterator[tuple[str, PreparedText | None]]:
        """Averages by weights; the uniform one is the same for all texts."""
        for weights in ensemble.averages:
            yield from (
                [(weights, None)]
                if weights == "uniform"
                else [(weights, text) for text in self.prepared.texts]
            )


@dataclass(frozen=True)
class _Reader:
    """Reads the rows of a comparison from the artifacts that it took."""

    asked: Comparer
    ledger: Ledger
    made: Mapping[Ref, Artifact]

    def read(self) -> Comparison:
        parts = self.asked.parts
        rows: Rows = {}
        for part, of_part in zip(parts, each_in_one_thread(self._rows_of, parts), strict=True):
            for system, sums_UD in of_part.items():
                rows.setdefault(system, {})[part[0].name, part[1]] = sums_UD
        sizes = {
            (text.name, split): self._stack([self._models[0]], text, split).sizes() for text, split in parts
        }
        mixtures = {
            ensemble.mixed_by(method): min(method.top_k or len(ensemble.models), len(ensemble.models))
            for ensemble in self.asked.ensembles
            for method in ensemble.methods
        }
        experts = {
            system: self.made[steps[-1].ref].facts["inference_cost"]
            for system, steps in self.asked.mixtures.items()
        }
        costs = dict.fromkeys(rows, 1) | mixtures | experts
        models = self._models_of(parts[0][0]) if parts else {}
        return Comparison(rows, sizes, costs, models=models)

    def _models_of(self, text: PreparedText) -> dict[System, SystemModels]:
        """Each system's models, for a text."""
        asked = self.asked
        models = {system: SystemModels((model,), (model,)) for system, model in asked.single.items()}
        for ensemble in asked.ensembles:
            whole = SystemModels(ensemble.refs, ensemble.refs)
            models |= {ensemble.mixed_by(method): whole for method in ensemble.methods}
            models |= {
                ensemble.averaged_by(weights): replace(whole, used=(self._average(ensemble, weights, text),))
                for weights in ensemble.averages
            }
        return models | {
            **{_best_expert(one): SystemModels(one.refs, one.refs) for one in asked.ensembles[:1]},
            **{one.own_expert: SystemModels(one.refs, one.refs) for one in self._shown},
        }

    @property
    def _shown(self) -> list[Ensemble]:
        """The ensembles whose experts have rows on their own domains."""
        first, others = self.asked.ensembles[:1], self.asked.ensembles[1:]
        return [*first, *(one for one in others if one.shows_experts)]

    @property
    def _models(self) -> list[Ref]:
        """Those that are the same for all texts."""
        ensembles = self.asked.ensembles
        return list(dict.fromkeys([*self.asked.single.values(), *(ensembles[0].refs if ensembles else ())]))

    def _rows_of(self, part: tuple[PreparedText, str]) -> dict[System, torch.Tensor]:
        """Each system's sums on one part, in the order of a table's rows."""
        text, split = part
        ensembles = self.asked.ensembles
        averages = {
            ensemble.averaged_by(weights): self._average(ensemble, weights, text)
            for ensemble in ensembles
            for weights in ensemble.averages
        }
        own = {
            ensemble.own_expert: model
            for ensemble in self._shown
            for domain, model in ensemble.models
            if domain == text.name
        }
        models = list(dict.fromkeys([*self._models, *averages.values(), *own.values()]))
        sums = dict(zip(models, self._stack(models, text, split).sums(), strict=True))
        rows = {system: sums[model] for system, model in self.asked.single.items()}
        if ensembles:
            best = {_best_expert(ensembles[0]): self._best_expert(ensembles[0], text)}
            rows |= {system: sums[model] for system, model in (best | own).items()}
        for ensemble in ensembles:
            rows |= self._mixed(ensemble, text, split)
            rows |= {
                ensemble.averaged_by(w): sums[averages[ensemble.averaged_by(w)]] for w in ensemble.averages
            }
        return rows

    def _stack(self, models: Sequence[Ref], text: PreparedText, split: str) -> ScoreStack:
        return stack_of(self.ledger, models, text, split, self.made)

    def _mixed(self, ensemble: Ensemble, text: PreparedText, split: str) -> dict[System, torch.Tensor]:
        if not ensemble.methods:
            return {}
        mixture = self.made[mix_request(self.asked.prepared, ensemble, text, split).ref]
        sums_MUD = torch.from_numpy(np.load(self.ledger.open_file(mixture, SUMS)))
        return dict(zip(map(ensemble.mixed_by, ensemble.methods), sums_MUD, strict=True))

    def _average(self, ensemble: Ensemble, weights: str, text: PreparedText) -> Ref:
        prepared = self.asked.prepared
        if weights == "argmax":
            fit = self.made[weights_request(prepared, ensemble, text).ref]
            return next(
                Ref("model", model) for model, share in fit.facts["weights"]["argmax"].items() if share
            )
        return average_request(prepared, ensemble, weights, None if weights == "uniform" else text).ref

    def _best_expert(self, forest: Ensemble, text: PreparedText) -> Ref:
        """The expert that is best on a text's development blocks (without any, the first)."""
        best = 0
        if text.tokens["development"]:
            development_EUD = self._stack(forest.refs, text, "development").sums()
            best = int(development_EUD[:, TOKENS].sum(1).argmax())
        return forest.refs[best]


def _best_expert(forest: Ensemble) -> System:
    return System("best single expert", forest.seed_share)


def fits_of(prepared: PreparedPlan, ensemble: Ensemble) -> dict[str, Ref]:
    """The fit of each text, by name."""
    return {text.name: fit_request(prepared, ensemble, text).ref for text in prepared.texts}
