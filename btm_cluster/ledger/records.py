"""Records of a growing forest in its store, beside artifacts and versions:
small documents, each created once.

    expansions/<id>.json               where a new domain's expert branches, settled before it is trained
    baselines/<model>.json             a DEMix or a Transformer-LM's milestone, and its forest version
    held/<id>-<version>.json           an expert without which version n of the forest was better
    quarantine/<id>.json               what the inbox had under a name and was refused, until it is replaced
    logs/<run>/<training>/…            TensorBoard's curves, written anew while a training runs
    logs/<run>/timeline.json           what the run did, when and where (`timelines.py`)
    logs/<run>/report.html             the run's page, which quotes test text

Knows what they say and where they lie; decides nothing.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

from btm_cluster.forest import Forest
from btm_cluster.identity import identity_of
from btm_cluster.ledger import THREADS, Ledger, Ref, check_place, known_form, list_ours
from btm_cluster.requests import Start

EXPANSIONS, HELD, QUARANTINE, LOGS = "expansions/", "held/", "quarantine/", "logs/"
PINS, BASELINES = "pins/", "baselines/"
REPORT_FILE = "report.html"
"""Name of the page in each run's folder below LOGS."""


@dataclass(frozen=True)
class BranchPoint:
    """Where a domain's expert starts: fixed before it does, so that a forest
    that grows meanwhile changes nothing."""

    domain: str
    text: str
    seed: str
    base_version: int
    base_hash: str
    start: Start
    contents: str
    """Names and sizes of the files in the inbox that the text was read from, as a
    hash; empty for a domain of the plan."""

    @property
    def identity(self) -> str:
        return branch_point_identity(self.domain, self.text, self.seed)


@dataclass(frozen=True)
class Held:
    """An expert that was trained and not merged: what the forest would have lost."""

    branch_point: str
    model: str
    base_version: int
    rise: float
    reason: str


@dataclass(frozen=True)
class Refusal:
    """A folder of the inbox that was refused."""

    folder: str
    reason: str
    identity: str = ""
    """Identity of the files as they lay there; records of older stores have it in their key alone."""


@dataclass(frozen=True)
class Baseline:
    """A baseline that was trained for a forest: kept as long as the store has the forest."""

    name: str
    """`transformer-lm`, for each of its milestones but the seed, or `demix`."""
    model: str
    version: int
    """The version of the forest that it was trained for."""


def record_baseline(ledger: Ledger, baseline: Baseline) -> None:
    """Notes a baseline, once."""
    ledger.documents.create(_baseline_key(baseline.model), asdict(baseline))


def read_baseline(ledger: Ledger, key: str) -> Baseline | None:
    """The baseline at a key."""
    record = ledger.documents.read(key)
    if record is None:
        return None
    with known_form(key):
        found = Baseline(**record.body)
    check_place(key, _baseline_key(found.model))
    return found


def list_baselines(ledger: Ledger) -> list[Baseline]:
    """Every one."""
    found = (read_baseline(ledger, entry.key) for entry in list_ours(ledger.storage, BASELINES))
    return [baseline for baseline in found if baseline is not None]


def branch_point_identity(domain: str, text: str, seed: str) -> str:
    """The identity of the start of a domain's expert, which its branch point settles."""
    return identity_of({"domain": domain, "text": text, "seed": seed})


def settle_branch_point(ledger: Ledger, wanted: BranchPoint) -> BranchPoint:
    """Pins a start, and returns it: ours, or that of whoever was first."""
    body = {name: value for name, value in asdict(wanted).items() if name != "start"}
    start = {"model": str(wanted.start.model), "keep_optimizer": wanted.start.keep_optimizer}
    ledger.documents.create(_pin_key(wanted.identity), body | {"start": start})
    standing = find_branch_point(ledger, wanted.identity)
    assert standing is not None
    return standing


def find_branch_point(ledger: Ledger, identity: str) -> BranchPoint | None:
    """The branch point of that identity, or None where none was settled."""
    return read_branch_point(ledger, _pin_key(identity))


