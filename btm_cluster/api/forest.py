"""A forest, opened from its store or by its plan: its models, averages and verdict."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from btm_cluster.api.ensemble import OpenEnsemble
from btm_cluster.api.plans import as_plan, opened_driver_of_call
from btm_cluster.driver.driver import Driver
from btm_cluster.errors import UserError
from btm_cluster.evaluation.verdict import Verdict
from btm_cluster.forest import Forest
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.ledger.versions import version_of
from btm_cluster.operations.averages import Average, average_by_weights, check_average, make_average
from btm_cluster.operations.ensemble import mixture_of_plan
from btm_cluster.operations.evaluate import check_text_is_known, evaluate_forest, find_grown
from btm_cluster.operations.generate import PROMPTS_AT_ONCE
from btm_cluster.plan import Plan
from btm_cluster.plan.file import is_plan_file
from btm_cluster.session import open_ledger
from btm_cluster.steps.mixture import forest_with_experts, mixture_of_store
from btm_cluster.steps.stored import documents_of, open_model, open_tokenizer, open_transformers_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SEED = "the seed"
"""The seed's name among the models that are mixed or averaged."""

Split: TypeAlias = Literal["train", "development", "test"]


def open_forest(
    source: Plan | str | Path | Mapping[str, Any],
    version: int | None = None,
    *,
    in_process: bool = False,
    address: str | None = None,
) -> "OpenForest":
    """A version of a forest, by default the newest; no model is loaded yet.

    Args:
        source: the place of its store, a folder or URL; or its plan, as a value, plain values or a YAML file.
        version: its number.
        in_process: as in `run`, for fits and scores that the store lacks.
        address: the same.

    Raises:
        UserError: there is no forest, or no such version.
    """
    is_store = isinstance(source, str | Path) and not is_plan_file(Path(source))
    plan = None if is_store else as_plan(source)
    ledger = open_ledger(str(source) if plan is None else plan.store)
    forest = version_of(ledger, version)
    return OpenForest(ledger, forest, plan, in_process, address)


@dataclass(frozen=True)
class StoredModel:
    """A model of a forest, in its store."""

    name: str
    """Its domain, or `the seed`."""
    identity: str
    """In the store, a hash of what it is made from."""
    _ledger: Ledger = field(repr=False, compare=False)

    def model(self) -> "PreTrainedModel":
        """The model, loaded anew: on the CPU, in float32, for evaluation.

        Raises:
            StoreError: the store has lost it.
        """
        return open_model(self._ledger, Ref("model", self.identity)).eval()


