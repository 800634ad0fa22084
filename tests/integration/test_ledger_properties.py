"""Whatever is done to a store, in any order, and wherever it crashes: the
ledger and the forest log against a model.

A crash is a process that ends at one store operation, before or after that took effect. What follows it is
what follows in the product: the same thing is done again.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from btm_cluster.algorithm import merge
from btm_cluster.errors import IntegrityError, MissingError, StoreError, UserError
from btm_cluster.forest import Expert, Forest, Foundation, Parent, describe_forest, merge_into
from btm_cluster.identity import identity_of
from btm_cluster.ledger import (
    Artifact,
    ForestLog,
    Inputs,
    Ledger,
    Origin,
    Ref,
    blob_key,
    identity_by,
    version_bodies,
)
from btm_cluster.ledger.version_bodies import WHOLE_BELOW
from btm_cluster.operations.gc import collect, find_garbage
from btm_cluster.operations.verify import verify
from tests.memory_store import Crash, InMemory, without_threads

Result = TypeVar("Result")
KEEP_VERSIONS = 2
GRACE_SECONDS = 4.0


def made(kind: str, recipe: Mapping[str, Any], **inputs: tuple[Ref, ...]) -> Origin:
    """What the product's requests are: an artifact's name, and what it is made from."""
    return Origin(Ref(kind, identity_by(kind, recipe, inputs)), recipe, inputs)


TOKENIZER = made("tokenizer", {"made": "tokenizer"})
SEED = made("model", {"made": "seed"}, texts=(), tokenizer=(TOKENIZER.ref,), start=())
FOUNDATION = Foundation(SEED.ref.identity, TOKENIZER.ref.identity, "config", 1024, (("law", "text-law"),))


class WatchedLog(ForestLog):
    """A log that remembers what it said is in it."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger.storage, ledger.documents)
        self.promised: list[Forest] = []

    def append(self, forest: Forest) -> bool:
        appended = super().append(forest)
        if appended:
            self.promised.append(replace(forest, parent=None))
        return appended


@pytest.fixture(autouse=True, scope="module")
def _no_threads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        without_threads(patch)
        yield


# What is committed: small, but as the product lays it out


def text_of(domain: str, edition: int = 0) -> Origin:
    identity = identity_of({"text": domain, "edition": edition})
    return Origin(Ref("text", identity), {"documents": identity}, {})


def expert_of(domain: str, edition: int = 0, parent: Ref = SEED.ref) -> Origin:
    texts = (text_of(domain, edition).ref,)
    return made("model", {"made": "expert"}, texts=texts, tokenizer=(TOKENIZER.ref,), start=(parent,))


def written(folder: Path, contents: Mapping[str, bytes]) -> dict[str, Path]:
    """Local files to commit."""
    paths = {}
    for name, data in contents.items():
        paths[name] = folder / f"{name}-{data.hex()}"
        if not paths[name].exists():
            paths[name].write_bytes(data)
    return paths


def model_files(folder: Path, weights: bytes) -> dict[str, Path]:
    """All models share a config, and those with the same weights share these."""
    return written(folder, {"model.safetensors": weights, "config.json": b"{}"})


def train_seed(ledger: Ledger, folder: Path) -> Forest:
    """Version 0, made once."""
    founded = ledger.log.newest()
    if founded is not None:
        return founded
    ledger.commit(TOKENIZER, written(folder, {"tokenizer.json": b"{}"}), {})
    seed = ledger.commit(SEED, model_files(folder, b"seed"), {"role": "seed"})
    ledger.log.append(Forest(0, FOUNDATION, (), {seed.identity: seed.manifest_hash}, "founded"))
    founded = ledger.log.newest()
    assert founded is not None
    return founded


def commit_text(ledger: Ledger, folder: Path, domain: str, edition: int = 0) -> Ref:
    text = text_of(domain, edition)
    if ledger.find(text.ref) is None:
        ledger.commit(text, written(folder, {"text": text.ref.identity[:4].encode()}), {})
    return text.ref


def commit_expert(
    ledger: Ledger, folder: Path, domain: str, edition: int, weights: bytes, parent: Ref = SEED.ref
) -> Expert:
    """Commits an expert and the text that it was trained on."""
    text = commit_text(ledger, folder, domain, edition)
    expert = expert_of(domain, edition, parent)
    model = ledger.commit(expert, model_files(folder, weights), {"role": "expert"})
    sha256 = model.blob("model.safetensors").sha256
    return Expert(domain, model.identity, sha256, text.identity, (Parent(parent.identity, 1.0),))


