"""A forest version as it is served: its ensemble, experts, seed and averages by the names that callers use,
and the change to the next version while requests are under way.
"""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from btm_cluster.equations.gates import Gate
from btm_cluster.equations.posterior import uniform_prior
from btm_cluster.errors import BtmError, UnknownModelError
from btm_cluster.language_model.prompts import Prompt
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.mixing.fitting import FULL, Mixing
from btm_cluster.serving.engine_thread import EngineThread
from btm_cluster.serving.settings import ServingSettings
from btm_cluster.steps.mixture import Mixture, engine_of, usual_device
from btm_cluster.steps.shared_models import SharedModels
from btm_cluster.steps.stored import open_model, open_tokenizer

log = logging.getLogger(__name__)
ENSEMBLE = "ensemble"
SEED = "seed"


@dataclass(frozen=True)
class Served:
    """A model as callers name it, in an engine that may hold several."""

    engine: EngineThread
    names: Sequence[str]
    """Names of the engine's models, in order."""
    gate: Gate
    """By which texts are scored."""
    experts: tuple[int, ...] | None = None
    """Those that write, where not all do."""

    def prompt(self, asked: Prompt) -> Prompt:
        """A prompt for this model."""
        if self.experts is None:
            return replace(asked, gate=self.gate)
        # Whatever a prior rules out writes here, if it is asked to.
        is_mixing = isinstance(self.gate, Mixing)
        return replace(asked, experts=self.experts, gate=self.gate if is_mixing else None)


class LoadedForest:
    """A forest version whose ensemble is loaded. Other models are loaded when they are first asked for."""

    def __init__(
        self,
        ledger: Ledger,
        mixture: Mixture,
        settings: ServingSettings,
        before: "LoadedForest | None" = None,
    ) -> None:
        """Loads the ensemble's models, but for those that the version `before` has loaded.

        Raises:
            UserError: the device has too little memory.
        """
        self.mixture, self._ledger, self._settings = mixture, ledger, settings
        self.tokenizer = open_tokenizer(ledger, mixture.tokenizer)
        device = settings.device or usual_device()
        self.shared = SharedModels(ledger, device, getattr(torch, settings.precision))
        known = before.shared if before is not None else None
        self.ensemble = self._thread(self.shared.open_each(mixture.models.values(), known), mixture)
        self._by_name = dict(self._of_the_ensemble())
        self._elsewhere = dict(self._beside_the_ensemble())
        self._others: OrderedDict[str, Served] = OrderedDict()
        self._loading = asyncio.Lock()
        self._users = 0
        self._is_replaced = False

    def _thread(self, models: Iterable[PreTrainedModel], mixture: Mixture) -> EngineThread:
        settings = self._settings
        engine = engine_of(
            models, mixture, self.tokenizer, settings.rows, settings.precision, settings.device
        )
        return EngineThread(engine, settings.waiting)

    def _of_the_ensemble(self) -> Iterator[tuple[str, Served]]:
        names = list(self.mixture.models)
        yield ENSEMBLE, Served(self.ensemble, names, self.mixture.gate)
        for text, gate in self.mixture.gates.items():
            yield f"{ENSEMBLE}:{text}", Served(self.ensemble, names, gate)
        for number, name in enumerate(names):
            called = f"expert:{name}" if name in self.mixture.domains else SEED
            yield called, Served(self.ensemble, names, _one_alone(number, len(names)), (number,))

    def _beside_the_ensemble(self) -> Iterator[tuple[str, Ref]]:
        """The seed, and stored averages of models of this version, by the names that callers use."""
        forest = self._ledger.log.version(self.mixture.version)
        assert forest is not None, "the mixture is of a version that was read"
        seed = Ref("model", forest.foundation.seed)
        if SEED not in self._by_name:
            yield SEED, seed
        ours = {seed, *(Ref("model", expert.identity) for expert in forest.experts)}
        averages = [
            artifact
            for artifact in self._ledger.list_artifacts("model")
            if artifact.facts.get("role") == "average" and ours.issuperset(artifact.inputs["models"])
        ]
        names = Counter(_average_name(artifact) for artifact in averages)
        for artifact in sorted(averages, key=lambda artifact: artifact.identity):
            name = _average_name(artifact)
            yield (name if names[name] == 1 else f"{name}-{artifact.identity[:8]}"), artifact.ref

    @property
    def model_names(self) -> list[str]:
        """All models that can be asked for."""
        return list(dict.fromkeys([*self._by_name, *self._elsewhere]))

    async def model(self, name: str) -> Served:
        """A model by its name, loaded where it is not yet.

        Raises:
            UnknownModelError: there is none of that name.
            UserError: there is too little memory for it.
        """
        found = self._by_name.get(name)
        if found is not None:
            return found
        if name not in self._elsewhere:
            raise UnknownModelError(f"no model {name!r}", expected=f"one of {', '.join(self.model_names)}")
        with self.in_use():
            async with self._loading:
                if name not in self._others:
                    while len(self._others) >= self._settings.other_models:
                        self._others.popitem(last=False)[1].engine.close()
                    await self._load_other(name)
                self._others.move_to_end(name)
                return self._others[name]

    async def _load_other(self, name: str) -> None:
        """Loads a model to its end, though whoever asked may hang up meanwhile: a thread cannot be stopped, and an
        engine that nobody knows would keep its memory for ever."""
        load = asyncio.ensure_future(asyncio.to_thread(self._open_other, name))
        try:
            self._others[name] = await asyncio.shield(load)
        except asyncio.CancelledError:
            try:
                self._others[name] = await load
            except Exception:  # whoever asked has gone: the log alone hears of it
                log.exception("%s was not loaded", name)
            raise

    def _open_other(self, name: str) -> Served:
        gate = Mixing(uniform_prior(torch.zeros(1, dtype=torch.float64)), FULL)
        ref = self._elsewhere[name]
        alone = replace(self.mixture, models={name: ref}, gate=gate, gates={})
        device = self._settings.device or usual_device()
        model = self.shared.find(ref) or open_model(self._ledger, ref, device)
        return Served(self._thread([model], alone), [name], gate)

    @property
    def failure(self) -> BaseException | None:
        """The exception that ended the ensemble's engine, if any."""
        return self.ensemble.failure

    @contextmanager
    def in_use(self) -> Iterator["LoadedForest"]:
        """Keeps its engines open meanwhile."""
        self._users += 1
        try:
            yield self
        finally:
            self._users -= 1
            self._close_if_unused()

    def replace(self) -> None:
        """Another version is served from now on: ends the engines once nobody uses them."""
        self._is_replaced = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._is_replaced and not self._users:
            for engine in (self.ensemble, *(one.engine for one in self._others.values())):
                engine.close()


