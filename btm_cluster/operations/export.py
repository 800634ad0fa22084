"""`btm export`: models of a forest as Hugging Face folders, on this machine and on the hub."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from btm_cluster.driver.driver import Driver
from btm_cluster.errors import UserError
from btm_cluster.evaluation.evaluate import forest_ensemble
from btm_cluster.evaluation.mixture_of_experts import mixture_of_experts_requests
from btm_cluster.forest import Forest
from btm_cluster.language_model import mergekit
from btm_cluster.language_model.hub import check_push, push
from btm_cluster.language_model.mixture_of_experts import check_target
from btm_cluster.language_model.stored_weights import SHARD_BYTES
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.ledger.versions import newest_version
from btm_cluster.operations.averages import Average, check_average, make_average, request_without_text
from btm_cluster.operations.evaluate import check_text_is_known, find_grown
from btm_cluster.operations.model_folder import (
    ForestModel,
    chat_template_of_forest,
    results_of,
    stored_type,
    write_adapter_folder,
    write_folder,
)
from btm_cluster.plan import MixtureOfExpertsPlan, Plan
from btm_cluster.steps.stored import open_config
from btm_cluster.storage.new_folder import check_folder, check_new_folder, new_folder

SEED, AVERAGE, EXPERTS, MIXTURE_OF_EXPERTS = "seed", "average", "experts", "mixture-of-experts"


@dataclass(frozen=True)
class MixtureOptions:
    """Options of `--moe`; those that were not given are as in the plan, or by default."""

    experts_per_token: int | None = None
    rest: Literal["average", "seed"] | None = None

    def over(self, plan: Plan) -> MixtureOfExpertsPlan:
        """The mixture that they and a plan describe."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        planned = plan.merging.mixture_of_experts or MixtureOfExpertsPlan()
        return planned.model_copy(update=given)


@dataclass(frozen=True)
class Export:
    """The models to export, and their destination: a folder, and a repository on the hub."""

    to: Path
    expert: str | None = None
    seed: bool = False
    average: Average | None = None
    all: bool = False
    """The seed and every expert, and the average where one is asked for, each in a folder of its own."""
    mixture_of_experts: MixtureOptions | None = None
    mergekit: Path | None = None
    """A file for the YAML of the same average."""
    repository: str | None = None
    """On the hub; of several models, the beginning of their names."""
    public: bool = False
    licence: str | None = None
    adapter: bool = False
    """Only the adapter of a LoRA expert, not the whole model that it makes of its base."""
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class Written:
    """A model that was exported."""

    model: str
    """`seed`, `average`, `mixture-of-experts`, or `experts/` and the domain."""
    folder: Path
    url: str | None
    """Its repository on the hub."""


def check_export_call(asked: Export, plan: Plan | None) -> None:
    """Refuses a call that cannot be met, before anything starts.

    Raises:
        UserError: saying what is wrong with it.
    """
    kinds = {
        "--expert": asked.expert is not None,
        "--seed": asked.seed,
        "--average": asked.average is not None and not asked.all,
        "--moe": asked.mixture_of_experts is not None,
        "--all": asked.all,
    }
    given = [option for option, is_given in kinds.items() if is_given]
    if len(given) != 1:
        raise UserError(
            "btm export needs one kind of model",
            found=" and ".join(given) or "none",
            expected="--expert NAME, --seed, --average WEIGHTS, --moe, or --all, which takes --average too",
        )
    if asked.mixture_of_experts is not None and plan is None:
        raise UserError(
            "--moe needs the forest's plan: routers are fitted on its development text",
            found="--store alone",
            remedy="name the plan instead of the store: btm export PLAN --moe",
        )
    if asked.average is not None:
        check_average(asked.average, "--average", [text.name for text in plan.texts] if plan else ())
    if asked.mergekit is not None:
        _check_mergekit(asked, asked.mergekit)
    if asked.adapter and asked.expert is None:
        raise UserError("--adapter is of a LoRA expert", found=given[0], expected="--expert NAME --adapter")
    if asked.public and asked.repository is None:
        raise UserError(
            "--public is of --push-to-hub", remedy="add --push-to-hub OWNER/NAME, or leave it out"
        )
    if asked.shard_bytes < 1:
        raise UserError("--shard-size is too small", found=f"{asked.shard_bytes} bytes", expected="some")
    check_new_folder(asked.to)


def _check_mergekit(asked: Export, file: Path) -> None:
    if asked.average is None or not asked.all:
        raise UserError(
            "--mergekit names folders of the seed and of the experts",
            expected="--average WEIGHTS and --all, by which they are written",
        )
    if os.path.lexists(file):
        raise UserError(f"{file} already exists", remedy="choose another file")
    check_folder(file.parent)


