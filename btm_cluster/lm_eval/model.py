"""A forest's ensemble as a model of lm-evaluation-harness.

Text is read as everywhere here: in blocks, each after the tokenizer's first token, which the harness calls the
prefix. In a document of several blocks, the harness's rolling windows would go on from the last token before,
and let the last window overlap. Here each block begins anew, so that figures are those of `btm score`.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import warning_once
from tqdm import tqdm

from btm_cluster.api.ensemble import OpenEnsemble
from btm_cluster.api.forest import open_forest
from btm_cluster.data.batches import batches
from btm_cluster.errors import UserError
from btm_cluster.language_model.document_scores import TOKENS_AT_ONCE
from btm_cluster.language_model.ensemble_scoring import TextScores
from btm_cluster.language_model.prompts import Prompt
from btm_cluster.language_model.sampling import Sampling
from btm_cluster.lm_eval import MODEL
from btm_cluster.operations.generate import PROMPTS_AT_ONCE

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

log = logging.getLogger(__name__)
PROMPTS_BETWEEN_REPORTS = 16
"""Times the prompts that are continued at once: progress is shown, and answers are cached, so often."""
_SETTINGS = {
    "until",
    "max_gen_toks",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
}
"""Generation settings that there are."""


@register_model(MODEL)
class ForestLM(TemplateLM):
    """The ensemble of a forest, loaded into this process.

    Chat templates are not applied: experts are trained on plain text.
    """

    def __init__(
        self,
        store: str | None = None,
        plan: str | None = None,
        domain: str | None = None,
        version: int | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        random_seed: int = 0,
        address: str | None = None,
        batch_size: int | str = PROMPTS_AT_ONCE,
        max_batch_size: int | None = None,  # noqa: ARG002
        device: str | None = None,
    ) -> None:
        """Opens the forest. The harness gives the last three by options of its own.

        Args:
            store: a forest's place; its experts are mixed by the paper's posterior.
            plan: a plan's file instead; its forest is mixed as it says.
            domain: with a plan, the text whose fitted mixture to use.
            version: the forest's, by default the newest.
            random_seed: of texts that are drawn rather than greedy.
            address: a Ray cluster for fits that the store lacks; they are made in this process otherwise.
            batch_size: prompts that are continued together; `auto` for as many as `btm generate` does.

        Raises:
            UserError: arguments that do not fit, or no such forest, version or text.
        """
        super().__init__()
        source = store if plan is None else plan
        if source is None or (store is not None and plan is not None):
            found = "neither" if source is None else "both"
            raise UserError(
                "the model btm needs a forest", found=found, expected="store=… or plan=… in --model_args"
            )
        forest = open_forest(str(source), version, in_process=address is None, address=address)
        if (device or "").startswith("cuda") and not torch.cuda.is_available():  # its default is cuda:0
            device = None
        is_auto = str(batch_size).startswith("auto")
        self._rows = PROMPTS_AT_ONCE if is_auto else int(batch_size)
        self._ensemble: OpenEnsemble = forest.ensemble(
            None if domain is None else str(domain),  # the harness makes numbers of what looks like one
            rows=self._rows,
            precision=precision,
            device=device,
        )
        self._random_seed = random_seed

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._ensemble.text_tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """The token that is read before every block."""
        return self._ensemble.text_tokenizer.first_token

    @property
    def max_length(self) -> int:
        """The block length."""
        return self._ensemble.mixture.block_tokens

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say; the harness's own default."""
        return 256

    def get_model_info(self) -> dict[str, Any]:
        """Version, experts and block length, which the harness writes into its results."""
        return {
            "forest_version": self._ensemble.mixture.version,
            "experts": list(self._ensemble.names),
            "block_tokens": self.max_length,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: ARG002
        """Ids of the text alone: the first token is read anyway."""
        return self._ensemble.text_tokenizer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation after its context, and whether it is the greedy one. For an
        empty context the harness gives the first token."""
        texts = [
            self._cut(continuation if pair[0] == "" else [*context, *continuation], len(continuation))
            for pair, context, continuation in requests
        ]
        found: list[tuple[float, bool]] = []
        scores = self._scores(texts, 1, disable_tqdm)
        for (pair, _, continuation), text, said in zip(requests, texts, scores, strict=True):
            start = len(text) - len(continuation)
            is_greedy = said.alternatives_TK[start:, 0].tolist() == text[start:]
            found.append((float(said.logp_T[start:].sum()), is_greedy))
            self.cache_hook.add_partial("loglikelihood", pair, found[-1])
        return found

    def _cut(self, tokens: list[int], continuation: int) -> list[int]:
        """The last block of a text, its continuation in it."""
        if continuation > self.max_length:
            raise UserError(
                "a continuation is longer than a block",
                found=f"{continuation} tokens",
                expected=f"at most {self.max_length}",
                remedy="a task with shorter answers, or loglikelihood_rolling",
            )
        if len(tokens) > self.max_length:
            warning_once(log, f"texts of more than {self.max_length} tokens, a block, are cut to their ends")
        return tokens[-self.max_length :]

    def loglikelihood_rolling(
        self, requests: Sequence["Instance"], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text, in nats, without an end-of-text token."""
        blocks: list[list[int]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            starts = range(0, len(ids), self.max_length)
            blocks += [ids[start : start + self.max_length] for start in starts]
            owners += [number] * len(starts)
        found = [0.0] * len(requests)
        for owner, said in zip(owners, self._scores(blocks, 0, disable_tqdm), strict=True):
            found[owner] += float(said.logp_T.sum())
        for request, logp in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logp)
        return found

    def _scores(self, texts: Sequence[list[int]], alternatives: int, disable_tqdm: bool) -> list[TextScores]:
        """The longest first, so many tokens at once."""
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        found: dict[int, TextScores] = {}
        with tqdm(total=len(texts), desc="Scoring", disable=disable_tqdm) as bar:
            for numbers in batches(order, lambda number: len(texts[number]), TOKENS_AT_ONCE):
                said = self._ensemble.engine.score([texts[n] for n in numbers], alternatives=alternatives)
                found |= dict(zip(numbers, said, strict=True))
                bar.update(len(numbers))
        return [found[number] for number in range(len(texts))]

    def generate_until(self, requests: Sequence["Instance"], disable_tqdm: bool = False) -> list[str]:
        """The ensemble's continuation of each text: greedy, unless a task draws."""
        prompts = [self._prompt(number, *request.args) for number, request in enumerate(requests)]
        at_once = self._rows * PROMPTS_BETWEEN_REPORTS
        found: list[str] = []
        with tqdm(total=len(prompts), desc="Generating", disable=disable_tqdm) as bar:
            for start in range(0, len(prompts), at_once):
                written = self._ensemble.engine.generate(prompts[start : start + at_once])
                for request, one in zip(requests[start : start + at_once], written, strict=True):
                    assert one.text is not None, "the engine has a tokenizer"
                    found.append(one.text)
                    self.cache_hook.add_partial("generate_until", request.args, one.text)
                bar.update(len(written))
        return found

    def _prompt(self, number: int, context: str, settings: dict[str, Any]) -> Prompt:
        """A prompt, cut to its end where the longest answer would not have room in the
        block; half a block is kept in any case."""
        given = normalize_gen_kwargs(settings, self.max_gen_toks)
        unknown = sorted(given.keys() - _SETTINGS)
        if unknown:
            raise UserError(
                "the task asks for generation settings that an ensemble has not",
                found=", ".join(unknown),
                expected=f"some of {', '.join(sorted(_SETTINGS))}",
                remedy="leave the task out, or change its generation_kwargs",
            )
        ids, most_tokens = self.tok_encode(context), given["max_gen_toks"]
        room = max(self.max_length - most_tokens, self.max_length // 2)
        if len(ids) > room:
            warning_once(
                log,
                f"prompts of more than {room} tokens are cut to their ends: a block has {self.max_length}",
            )
        sampling = Sampling(
            temperature=given.get("temperature", 1.0) if given["do_sample"] else 0.0,
            top_p=given.get("top_p") or 1.0,
            random_seed=self._random_seed,
            top_k=max(given.get("top_k") or 0, 0) or None,
            repetition_penalty=given.get("repetition_penalty") or 1.0,
        )
        stops = tuple(stop for stop in given["until"] if stop)
        return Prompt(ids[-room:], most_tokens, sampling, number, stops)
