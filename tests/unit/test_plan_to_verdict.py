"""The pure parts of the benchmark from plan to verdict: timelines, averages over time, plans of a corpus."""

import argparse
import os
import sys
import types
from pathlib import Path

import pytest

from btm_cluster.plan import Plan

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts import what lies beside them
from busy_share import CpuMeter, gpu_meter, joined, mean_between, used_between
from corpus_plan import corpus_plan
from run_timeline import (
    Event,
    first_update,
    forest_names,
    last_score,
    longest_waits,
    made_from,
    parse_line,
    timeline,
)

SEED, EXPERT, AVERAGE = "5" * 64, "e" * 64, "a" * 64
LINES = [
    (2.0, "python: reading"),
    (3.0, "tokenizer: training the tokenizer"),
    (5.0, "seed: starting"),
    (6.0, "seed: loading"),
    (8.0, "2026-11-29 15:30:01 INFO seed: training update 9/100 loss 7.607 4,782 tokens/s about 2 min left"),
    (
        9.0,
        "seed: training update 100/100 loss 5.659 4,782 tokens/s checkpoint: stalled 0.1 s, stored in 0.2 s",
    ),
    (9.5, "seed: storing"),
    (11.0, "python: starting"),
    (12.0, "python: training update 105/200 loss 5.909 4,736 tokens/s 0:21 left"),
    (13.0, "python under 55555555: scoring"),
    (19.0, "2026-11-29 WARNING: something else"),
]


def manifest(kind, identity, recipe, role=None):
    return {
        "body": {
            "kind": kind,
            "identity": identity,
            "recipe": recipe,
            "facts": {"role": role} if role else {},
        }
    }


def whole_run():
    made = [
        made_from(manifest("source", "1" * 64, {}), 2.5),
        made_from(manifest("tokens", "2" * 64, {"text": "1" * 64}), 4.0),
        made_from(manifest("model", SEED, {"texts": ["1" * 64]}, "seed"), 10.0),
        made_from(manifest("model", EXPERT, {"start": {"parents": [{"identity": SEED}]}}, "expert"), 12.5),
        made_from(manifest("scores", "6" * 64, {"model": SEED, "tokens": ["2" * 64]}), 14.0),
        made_from(manifest("scores", "7" * 64, {"model": SEED, "tokens": ["3" * 64]}), 15.0),
        made_from(
            manifest("model", AVERAGE, {"average": [{"identity": SEED}, {"identity": EXPERT}]}, "average"),
            16.0,
        ),
        made_from(manifest("scores", "8" * 64, {"model": AVERAGE, "tokens": ["2" * 64]}), 17.0),
        made_from(manifest("overlap", "9" * 64, {}), 18.0),
    ]
    said = [one for one in (parse_line(*line) for line in LINES) if one is not None]
    names = forest_names(
        {"foundation": {"seed": SEED}, "experts": [{"identity": EXPERT, "domain": "python"}]}
    )
    return timeline(said, made, names, 20.0)


def test_a_line_tells_the_phase_and_the_update():
    progress = parse_line(
        8.0, "2026-11-29 15:30:01 INFO seed: training update 9/100 loss 7.607 4,782 tokens/s"
    )
    assert progress is not None
    assert (progress.label, progress.phase, progress.update, progress.is_last) == (
        "seed",
        "training",
        9,
        False,
    )
    assert parse_line(1.0, "note: Something is not as it should be") is None
    assert parse_line(1.0, "") is None


def test_the_timeline_has_every_event_in_order_of_time():
    assert [(event.seconds, event.name, event.what) for event in whole_run()] == [
        (2.5, "text", "first stored"),
        (4.0, "text", "all 2 stored"),
        (5.0, "seed", "starting"),
        (6.0, "seed", "loading"),
        (8.0, "seed", "first update"),
        (9.0, "seed", "last update"),
        (9.5, "seed", "storing"),
        (10.0, "seed", "stored"),
        (11.0, "python", "starting"),
        (12.0, "python", "first update"),
        (12.5, "python", "stored"),
        (13.0, "scores", "first task scores"),
        (14.0, "seed", "first score stored"),
        (15.0, "seed", "last score stored"),
        (16.0, "averages", "stored"),
        (17.0, "averages", "first score stored"),
        (17.0, "averages", "last score stored"),
        (18.0, "overlap", "stored"),
        (20.0, "verdict", "printed"),
    ]


