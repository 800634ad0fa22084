"""A search for a recipe by Ray Tune: it draws the trials, and its ASHA stops those that lose early.

A trial's process trains nothing and reserves next to nothing. It hands Tune what the driver measures, and the
driver has trainings and scores done by its workers, like all others. So Ray alone schedules, a rung is an
artifact like any other, and Tune keeps nothing that a killed search would miss.
"""

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeAlias

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from btm_cluster.errors import StepError, one_line
from btm_cluster.plan import SearchPlan
from btm_cluster.storage.scratch import scratch_folder

SHARE, PERPLEXITY = "share", "development"
NODE_SHARE = 1e-3
"""Of the driver's node, which a trial reserves, since Tune wants something reserved: no CPU, which a training
may need whole."""
END_SECONDS = 60.0
"""How long the end of Tune is waited for."""
logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)  # it looks for files of results in the end
Show: TypeAlias = Callable[[str], None]
Event: TypeAlias = tuple[str, int, Mapping[str, Any]]
"""An event's name, the number of its trial, and the trial's settings or result."""


@contextmanager
def searching(space: SearchPlan, show: Show) -> Iterator["TuneSearch"]:
    """A search, under way in a thread of its own until it is over or left."""
    search = TuneSearch(space)
    with scratch_folder() as folder:
        search.start(_tuner(space, search, folder.as_posix(), show))
        try:
            yield search
        finally:
            search.end()
            show("")


class TuneSearch:
    """The trials of a search, as Tune starts and stops them."""

    def __init__(self, space: SearchPlan) -> None:
        self._space, self._events = space, SimpleQueue[Event]()
        # Beside the driver, with which it ends.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.results = ray.remote(_Results).options(num_cpus=0, scheduling_strategy=here).remote()
        self.is_left = threading.Event()
        self._under_way: dict[int, Mapping[str, float]] = {}
        self._ended: set[int] = set()
        self._thread: threading.Thread | None = None

    def start(self, tuner: tune.Tuner) -> None:
        def fit() -> None:
            try:
                tuner.fit()
                self.hear("over", 0, {"cause": "it ended before its trials"})
            except Exception as exc:  # of whatever kind Tune has for it
                self.hear("over", 0, {"cause": f"{type(exc).__name__}: {one_line(exc)}"})

        self._thread = threading.Thread(target=fit, name="tune", daemon=True)
        self._thread.start()

    def hear(self, what: str, trial: int, told: Mapping[str, Any]) -> None:
        """Takes note of an event, in the thread of Tune."""
        self._events.put((what, trial, told))

    def under_way(self) -> Mapping[int, Mapping[str, float]]:
        while len(self._under_way) < min(self._space.at_once, self._space.trials - len(self._ended)):
            self._take_event()
        return dict(self._under_way)

    def tell(self, trial: int, share: float, perplexity: float | None) -> None:
        told = None if perplexity is None else {SHARE: share, PERPLEXITY: perplexity}
        ray.get(self.results.tell.remote(trial, told))
        awaited = "completed" if told is None else "result"
        while self._take_event() != (awaited, trial):  # Tune decides before the next trial is told
            pass

    def _take_event(self) -> tuple[str, int]:
        """Waits for the next event of Tune.

        Raises:
            StepError: a trial's process failed, or Tune did.
        """
        what, trial, told = self._events.get()
        if what in ("failed", "over"):
            raise StepError(
                "the search for a recipe failed in Ray Tune",
                found=told["cause"],
                remedy="the same command goes on with it: what was trained is kept",
            )
        if what == "started":
            self._under_way[trial] = told
        elif what == "completed" or told.get("done"):
            self._under_way.pop(trial, None)
            self._ended.add(trial)
        return what, trial

    def end(self) -> None:
        """Ends all trials, and Tune."""
        self.is_left.set()
        self.results.close.remote()
        assert self._thread is not None
        self._thread.join(END_SECONDS)
        ray.kill(self.results)


class _Results:
    """Actor with a queue for each trial, from which its process takes what the driver has measured."""

    def __init__(self) -> None:
        self._measured: defaultdict[int, asyncio.Queue[dict[str, float] | None]] = defaultdict(asyncio.Queue)
        self._is_closed = False

    async def tell(self, trial: int, measured: dict[str, float] | None) -> None:
        await self._measured[trial].put(measured)

    async def next(self, trial: int) -> dict[str, float] | None:
        return None if self._is_closed else await self._measured[trial].get()

    async def close(self) -> None:
        """Nothing more is measured."""
        self._is_closed = True
        for measured in self._measured.values():
            await measured.put(None)


