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
from btm_cluster.language_model.ensemble import Ensemble, Sampling, reads_on_as_it_scores
from btm_cluster.language_model.model import load_model
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
    if not 0 <= sampling.temperature < float("inf"):
        raise UserError("--temperature is out of range", found=f"{sampling.temperature:g}", expected="at least 0")
    if not 0 < sampling.top_p <= 1:
        raise UserError("--top-p is out of range", found=f"{sampling.top_p:g}", expected="above 0, at most 1")


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
    room = plan.training.block_tokens - len(read)
    if room < 1:
        raise UserError(
            "the prompt is too long",
            found=f"{len(read)} tokens",
            expected=f"fewer than {plan.training.block_tokens}: the forest reads no further back than a block",
            remedy="give its end alone",
        )
    models, gate = _models_and_gate(grown, text, driver)
    ensemble = open_ensemble(
        driver.ledger, list(models.values()), gate, tokenizer.first_token, read, plan.training.block_tokens
    )
    written, trust_E = [], torch.zeros(len(models), dtype=torch.float64)
    for token in ensemble.write(min(most_tokens, room), tokenizer.end_of_text, tokenizer.vocabulary, sampling):
        written.append(token)
        trust_E += ensemble.log_weights().exp()
    trust_E = trust_E / max(1, len(written))
    added = tokenizer.decode_continuation(read, written)
    return Generated(added, len(written), dict(zip(models, trust_E.tolist(), strict=True)))


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


def open_ensemble(
    ledger: Ledger, models: Sequence[Ref], gate: Gate, first_token: int, read: Sequence[int], block_tokens: int
) -> Ensemble:
    """Several models of one architecture loaded as one, which has read a text and predicts as their scores say."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = [ledger.get(model) for model in models]
    loaded = [load_model(open_config(ledger, one), ledger.open_file(one, "model.safetensors")) for one in found]
    on_device = [model.to(device) for model in loaded]
    anew = None if reads_on_as_it_scores(on_device[0], block_tokens) else block_tokens
    return Ensemble(on_device, gate, first_token, read, anew)
