"""The plans of the benchmark that grows experts from a base it has trained."""

import sys
from pathlib import Path

import pytest

from btm_cluster.language_model.configuration import full_config
from btm_cluster.language_model.deltas import trains_of
from btm_cluster.language_model.mixture_of_experts import check_target
from btm_cluster.language_model.model import count_parameters
from btm_cluster.plan import Plan
from btm_cluster.study.branchings import experts_names

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts import what lies beside them
import experts_from_base
from experts_from_base import SIZES, base_plan, study_plan, updates_for

COMMON = {"store": "store", "domains": [{"name": "a", "text": "a.jsonl"}]}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_all_that_the_plans_ask_for_can_be_made_of_the_shape(size: experts_from_base.Size) -> None:
    base = Plan.model_validate(base_plan(COMMON, size, 10))
    config = full_config(base.model, size.vocabulary, size.block_tokens)
    check_target(config)
    study = Plan.model_validate(study_plan(COMMON, size, 10, [1.0])).study
    assert study is not None
    for branching in study.branching:
        trains_of(branching, config)
    assert experts_names(study) == [
        "full experts",
        "feed-forward experts",
        *(f"LoRA experts of rank {rank}" for rank in size.ranks),
    ]


def test_the_larger_size_has_about_30m_parameters_without_embeddings() -> None:
    base = Plan.model_validate(base_plan(COMMON, SIZES["30m"], 10))
    config = full_config(base.model, SIZES["30m"].vocabulary, SIZES["30m"].block_tokens)
    assert count_parameters(config) == pytest.approx((37.9e6, 29.5e6), rel=1e-3)


def test_updates_never_make_more_passes_than_asked() -> None:
    size = SIZES["30m"]
    assert [updates_for(passes, 12_700, size) for passes in (4, 1)] == [1587, 396]
    assert 1587 * size.blocks <= 4 * 12_700 < 1588 * size.blocks


def test_more_than_five_passes_are_refused_and_a_corpus_that_is_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [
        "experts_from_base.py",
        str(tmp_path / "corpus"),
        "--to",
        str(tmp_path),
        "--work",
        str(tmp_path / "work"),
    ]
    monkeypatch.setattr(sys, "argv", call)
    experts_from_base.main()
    assert "there is no corpus here, and nothing is measured" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()
    monkeypatch.setattr(sys, "argv", [*call, "--passes", "4.8"])
    with pytest.raises(SystemExit):
        experts_from_base.main()
    assert "make 5.3 passes; 5 at most" in capsys.readouterr().err