def _trial(_: Mapping[str, float], results: Any) -> None:
    """A trial for Tune: what is measured of it, until nothing more is or Tune stops it."""
    number = _number(tune.get_context().get_trial_id())
    while (measured := ray.get(results.next.remote(number))) is not None:
        tune.report(measured)


def _number(trial_id: str) -> int:
    """From 1, in the order in which trials are drawn."""
    return int(trial_id.rsplit("_", 1)[1]) + 1


def _tuner(space: SearchPlan, search: TuneSearch, folder: str, show: Show) -> tune.Tuner:
    """Tune's settings; its own notes, which nobody needs afterwards, go to `folder`."""
    node = f"node:{ray.util.get_node_ip_address()}"
    trainable = tune.with_resources(tune.with_parameters(_trial, results=search.results), {node: NODE_SHARE})
    param_space = _param_space(space)
    asha = ASHAScheduler(
        time_attr=SHARE,
        grace_period=space.first_rung,
        reduction_factor=space.reduction_factor,
        max_t=1.0,
    )
    drawn = BasicVariantGenerator(random_state=space.random_seed, max_concurrent=space.at_once)
    return tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=tune.TuneConfig(
            metric=PERPLEXITY,
            mode="min",
            num_samples=space.samples,
            scheduler=asha,
            search_alg=drawn,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=folder,
            verbose=1,
            callbacks=[_SearchCallback(search)],
            stop=_SearchStopper(search),
            progress_reporter=_Table(param_space, show),
        ),
    )


def _name(trial: Trial) -> str:
    return f"trial-{_number(trial.trial_id)}"


def _param_space(space: SearchPlan) -> dict[str, Any]:
    """The plan's space in Tune's terms."""
    found: dict[str, Any] = {}
    rate, blocks = space.learning_rate, space.blocks_per_domain_update
    if rate is not None and rate.grid:
        found["learning_rate"] = tune.grid_search(list(rate.grid))
    elif rate is not None and rate.uniform:
        found["learning_rate"] = tune.uniform(*rate.uniform)
    elif rate is not None and rate.loguniform:
        found["learning_rate"] = tune.loguniform(*rate.loguniform)
    if blocks is not None:
        found["blocks_per_domain_update"] = tune.grid_search(list(blocks.grid))
    return found


class _NotPickled:
    """Leaves out its state where Tune saves its settings to resume from them: a search begins anew from the store."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _SearchCallback(_NotPickled, TrialProgressCallback):
    """Tells the search of what Tune does, once that is decided.

    In the place of the callback of Tune that prints each result to standard output.
    """

    def __init__(self, search: TuneSearch) -> None:
        self._search = search

    def on_trial_start(self, *, trial: Trial, **_: Any) -> None:
        self._hear("started", trial, trial.config)

    def on_trial_result(self, *, trial: Trial, result: Mapping[str, Any], **_: Any) -> None:
        self._hear("result", trial, result)

    def on_trial_complete(self, *, trial: Trial, **_: Any) -> None:
        self._hear("completed", trial, {})

    def on_trial_error(self, *, trial: Trial, **_: Any) -> None:
        self._hear("failed", trial, {"cause": f"{_name(trial)}: its process failed"})

    def _hear(self, what: str, trial: Trial, told: Mapping[str, Any]) -> None:
        self._search.hear(what, _number(trial.trial_id), told)


class _SearchStopper(_NotPickled, tune.Stopper):
    """Has Tune start no other trial once the search is left."""

    def __init__(self, search: TuneSearch) -> None:
        self._search = search

    def __call__(self, *_: Any) -> bool:
        return self._search.is_left.is_set()

    def stop_all(self) -> bool:
        return self._search.is_left.is_set()


class _Table(_NotPickled, tune.CLIReporter):
    """Tune's own table of trials, shown where it has changed, every few seconds at most."""

    def __init__(self, settings: Iterable[str], show: Show) -> None:
        columns = {name: name.split("_per_")[0].replace("_", " ") for name in settings}
        super().__init__(
            metric_columns=[SHARE, PERPLEXITY], parameter_columns=columns, print_intermediate_tables=True
        )
        self._show, self._shown = show, ""

    def report(self, trials: list[Trial], done: bool, *system: str) -> None:
        lines = self._progress_str(trials, done, *system).splitlines()
        table = "\n".join(line for line in lines if line.startswith(("Number of trials", "+", "|")))
        if table != self._shown:
            self._shown = table
            self._show(table)