def without(forest: Forest, domain: str) -> Forest:
    """The next version, as the removal of a domain makes it."""
    experts = tuple(expert for expert in forest.experts if expert.domain != domain)
    named = {forest.foundation.seed, *(expert.identity for expert in experts)}
    return replace(
        forest,
        version=forest.version + 1,
        experts=experts,
        manifests={identity: known for identity, known in forest.manifests.items() if identity in named},
        reason=f"removed {domain}",
        parent=None,
    )


# Any sequence of operations, with a crash in any of them


@dataclass(frozen=True)
class Standing:
    """An artifact as the model knows it."""

    manifest_hash: str
    made: float
    needs: tuple[Ref, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A training's latest checkpoint as the model knows it."""

    update: int
    moments: bytes
    made: float
    inputs: Inputs


def needs_of(made: Origin) -> tuple[Ref, ...]:
    """A model is whole without its start."""
    return (*made.inputs["texts"], *made.inputs["tokenizer"])


CRASHES = st.tuples(st.integers(0, 9) | st.integers(10, 70), st.booleans())
"""At which operation, the first being 1, and whether before it took effect.

Most things are done before the 70th.
"""
DOMAINS = st.sampled_from(["code", "law", "news"])
EDITIONS = st.sampled_from([0, 0, 0, 1])
WEIGHTS = st.sampled_from([b"w0", b"w1"])
DRIVERS = st.integers(0, 1)
CHOICES = st.integers(0, 100)


class Store(RuleBasedStateMachine):
    """A store, what two drivers believe of it, and what it should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = tempfile.TemporaryDirectory()
        self.folder = Path(self.scratch.name)
        self.storage = InMemory(self.folder)
        self.ledger = Ledger(self.storage)
        self.ledger.log = self.watched = WatchedLog(self.ledger)
        self.held: list[Forest] = []
        self.log: list[Forest] = []
        self.artifacts: dict[Ref, Standing] = {}
        self.experts: dict[str, Expert] = {}
        """Every expert that was ever committed, by identity."""
        self.training: dict[str, Checkpoint] = {}
        self.pinned: set[int] = set()

    def teardown(self) -> None:
        self.scratch.cleanup()

    def attempt(self, act: Callable[[], Result], crash: tuple[int, bool]) -> Result:
        """Does it; after a crash, does it again."""
        operation, first = crash
        self.storage.arm(operation, **{"before" if first else "after": self.storage.crash})
        try:
            return act()
        except Crash:
            self.storage.arm(0)
            return act()
        finally:
            self.storage.arm(0)

    def stands(self, forest: Forest) -> bool:
        standing = {
            ref.identity: known.manifest_hash for ref, known in self.artifacts.items() if ref.kind == "model"
        }
        return all(standing.get(identity) == known for identity, known in forest.manifests.items())

    def kept(self) -> set[int]:
        return {*range(len(self.log))[-KEEP_VERSIONS:], *self.pinned}

    def found(self, ref: Ref, needs: tuple[Ref, ...]) -> None:
        """What was committed just now, or stood before."""
        if ref not in self.artifacts:
            self.artifacts[ref] = Standing(self.ledger.get(ref).manifest_hash, self.storage.now, needs)

    @initialize(crash=CRASHES)
    def train_seed(self, crash: tuple[int, bool]) -> None:
        founded = self.attempt(lambda: train_seed(self.ledger, self.folder), crash)
        self.held = [founded, founded]
        self.log = [founded]
        self.found(TOKENIZER.ref, ())
        self.found(SEED.ref, needs_of(SEED))
        assert founded.manifests == {SEED.ref.identity: self.artifacts[SEED.ref].manifest_hash}

    @rule(
        domain=DOMAINS,
        edition=EDITIONS,
        parent=CHOICES,
        weights=WEIGHTS,
        merger=st.none() | DRIVERS,
        crash=CRASHES,
    )
    def commit(
        self,
        domain: str,
        edition: int,
        parent: int,
        weights: bytes,
        merger: int | None,
        crash: tuple[int, bool],
    ) -> None:
        standing = [SEED.ref, *(ref for i in self.experts if (ref := Ref("model", i)) in self.artifacts)]
        start = standing[parent % min(len(standing), 3)]
        expert = self.attempt(
            lambda: commit_expert(self.ledger, self.folder, domain, edition, weights, start), crash
        )
        self.experts[expert.identity] = expert
        self.found(Ref("text", expert.text), ())
        self.found(Ref("model", expert.identity), needs_of(expert_of(domain, edition, start)))
        if merger is not None:
            self.merge_experts(merger, [expert], crash)

    @precondition(lambda self: self.experts)
    @rule(
        driver=DRIVERS,
        is_stale=st.booleans(),
        chosen=st.lists(CHOICES, min_size=1, max_size=2),
        crash=CRASHES,
    )
    def merge(self, driver: int, is_stale: bool, chosen: list[int], crash: tuple[int, bool]) -> None:
        known = list(self.experts.values())
        experts = list({e.domain: e for e in (known[choice % len(known)] for choice in chosen)}.values())
        if not is_stale:
            self.read_newest(driver)
        self.merge_experts(driver, experts, crash)

    def read_newest(self, driver: int) -> None:
        newest = self.ledger.log.newest()
        assert newest is not None
        self.held[driver] = newest

    def merge_experts(self, driver: int, experts: Sequence[Expert], crash: tuple[int, bool]) -> None:
        held, newest = self.held[driver], self.log[-1]
        texts = [{expert.domain: expert.text for expert in forest.experts} for forest in (held, newest)]
        conflicts = [
            any(t.get(expert.domain, expert.text) != expert.text for expert in experts) for t in texts
        ]
        try:
            merged = self.attempt(lambda: merge(held, experts, self.ledger), crash)
        except (MissingError, IntegrityError):
            lost = [expert for expert in experts if Ref("model", expert.identity) not in self.artifacts]
            assert lost or not self.stands(held)
        except UserError:
            assert any(conflicts)
        else:
            self.held[driver] = merged
            together = {expert.domain: expert for expert in experts} | {e.domain: e for e in newest.experts}
            grows = len(together) > len(newest.experts)
            if all(expert.domain in held.domains for expert in experts) and len(
                self.ledger.log.versions()
            ) == len(self.log):
                # This driver has seen them in the forest: whoever removed them since has the last word.
                return
            assert not conflicts[1]
            if grows:
                self.log.append(replace(merged, parent=None))
                assert merged.experts == tuple(together[domain] for domain in sorted(together))
                expected = {expert.identity for expert in merged.experts} | {SEED.ref.identity}
                assert expected <= set(merged.manifests)
                assert self.stands(merged)

    @precondition(lambda self: len(self.log) > 1)
    @rule(driver=DRIVERS, is_stale=st.booleans(), domain=DOMAINS, crash=CRASHES)
    def remove(self, driver: int, is_stale: bool, domain: str, crash: tuple[int, bool]) -> None:
        if not is_stale:
            self.read_newest(driver)

        def remove() -> None:
            forest: Forest | None = self.held[driver]
            while forest is not None and domain in forest.domains:
                if self.ledger.log.append(without(forest, domain)):
                    return
                forest = self.ledger.log.newest()

        self.attempt(remove, crash)
        if domain in self.held[driver].domains and domain in self.log[-1].domains:
            self.log.append(without(self.log[-1], domain))

    @precondition(lambda self: len(self.log) > 1)
    @rule(version=CHOICES, crash=CRASHES)
    def roll_back(self, version: int, crash: tuple[int, bool]) -> None:
        target = self.log[version % len(self.log)]

        def next_version(newest: Forest) -> Forest:
            reason = f"rolled back to version {target.version}"
            return replace(target, version=newest.version + 1, reason=reason, parent=None)

        def roll_back() -> None:
            newest = self.ledger.log.newest()
            assert newest is not None
            if newest.experts != target.experts:
                for identity, manifest_hash in target.manifests.items():
                    self.ledger.check_standing(Ref("model", identity), manifest_hash)
                assert self.ledger.log.append(next_version(newest))

        try:
            self.attempt(roll_back, crash)
        except (MissingError, IntegrityError):
            assert not self.stands(target)
        else:
            if self.log[-1].experts != target.experts:
                self.log.append(next_version(self.log[-1]))

    @precondition(lambda self: len(self.log) > 1)
    @rule(version=CHOICES, crash=CRASHES)
    def pin_or_unpin(self, version: int, crash: tuple[int, bool]) -> None:
        standing = [forest.version for forest in self.log if self.stands(forest)]
        chosen = standing[version % len(standing)]
        if chosen in self.pinned:
            self.attempt(lambda: self.ledger.unpin(chosen), crash)
        else:
            self.attempt(lambda: self.ledger.pin(chosen), crash)
        self.pinned ^= {chosen}

    @rule(domain=DOMAINS, more=st.integers(0, 2), moments=WEIGHTS, crash=CRASHES)
    def save(self, domain: str, more: int, moments: bytes, crash: tuple[int, bool]) -> None:
        expert = expert_of(domain)
        identity = expert.ref.identity
        before = self.training.get(identity)
        update = (before.update if before else 0) + more
        files = written(self.folder, {"model.safetensors": b"w0", "moments": moments})

        def save() -> None:
            commit_text(self.ledger, self.folder, domain)
            self.ledger.save_training(expert, update, files, {"how": {}})

        self.attempt(save, crash)
        self.found(text_of(domain).ref, ())
        if before is None or more:  # a training saved twice at one update stays as it was first
            self.training[identity] = Checkpoint(update, moments, self.storage.now, expert.inputs)

    @precondition(lambda self: self.training)
    @rule(domain=DOMAINS, clears=st.booleans(), crash=CRASHES)
    def resume_or_clear(self, domain: str, clears: bool, crash: tuple[int, bool]) -> None:
        identity = expert_of(domain).ref.identity

        def resume() -> Checkpoint | None:
            latest = self.ledger.latest_training(identity)
            if latest is None:
                return None
            assert self.ledger.open_file(latest, "model.safetensors").read_bytes() == b"w0"
            moments = self.ledger.open_file(latest, "moments").read_bytes()
            known = self.training[identity]
            return replace(known, update=latest.recipe["update"], moments=moments)

        if clears:
            self.attempt(lambda: self.ledger.clear_training(identity), crash)
            self.training.pop(identity, None)
            assert not [key for key in self.storage.objects if key.startswith(f"training/{identity}/")]
        assert self.attempt(resume, crash) == self.training.get(identity)

    @rule(
        passed_seconds=st.sampled_from([GRACE_SECONDS + 1, GRACE_SECONDS - 1, 0.0]),
        grace_seconds=st.sampled_from([GRACE_SECONDS, 1.0]),
        crash=CRASHES,
    )
    def let_time_pass_and_collect(
        self, passed_seconds: float, grace_seconds: float, crash: tuple[int, bool]
    ) -> None:
        self.storage.now += passed_seconds
        oldest_kept = self.storage.now - grace_seconds
        young = {key for key in self.storage.objects if self.storage.objects[key][1] >= oldest_kept}
        self.attempt(
            lambda: collect(self.ledger, find_garbage(self.ledger, KEEP_VERSIONS, grace_seconds)), crash
        )
        assert young <= set(self.storage.objects), "something young was collected"
        roots = [ref for ref, known in self.artifacts.items() if known.made >= oldest_kept]
        self.training = {i: known for i, known in self.training.items() if known.made >= oldest_kept}
        roots += [ref for known in self.training.values() for refs in known.inputs.values() for ref in refs]
        roots += [
            Ref("model", identity) for version in self.kept() for identity in self.log[version].manifests
        ]
        reached: set[Ref] = set()
        while roots:
            ref = roots.pop()
            if ref in self.artifacts and ref not in reached:
                reached.add(ref)
                roots += self.artifacts[ref].needs
        self.artifacts = {ref: known for ref, known in self.artifacts.items() if ref in reached}
        orphans = {key for key in self.storage.objects if "blobs/" in key} - self.named_blobs()
        assert orphans <= young, "a blob that nothing names stayed"

    def named_blobs(self) -> set[str]:
        artifacts = [self.ledger.get(ref) for ref in self.artifacts]
        trainings = [self.ledger.latest_training(identity) for identity in self.training]
        return {
            blob_key(a.ref, blob.sha256)
            for a in (*artifacts, *trainings)
            if a is not None
            for blob in a.blobs
        }

    @invariant()
    def the_log_is_what_was_appended_and_a_chain_without_gaps(self) -> None:
        assert self.ledger.log.versions() == list(range(len(self.log)))
        for version, expected in enumerate(self.log):
            read = self.ledger.log.version(version)
            assert read is not None
            assert replace(read, parent=None) == replace(expected, parent=None)
            assert read.parent == (self.ledger.log.version_hash(version - 1) if version else None)
        newest = self.ledger.log.newest()
        assert newest is not None
        assert newest.experts == self.log[-1].experts
        for promised in self.watched.promised:
            assert promised == replace(self.log[promised.version], parent=None)

    @invariant()
    def exactly_what_the_model_knows_is_there(self) -> None:
        keys = {key for key in self.storage.objects if not key.startswith(("blobs/", "forest/", "clock/"))}
        expected = {f"artifacts/{ref.kind}/{ref.identity}.json" for ref in self.artifacts}
        expected |= {f"training/{i}/{checkpoint.update:09d}.json" for i, checkpoint in self.training.items()}
        expected |= {f"pins/{version:06d}.json" for version in self.pinned}
        assert {key for key in keys if key.endswith(".json")} == expected
        for ref, known in self.artifacts.items():
            assert self.ledger.get(ref).manifest_hash == known.manifest_hash
        assert set(self.ledger.log.pinned()) == self.pinned

    @invariant()
    def nothing_is_wrong_but_that_versions_outside_of_the_kept_ones_lost_models(self) -> None:
        for problem in verify(self.ledger).problems:
            named = re.match(r"forest version (\d+) names model", problem)
            assert named, problem
            assert int(named[1]) not in self.kept(), problem
            assert not self.stands(self.log[int(named[1])]), problem


@pytest.mark.parametrize("whole_below", [WHOLE_BELOW, 0], ids=["whole versions", "differences"])
def test_a_store_holds_what_the_model_says_whatever_is_done_and_wherever_it_crashes(
    whole_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version_bodies, "WHOLE_BELOW", whole_below)
    run_state_machine_as_test(
        Store, settings=settings(max_examples=60, stateful_step_count=25, deadline=None)
    )


# One scenario, with trouble at every single operation


def train(ledger: Ledger, folder: Path, domain: str) -> Expert:
    """As `steps.train`: goes on from the latest checkpoint, commits, and drops the checkpoints."""
    commit_text(ledger, folder, domain)
    expert = expert_of(domain)
    identity = expert.ref.identity
    is_done = ledger.find(expert.ref) is not None
    if not is_done:
        latest = ledger.latest_training(identity)
        start = latest.recipe["update"] if latest else 0
        if latest is not None:
            assert ledger.open_file(latest, "moments").read_bytes() == b"moments of %d" % start
        for update in range(start + 1, 3):
            files = written(folder, {"moments": b"moments of %d" % update, "model.safetensors": b"halfway"})
            ledger.save_training(expert, update, files, {"how": {}})
    committed = commit_expert(ledger, folder, domain, 0, b"weights of " + domain.encode())
    if not is_done:
        ledger.clear_training(identity)
    return committed


def tidy(storage: InMemory) -> None:
    storage.now += GRACE_SECONDS + 1
    ledger = Ledger(storage)
    collect(ledger, find_garbage(ledger, KEEP_VERSIONS, GRACE_SECONDS))


def run_scenario(storage: InMemory) -> None:
    """Trains the seed and two experts, merges them, and collects an average that nothing needs."""
    ledger, folder = Ledger(storage), storage.folder
    forest = train_seed(ledger, folder)
    experts = [train(ledger, folder, domain) for domain in ("law", "code")]
    average = made(
        "model", {"weights": [0.5, 0.5]}, models=tuple(Ref("model", e.identity) for e in experts), fit=()
    )
    ledger.commit(average, model_files(folder, b"average"), {"role": "average"})
    merge(forest, experts, ledger)
    tidy(storage)


def outcome(storage: InMemory) -> tuple[dict[str, Any], set[str]]:
    """The forest and the live keys, once what was left behind grew old and was collected."""
    tidy(storage)
    ledger = Ledger(storage)
    assert verify(ledger).problems == ()
    forest = ledger.log.newest()
    assert forest is not None
    return describe_forest(forest), set(storage.objects)


def unanswered() -> None:
    raise StoreError("took effect, and the answer was lost")


@pytest.mark.parametrize("trouble", ["crash before", "crash after", "StoreError after"])
def test_whatever_single_operation_ends_a_run_the_same_run_again_ends_as_an_undisturbed_one(
    trouble: str, tmp_path: Path
) -> None:
    undisturbed = InMemory(tmp_path)
    run_scenario(undisturbed)
    operations, expected = undisturbed.operations, outcome(undisturbed)
    assert [expert["domain"] for expert in expected[0]["experts"]] == ["code", "law"]
    differing = {}
    for operation in range(1, operations + 1):
        storage = InMemory(tmp_path)
        fail = unanswered if trouble.startswith("StoreError") else storage.crash
        storage.arm(operation, **{trouble.split()[1]: fail})
        with pytest.raises((Crash, StoreError)):
            run_scenario(storage)
        storage.arm(0)
        run_scenario(storage)
        forest, keys = outcome(storage)
        assert forest == expected[0], f"{trouble} operation {operation}"
        if keys != expected[1]:
            differing[operation] = keys ^ expected[1]
    assert differing == {}, f"keys that were lost or left by a {trouble} one of {operations} operations"


def test_an_operation_that_is_done_twice_since_its_answer_was_lost_changes_nothing(tmp_path: Path) -> None:
    undisturbed = InMemory(tmp_path)
    run_scenario(undisturbed)
    operations, expected = undisturbed.operations, outcome(undisturbed)
    for operation in range(1, operations + 1):
        storage = InMemory(tmp_path)
        storage.arm(operation, repeats=True)
        run_scenario(storage)
        assert outcome(storage) == expected, f"operation {operation}"


@pytest.fixture
def storage(tmp_path: Path) -> InMemory:
    return InMemory(tmp_path)


@pytest.fixture
def ledger(storage: InMemory) -> Ledger:
    return Ledger(storage)


def make_expert(ledger: Ledger, folder: Path, domain: str, parent: Ref = SEED.ref) -> Expert:
    return commit_expert(ledger, folder, domain, 0, b"weights of " + domain.encode(), parent)


def next_version(forest: Forest, domain: str) -> Forest:
    expert = Expert(domain, f"expert-{domain}", "weights", f"text-{domain}", ())
    return merge_into(forest, [expert], {}, f"added {domain}")


def test_an_append_whose_answer_was_lost_knows_its_own_version_from_anothers(
    ledger: Ledger, storage: InMemory, tmp_path: Path
) -> None:
    founded = train_seed(ledger, tmp_path)
    ours, theirs = next_version(founded, "law"), next_version(founded, "code")
    # An append reads the version before, then creates: the adapter's second try hears that the key is taken.
    storage.arm(2, repeats=True)
    assert ledger.log.append(ours)
    assert ledger.log.newest() == replace(ours, parent=ledger.log.version_hash(0))
    storage.arm(2, repeats=True)
    assert not ledger.log.append(theirs)
    storage.arm(2, repeats=True)
    assert not ledger.log.append(ours), "the same content by another transaction is another's"
    assert ledger.log.newest() == replace(ours, parent=ledger.log.version_hash(0))


def test_an_append_between_whose_steps_another_was_first_says_so(
    ledger: Ledger, storage: InMemory, tmp_path: Path
) -> None:
    founded = train_seed(ledger, tmp_path)
    ours, theirs = next_version(founded, "law"), next_version(founded, "code")
    won: list[bool] = []
    storage.arm(2, before=lambda: won.append(Ledger(storage).log.append(theirs)), repeats=True)
    assert not ledger.log.append(ours)
    assert won == [True]
    newest = ledger.log.newest()
    assert newest is not None
    assert newest.domains == ("code",)


def test_another_driver_that_merges_at_any_moment_of_a_merge_loses_nobodys_expert(tmp_path: Path) -> None:
    operation, ends = 0, False
    while not ends:
        operation += 1
        storage = InMemory(tmp_path)
        ledger = Ledger(storage)
        founded = train_seed(ledger, tmp_path)
        experts = {domain: make_expert(ledger, tmp_path, domain) for domain in ("law", "code")}
        reached: list[Forest] = []

        def interrupt(storage: InMemory = storage, founded: Forest = founded, theirs: Expert = experts["code"],
                      reached: list[Forest] = reached) -> None:  # fmt: skip
            reached.append(merge(founded, [theirs], Ledger(storage)))

        storage.arm(operation, before=interrupt)
        merge(founded, [experts["law"]], ledger)
        storage.arm(0)
        ends = not reached
        newest = ledger.log.newest()
        assert newest is not None
        assert newest.domains == (("law",) if ends else ("code", "law")), f"operation {operation}"
        assert verify(ledger).problems == ()
    assert operation > 3


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_after_a_crash_while_checkpoints_are_dropped_the_latest_that_is_left_is_whole(
    first: bool, tmp_path: Path
) -> None:
    files = [written(tmp_path, {"moments": b"moments of %d" % update, "w": b"w"}) for update in range(3)]
    expert = expert_of("law")
    identity = expert.ref.identity
    operation, crashed = 0, True
    while crashed:
        operation += 1
        storage = InMemory(tmp_path)
        ledger = Ledger(storage)
        for update in (1, 2):
            ledger.save_training(expert, update, files[update], {})
        storage.arm(operation, **{"before" if first else "after": storage.crash})
        try:
            ledger.clear_training(identity)
            crashed = False
        except Crash:
            pass
        storage.arm(0)
        latest = ledger.latest_training(identity)
        for blob in latest.blobs if latest else ():
            ledger.open_file(latest, blob.name)
        assert verify(ledger).problems == (), f"operation {operation}"
    assert operation == 5


# What those found, each told by itself


def old_orphans(storage: InMemory, contents: Sequence[bytes]) -> None:
    """Blobs of an artifact whose commit never came to its end, long ago."""
    storage.arm(len(contents) + 1, before=storage.crash)
    with pytest.raises(Crash):
        commit_contents(Ledger(storage), storage.folder, contents)
    storage.arm(0)
    storage.now += GRACE_SECONDS + 1


def commit_contents(ledger: Ledger, folder: Path, contents: Sequence[bytes]) -> Artifact:
    return ledger.commit(SEED, written(folder, {data.decode(): data for data in contents}), {})


@pytest.mark.parametrize("operation", range(1, 5))
def test_a_commit_of_old_blobs_in_the_midst_of_which_they_are_collected_is_whole(
    operation: int, storage: InMemory, ledger: Ledger
) -> None:
    # Uploads renew the blobs that a commit is about to name, so that they are young: found as garbage before,
    # they stay.
    contents = [b"one", b"two"]
    old_orphans(storage, contents)
    garbage = find_garbage(ledger, KEEP_VERSIONS, GRACE_SECONDS)
    assert len(garbage.blobs) == 2
    storage.arm(operation, before=lambda: collect(Ledger(storage), garbage))
    commit_contents(ledger, storage.folder, contents)
    assert verify(ledger).problems == ()


def test_what_a_collection_that_crashed_left_of_its_clock_is_collected_by_a_later_one(
    storage: InMemory, ledger: Ledger
) -> None:
    storage.arm(2, before=storage.crash)
    with pytest.raises(Crash):
        find_garbage(ledger, KEEP_VERSIONS, GRACE_SECONDS)
    storage.arm(0)
    assert len(storage.objects) == 1
    tidy(storage)
    assert storage.objects == {}


def removed_and_collected(ledger: Ledger, storage: InMemory) -> Forest:
    """Version 1 of a forest whose expert was removed since, and collected."""
    first = merge(train_seed(ledger, storage.folder), [make_expert(ledger, storage.folder, "law")], ledger)
    assert ledger.log.append(without(first, "law"))
    for domain in ("code", "news"):
        newest = ledger.log.newest()
        assert newest is not None
        merge(newest, [make_expert(ledger, storage.folder, domain)], ledger)
    tidy(storage)
    assert ledger.find(Ref("model", first.experts[0].identity)) is None
    return first


def test_a_driver_with_a_stale_forest_merges_though_an_expert_of_that_forest_was_removed_and_collected(
    ledger: Ledger, storage: InMemory
) -> None:
    stale = removed_and_collected(ledger, storage)
    merged = merge(stale, [make_expert(ledger, storage.folder, "poems")], ledger)
    assert merged.domains == ("code", "news", "poems")


def test_a_version_whose_models_were_collected_cannot_be_pinned(ledger: Ledger, storage: InMemory) -> None:
    gone = removed_and_collected(ledger, storage)
    with pytest.raises(StoreError):
        ledger.pin(gone.version)
    assert ledger.log.pinned() == []


def test_a_version_names_no_expert_that_lost_its_domain_to_another(ledger: Ledger, storage: InMemory) -> None:
    # Named, it would never be collected, and each later merge would fail without it.
    founded = train_seed(ledger, storage.folder)
    first = make_expert(ledger, storage.folder, "law")
    merge(founded, [first], ledger)
    second = make_expert(ledger, storage.folder, "law", parent=Ref("model", first.identity))
    merged = merge(founded, [second, make_expert(ledger, storage.folder, "code")], ledger)
    assert first in merged.experts
    assert set(merged.manifests) == {SEED.ref.identity, *(expert.identity for expert in merged.experts)}
