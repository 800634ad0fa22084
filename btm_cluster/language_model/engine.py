"""The ensemble as an engine: several sequences, each in a row of its own,
are continued by all experts together.

    p(x_t | x_<t) = Σ_j p_j(x_t | x_<t) · p(D=j | x_<t)                     paper, equation 1

A caller admits sequences into free rows, steps all of them by one token, and releases those that are
finished; `generate` does so for a list. Between two steps rows may come and go. Vocabularies stay on the
device: only drawn tokens, their log-probabilities and the experts' weights come to the host.

E experts, R rows, V tokens of the vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from btm_cluster.equations.gates import Gate
from btm_cluster.equations.running import RunningGate
from btm_cluster.errors import UserError
from btm_cluster.language_model.decoding import ReadPrompt
from btm_cluster.language_model.engine_opening import EngineSettings, bytes_of, open_decoder
from btm_cluster.language_model.ensemble_scoring import EnsembleScorer, TextScores
from btm_cluster.language_model.mixing_step import Begun, MixingStep
from btm_cluster.language_model.prompts import (
    Decode,
    Drawn,
    Finish,
    Prompt,
    Written,
    check_ids,
    check_length,
    check_prompt,
    ends_with_stop,
    text_before_stop,
)
from btm_cluster.language_model.row_cache import up_to
from btm_cluster.language_model.sampling import uniforms


@dataclass
class _Row:
    """A sequence under way."""

    prompt: Prompt
    experts: Sequence[int]
    """Those that write."""
    written: Written = field(default_factory=Written)


class EnsembleEngine:
    """Experts of one architecture on one device, how they are mixed, and the sequences that they continue.

    Of one process and one thread. It holds E models, and for each of `settings.rows` rows a block's keys and
    values in each.
    """

    def __init__(
        self,
        models: Iterable[PreTrainedModel],
        gate: Gate,
        settings: EngineSettings,
        decode: Decode | None = None,
    ) -> None:
        """Takes models over, one after the other: they are moved to the device and, for bfloat16, cast in place.

        `decode` is for stop strings.

        Raises:
            UserError: the device has too little memory.
        """
        self.settings = settings
        self._gate, self._decode = gate, decode
        self._models, self._decoder, self.way = open_decoder(models, settings)
        buffers = self._decoder.buffers
        self._form = gate.running()
        self._known = buffers.logits_ERV.shape[2]
        vocabulary = min(settings.vocabulary, self._known)
        self._step = MixingStep(self._form, buffers, vocabulary, settings.block_tokens, settings.captures)
        self._rows: dict[int, _Row] = {}

    @property
    def free_rows(self) -> int:
        """Sequences that can be admitted now."""
        return self.settings.rows - len(self._rows)

    @property
    def captures(self) -> bool:
        """Whether its steps are, or will be, captured as CUDA graphs."""
        return self._step.captures and self._decoder.captures

    def memory(self) -> dict[str, int]:
        """Bytes that are taken for good: weights, and keys and values of all
        rows where these are in one place."""
        return {"weights": bytes_of(self._models), "rows": self.settings.rows * self._decoder.bytes_per_row}

    @torch.inference_mode()
    def admit(self, prompts: Sequence[Prompt]) -> list[int]:
        """Reads prompts into free rows, equal ones once, and returns their rows.

        Raises:
            UserError: a prompt that is too long, or cannot be continued as asked. Then none is admitted.
        """
        assert len(prompts) <= self.free_rows, "a caller admits as many as there are free rows"
        if not prompts:
            return []
        forms = [self._form if prompt.gate is None else prompt.gate.running() for prompt in prompts]
        for prompt in prompts:
            self.check(prompt)
        free = (row for row in range(self.settings.rows) if row not in self._rows)
        rows = [row for row, _ in zip(free, prompts, strict=False)]
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in zip(rows, prompts, strict=True):
            rows_of.setdefault((self.settings.first_token, *prompt.tokens), []).append(row)
        read = dict(zip(rows_of, self._decoder.read(list(rows_of), list(rows_of.values())), strict=True))
        begun = [
            _begin(prompt, form, read[(self.settings.first_token, *prompt.tokens)])
            for prompt, form in zip(prompts, forms, strict=True)
        ]
        self._step.begin(rows, begun)
        for row, one in zip(rows, begun, strict=True):
            kept = torch.isfinite(one.kept_E) | self._form.needs_all_experts
            self._rows[row] = _Row(one.prompt, kept.nonzero()[:, 0].tolist())
        return rows

    def check(self, prompt: Prompt) -> None:
        """Refuses a prompt that cannot be continued as asked. From any thread.

        Raises:
            UserError: saying why.
        """
        check_prompt(prompt, self.settings.block_tokens, self._known)
        form = self._form if prompt.gate is None else prompt.gate.running()
        if type(form) is not type(self._form):
            found, expected = type(form).__name__, type(self._form).__name__
            raise UserError(
                "a prompt's gate is of another form than the engine's", found=found, expected=expected
            )
        if prompt.stop and self._decode is None:
            raise UserError("stop strings need a tokenizer", remedy="give the engine one")
        if prompt.draws_one_expert and not (form.is_full_posterior and prompt.sampling.is_plain):
            raise UserError(
                "one expert alone would write other texts than all together",
                expected="the full posterior, temperature 1, and no top-p, top-k or repetition penalty",
                remedy="let all experts write",
            )

    def check_text(self, tokens: Sequence[int]) -> None:
        """Refuses a text that cannot be scored. From any thread.

        Raises:
            UserError: it is longer than a block, or has unknown token ids.
        """
        check_length(tokens, self.settings.block_tokens, self.settings.block_tokens, "the text")
        check_ids(tokens, self._known)

    @torch.inference_mode()
    def step(self, forced: Mapping[int, int] | None = None) -> dict[int, Drawn]:
        """Draws one token in every row that is not finished, and lets the experts read it.

        `forced` are taken instead.
        """
        writing = {number: row for number, row in sorted(self._rows.items()) if row.written.finish is None}
        if not writing:
            return {}
        prompts = [row.prompt for row in writing.values()]
        self._step.force(forced or {})
        filters = any(prompt.sampling.filters for prompt in prompts)
        self._step.run(self._row_count(writing), filters, any(prompt.alternatives for prompt in prompts))
        # The GPU goes on while the host looks at what was drawn: a sequence that turns out to have ended
        # reads one token too many.
        reading = [number for number, row in writing.items() if self._room(row) > 1]
        if reading:
            experts = sorted({expert for number in reading for expert in writing[number].experts})
            longest = max(
                len(writing[number].prompt.tokens) + len(writing[number].written.tokens) for number in reading
            )
            self._decoder.read_on(reading, experts, 1 + longest)
        drawn = self._step.drawn(list(writing), prompts)
        return {
            number: self._note(row, one) for (number, row), one in zip(writing.items(), drawn, strict=True)
        }

    def _row_count(self, numbers: Mapping[int, _Row]) -> int:
        return up_to(max(numbers) + 1, 1, self.settings.rows)

    def _room(self, row: _Row) -> int:
        """Tokens that may still be drawn."""
        length = len(row.written.tokens)
        return min(row.prompt.most_tokens, self.settings.block_tokens - len(row.prompt.tokens)) - length

    def _note(self, row: _Row, drawn: Drawn) -> Drawn:
        written = row.written
        if drawn.token == self.settings.end_of_text:
            written.finish = "end of text"
        else:
            written.tokens.append(drawn.token)
            written.finish = self._finish(row)
            drawn = replace(drawn, finish=written.finish)
            written.drawn.append(drawn)
        return replace(drawn, finish=written.finish)

    def _finish(self, row: _Row) -> Finish | None:
        if self._decode is not None and ends_with_stop(row.prompt, row.written.tokens, self._decode):
            return "stop"
        if self._room(row) > 0:
            return None
        return "tokens" if len(row.written.tokens) == row.prompt.most_tokens else "block"

    def release(self, row: int) -> Written:
        """Frees a row, finished or not, and returns what was written."""
        done = self._rows.pop(row)
        self._decoder.forget(row)
        if self._decode is not None:
            done.written.text = text_before_stop(done.prompt, done.written.tokens, self._decode)
        return done.written

    def generate(self, prompts: Sequence[Prompt]) -> list[Written]:
        """Continues all prompts, as many at once as there are rows.

        Raises:
            UserError: a prompt that cannot be continued as asked.
        """
        waiting = list(enumerate(prompts))[::-1]
        numbers: dict[int, int] = {}
        found: dict[int, Written] = {}
        while waiting or numbers:
            taken = [waiting.pop() for _ in range(min(self.free_rows, len(waiting)))]
            numbers |= dict(
                zip(self.admit([prompt for _, prompt in taken]), (n for n, _ in taken), strict=True)
            )
            for row, drawn in self.step().items():
                if drawn.finish is not None:
                    found[numbers.pop(row)] = self.release(row)
        return [found[number] for number in range(len(prompts))]

    @torch.inference_mode()
    def log_probs(self, row: int) -> torch.Tensor:
        """log p of every next token of a row's sequence: float32 [V], on the device."""
        return self._step.log_probs(row + 1)[row]

    @torch.inference_mode()
    def score(
        self, texts: Sequence[Sequence[int]], gate: Gate | None = None, alternatives: int = 0
    ) -> list[TextScores]:
        """Log-probabilities of texts' tokens under each expert and the ensemble,
        each text read from its beginning.

        Raises:
            UserError: a text longer than a block, or with unknown token ids.
        """
        for text in texts:
            self.check_text(text)
        scorer = EnsembleScorer(self._models, self.settings, self._known, self.way == "anew")
        return scorer.score(texts, self._gate if gate is None else gate, alternatives)