class OpenForest:
    """A version of a forest. It stays at its version, however the forest grows."""

    def __init__(
        self, ledger: Ledger, forest: Forest, plan: Plan | None, in_process: bool, address: str | None
    ) -> None:
        self._ledger, self._forest, self.plan = ledger, forest, plan
        self._in_process, self._address = in_process, address
        self.seed = StoredModel(SEED, forest.foundation.seed, ledger)
        self.experts: Mapping[str, StoredModel] = {
            expert.domain: StoredModel(expert.domain, expert.identity, ledger) for expert in forest.experts
        }
        """By domain."""

    def __repr__(self) -> str:
        return f"<forest version {self.version} of {', '.join(self.domains) or 'no domain'}>"

    @property
    def version(self) -> int:
        """Its number."""
        return self._forest.version

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains that have an expert."""
        return self._forest.domains

    @property
    def block_tokens(self) -> int:
        """The length of text that the models were trained on; they read no further back."""
        return self._forest.foundation.block_tokens

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer, as transformers opens it. One that was trained here adds no special token to a text."""
        return open_transformers_tokenizer(self._ledger, self._tokenizer, self.block_tokens)

    @cached_property
    def first_token(self) -> int:
        """Id of the token that every block was read after in training. Ensembles read it by themselves."""
        return open_tokenizer(self._ledger, self._tokenizer).first_token

    def documents(self, domain: str, split: Split = "test") -> list[str]:
        """The documents of one split of a domain's text, in the order in which they are packed into blocks.

        Raises:
            UserError: no expert has that domain, or there is no such split.
            StoreError: the store has lost the text.
        """
        if split not in get_args(Split):
            raise UserError("there is no such split", found=f"{split!r}", expected=", ".join(get_args(Split)))
        texts = {expert.domain: expert.text for expert in self._forest.experts}
        if domain not in texts:
            raise UserError(
                f"no expert has the domain {domain}",
                found=f"{self!r}",
                expected=f"one of {', '.join(texts)}",
                remedy="name one of them",
            )
        return list(documents_of(self._ledger, texts[domain], split))

    @property
    def _tokenizer(self) -> Ref:
        return Ref("tokenizer", self._forest.foundation.tokenizer)

    def ensemble(
        self,
        domain: str | None = None,
        *,
        rows: int = PROMPTS_AT_ONCE,
        precision: Literal["float32", "bfloat16"] = "float32",
        device: str | None = None,
    ) -> "OpenEnsemble":
        """All experts, loaded into this process, as one language model.

        With a plan they are mixed as its `merging` says. Of a store alone, by the paper's posterior.

        Args:
            domain: the plan's text whose fitted mixture to use; by default the one for unknown text.
            rows: prompts that are continued together. Each takes memory for a block's keys and values in every
                expert.
            precision: of weights, keys and values; verdicts are measured in float32.
            device: such as `cuda:1`; by default the GPU where there is one.

        Raises:
            UserError: a text that the plan does not know, one without a plan, or too little memory.
        """
        if self.plan is None:
            if domain is not None:
                raise _needs_plan(f"a mixture for {domain!r}")
            mixture = mixture_of_store(self._ledger, self.version)
        else:
            with self._driver(self.plan) as driver:
                mixture = mixture_of_plan(self.plan, driver, domain, version=self.version)
        return OpenEnsemble(self._ledger, mixture, rows, precision, device)

    def average(
        self, weights: str | Mapping[str, float] = "uniform", domain: str | None = None
    ) -> "PreTrainedModel":
        """One model whose parameters are a weighted average of the experts', in memory: on the CPU, for evaluation.

        Args:
            weights: `uniform`; or the weight of each model by domain, and of `the seed`, one together; or,
                with a plan, whatever `btm merge --weights` takes.
            domain: the plan's text that `btm merge` would be called for.

        Raises:
            UserError: weights or a text that are unknown or do not fit, or that need a plan.
            IncompatibleError: models that cannot be averaged.
        """
        if weights == "uniform" and domain is None:
            domains = forest_with_experts(self._ledger, self.version).domains
            weights = dict.fromkeys(domains, 1 / len(domains))
        if not isinstance(weights, str):
            if domain is not None:
                raise UserError(
                    "weights that are given are the same for every text", found=f"domain {domain!r}"
                )
            models = {**self.experts, SEED: self.seed}
            refs = {name: Ref("model", model.identity) for name, model in models.items()}
            return average_by_weights(self._ledger, refs, weights).eval()
        if self.plan is None:
            raise _needs_plan(f"an average by {weights!r}")
        asked = Average(weights, domain)
        check_average(asked, "weights", [text.name for text in self.plan.texts])
        with self._driver(self.plan) as driver:
            if domain is not None:
                check_text_is_known(self.plan, domain, driver.ledger, self.version)
            average = make_average(find_grown(self.plan, driver, self.version), asked, driver)
        return open_model(self._ledger, average.ref).eval()

    def verdict(self) -> Verdict:
        """The comparison with seed and baselines, as `btm evaluate` makes it.

        Raises:
            UserError: there is no plan.
        """
        if self.plan is None:
            raise _needs_plan("a verdict")
        with self._driver(self.plan) as driver:
            return evaluate_forest(self.plan, driver, self.version).verdict

    def _driver(self, plan: Plan) -> AbstractContextManager[Driver]:
        return opened_driver_of_call(plan, self._address, self._in_process)


def _needs_plan(what: str) -> UserError:
    return UserError(
        f"{what} needs a plan",
        found="a forest opened by its store",
        expected="the plan, which says what is fitted, on which text",
        remedy="open_forest(plan), with the plan that grew it",
    )
