"""The main job on a real Ray cluster: through `ray job submit`, killed,
stopped, and with an expert that fails."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from btm_cluster.algorithm import found, grow
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.port import Failure, Outcome
from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.recipes import expert_request, score_request, seed_request, seed_start
from btm_cluster.driver.run_events import RunEvents
from btm_cluster.equations.learned_gate import fit_gate_for_all, tune_gate
from btm_cluster.errors import UserError
from btm_cluster.evaluation.evaluate import forest_ensemble
from btm_cluster.evaluation.fitting import fit_request, for_all_requests, mix_request
from btm_cluster.evaluation.scoring import score_models, stack_of
from btm_cluster.evaluation.systems import CALIBRATED, GATE, PAPERS
from btm_cluster.forest import Forest
from btm_cluster.ledger import Artifact, Ledger, Ref, artifact_key
from btm_cluster.ledger.timelines import list_runs, read_timeline
from btm_cluster.mixing.fit_file import SUMS
from btm_cluster.mixing.fitting import fit_mixing, one_thread_each, shared_mixing
from btm_cluster.plan import Plan
from btm_cluster.requests import AverageRequest, TrainRequest
from btm_cluster.requests.progress import Progress
from btm_cluster.workers.on_ray import workers
from btm_cluster.workers.on_ray.lazily import LazyRayWorkers
from tests.conftest import DOMAINS, in_process
from tests.end_to_end.conftest import BIN, REPOSITORY, Btm, _wait_for, experts_in, plain, write_prepared
from tests.forked import run_forked
from tests.made import origin


def test_a_submitted_job_grows_the_same_forest_as_one_process_and_shows_itself_in_ray(
    cluster: dict[str, str], long_plan: Path, undisturbed: Forest, tmp_path: Path
) -> None:
    # From the user's own folder: the text beside the plan goes along, and the store does not.
    folder = tmp_path / "mine"
    fields = yaml.safe_load(long_plan.read_text())
    for text in (*fields["domains"], *fields["targets"]):
        (folder / "text").mkdir(parents=True, exist_ok=True)
        shutil.copy(text["text"], folder / "text" / f"{text['name']}.jsonl")
        text["text"] = f"text/{text['name']}.jsonl"
    (folder / "plan.yaml").write_text(yaml.safe_dump(fields))
    submit = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--"]
    entry = ["btm", "run", "plan.yaml", "--address", "auto"]
    with (tmp_path / "job.log").open("w") as log:
        job = subprocess.Popen([*submit, *entry], cwd=folder, env=cluster, stdout=log, stderr=log)
        metrics = _wait_for(lambda: _metrics(cluster), lambda text: "ray_btm_loss{" in text)
        assert job.wait(timeout=400) == 0, (tmp_path / "job.log").read_text()
    said = (tmp_path / "job.log").read_text()
    copies = Path(cluster["SESSION_FOLDER"]).glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*")
    assert list(copies), "where a relative store would be: plan/folder.py tells it by this path"
    assert re.search(
        r"(Worth it|Not worth it|Undecided) as an ensemble: .* against the seed on 3 test texts", said
    )
    assert experts_in(tmp_path / "store") == plain(undisturbed)
    assert re.search(r'ray_btm_updates\{[^}]*expert="(seed|kitchen|harbour|orchard)"', metrics)
    actors = subprocess.run(
        [str(BIN / "ray"), "list", "actors", "--format", "json"],
        env=cluster,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {actor["name"] for actor in json.loads(actors.stdout)}
    assert any(name.startswith("seed-") for name in names), names
    assert any(name.startswith("merge-") for name in names), names
    check_timeline(Ledger.open(str(tmp_path / "store")), undisturbed, names)


def check_timeline(ledger: Ledger, forest: Forest, actors: set[str]) -> None:
    """The one run of a store says which actors trained, scored and averaged, on which node, and what it cost."""
    (run,) = list_runs(ledger)
    seen = read_timeline(ledger, run)
    assert (seen.command, seen.outcome) == ("run", "done")
    (node,) = seen.nodes
    assert (seen.nodes[node].cpus, seen.nodes[node].gpus) == (2, 0)
    steps = [one for one in seen.events if one.what == "step"]
    assert {one.node for one in steps} == {node}
    assert all(seen.began - 1 <= one.began <= one.ended <= seen.ended + 1 for one in seen.events)
    trained = {one.label: one for one in steps if one.kind == "train"}
    assert trained.keys() >= {"seed", *forest.domains}
    assert all(trained["seed"].ended <= trained[domain].began + 1 for domain in forest.domains)
    assert {one.process for one in steps if one.kind in ("train", "average")} <= actors
    assert {one.kind for one in steps} >= {"read_text", "tokenize", "train", "score", "average"}
    held = sum(one.seconds * one.cpus for one in seen.events if one.what in ("step", "start", "failure"))
    assert seen.cpu_seconds == pytest.approx(held)


IMPORTS = """
import sys
import ray
from btm_cluster.workers.on_ray.cluster import connected