def read_branch_point(ledger: Ledger, key: str) -> BranchPoint | None:
    """The branch point at a key."""
    record = ledger.documents.read(key)
    if record is None:
        return None
    with known_form(key):
        body = dict(record.body)
        start = body.pop("start")
        found = BranchPoint(**body, start=Start(Ref.parse(start["model"]), start["keep_optimizer"]))
        own = _pin_key(found.identity)
    check_place(key, own)
    return found


def list_branch_points(ledger: Ledger) -> Iterator[BranchPoint]:
    """Every one."""
    keys = [entry.key for entry in list_ours(ledger.storage, EXPANSIONS)]
    with ThreadPoolExecutor(THREADS) as pool:
        yield from (
            found for found in pool.map(lambda key: read_branch_point(ledger, key), keys) if found is not None
        )


def open_branch_points(ledger: Ledger, forest: Forest | None) -> list[BranchPoint]:
    """Pins of experts that are neither in the forest nor taken out of it:
    expansions in the making, or held back."""
    return [one for one in list_branch_points(ledger) if is_open(one, forest)]


def is_open(point: BranchPoint, forest: Forest | None) -> bool:
    """Whether an expert is neither in the forest nor taken out of it."""
    return forest is None or point.domain not in (*forest.domains, *forest.withdrawn)


def hold(ledger: Ledger, held: Held) -> None:
    """Notes that an expert is held back from a version."""
    ledger.documents.create(_held_key(held), asdict(held))


def newest_held(ledger: Ledger) -> dict[str, Held]:
    """Experts that are held back, by the identity of their branch point: the newest judgement of each."""
    newest = {_stem(entry.key).partition("-")[0]: entry.key for entry in list_ours(ledger.storage, HELD)}
    found = ((identity, read_held(ledger, key)) for identity, key in newest.items())
    return {identity: held for identity, held in found if held is not None}


def read_held(ledger: Ledger, key: str) -> Held | None:
    """The judgement at a key."""
    record = ledger.documents.read(key)
    if record is None:
        return None
    with known_form(key):
        found = Held(**record.body)
        own = _held_key(found)
    check_place(key, own)
    return found


def quarantine(ledger: Ledger, folder: str, identity: str, reason: str) -> None:
    """Notes that what the inbox has in `folder` was refused.

    `identity` is that of the files as they lie there.
    """
    ledger.documents.create(_refusal_key(identity), asdict(Refusal(folder, reason, identity)))


def find_refusals(ledger: Ledger, identities: Iterable[str]) -> dict[str, Refusal]:
    """Those of some files, by their identity: a store keeps many more."""
    return _read_refusals(ledger, [_refusal_key(identity) for identity in identities])


def list_refusals(ledger: Ledger) -> dict[str, Refusal]:
    """Every refusal, by the identity of what was refused."""
    return _read_refusals(ledger, [entry.key for entry in list_ours(ledger.storage, QUARANTINE)])


def read_refusal(ledger: Ledger, key: str) -> Refusal | None:
    """The refusal at a key."""
    record = ledger.documents.read(key)
    if record is None:
        return None
    with known_form(key):
        found = Refusal(**record.body)
    check_place(key, _refusal_key(found.identity or _stem(key)))
    return found


def _read_refusals(ledger: Ledger, keys: list[str]) -> dict[str, Refusal]:
    with ThreadPoolExecutor(THREADS) as pool:
        read = zip(keys, pool.map(lambda key: read_refusal(ledger, key), keys), strict=True)
        return {_stem(key): found for key, found in read if found is not None}


def _baseline_key(model: str) -> str:
    return f"{BASELINES}{model}.json"


def _pin_key(identity: str) -> str:
    return f"{EXPANSIONS}{identity}.json"


def _held_key(held: Held) -> str:
    return f"{HELD}{held.branch_point}-{held.base_version:06d}.json"


def _refusal_key(identity: str) -> str:
    return f"{QUARANTINE}{identity}.json"


def _stem(key: str) -> str:
    return PurePosixPath(key).stem