def test_work_is_from_the_first_update_of_the_seed_to_the_last_score():
    events = whole_run()
    assert (first_update(events), last_score(events)) == (8.0, 17.0)
    assert (first_update([]), last_score([])) == (None, None)


def test_the_longest_waits_come_first():
    events = [Event(0.0, "a", "x"), Event(1.0, "b", "x"), Event(5.0, "c", "x"), Event(7.0, "d", "x")]
    assert [(seconds, later.name) for seconds, _, later in longest_waits(events, 2)] == [
        (4.0, "c"),
        (2.0, "d"),
    ]


def test_a_model_is_named_by_the_forest_and_others_by_their_role():
    rival = made_from(manifest("model", "b" * 64, {}, "transformer-lm"), 1.0)
    assert [event.name for event in timeline([], [rival], {}, 2.0)] == ["transformer-lm", "verdict"]


def test_a_reading_holds_until_the_next():
    readings = [(0.0, 0.0), (1.0, 1.0), (4.0, 0.0)]
    assert mean_between(readings, 0.0, 8.0) == pytest.approx(3 / 8)
    assert mean_between(readings, 2.0, 4.0) == pytest.approx(1.0)
    assert mean_between(readings, 3.0, 5.0) == pytest.approx(1 / 2)
    assert mean_between([], 0.0, 1.0) is None
    assert mean_between([(5.0, 1.0)], 0.0, 1.0) is None


def test_a_count_grows_in_straight_lines():
    readings = [(0.0, 0.0), (2.0, 4.0), (3.0, 4.0)]
    assert used_between(readings, 1.0, 3.0) == pytest.approx(2.0)
    assert used_between(readings, 1.0, 9.0) == pytest.approx(2.0)
    assert used_between(readings, -5.0, 1.0) == pytest.approx(2.0)
    assert used_between([], 0.0, 1.0) == 0.0


def test_the_cpu_time_of_a_process_is_seen():
    with CpuMeter(os.getpid()) as meter:
        pass
    assert meter.readings
    assert meter.processes[0].cpu_seconds > 0


def test_a_worker_has_the_names_of_all_that_ran_in_it():
    names = "python"
    for name in ("ray::IDLE", "ray::score_task", "ray::IDLE", "ray::prepare_task", "ray::score_task"):
        names = joined(names, name)
    assert names == "ray::score_task, ray::prepare_task"
    assert joined("raylet", "raylet") == "raylet"
    assert joined("ray::Trainer", "ray::Trainer.train") == "ray::Trainer"


def test_gpus_are_read_by_nvml(monkeypatch):
    busy = {0: 50, 1: 100}
    fake = types.SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetUtilizationRates=lambda gpu: types.SimpleNamespace(gpu=busy[gpu]),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    meter = gpu_meter()
    assert meter is not None
    with meter:
        pass
    assert {share for _, share in meter.readings} == {0.75}
    assert "2 GPU(s)" in meter.method


def test_gpus_are_read_by_nvidia_smi_where_its_package_is_not_there(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\nif [ "$1" = -L ]; then echo GPU 0; echo GPU 1; else echo 40; echo 60; echo "[N/A]"; fi\n'
    )
    program.chmod(0o755)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    meter = gpu_meter()
    assert meter is not None
    with meter:  # it ends by itself where nothing more can be read
        pass
    assert [share for _, share in meter.readings] == [0.5]


def test_a_machine_without_gpus_has_no_meter(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_meter() is None


def test_a_corpus_becomes_a_plan_that_is_valid(tmp_path):
    for folder, splits in (
        ("train_domains/b", "train valid test"),
        ("train_domains/a", "train"),
        ("eval_domains/c", "test"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        for split in splits.split():
            (tmp_path / folder / f"{split}.jsonl.zst").touch()
    asked = argparse.Namespace(
        corpus=tmp_path, domains=2, targets=1, updates=600, model_size="3m", blocks=32, seed_share=0.75
    )
    asked.seed_gpus, asked.gpus_per_expert = 1, 0.5
    plan = Plan.model_validate(corpus_plan(asked) | {"store": "store"})
    assert [text.name for text in plan.domains] == ["a", "b"]
    assert plan.domains[1].development == (str(tmp_path / "train_domains/b/valid.jsonl.zst"),)
    assert plan.training.updates == 600
    asked.domains = 3
    with pytest.raises(SystemExit, match="2 texts, and 3"):
        corpus_plan(asked)
