"""A DEMix over groups of ranks against the one that a single process trains."""

import json
import os
import shutil
import subprocess
import sys
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


def demix_fields(texts: dict[str, Path], store: Path, domains: int) -> dict[str, Any]:
    """A plan with a DEMix whose training shows the scale of every gradient, as
    Adam's own small epsilon would not."""
    fields = plan_fields(texts, store)
    names = (*DOMAINS, *TARGETS)[:domains]
    fields |= {"domains": [{"name": name, "text": str(texts[name])} for name in names], "targets": []}
    fields["training"] |= {"learning_rate": 0.5, "epsilon": 1.0, "gradient_clip": 0.5}
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
    for domains, is_seeded in ((2, False), (4, False), (4, True)):
        store = tmp_path / f"alone-{domains}-{is_seeded}"
        plan = Plan.model_validate(demix_fields(texts, store, domains))
        driver = in_process(plan)
        prepared = prepare(plan, driver)
        request = demix_request(prepared)
        if is_seeded:
            seed = train(seed_request(prepared), driver.ledger, Undisturbed())
            request = seeded_demix_request(prepared, seed.ref)
        for ranks in {2: (2, 4), 4: (2,)}[domains]:
            copy = tmp_path / f"{domains}-{ranks}-{is_seeded}"
            shutil.copytree(store, copy)
            fields = demix_fields(texts, copy, domains)
            # Stopped where all agree on it; then it goes on.
            jobs += [(fields, ranks, 2, is_seeded), (fields, ranks, None, is_seeded)]
        if domains == 2:  # and once it goes on with half of the ranks, as new resources make it
            copy = tmp_path / "resized"
            shutil.copytree(store, copy)
            fields = demix_fields(texts, copy, domains)
            resized = [(fields, 4, 2, is_seeded), (fields, 2, None, is_seeded)]
        train(request, driver.ledger, Undisturbed())
        alone[domains, is_seeded] = (
            request,
            parts_of(request, driver.ledger),
            curve_of(request, driver.ledger),
        )
    made = subprocess.run(
        [sys.executable, "-m", "tests.integration.train_in_groups"],
        input=json.dumps([*jobs, *resized]),
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert made.returncode == 0, made.stderr
    for fields, ranks, _, is_seeded in (*jobs[1::2], resized[1]):
        request, expected, curve = alone[len(fields["domains"]), is_seeded]
        ledger = Ledger.open(fields["store"])
        profile = ledger.get(request.ref).facts["profile"]
        if fields is resized[1][0]:
            assert [span["workers"] for span in profile] == [4, 2]
        else:
            assert profile["workers"] == ranks
        assert curve_of(request, ledger) == [pytest.approx(values, rel=1e-3) for values in curve], ranks
        found = parts_of(request, ledger)
        for part, other in zip(found, expected, strict=True):
            for name, tensor in part.items():
                assert (tensor - other[name]).abs().max() < 1e-4, (ranks, name)
        assert any((found[0][name] - found[1][name]).abs().max() > 1e-3 for name in found[0])


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