def _begin(prompt: Prompt, form: RunningGate, read: ReadPrompt) -> Begun:
    """A row's state after its prompt, and the experts that write."""
    state = form.begin(read.logp_ET, read.entropy_ET[:, :-1])
    of_one = {name: value[..., None] for name, value in state.items()}
    log_weights_E = form.log_weights(of_one, read.entropy_ET[:, -1:])[:, 0]
    kept_E = torch.zeros_like(log_weights_E).masked_fill(log_weights_E == -torch.inf, -torch.inf)
    if prompt.experts is not None:
        others = [j for j in range(len(kept_E)) if j not in prompt.experts]
        kept_E[others] = -torch.inf
    if prompt.top_k_experts is not None and prompt.top_k_experts < len(kept_E):
        kept_E[
            (log_weights_E + kept_E).argsort(descending=True, stable=True)[prompt.top_k_experts :]
        ] = -torch.inf
    if prompt.draws_one_expert:
        reached = uniforms(prompt.sampling.random_seed, prompt.sample, 1)[0]
        cumulated_E = torch.softmax(log_weights_E + kept_E, dim=0).cumsum(0)
        chosen = int(torch.searchsorted(cumulated_E, float(reached) * cumulated_E[-1], right=True))
        kept_E = torch.full_like(kept_E, -torch.inf)
        kept_E[chosen] = 0
    return Begun(prompt, read.entropy_ET.shape[1], state, kept_E)
