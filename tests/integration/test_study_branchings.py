"""A study of experts that train a part, of mixtures of experts, and of a pretrained model: rows and costs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from btm_cluster.data.tokenizer_training import train_tokenizer
from btm_cluster.driver.port import Outcome
from btm_cluster.errors import UserError
from btm_cluster.evaluation.costs import gpu_seconds, is_better
from btm_cluster.language_model.mixture_of_experts import size_of_mixture
from btm_cluster.ledger import Artifact
from btm_cluster.operations.run import run_plan
from btm_cluster.operations.study import results_of
from btm_cluster.plan import Plan
from btm_cluster.report.study_page import write_page
from btm_cluster.requests import StepRequest, TrainRequest
from btm_cluster.steps.stored import open_weights
from btm_cluster.study.branchings import experts_of
from btm_cluster.study.repeat import Repeat
from btm_cluster.study.repeats import repeats_of
from tests.conftest import DOMAINS, in_process, made_up_documents, plan_fields
from tests.integration.test_pretrained import SMALL, build
from tests.integration.test_study import Studied, short_searches, studied_by

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FEED_FORWARD, LORA = "forest of feed-forward experts", "forest of LoRA experts of rank 4"
PLAIN = {"prior": "fitted", "development_blocks": None, "top_k": None}
DIVERGING = {"train": "feed-forward", "learning_rate_scale": 1e30}
EXPERT_TOKENS = 6 * 4 * 32
"""Of one expert: updates, blocks and tokens of a block. The seed has as many of each of two domains."""


def fields_of(texts: dict[str, Path], store: Path, **study: Any) -> dict[str, Any]:
    fields = plan_fields(texts, store)
    fields["domains"] = fields["domains"][:2]
    fields["training"] |= {"learning_rate": 1e-2}
    return fields | {"model": {"config": LLAMA}, "study": study}


@pytest.fixture(scope="module", autouse=True)
def _short_searches() -> Iterator[None]:
    with short_searches():
        yield


@pytest.fixture(scope="module")
def studied(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Studied:
    ways = [{"train": "all"}, {"train": "feed-forward"}, {"train": "lora", "lora": {"rank": 4}}, DIVERGING]
    store = tmp_path_factory.mktemp("branchings") / "store"
    plan = Plan.model_validate(fields_of(texts, store, systems=["mixture-of-experts"], branching=ways))
    driver = in_process(plan)
    return Studied(plan, driver, studied_by(plan, driver))


@pytest.fixture(scope="module")
def repeat(studied: Studied) -> Repeat:
    return repeats_of(studied.plan, studied.driver)[0]


def weights_bytes(*models: Artifact) -> int:
    names = ("model.safetensors", "delta.safetensors", "adapter_model.safetensors")
    return sum(blob.size_bytes for model in models for blob in model.blobs if blob.name in names)


def test_full_experts_are_those_of_the_first_forest(studied: Studied) -> None:
    for first, other in (
        ("forest", "forest of full experts"),
        ("own expert", "own expert of forest of full experts"),
        ("average", "average of forest of full experts"),
        ("mixture of experts", "mixture of experts of forest of full experts"),
    ):
        rows = [entry for entry in studied.study.entries if entry["system"] == other]
        assert rows
        for row in rows:
            named = {name: row[name] for name in ("posterior", "prior", "development_blocks", "top_k")}
            assert row["per_domain"] == studied.entry(system=first, **named)["per_domain"]


def test_a_forest_whose_experts_diverge_is_left_out_and_told_among_the_trials(studied: Studied) -> None:
    (trial,) = studied.study.trials
    assert trial == {
        "size": "model",
        "random_seed": 0,
        "experts": "feed-forward experts, at 1e+30 times the rate",
        "learning_rate_scale": 1e30,
        "development": None,
        "chosen": False,
    }
    assert not any("1e+30" in entry["system"] for entry in studied.study.entries)


def test_experts_see_equal_tokens_whatever_they_train_and_the_transformer_lm_as_many(
    studied: Studied, repeat: Repeat
) -> None:
    for one in (repeat, *repeat.others):
        assert {request.tokens for request in experts_of(one)} == {EXPERT_TOKENS}
    systems = {entry["system"] for entry in studied.study.entries}
    for system in systems - {"seed"}:
        costs = [entry["cost"] for entry in studied.study.entries if entry["system"] == system]
        assert {cost["training_tokens"] for cost in costs} == {4 * EXPERT_TOKENS}, system
    assert studied.entry(system="seed")["cost"]["training_tokens"] == 2 * EXPERT_TOKENS


def test_bytes_and_flops_are_those_of_what_is_trained_and_stored(studied: Studied, repeat: Repeat) -> None:
    ledger = studied.driver.ledger
    seed = ledger.get(repeat.seeds[0.5].ref)
    lora = next(other for other in repeat.others if "LoRA" in other.experts)
    adapters = [ledger.get(request.ref) for request in experts_of(lora)]
    parameters = (
        sum(
            tensor["data_offsets"][1] - tensor["data_offsets"][0]
            for name, tensor in open_weights(ledger, seed).header.items()
            if name != "__metadata__"
        )
        // 4
    )
    # q, k, v and o; gate, up and down: each has A and B of rank 4.
    adapter = 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 48))
    attention = 12 * 1 * 32 * 32
    cost = studied.entry(system=LORA, posterior="calibrated", **PLAIN)["cost"]
    assert cost["stored_bytes"] == weights_bytes(seed, *adapters)
    assert cost["bytes_of_each"] == weights_bytes(*adapters) // 2 == pytest.approx(4 * adapter, rel=0.5)
    of_seed = 2 * EXPERT_TOKENS * (6 * parameters + attention)
    of_experts = 2 * EXPERT_TOKENS * (4 * (parameters + adapter) + 2 * adapter + attention)
    assert cost["training_flops"] == of_seed + of_experts
    assert cost["inference_flops"] == 2 * (2 * parameters + attention // 3)
    assert (cost["gpu_seconds"], cost["tokens_per_second"] > 0) == (0, True)
    for experts_per_token in (1, 2):
        routed = studied.entry(system=f"mixture of experts of {LORA}", top_k=experts_per_token)
        size = size_of_mixture(repeat.prepared.model, 2, experts_per_token)
        assert routed["cost"]["inference_flops"] == 2 * size.active_parameters + attention // 3
        assert routed["inference_cost"] == size.inference_cost


def test_a_mixture_and_an_ensemble_of_feed_forward_experts_are_those_of_a_run(studied: Studied) -> None:
    branching, merging = {"train": "feed-forward"}, {"mixture_of_experts": {"experts_per_token": 1}}
    fields = studied.plan.model_dump(mode="json", exclude={"study"}, exclude_defaults=True)
    plan = Plan.model_validate(
        fields | {"branching": branching, "merging": merging, "baselines": ["transformer-lm"]}
    )
    driver = in_process(plan)
    rows = {row.system: row for row in run_plan(plan, driver).verdict.rows["test"]}
    assert not driver.made["model"]
    for name, wanted in (
        ("mixture of experts, top-1", {"system": f"mixture of experts of {FEED_FORWARD}", "top_k": 1}),
        ("ensemble, calibrated", {"system": FEED_FORWARD, "posterior": "calibrated", **PLAIN}),
        ("the domain's own expert", {"system": f"own expert of {FEED_FORWARD}"}),
        ("Transformer-LM", {"system": "transformer-lm"}),
    ):
        found = studied.entry(**wanted)["per_domain"]
        cells = {text: round(cell.perplexity, 4) for text, cell in rows[name].cells.items()}
        assert {text: value for text, value in found.items() if value is not None} == cells, name


def test_the_page_says_what_is_better_at_which_cost_and_so_does_the_summary(
    studied: Studied, tmp_path: Path
) -> None:
    write_page(results_of(studied.plan, studied.study), tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| Transformer-LM: continued pretraining of the seed on all domains |" in page
    html = (tmp_path / "report.html").read_text()
    for name, row in (
        (
            "LoRA experts of rank 4: ensemble, calibrated",
            {"system": LORA, "posterior": "calibrated", **PLAIN},
        ),
        ("mixture of experts, top-2", {"system": "mixture of experts", "top_k": 2}),
    ):
        entry = studied.entry(**row)
        answers = {True: "yes", False: "no", None: "open"}
        cells = [
            f"{answers[one['is_better']]}, at {one['relative_cost']:.2f}x"
            for one in entry["at_equal_cost"].values()
        ]
        (line,) = (
            line
            for line in page.splitlines()
            if line.startswith(f"| {name} |") and "x | " in line and cells[0] in line
        )
        assert line.endswith(f"| {cells[0]} | {cells[1]} |")
        assert all(cell in html for cell in cells)
    assert json.dumps(list(studied.study.entries))


def test_an_ensemble_is_held_against_a_larger_transformer_lm_of_its_inference_cost(
    studied: Studied, tmp_path: Path
) -> None:
    def larger(entry: Mapping[str, Any], size: str, times: float, bits: float) -> dict[str, Any]:
        cost = entry["cost"] | {"inference_flops": round(times * entry["cost"]["inference_flops"])}
        own = entry["bits_per_byte"]["all"]
        told = entry["bits_per_byte"] | {"all": own and own + bits}
        return {**entry, "size": size, "cost": cost, "bits_per_byte": told}

    entries = studied.study.entries
    for bits, answer in ((1.0, "yes"), (-1.0, "no")):
        others = [larger(e, *size, bits) for size in (("two", 2.0), ("nine", 9.0)) for e in entries]
        write_page(results_of(studied.plan, replace(studied.study, entries=(*entries, *others))), tmp_path)
        page = (tmp_path / "README.md").read_text()
        (line,) = (one for one in page.splitlines() if one.startswith("| model forest, calibrated |"))
        assert "| two | " in line
        assert line.endswith(f"| {answer}, at 1.00x |")
    write_page(results_of(studied.plan, studied.study), tmp_path)
    assert "across sizes" not in (tmp_path / "README.md").read_text()


def test_gpu_seconds_are_of_trainings_that_one_process_has_mostly_done() -> None:
    def seconds(rate: float, seconds: float) -> float | None:
        note = {"tokens_per_second": rate, "seconds": seconds, "gpus": 0.25}
        return gpu_seconds(Artifact("model", "0", {}, {}, (), {"tokens": 1000}, note, (), ""))

    assert seconds(10, 100) == 25
    assert seconds(10, 60) == 25
    assert seconds(10, 40) is None
    assert seconds(0, 5) is None


@pytest.mark.parametrize(
    ("interval", "relative_cost", "answer"),
    [
        ((-0.2, -0.1), 1.04, True),
        ((-0.2, -0.1), 0.5, True),
        ((-0.2, -0.1), 8, None),
        ((-0.2, 0.1), 1, False),
        ((0.1, 0.2), 8, False),
        ((0.1, 0.2), 0.9, None),
    ],
)
def test_better_at_equal_cost_is_left_open_where_the_cost_is_not_equal(
    interval: tuple[float, float], relative_cost: float, answer: bool | None
) -> None:
    assert is_better(interval, relative_cost) is answer


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small llama and its tokenizer, as anybody would save them."""
    folder = tmp_path_factory.mktemp("pretrained")
    build("llama", **SMALL["llama"]).save_pretrained(folder)
    train_tokenizer([d for name in DOMAINS for d in made_up_documents(name, 100)], 320, folder)
    return folder


