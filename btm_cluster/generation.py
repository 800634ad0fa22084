"""`btm generate`: the whole forest writes on, its models weighted as the posterior or the gate says, token after token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from btm_cluster.algorithm import Grown
from btm_cluster.driver import Driver
from btm_cluster.equations.gates import Gate
from btm_cluster.errors import UserError
from btm_cluster.evaluation.evaluate import planned_ensemble
from btm_cluster.evaluation.fitting import fit_for
from btm_cluster.evaluation.systems import planned_method
from btm_cluster.ground import PreparedText
from btm_cluster.language_model.engine import EnsembleEngine
from btm_cluster.language_model.engine_opening import EngineSettings
from btm_cluster.language_model.model import load_model
from btm_cluster.language_model.prompts import Prompt, check_length
from btm_cluster.language_model.sampling import Sampling, check_sampling
from btm_cluster.language_model.tokenizer import TextTokenizer
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.mixing import Mixing
from btm_cluster.plan import Plan
from btm_cluster.run import TAKEN_OUT, check_text_is_known, find_grown
from btm_cluster.steps.stored import open_config, open_tokenizer


@dataclass(frozen=True)
class Generated:
    """What a forest wrote after a prompt, and how much it trusted each expert meanwhile."""

    text: str
    tokens: int
    trust: Mapping[str, float]
    """The mean weight over the written tokens, by domain, and the seed's; what the plan's `top_k` leaves out is missing."""

    @property
    def trust_line(self) -> str:
        """In words, the most trusted first."""
        shares = sorted(self.trust.items(), key=lambda share: -share[1])
        return f"{self.tokens} tokens; trusted " + ", ".join(f"{domain} {share:.0%}" for domain, share in shares)


def check_generate_call(most_tokens: int, sampling: Sampling) -> None:
    """Refuses a call that cannot be met, before anything starts.

    Raises:
        UserError: saying what is wrong with it.
    """
    if most_tokens < 1:
        raise UserError("--tokens is too small", found=str(most_tokens), expected="at least 1")
    check_sampling(sampling)


def generate(
    plan: Plan, target: str | None, prompt: str, most_tokens: int, sampling: Sampling, driver: Driver
) -> Generated:
    """Continues a prompt by at most `most_tokens`, until end of text or until a block is full.

    The experts are mixed as the plan's `merging` says, with what was fitted for the text `target`; without one, as for a text of
    which nothing is known. They are loaded into this process, and run on its GPU where it has one.

    Raises:
        UserError: no forest yet, a target that is unknown or was taken out of it, or a prompt that fills a block.
    """
    if target is not None:
        check_text_is_known(plan, target, driver.ledger)
    grown = find_grown(plan, driver)
    text = next((text for text in grown.ground.texts if text.name == target), None)
    if target is not None and text is None:
        raise UserError(f"{target!r} was taken out of the forest", remedy=TAKEN_OUT)
    tokenizer = open_tokenizer(driver.ledger, grown.ground.tokenizer)
    read = tokenizer.encode(prompt)
    check_length(read, plan.training.block_tokens - 1, plan.training.block_tokens)
    models, gate = _models_and_gate(grown, text, driver)
    engine = open_engine(driver.ledger, list(models.values()), gate, tokenizer, plan.training.block_tokens)
    written = engine.generate([Prompt(read, most_tokens, sampling)])[0]
    assert written.text is not None, "the engine has a tokenizer"
    trust = dict(zip(models, written.mean_weights(len(models)), strict=True))
    return Generated(written.text, len(written.tokens), trust)


def _models_and_gate(grown: Grown, text: PreparedText | None, driver: Driver) -> tuple[dict[str, Ref], Gate]:
    """Who writes for a text, by name, and how they are weighed. Under a posterior, those that the plan's `top_k` keeps."""
    ground = grown.ground
    ensemble = planned_ensemble(ground, grown.forest)
    method = planned_method(ground.plan.merging, len(ensemble.models))
    fit = fit_for(ground, ensemble, text, driver)[method]
    if not isinstance(fit, Mixing):
        return dict(ensemble.models), fit
    kept = [j for j, share in enumerate(fit.log_prior_E.tolist()) if share > float("-inf")]
    return dict(ensemble.models[j] for j in kept), replace(fit, log_prior_E=fit.log_prior_E[kept])


def open_engine(
    ledger: Ledger, models: Sequence[Ref], gate: Gate, tokenizer: TextTokenizer, block_tokens: int
) -> EnsembleEngine:
    """Several models of one architecture loaded as one, which writes one text at a time, as their scores say.

    On a GPU where there is one, in float32: the ensemble that writes is then the one that was measured.

    Raises:
        UserError: the device has too little memory.
    """
    found = [ledger.get(model) for model in models]
    loaded = [load_model(open_config(ledger, one), ledger.open_file(one, "model.safetensors")) for one in found]
    settings = EngineSettings(
        first_token=tokenizer.first_token,
        vocabulary=tokenizer.vocabulary,
        block_tokens=block_tokens,
        end_of_text=tokenizer.end_of_text,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    return EnsembleEngine(loaded, gate, settings, tokenizer.decode_continuation)
