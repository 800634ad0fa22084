"""What a living forest notes down in its store, beside artifacts and versions: small documents, each created once.

    expansions/<id>.json               where a new domain's expert branches, settled before anything of it is made
    held/<id>-<version>.json           an expert without which version n of the forest was better
    quarantine/<id>.json               what the inbox had under a name and was refused, until it is replaced

    logs/<run>/<training>/…            TensorBoard's curves, written anew while a training runs

Knows what they say and where they lie; decides nothing.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from btm_cluster.forest import Forest, Parent, identity_of
from btm_cluster.ledger import THREADS, Ledger, Ref
from btm_cluster.requests import Start

EXPANSIONS, HELD, QUARANTINE, TOMBSTONES, LOGS = "expansions/", "held/", "quarantine/", "tombstones/", "logs/"


@dataclass(frozen=True)
class BranchPoint:
    """Where a domain's expert starts: fixed before it does, so that a forest that grows meanwhile changes nothing."""

    domain: str
    text: str
    seed: str
    base_version: int
    base_hash: str
    start: Start
    contents: str
    """Names and sizes of the files in the inbox that the text was read from, as a hash; empty for a domain of the plan."""

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


def branch_point_identity(domain: str, text: str, seed: str) -> str:
    """Of the start of a domain's expert: the question that its branch point answers."""
    return identity_of({"domain": domain, "text": text, "seed": seed})


def settle_branch_point(ledger: Ledger, wanted: BranchPoint) -> BranchPoint:
    """Pins a start, and returns it: ours, or that of whoever was first."""
    body = {name: value for name, value in asdict(wanted).items() if name != "start"}
    start = {
        "model": wanted.start.model.identity,
        "parents": [asdict(parent) for parent in wanted.start.parents],
        "keep_optimizer": wanted.start.keep_optimizer,
    }
    ledger.documents.create(_pin_key(wanted.identity), body | {"start": start})
    standing = find_branch_point(ledger, wanted.identity)
    assert standing is not None
    return standing


def find_branch_point(ledger: Ledger, identity: str) -> BranchPoint | None:
    """The branch point of that identity, or None where none was settled."""
    record = ledger.documents.read(_pin_key(identity))
    if record is None:
        return None
    body = dict(record.body)
    start = body.pop("start")
    parents = tuple(Parent(**parent) for parent in start["parents"])
    return BranchPoint(**body, start=Start(Ref("model", start["model"]), parents, start["keep_optimizer"]))


def list_branch_points(ledger: Ledger) -> Iterator[BranchPoint]:
    """Every one."""
    identities = [_stem(entry.key) for entry in ledger.storage.list(EXPANSIONS)]
    with ThreadPoolExecutor(THREADS) as pool:
        yield from (
            found for found in pool.map(lambda one: find_branch_point(ledger, one), identities) if found is not None
        )


def open_branch_points(ledger: Ledger, forest: Forest | None) -> list[BranchPoint]:
    """Pins of experts that are neither in the forest nor taken out of it: expansions in the making, or held back."""
    settled = () if forest is None else (*forest.domains, *forest.withdrawn)
    return [one for one in list_branch_points(ledger) if one.domain not in settled]


def hold(ledger: Ledger, held: Held) -> None:
    """Notes that an expert is held back from a version."""
    ledger.documents.create(f"{HELD}{held.branch_point}-{held.base_version:06d}.json", asdict(held))


def newest_held(ledger: Ledger) -> dict[str, Held]:
    """What is held back, by the identity of its branch point: the newest judgement of each."""
    newest = {_stem(entry.key).partition("-")[0]: entry.key for entry in ledger.storage.list(HELD)}
    found: dict[str, Held] = {}
    for identity, key in newest.items():
        record = ledger.documents.read(key)
        if record is not None:
            found[identity] = Held(**record.body)
    return found


def quarantine(ledger: Ledger, folder: str, identity: str, reason: str) -> None:
    """Notes that what the inbox has in `folder` was refused. `identity` is that of the files as they lie there."""
    ledger.documents.create(f"{QUARANTINE}{identity}.json", {"folder": folder, "reason": reason})


def list_quarantine(ledger: Ledger) -> dict[str, Mapping[str, Any]]:
    """Every refusal, by the identity of what was refused."""
    keys = [entry.key for entry in ledger.storage.list(QUARANTINE)]
    with ThreadPoolExecutor(THREADS) as pool:
        read = zip(keys, pool.map(ledger.documents.read, keys), strict=True)
        return {_stem(key): record.body for key, record in read if record is not None}


def _pin_key(identity: str) -> str:
    return f"{EXPANSIONS}{identity}.json"


def _stem(key: str) -> str:
    return PurePosixPath(key).stem