def from_pretrained(folder: Path, fields: dict[str, Any], **study: Any) -> Plan:
    source = {"pretrained": str(folder)}
    fields["training"].pop("seed_share", None)  # it is 0 then, and experts train all updates
    return Plan.model_validate(fields | {"model": source, "tokenizer": source, "study": study})


def test_a_study_of_a_pretrained_model_sets_its_continued_pretraining_beside_its_experts(
    pretrained: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = fields_of(texts, tmp_path / "store") | {"targets": []}
    ways = {"branching": [DIVERGING, {"train": "lora", "lora": {"rank": 4}, "learning_rate_scale": 8}]}
    recipes = {"trials": [{"learning_rate": 1e-2}, {"learning_rate": 5e-3}], "learning_rate_scales": [0.5, 1]}
    plan = from_pretrained(pretrained, fields, systems=[], **ways, **recipes)
    driver = in_process(plan)
    run_steps, asked = driver.workers.run, list[list[str]]()

    def noting(requests: Sequence[StepRequest]) -> Iterator[tuple[StepRequest, Outcome]]:
        asked.append([each.label for each in requests if isinstance(each, TrainRequest)])
        return run_steps(requests)

    monkeypatch.setattr(driver.workers, "run", noting)
    study = studied_by(plan, driver)
    (at_each_scale,) = [labels for labels in asked if any("-scale-" in label for label in labels)]
    assert len(at_each_scale) == 3 * 2 * 2, "two experts of each kind at each scale, all at once"
    seed, whole = (Studied(plan, driver, study).entry(system=system) for system in ("seed", "transformer-lm"))
    assert seed["cost"]["training_tokens"] == 0
    assert whole["cost"]["training_tokens"] == 2 * 12 * 4 * 32
    forests = {"forest", LORA}
    assert {e["cost"]["training_tokens"] for e in study.entries if e["system"] in forests} == {
        2 * 12 * 4 * 32
    }
    of_others = [trial for trial in study.trials if "experts" in trial]
    assert [trial["learning_rate_scale"] for trial in of_others] == [5e29, 1e30, 4, 8]
    assert [trial["experts"] for trial in of_others[::2]] == [
        "feed-forward experts",
        "LoRA experts of rank 4",
    ]
    assert sum(trial["chosen"] for trial in of_others) == 1, "the other diverged at each scale"
    assert not any("feed-forward" in entry["system"] for entry in study.entries)
    # A run of the same plan imports the same model and continues it by the same artifact.
    chosen = next(trial for trial in study.trials if trial.get("learning_rate") and trial["chosen"])
    training = fields["training"] | {"learning_rate": chosen["learning_rate"]}
    run = from_pretrained(pretrained, fields | {"training": training, "baselines": ["transformer-lm"]})
    rows = {row.system: row for row in run_plan(run, in_process(run)).verdict.rows["test"]}
    for name, entry in (("seed", seed), ("Transformer-LM", whole)):
        cells = {text: round(cell.perplexity, 4) for text, cell in rows[name].cells.items()}
        assert entry["per_domain"] == cells, name


@pytest.mark.parametrize(
    ("study", "words"),
    [
        ({"systems": ["demix-from-seed"]}, "demix-from-seed in study.systems"),
        ({"seed_shares": [0.5]}, "study.seed_shares"),
        ({"branching": [{"train": "lora", "lora": {"rank": 999}}]}, "999"),
        ({"branching": [{"train": "lora"}, {"train": "lora", "start": "uniform"}]}, "rank 16 2 times"),
        (
            {
                "branching": [{"train": "all"}, {"train": "all", "learning_rate_scale": 2}],
                "learning_rate_scales": [1, 2],
            },
            "full experts 2 times(.|\n)*names leave the learning rate out",
        ),
    ],
)
def test_what_a_study_cannot_have_is_refused_before_a_text_is_read(
    study: dict[str, Any], words: str, pretrained: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    plan = from_pretrained(pretrained, fields_of(texts, tmp_path / "store"), **study)
    with pytest.raises(UserError, match=words):
        studied_by(plan, in_process(plan))
    assert not (tmp_path / "store").exists()


def test_an_architecture_without_a_mixture_of_experts_is_refused_before_a_text_is_read(
    texts: dict[str, Path], tmp_path: Path
) -> None:
    fields = fields_of(texts, tmp_path / "store", systems=["mixture-of-experts"])
    plan = Plan.model_validate(fields | {"model": plan_fields(texts, tmp_path)["model"]})
    with pytest.raises(UserError, match="a gpt2 has no mixture of experts"):
        studied_by(plan, in_process(plan))
    assert not (tmp_path / "store").exists()