def imported():
    import datasets, random, tokenizers
    return [datasets.__file__, random.__file__, tokenizers.__file__]

class Actor:
    def imported(self):
        return imported()

with connected(sys.argv[1], dashboard=False):
    ours = imported()
    assert ray.get(ray.remote(imported).remote()) == ours
    assert ray.get(ray.remote(Actor).remote().imported.remote()) == ours
"""


def test_workers_import_what_the_driver_does_and_not_a_module_beside_the_plan(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    """Ray puts the folder that a driver is run in first on its workers' path;
    a `datasets` there hid the library."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").touch()
    for name in ("random.py", "tokenizers.py"):
        (tmp_path / name).touch()
    program = [sys.executable, "-P", "-c", IMPORTS, cluster["RAY_ADDRESS"]]
    environment = cluster | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _metrics(cluster: dict[str, str]) -> str:
    """What the node exports to Prometheus."""
    (port,) = Path(cluster["SESSION_FOLDER"], "session_latest").glob("metrics_export_port_*")
    with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text()}/metrics") as answer:
        return str(answer.read().decode())


def test_a_run_that_is_stopped_and_then_killed_resumes_to_the_very_same_forest(
    btm: Callable[..., Btm],
    grow_only: Callable[[Path], Btm],
    long_fields: dict[str, Any],
    undisturbed: Forest,
    tmp_path: Path,
) -> None:
    path = write_prepared(long_fields, undisturbed, tmp_path, has_seed=False, experts=1)
    store = tmp_path / "store"
    stopped = btm("run", str(path))
    stopped.wait_until_said(r"seed: training update [1-9]")
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.exit_code() == 130, stopped.said
    assert "saving to stop" in stopped.said
    assert list((store / "training").rglob("*.json"))
    killed = btm("run", str(path))
    killed.wait_until_said(r"(kitchen|harbour): training update")
    killed.process.kill()
    assert killed.exit_code() == -signal.SIGKILL
    last = grow_only(path)
    assert last.exit_code() == 0, last.said
    assert experts_in(store) == plain(undisturbed)
    assert not list((store / "training").rglob("*.json"))