def export(asked: Export, plan: Plan | None, driver: Driver) -> list[Written]:
    """Writes the folders, then the YAML, and pushes them.

    Names and token of the hub are checked before anything is made. With a plan, cards have the test
    perplexities that are stored.

    Raises:
        UserError: no forest yet, a domain or text that it has not, or what the hub would refuse.
    """
    ledger, forest = driver.ledger, newest_version(driver.ledger)
    names = _names(asked, forest)
    repositories = {name: _repository(asked, name) for name in names}
    if asked.mixture_of_experts is not None:
        _check_mixture_of_experts(asked.mixture_of_experts, forest, ledger)
    check_push([one for one in repositories.values() if one is not None], asked.public)
    models = _models(asked, names, forest, plan, driver)
    called = plan.name if plan is not None else ledger.storage.location.rstrip("/").rpartition("/")[2]
    places = {name: asked.to / name if asked.all else asked.to for name in names}
    if asked.all:
        with new_folder(asked.to) as whole:
            for name, one in models.items():
                write_folder(ledger, forest, called, one, whole / name, asked.shard_bytes)
    else:
        (one,) = models.values()
        if asked.adapter:
            write_adapter_folder(ledger, forest, called, one, asked.to)
        else:
            write_folder(ledger, forest, called, one, asked.to, asked.shard_bytes)
    if asked.mergekit is not None:
        folders = {one.model.identity: str(places[name].absolute()) for name, one in models.items()}
        _write(asked.mergekit, mergekit_text(models[AVERAGE].model, folders, stored_type(models[SEED].model)))
    return [
        Written(name, places[name], None if to is None else push(places[name], to, asked.public))
        for name, to in repositories.items()
    ]


def mergekit_text(average: Artifact, folders: Mapping[str, str], dtype: str) -> str:
    """The YAML by which mergekit makes an average of the models in some folders, by identity, in `dtype`."""
    if "base" not in average.inputs:
        weights = average.facts["weights"]
        return mergekit.linear({folders[identity]: weight for identity, weight in weights.items()}, dtype)
    (base,) = average.inputs["base"]
    models = [folders[model.identity] for model in average.inputs["models"]]
    recipe = average.recipe
    return mergekit.task_vectors(
        recipe["method"], folders[base.identity], models, recipe["scale"], recipe["density"], dtype
    )


def _names(asked: Export, forest: Forest) -> list[str]:
    """Each model's name, which is its place below `to` where there are several."""
    if asked.expert is not None:
        forest.expert(asked.expert)
        return [f"{EXPERTS}/{asked.expert}"]
    if not forest.experts and not asked.seed:
        raise UserError(f"forest version {forest.version} has no expert", found=forest.reason)
    if asked.mixture_of_experts is not None:
        return [MIXTURE_OF_EXPERTS]
    experts = [f"{EXPERTS}/{domain}" for domain in forest.domains] if asked.all else []
    is_seed_wanted = asked.seed or asked.all
    return [*([SEED] if is_seed_wanted else []), *experts, *([AVERAGE] if asked.average else [])]


def _repository(asked: Export, name: str) -> str | None:
    if asked.repository is None or not asked.all:
        return asked.repository
    return f"{asked.repository}-{name.replace('/', '-')}"


def _models(
    asked: Export, names: Sequence[str], forest: Forest, plan: Plan | None, driver: Driver
) -> dict[str, ForestModel]:
    """The models by name; an average is made where it is not there yet."""
    ledger, template = driver.ledger, chat_template_of_forest(forest, plan, driver.ledger)
    if asked.average is not None and asked.average.target is not None and plan is not None:
        check_text_is_known(plan, asked.average.target, ledger)
    grown = replace(find_grown(plan, driver), forest=forest) if plan is not None else None
    known = {SEED: (SEED, Ref("model", forest.foundation.seed))}
    known |= {f"{EXPERTS}/{e.domain}": (e.domain, Ref("model", e.identity)) for e in forest.experts}
    if asked.average is not None:
        if grown is not None:
            made = make_average(grown, asked.average, driver)
        else:
            (made,) = driver.require([request_without_text(forest, asked.average)])
        known[AVERAGE] = (asked.average.label, made.ref)
    if asked.mixture_of_experts is not None:
        assert grown is not None, "a call without a plan was refused"
        wanted = asked.mixture_of_experts.over(grown.prepared.plan)
        steps = mixture_of_experts_requests(grown.prepared, forest_ensemble(grown.prepared, forest), wanted)
        known[MIXTURE_OF_EXPERTS] = ("mixture of experts", driver.require(steps)[-1].ref)

    def model(called: str, ref: Ref) -> ForestModel:
        results = results_of(grown, ref, ledger) if grown is not None else ()
        return ForestModel(called, ledger.get(ref), results, asked.licence, template)

    return {name: model(*known[name]) for name in names}


def _check_mixture_of_experts(given: MixtureOptions, forest: Forest, ledger: Ledger) -> None:
    """Refuses a mixture of experts that cannot be made.

    Raises:
        UserError: an architecture that no mixture of experts has, or an option for more experts than there are.
    """
    check_target(open_config(ledger, ledger.get(Ref("model", forest.foundation.seed))))
    if (given.experts_per_token or 0) > len(forest.experts):
        raise UserError(
            "--experts-per-token is more than the forest has",
            found=str(given.experts_per_token),
            expected=f"at most {len(forest.experts)}",
        )


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
