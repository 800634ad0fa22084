"""The points that a curve has, and what is read back of curves and timelines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btm_cluster.curve import CURVE_FILE, Curve, Rise, development_updates, is_recorded
from btm_cluster.errors import UserError
from btm_cluster.ledger import Ledger
from btm_cluster.ledger.curves import read_curve, read_rise
from btm_cluster.ledger.timelines import (
    Event,
    Node,
    Timeline,
    list_runs,
    new_run_name,
    read_timeline,
    run_key,
    write_timeline,
)
from btm_cluster.storage.local_folder import LocalFolder
from tests.made import origin

POINTS = {
    "updates": [1, 2], "loss": [3.5, 3.25], "learning_rate": [0.001, 0.002], "gradient_norm": [1.5, 0.5],
    "tokens": [128, 256], "development": {"updates": [2], "loss": [3.75]},
}  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(LocalFolder(str(tmp_path / "store")))


@pytest.mark.parametrize("updates", [1, 12, 499, 500, 501, 1_000_000])
def test_a_curve_has_all_updates_of_a_short_training_and_at_most_512_of_a_long_one(updates: int) -> None:
    ends = (updates // 2, updates)
    points = [update for update in range(1, updates + 1) if is_recorded(update, updates, ends)]
    assert points[-1] == updates
    assert min(updates, 250) <= len(points) <= 512


def test_a_seeds_points_are_those_of_the_transformer_lm_that_passes_it() -> None:
    seed = [update for update in range(1, 601) if is_recorded(update, 2_000, ends=(600,))]
    whole = [update for update in range(1, 2_001) if is_recorded(update, 2_000, ends=(600, 2_000))]
    assert seed == [update for update in whole if update <= 600]


def test_development_loss_is_taken_at_even_distances() -> None:
    assert list(development_updates(200, 16)) == list(range(13, 201, 13))
    assert list(development_updates(12, 2)) == [6, 12]
    assert list(development_updates(12, 16)) == list(range(1, 13))
    assert list(development_updates(12, 0)) == []


def curve(loss: Sequence[float]) -> Curve:
    return Curve.model_validate(
        {name: [*range(1, len(loss) + 1)] for name in ("updates", "tokens")}
        | {"loss": [*loss], "learning_rate": [0.1] * len(loss), "gradient_norm": [1.0] * len(loss)}
    )


def falling(points: int) -> np.ndarray:
    return 2 + 7 * np.exp(-np.arange(points) / (points / 5))


@pytest.mark.parametrize(("points", "nats"), [(20, 4.0), (100, 0.8), (500, 0.8)])
def test_a_loss_that_rises_for_good_is_noticed(points: int, nats: float) -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, points)
    turned = np.where(np.arange(points) < points * 0.6, 0.0, nats)
    rise = curve(falling(points) + turned + noise).rise()
    assert rise is not None
    assert rise.at == pytest.approx(points * 0.6, abs=points * 0.05)
    assert 0.3 * nats < rise.last - rise.lowest < nats
    assert f"around update {rise.at:,} to {rise.last:.2f} at the end" in rise.sentence


@pytest.mark.parametrize("points", [3, 9, 19, 20, 50, 500])
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_noise_is_no_rise_nor_is_a_spike_that_passes(points: int, noise: float) -> None:
    for random_seed in range(100):
        random = np.random.default_rng(random_seed).normal(0, noise, points)
        assert curve(4 + random).rise() is None, "on a plateau"
        assert curve(falling(points) + random).rise() is None
    if points >= 50:
        spike = np.where(np.arange(points) // 5 == points // 10, 3.0, 0.0)
        assert curve(falling(points) + spike).rise() is None


def test_a_rise_is_read_of_a_stored_curve_and_a_broken_one_stops_nothing(
    ledger: Ledger, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    risen = commit_curve(ledger, tmp_path, curve([*range(20)]).model_dump_json())
    assert read_rise(ledger, risen.ref) == Rise(lowest=2.0, at=5, last=17.0)
    assert read_rise(ledger, None) is None
    assert not caplog.messages
    assert read_rise(ledger, commit_curve(ledger, tmp_path, "no curve").ref) is None
    assert "whether a training's loss rose is not known" in caplog.text


def commit_curve(ledger: Ledger, folder: Path, text: str) -> Any:
    (folder / CURVE_FILE).write_text(text, encoding="utf-8")
    return ledger.commit(origin("model", {"of": text}), {CURVE_FILE: folder / CURVE_FILE}, {})


def test_a_curve_is_read_back_and_a_model_without_one_has_none(ledger: Ledger, tmp_path: Path) -> None:
    curve = read_curve(ledger, commit_curve(ledger, tmp_path, json.dumps(POINTS)))
    assert curve is not None
    assert json.loads(curve.model_dump_json()) == POINTS
    assert read_curve(ledger, ledger.commit(origin("model", {}), {}, {})) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": [3.5]},
        {"updates": [2, 2]},
        {"tokens": ["many", "more"]},
        {"development": {"updates": [1], "loss": []}},
        {"surprise": []},
    ],
)
def test_a_file_that_is_no_curve_is_refused_by_name(
    ledger: Ledger, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    model = commit_curve(ledger, tmp_path, json.dumps(POINTS | wrong))
    with pytest.raises(UserError, match=rf"curve\.json of model {model.identity[:12]} holds no curve"):
        read_curve(ledger, model)


def timeline() -> Timeline:
    event = Event(
        what="step", kind="train", label="seed", role="seed", node="n", gpus=1, cpus=1, began=11, ended=14
    )
    return Timeline(
        command="run", began=10, ended=15, nodes={"n": Node(name="host", gpus=8, cpus=64)}, events=[event],
        gpu_seconds=3, cpu_seconds=3,
    )  # fmt: skip


def test_a_timeline_is_read_back_and_runs_are_listed_newest_first(ledger: Ledger, tmp_path: Path) -> None:
    names = ["20261129-120000-host-1", new_run_name()]
    for name in names:
        write_timeline(ledger, name, timeline())
    (tmp_path / "events").touch()
    ledger.storage.upload(run_key("20261130-120000-host-2", "seed/events"), tmp_path / "events")
    assert list_runs(ledger) == sorted(names, reverse=True)
    assert read_timeline(ledger, names[0]) == timeline()


def test_a_timeline_that_is_missing_or_broken_is_refused_by_name(ledger: Ledger) -> None:
    with pytest.raises(UserError, match="no timeline of the run 'yesterday'"):
        read_timeline(ledger, "yesterday")
    write_timeline(ledger, "today", timeline())
    with pytest.raises(UserError) as missing:
        read_timeline(ledger, "yesterday")
    assert "of today" in missing.value.expected
    path = Path(ledger.storage.address(run_key("today", "timeline.json")))
    path.write_text(path.read_text()[:-10])
    with pytest.raises(UserError, match=r"logs/today/timeline\.json is no timeline"):
        read_timeline(ledger, "today")