def test_an_expert_gets_ready_while_its_seed_is_trained_and_trainers_score_other_models_too(
    connect: Callable[..., LazyRayWorkers], fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields["training"] |= {"updates": 5_000, "seed_share": 4_990 / 5_000}
    plan = Plan.model_validate(fields)
    prepared = prepare(plan, driver := in_process(plan))
    seed, (domain, *_) = seed_request(prepared), prepared.domains
    expert = expert_request(prepared, domain, seed_start(prepared, seed.ref))
    average = AverageRequest("average", (seed.ref, expert.ref), (0.5, 0.5))
    models = [seed, expert, average]
    scores = [score_request(prepared, model.ref, domain, "test", model.label) for model in models]
    monkeypatch.setattr(workers, "step_task", None)  # so that no other process can score
    told: list[tuple[str, str]] = []
    events = RunEvents()

    def tell(one: Progress) -> None:
        told.append((one.label, one.phase))

    with connect(driver.ledger, tell, threading.Event(), events) as on_ray:
        outcomes = [outcome for _, outcome in on_ray.run([*models, *scores])]
    assert all(isinstance(outcome, Artifact) for outcome in outcomes), outcomes
    assert told.index((expert.label, "warming up")) < told.index((seed.label, "storing"))
    happened = [(one.what, one.kind, one.label) for one in events.timeline().events]
    assert happened.index(("start", "train", expert.label)) < happened.index(("step", "train", expert.label))
    trainers = {one.process for one in events.timeline().events if one.kind == "train"}
    assert {one.process for one in events.timeline().events if one.kind == "score"} <= trainers


def experts_of(plan: Plan, driver: Driver, number: int) -> list[TrainRequest]:
    """Experts of a plan whose seed is trained, and which differ by their random seeds as well."""
    prepared = prepare(plan, driver)
    driver.require([seed := seed_request(prepared)])
    start, domains = seed_start(prepared, seed.ref), prepared.domains
    experts = [expert_request(prepared, domains[n % len(domains)], start) for n in range(number)]
    return [
        replace(one, label=f"{n}-{one.label}", training=one.training.model_copy(update={"random_seed": n}))
        for n, one in enumerate(experts)
    ]


def trained_by(events: RunEvents) -> dict[str, str]:
    """The trainer of each model."""
    happened = events.timeline().events
    return {one.label: one.process for one in happened if (one.what, one.kind) == ("step", "train")}


def test_experts_that_one_process_trains_are_those_that_processes_of_their_own_train_bit_for_bit(
    connect: Callable[..., LazyRayWorkers], fields: dict[str, Any]
) -> None:
    plan = Plan.model_validate(fields)
    experts = experts_of(plan, driver := in_process(plan), 3)
    models: list[dict[str, str]] = []
    each = [[one] for one in experts]
    # Trainers end with their driver. Where no number is given, all wait at Ray for its two CPUs.
    for drivers, settings, most in (
        ([[experts]], {"concurrent_experts": 1}, 1),
        ([[experts]], {}, 2),
        ([each], {}, 1),
        ([[call] for call in each], {}, 3),
    ):
        events, outcomes = RunEvents(), list[Outcome]()
        for calls in drivers:
            with connect(driver.ledger, lambda _: None, threading.Event(), events, **settings) as on_ray:
                outcomes += [outcome for asked in calls for _, outcome in on_ray.run(asked)]
        made = [one for one in outcomes if isinstance(one, Artifact)]
        assert made == outcomes
        models.append({one.identity: one.blob("model.safetensors").sha256 for one in made})
        processes = trained_by(events)
        assert processes.keys() == {one.label for one in experts}
        assert len(set(processes.values())) == most
        for model in made:
            driver.ledger.storage.delete(artifact_key(model.ref))
    assert all(made == models[0] for made in models)
    assert len(set(models[0].values())) == len(experts)


def test_an_expert_that_fails_takes_no_other_along_that_its_process_would_have_trained(
    connect: Callable[..., LazyRayWorkers], fields: dict[str, Any]
) -> None:
    plan = Plan.model_validate(fields)
    experts = experts_of(plan, driver := in_process(plan), 4)
    tokens = driver.ledger.get(experts[1].texts[0].tokens[0]).blob("tokens.npy")
    damaged = Path(plan.store) / "blobs" / tokens.sha256
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    events = RunEvents()
    with connect(driver.ledger, lambda _: None, threading.Event(), events, concurrent_experts=1) as on_ray:
        outcomes = {request.label: outcome for request, outcome in on_ray.run(experts)}
    failed = [label for label, one in outcomes.items() if isinstance(one, Failure)]
    assert failed == [experts[1].label]
    first, second, third = (trained_by(events)[experts[n].label] for n in (0, 2, 3))
    assert first != second
    assert second == third, "a process goes on after its first model, and not after one that failed"


def test_averages_are_made_together_on_a_cluster_and_one_that_fails_fails_alone(
    connect: Callable[..., LazyRayWorkers], fields: dict[str, Any]
) -> None:
    plan = Plan.model_validate(fields)
    seed = seed_request(prepare(plan, driver := in_process(plan)))
    (trained,) = driver.require([seed])
    files = {blob.name: driver.ledger.open_file(trained, blob.name) for blob in trained.blobs}
    models = [trained]
    for number in range(2):
        weights = {name: tensor + number for name, tensor in load_file(files["model.safetensors"]).items()}
        save_file(weights, changed := Path(plan.store) / f"{number}.safetensors")
        further = origin("model", {**trained.recipe, "last_update": 10**6 + number}, trained.inputs)
        models.append(driver.ledger.commit(further, files | {"model.safetensors": changed}, trained.facts))
    damaged = Path(plan.store) / "blobs" / models[2].blob("model.safetensors").sha256
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\1\2\3")
    shares = [(0.5, 0.5, 0.0), (0.25, 0.75, 0.0), (0.25, 0.5, 0.25), (0.75, 0.25, 0.0)]
    refs = tuple(model.ref for model in models)
    averages = [AverageRequest(f"average {number}", refs, share) for number, share in enumerate(shares)]
    with connect(driver.ledger, lambda _: None, threading.Event(), events := RunEvents()) as on_ray:
        outcomes = {request.label: outcome for request, outcome in on_ray.run(averages)}
    assert isinstance(outcomes["average 2"], Failure)
    assert "model.safetensors" in outcomes["average 2"].cause
    for request in (averages[0], averages[1], averages[3]):
        made = outcomes[request.label]
        assert isinstance(made, Artifact)
        assert driver.ledger.open_file(made, "model.safetensors").exists()
    failed = [one.label for one in events.timeline().events if one.what == "failure"]
    assert failed == [*(one.label for one in averages), "average 2"], "all together, and one alone"


def test_a_users_mistake_in_another_step_costs_a_training_nothing(
    connect: Callable[..., LazyRayWorkers], fields: dict[str, Any]
) -> None:
    plan = Plan.model_validate(fields)
    seed = seed_request(prepare(plan, driver := in_process(plan)))
    endless = replace(
        seed, training=seed.training.model_copy(update={"updates": 2_000_000}), last_update=1_000_000
    )
    told: list[Progress] = []

    def watch(progress: Progress) -> None:
        if progress.phase == "training":
            told.append(progress)
            if len(told) == 2:
                raise UserError("a mistake in another step")

    with (
        connect(driver.ledger, watch, threading.Event()) as on_ray,
        pytest.raises(UserError, match="in another step"),
    ):
        list(on_ray.run([endless]))
    saved = driver.ledger.latest_training(endless.ref.identity)
    assert saved is not None
    assert saved.recipe["update"] >= told[1].done > 0


def test_scores_are_mixed_in_the_cluster_as_their_fits_say(
    connect: Callable[..., LazyRayWorkers], fields: dict[str, Any]
) -> None:
    fields["domains"] = fields["domains"][:2]
    plan = Plan.model_validate(fields)
    grown = grow(plan, driver := in_process(plan))
    prepared, merging, ledger = grown.prepared, plan.merging, driver.ledger
    experts = [Ref("model", expert.identity) for expert in grown.forest.experts]
    score_models(prepared, dict.fromkeys(experts, "an expert"), prepared.texts, driver)
    target, domains = prepared.texts[-1], prepared.domains
    methods = (PAPERS, replace(CALIBRATED, is_for_all=True), GATE)
    ensemble = replace(forest_ensemble(prepared, grown.forest), methods=methods)
    fits = [*for_all_requests(prepared, ensemble, target), fit_request(prepared, ensemble, target)]
    with connect(ledger, lambda _: None, threading.Event()) as on_ray:
        in_cluster = Driver(ledger, on_ray)
        # All in one call: each starts once those are there that it needs.
        *_, mixture = in_cluster.require([*fits[::-1], mix_request(prepared, ensemble, target, "test")])
        assert in_cluster.made == {"fit": 3, "mixture": 1}
    stacks = [stack_of(ledger, experts, text, "development") for text in (*domains, target)]
    *of_domains, own = [stack.take(0, merging.development_blocks) for stack in stacks]
    by_hand = [fit_mixing("full", "ema", *own, merging), shared_mixing(of_domains, merging)]
    test = stack_of(ledger, experts, target, "test")
    expected = [test.mixture_sums(mixing.log_prior_E, mixing.posterior).numpy() for mixing in by_hand]
    sums = np.load(ledger.open_file(mixture, SUMS))
    np.testing.assert_allclose(sums[:2], expected, rtol=1e-6)
    *for_domains, own_text = [stack.sample(merging.development_blocks) for stack in stacks]
    with one_thread_each():
        gate = tune_gate(own_text, fit_gate_for_all(for_domains))
    torch.testing.assert_close(torch.from_numpy(sums[2]), test.gated_sums(gate), rtol=1e-5, atol=1e-5)


def test_a_failed_expert_is_named_its_siblings_are_merged_and_only_it_is_tried_again(
    btm: Callable[..., Btm],
    grow_only: Callable[[Path], Btm],
    fields: dict[str, Any],
    write_plan: Callable[[dict[str, Any]], Path],
) -> None:
    fields["domains"] = fields["domains"][:2]
    path, store = write_plan(fields), Path(fields["store"])
    plan = Plan.model_validate(fields)
    prepared = prepare(plan, driver := in_process(plan))
    tokens = driver.ledger.get(prepared.domains[0].tokens["train"][0]).blob("tokens.npy")
    damaged = store / "blobs" / tokens.sha256
    whole = damaged.read_bytes()
    failing, other = DOMAINS[:2]
    # The seed learns from all founding domains, so it comes before the damage.
    found(prepared, driver.obtain([seed_request(prepared)])[0], driver)
    damaged.write_bytes(whole[:-1] + b"?")
    run = btm("run", str(path))
    assert run.exit_code() == 1, run.said
    assert re.search(rf"- {failing}: 1 attempt.*\n?.*is damaged", run.said), run.said
    assert set(experts_in(store)) == {other}
    assert " as an ensemble: " in run.said, "the verdict on what there is"
    damaged.write_bytes(whole)
    again = grow_only(path)
    assert again.exit_code() == 0, again.said
    assert set(experts_in(store)) == {failing, other}
    assert not re.search(rf"{other}: training", again.said)


@pytest.mark.parametrize(("group", "asker"), [("seed_gpus", "seed"), ("gpus_per_expert", "an expert")])
def test_an_ask_that_the_cluster_can_never_meet_is_refused_with_what_there_is_before_anything_is_trained(
    btm: Callable[..., Btm],
    fields: dict[str, Any],
    write_plan: Callable[[dict[str, Any]], Path],
    group: str,
    asker: str,
) -> None:
    fields["cluster"] |= {group: 4}
    run = btm("run", str(write_plan(fields)))
    assert run.exit_code() == 2
    assert f"the cluster can never hold {asker}" in run.said
    assert "training update" not in run.said
    assert "2 CPU, 0 GPU" in run.said
    assert "4 worker(s) with 1 CPU, 1 GPU each" in run.said
    assert "Traceback" not in run.said


def test_an_ask_that_an_autoscaler_may_meet_waits_and_says_so(
    btm: Callable[..., Btm], fields: dict[str, Any], write_plan: Callable[[dict[str, Any]], Path]
) -> None:
    fields["cluster"] |= {"seed_gpus": 1, "autoscaling": True, "stop_grace_seconds": 0.1}
    plan = Plan.model_validate(fields)
    prepare(plan, in_process(plan))
    run = btm("run", str(write_plan(fields)))
    run.wait_until_said(r"seed: waiting for the cluster to grow to 1 worker\(s\) with 1 CPU, 1 GPU each")
    run.process.send_signal(signal.SIGTERM)
    assert run.exit_code() == 130, run.said


@pytest.mark.parametrize("module", ["ray", "ray._private.node", "btm_cluster.workers.on_ray.workers"])
def test_a_signal_while_ray_is_imported_or_joined_ends_in_exit_code_130(
    cluster: dict[str, str],
    fields: dict[str, Any],
    write_plan: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    module: str,
) -> None:
    """Ray's own handler, in place while it starts, ended the process with the signal's number."""
    arguments = [module, str(int(signal.SIGTERM)), "btm", "run", str(write_plan(fields))]
    done = run_forked("tests.stopped_while_importing", arguments, cluster, tmp_path)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert not list((Path(fields["store"]) / "artifacts").glob("*"))


def test_an_address_where_no_cluster_answers_is_refused_at_once(
    btm: Callable[..., Btm], fields: dict[str, Any], write_plan: Callable[[dict[str, Any]], Path]
) -> None:
    run = btm("run", str(write_plan(fields)), "--address", "127.0.0.1:9")
    assert run.exit_code() == 2
    assert "no Ray cluster answers at 127.0.0.1:9" in run.said
    assert "Traceback" not in run.said
