"""A DEMix over groups of ranks against the one that a single process trains."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from btm_cluster.algorithm import grow
from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.recipes import demix_request, seed_request
from btm_cluster.errors import PlanError
from btm_cluster.language_model.demix_group import share_of
from btm_cluster.ledger import Ledger
from btm_cluster.ledger.curves import read_curve
from btm_cluster.plan import Plan
from btm_cluster.requests import TrainRequest
from btm_cluster.steps.train import train
from btm_cluster.study.controls import seeded_demix_request
from tests.conftest import DOMAINS, TARGETS, in_process, plan_fields
from tests.integration.test_training import Undisturbed
from tests.integration.train_in_groups import Job, train_in_groups


def demix_fields(
    texts: dict[str, Path], store: Path, domains: int, optimizer: str = "adamw"
) -> dict[str, Any]:
    """A plan with a DEMix whose training shows the scale of every gradient, as
    Adam's own small epsilon would not."""
    fields = plan_fields(texts, store)
    names = (*DOMAINS, *TARGETS)[:domains]
    fields |= {"domains": [{"name": name, "text": str(texts[name])} for name in names], "targets": []}
    fields["training"] |= {"learning_rate": 0.5, "epsilon": 1.0, "gradient_clip": 0.5}
    if optimizer == "muon":  # whose steps are as large as Adam's with a small epsilon
        fields["training"] |= {"learning_rate": 0.005, "optimizer": optimizer}
    return fields | {"baselines": ["demix"]}


def parts_of(request: TrainRequest, ledger: Ledger) -> list[dict[str, Any]]:
    return [load_file(ledger.open_file(ledger.get(part.ref), "model.safetensors")) for part in request.parts]


def curve_of(request: TrainRequest, ledger: Ledger) -> list[list[float]]:
    curve = read_curve(ledger, ledger.get(request.ref))
    assert curve is not None
    looks = curve.development
    return [curve.updates, curve.loss, curve.gradient_norm, curve.tokens, looks.updates, looks.loss]


def test_groups_of_ranks_train_the_demix_of_one_process(texts: dict[str, Path], tmp_path: Path) -> None:
    alone, jobs = {}, []
    of_each = [
        (2, "demix", "adamw"),
        (4, "demix", "adamw"),
        (4, "demix-from-seed", "adamw"),
        (4, "demix", "muon"),
    ]
    for domains, name, optimizer in of_each:
        store = tmp_path / f"alone-{domains}-{name}-{optimizer}"
        plan = Plan.model_validate(demix_fields(texts, store, domains, optimizer))
        driver = in_process(plan)
        prepared = prepare(plan, driver)
        request = demix_request(prepared)
        if name == "demix-from-seed":
            seed = train(seed_request(prepared), driver.ledger, Undisturbed())
            request = seeded_demix_request(prepared, seed.ref)
        for ranks in {2: (2, 4), 4: (2,)}[domains]:
            copy = tmp_path / f"{domains}-{ranks}-{name}-{optimizer}"
            shutil.copytree(store, copy)
            fields = demix_fields(texts, copy, domains, optimizer)
            # Stopped where all agree on it; then it goes on.
            jobs += [Job(fields, name, ranks, stop_after=2), Job(fields, name, ranks)]
        if domains == 2:  # and once it goes on with half of the ranks, as new resources make it
            copy = tmp_path / "resized"
            shutil.copytree(store, copy)
            fields = demix_fields(texts, copy, domains)
            resized = [Job(fields, name, 4, stop_after=2), Job(fields, name, 2)]
        train(request, driver.ledger, Undisturbed())
        alone[domains, name, optimizer] = (
            request,
            parts_of(request, driver.ledger),
            curve_of(request, driver.ledger),
        )
    train_in_groups([*jobs, *resized])
    for job in (*jobs[1::2], resized[1]):
        optimizer = job.fields["training"].get("optimizer", "adamw")
        request, expected, curve = alone[len(job.fields["domains"]), job.model, optimizer]
        ledger = Ledger.open(job.fields["store"])
        profile = ledger.get(request.ref).facts["profile"]
        if job is resized[1]:
            assert [span["workers"] for span in profile] == [4, 2]
        else:
            assert profile["workers"] == job.ranks
        assert curve_of(request, ledger) == [pytest.approx(values, rel=1e-3) for values in curve], job.ranks
        close = 2e-3 if optimizer == "muon" else 1e-4  # Newton and Schulz's products are in bfloat16
        found = parts_of(request, ledger)
        for part, other in zip(found, expected, strict=True):
            for name, tensor in part.items():
                assert (tensor - other[name]).abs().max() < close, (job.ranks, name)
        assert any((found[0][name] - found[1][name]).abs().max() > 10 * close for name in found[0])


def test_every_domain_is_trained_by_equally_many_ranks_and_every_rank_trains_equally_many() -> None:
    for world, domains in [(1, 3), (2, 2), (2, 8), (8, 8), (6, 3), (4, 1)]:
        shares = [share_of(rank, world, domains) for rank in range(world)]
        for domain in range(domains):
            numbers = [share.number for share in shares if domain in share.domains]
            assert numbers == list(range(max(1, world // domains)))
        assert {len(share.domains) for share in shares} == {max(1, domains // world)}


def test_a_group_that_does_not_fit_the_domains_is_refused_before_a_text_is_read(
    fields: dict[str, Any],
) -> None:
    fields |= {"baselines": ["demix"], "cluster": {"seed_gpus": 2}}
    plan = Plan.model_validate(fields)
    driver = in_process(plan)
    with pytest.raises(PlanError, match="2 GPUs for 3 domains"):
        grow(plan, driver)
    assert not driver.made
