"""One step of all rows: experts' predictions are mixed, a token is drawn in
every row, and the weights take it in.

All of it on the rows' device, as one captured graph. B rows of one step, beside the letters of decoding.py.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from btm_cluster.equations.running import RunningGate, State
from btm_cluster.errors import UserError
from btm_cluster.language_model.cuda_graphs import Graphs
from btm_cluster.language_model.decoding import RowBuffers
from btm_cluster.language_model.prompts import MOST_ALTERNATIVES, Drawn, Prompt
from btm_cluster.language_model.sampling import draw, keep_likeliest, penalise, uniforms


@dataclass(frozen=True)
class Begun:
    """State of a new row."""

    prompt: Prompt
    tokens_read: int
    """With the tokenizer's first token."""
    state: State
    kept_E: torch.Tensor
    """0 for experts that write, -inf for the others."""


class MixingStep:
    """The gate's state and the settings of every row, and the step that they take together."""

    def __init__(
        self, form: RunningGate, buffers: RowBuffers, vocabulary: int, block_tokens: int, captures: bool
    ) -> None:
        """`form` says how states are read and advanced, and free rows have its
        numbers: they take part in steps, too.

        Tokens from `vocabulary` on are never drawn.
        """
        device, (experts, rows, _) = buffers.tokens_R.device, buffers.logits_ERV.shape
        self._form, self._buffers, self._last_place = form, buffers, block_tokens - 1
        nothing_E0 = torch.zeros(experts, 0, dtype=torch.float64)
        self._state = {
            name: value[..., None].repeat(*[1] * value.dim(), rows).to(device)
            for name, value in form.begin(nothing_E0, nothing_E0).items()
        }
        self._settings = {
            "temperature": torch.ones(rows, device=device),
            "top_p": torch.ones(rows, device=device),
            "top_k": torch.full((rows,), vocabulary, device=device),
            "penalty": torch.ones(rows, device=device),
        }
        self._kept_ER = torch.zeros(experts, rows, dtype=torch.float64, device=device)
        self._uniform_RT = torch.zeros(rows, block_tokens, dtype=torch.float64, device=device)
        self._turn_R1 = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._forced_R = torch.full((rows,), -1, device=device)
        self._is_forced = False
        self._seen_RV = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
        self._alternatives = min(MOST_ALTERNATIVES, vocabulary)
        width = 2 + 2 * experts + 2 * self._alternatives
        self._told_RN = torch.zeros(rows, width, dtype=torch.float64, device=device)
        self._told_host_RN = torch.zeros(rows, width, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._graphs = Graphs(device, 1, captures)

    def begin(self, rows: Sequence[int], begun: Sequence[Begun]) -> None:
        """Sets rows up for sequences that were read into them.

        Raises:
            UserError: a gate whose numbers are of other shapes than the engine's.
        """
        for one in begun:
            self._check(one.state)
        into = torch.tensor(rows).to(self._kept_ER.device)
        for name, buffer in self._state.items():
            buffer[..., into] = torch.stack([one.state[name] for one in begun], dim=-1).to(into.device)
        sampling = [one.prompt.sampling for one in begun]
        vocabulary = self._seen_RV.shape[1]
        numbers = {
            "temperature": [one.temperature for one in sampling],
            "top_p": [one.top_p for one in sampling],
            "top_k": [vocabulary if one.top_k is None else min(one.top_k, vocabulary) for one in sampling],
            "penalty": [one.repetition_penalty for one in sampling],
        }
        for name, buffer in self._settings.items():
            buffer[into] = torch.tensor(numbers[name], dtype=buffer.dtype).to(into.device)
        self._kept_ER[:, into] = torch.stack([one.kept_E for one in begun], dim=1).to(into.device)
        self._buffers.places_R[into] = torch.tensor([one.tokens_read - 1 for one in begun]).to(into.device)
        self._turn_R1[into] = 0
        count = self._uniform_RT.shape[1]
        # The first number is for the choice of an expert.
        drawn = [uniforms(one.prompt.sampling.random_seed, one.prompt.sample, 1 + count)[1:] for one in begun]
        self._uniform_RT[into] = torch.from_numpy(np.stack(drawn)).to(into.device)
        seen = [
            (row, token) for row, one in zip(rows, begun, strict=True) for token in set(one.prompt.tokens)
        ]
        self._seen_RV[into] = False
        if known := [place for place in seen if place[1] < vocabulary]:
            row_N, token_N = torch.tensor(known).T.to(into.device)
            self._seen_RV[row_N, token_N] = True

    def _check(self, state: State) -> None:
        for name, value in state.items():
            expected = self._state[name].shape[:-1]
            if value.shape != expected:
                raise UserError(
                    f"a prompt's gate does not fit the engine's: {name}",
                    found=str(list(value.shape)),
                    expected=str(list(expected)),
                    remedy="weigh all prompts of one engine by the same method",
                )

    @property
    def captures(self) -> bool:
        """Whether steps are captured as CUDA graphs: so far none has failed."""
        return self._graphs.captures

    def force(self, tokens: Mapping[int, int]) -> None:
        """Tokens that the next step takes instead of drawing, by row."""
        if not tokens and not self._is_forced:
            return
        forced = [tokens.get(row, -1) for row in range(len(self._forced_R))]
        self._forced_R.copy_(torch.tensor(forced))
        self._is_forced = bool(tokens)

    def run(self, row_count: int, filters: bool, alternatives: bool) -> None:
        """Draws a token in each of the first rows, which become the tokens to read next."""
        work = functools.partial(self._run, row_count, filters, alternatives)
        self._graphs.run_all((row_count, filters, alternatives), {0: work})
        self._told_host_RN.copy_(self._told_RN, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def drawn(self, rows: Sequence[int], prompts: Sequence[Prompt]) -> list[Drawn]:
        """The tokens of the last step, once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        told = self._told_host_RN[list(rows)].tolist()
        return [
            self._drawn(numbers, prompt.alternatives) for numbers, prompt in zip(told, prompts, strict=True)
        ]

    def _drawn(self, numbers: Sequence[float], alternatives: int) -> Drawn:
        experts = len(self._kept_ER)
        (token, logp), weights_E, shares_E = (
            numbers[:2],
            numbers[2 : 2 + experts],
            numbers[2 + experts :][:experts],
        )
        ids, logps = numbers[2 + 2 * experts :][: self._alternatives], numbers[-self._alternatives :]
        likeliest = list(zip(map(int, ids), logps, strict=True))[:alternatives]
        return Drawn(int(token), logp, weights_E, shares_E, likeliest)

    def log_probs(self, row_count: int) -> torch.Tensor:
        """log p of every next token in the first rows: float32 [B, V].

        Of tokens that are never drawn, too.
        """
        return self._mix(row_count)[1]

    def _mix(self, row_count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each expert's log-probabilities [E, B, V], the mixture's [B, V], the
        log-weights and the entropies [E, B]."""
        logp_EBV = torch.log_softmax(self._buffers.logits_ERV[:, :row_count].float(), dim=-1)
        entropy_EB = logp_EBV.new_zeros(logp_EBV.shape[:2]).double()
        if self._form.needs_entropy:
            entropy_EB = torch.special.entr(logp_EBV.exp()).sum(-1).double()
        log_weights_EB = self._form.log_weights(self._state_of(row_count), entropy_EB)
        log_weights_EB = torch.log_softmax(log_weights_EB + self._kept_ER[:, :row_count], dim=0)
        mixture_BV = torch.logsumexp(logp_EBV + log_weights_EB.float()[..., None], dim=0)
        return logp_EBV, mixture_BV, log_weights_EB, entropy_EB

    def _state_of(self, row_count: int) -> dict[str, torch.Tensor]:
        return {name: value[..., :row_count] for name, value in self._state.items()}

    def _run(self, row_count: int, filters: bool, alternatives: bool) -> None:
        first = slice(row_count)
        logp_EBV, mixture_BV, log_weights_EB, entropy_EB = self._mix(row_count)
        tokens_B = self._draw(mixture_BV[:, : self._seen_RV.shape[1]], filters)
        said_EB = logp_EBV.gather(2, tokens_B.expand(len(logp_EBV), -1)[..., None])[..., 0].double()
        share_EB = torch.softmax(log_weights_EB + said_EB, dim=0)
        told = [tokens_B[None], mixture_BV.gather(1, tokens_B[:, None]).T, log_weights_EB.exp(), share_EB]
        if alternatives:
            likeliest = mixture_BV[:, : self._seen_RV.shape[1]].topk(self._alternatives, dim=1)
            told += [likeliest.indices.T, likeliest.values.T]
        changed = self._form.advance(self._state_of(row_count), said_EB, entropy_EB)
        for name, value in changed.items():
            self._state[name][..., first].copy_(value)
        self._seen_RV[first].scatter_(1, tokens_B[:, None], True)
        self._turn_R1[first].add_(1).clamp_(max=self._uniform_RT.shape[1] - 1)
        self._buffers.tokens_R[first].copy_(tokens_B)
        self._buffers.places_R[first].add_(1).clamp_(max=self._last_place)
        told_BN = torch.cat([part.double() for part in told]).T
        self._told_RN[first, : told_BN.shape[1]].copy_(told_BN)

    def _draw(self, log_probs_BV: torch.Tensor, filters: bool) -> torch.Tensor:
        first = slice(len(log_probs_BV))
        temperature_B = self._settings["temperature"][first]
        if filters:
            log_probs_BV = penalise(log_probs_BV, self._seen_RV[first], self._settings["penalty"][first])
            top_k_B, top_p_B = self._settings["top_k"][first], self._settings["top_p"][first]
            log_probs_BV = keep_likeliest(log_probs_BV, top_k_B, top_p_B, temperature_B)
        uniform_B = self._uniform_RT[first].gather(1, self._turn_R1[first])[:, 0]
        drawn_B = draw(log_probs_BV, uniform_B, temperature_B)
        return torch.where(self._forced_R[first] >= 0, self._forced_R[first], drawn_B)