def _average_name(average: Artifact) -> str:
    """Such as `average:fitted-for-legal`: names of models have no spaces."""
    return "average:" + "-".join(str(average.note.get("name", average.identity[:8])).split())


def _one_alone(number: int, count: int) -> Mixing:
    log_prior_E = torch.full((count,), -torch.inf, dtype=torch.float64)
    log_prior_E[number] = 0.0
    return Mixing(log_prior_E, FULL)


class LiveForest:
    """The version that is served now; another one takes its place without ending a request."""

    def __init__(self, ledger: Ledger, settings: ServingSettings) -> None:
        self.ledger, self.settings = ledger, settings
        self._current: LoadedForest | None = None
        self._changing = asyncio.Lock()

    @property
    def current(self) -> LoadedForest:
        """The version that new requests get."""
        assert self._current is not None, "change_to comes first"
        return self._current

    async def change_to(self, mixture: Mixture) -> None:
        """Loads a version, and then gives it to new requests. What is under way ends on the version before.

        Raises:
            BtmError: it cannot be loaded; the version before stays.
        """
        async with self._changing:
            await self._load(mixture)

    async def _load(self, mixture: Mixture) -> None:
        before = self._current
        self._current = await asyncio.to_thread(LoadedForest, self.ledger, mixture, self.settings, before)
        log.info("serving forest version %d", mixture.version)
        if before is not None:
            before.replace()

    async def follow(self, newer: Callable[[int], Mixture | None], seconds: float) -> None:
        """Serves each newer version. `newer` is asked for it again and again, with the one that is served."""
        while True:
            await asyncio.sleep(seconds)
            async with self._changing:  # so that what `newer` finds never takes the place of a later change
                version = self.current.mixture.version
                try:
                    if mixture := await asyncio.to_thread(newer, version):
                        await self._load(mixture)
                except BtmError as exc:
                    log.warning("forest version %d stays: %s", version, exc)
                except Exception:  # of a store's library, say: the next look may succeed
                    log.exception("forest version %d stays", version)

    def close(self) -> None:
        """Ends the engines once nobody uses them."""
        if self._current is not None:
            self._current.replace()
