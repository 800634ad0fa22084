"""`btm plan`: what a run would do and cost, before and after texts are read and models trained."""

import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from btm_cluster.commands.plan import preview_table
from btm_cluster.data.tokenizer_training import train_tokenizer
from btm_cluster.driver import rates
from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.prepared_plan import text_of
from btm_cluster.driver.room import Room
from btm_cluster.errors import FoundationError, ResourcesError, StepError, UserError
from btm_cluster.ledger import Ledger, Ref, artifact_key, blob_key
from btm_cluster.operations.plan import DONE, NEW, UNREAD, Preview, Step, preview
from btm_cluster.operations.run import run_plan
from btm_cluster.operations.verify import verify
from btm_cluster.plan import Plan
from btm_cluster.storage.local_folder import LocalFolder
from btm_cluster.terminal.tables import consoles
from btm_cluster.workers.dry_run import Overlay
from tests.conftest import DOMAINS, in_process, made_up_documents, plan_fields, write_jsonl


def look(fields: dict[str, Any]) -> Preview:
    plan = Plan.model_validate(fields)
    return preview(plan, Ledger.open(plan.store))


def states(seen: Preview) -> dict[str, str]:
    return {step.name: step.state for step in seen.steps}


def step(seen: Preview, name: str) -> Step:
    return next(step for step in seen.steps if step.name == name)


@pytest.fixture(scope="module")
def grown_store(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a forest of all domains and the baseline."""
    store = tmp_path_factory.mktemp("grown") / "store"
    plan = Plan.model_validate(plan_fields(texts, store) | {"baselines": ["transformer-lm"]})
    run_plan(plan, in_process(plan))
    return store


@pytest.fixture
def after(grown_store: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The plan's fields, on a copy of the grown store."""
    shutil.copytree(grown_store, fields["store"])
    return fields | {"baselines": ["transformer-lm"]}


def test_a_dry_runs_placeholders_are_listed_with_what_lies_below_and_leave_it_alone(tmp_path: Path) -> None:
    below = LocalFolder(str(tmp_path))
    assert below.create("blobs/below", b"1")
    overlay = Overlay(below)
    assert overlay.create("blobs/above", b"2")
    assert overlay.create("artifacts/text/a.json", b"3")
    assert not overlay.create("blobs/above", b"again")
    assert not overlay.create("blobs/below", b"again")
    for prefix, listed in {
        "": ["artifacts/text/a.json", "blobs/above", "blobs/below"],
        "blobs/": ["blobs/above", "blobs/below"],
        "blobs/a": ["blobs/above"],
        "art": ["artifacts/text/a.json"],
        "tombstones/": [],
    }.items():
        assert [entry.key for entry in overlay.list(prefix)] == listed
    overlay.erase("blobs/a")
    overlay.delete("artifacts/text/a.json")
    assert [entry.key for entry in overlay.list("")] == ["blobs/below"]
    assert [entry.key for entry in below.list("")] == ["blobs/below"]


NAMES = [*DOMAINS, "market"]


def test_before_texts_are_read_sizes_are_known_and_nothing_is_claimed_of_the_rest(
    fields: dict[str, Any],
) -> None:
    seen = look(fields | {"baselines": ["transformer-lm"]})
    assert states(seen) == {f"read {name}": NEW for name in NAMES} | {
        "tokenizer": UNREAD,
        "token blocks": UNREAD,
        "seed": UNREAD,
        **{f"expert {name}": UNREAD for name in DOMAINS},
        "transformer-lm": UNREAD,
        "scores": UNREAD,
    }
    assert (step(seen, "seed").updates, step(seen, "seed").tokens) == (6, 6 * 3 * 4 * 32)
    assert (step(seen, "expert kitchen").updates, step(seen, "expert kitchen").tokens) == (6, 6 * 4 * 32)
    assert step(seen, "transformer-lm").tokens == 6 * 3 * 4 * 32
    assert seen.rate.is_estimate
    assert seen.money is None
    assert not Path(fields["store"]).exists()


def test_what_is_foretold_before_reading_is_what_is_foretold_afterwards_and_done(
    fields: dict[str, Any], after: dict[str, Any]
) -> None:
    before = look(after | {"store": f"{fields['store']}-empty"})
    done = look(after)
    assert set(states(done).values()) == {DONE}
    assert (before.parameters, before.non_embedding_parameters) == (
        done.parameters,
        done.non_embedding_parameters,
    )
    for one in before.steps:
        other = step(done, one.name)
        assert (one.updates, one.tokens) == (other.updates, other.tokens)
        assert one.stored_bytes in (0, other.stored_bytes)
    assert (done.gpu_hours, done.cpu_hours, done.wall_hours) == (0, 0, 0)


def test_at_60_columns_the_tables_fit_and_say_what_matters(after: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=60)
    preview_table(look(after), (), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    table = shown.partition("parameters")[0]
    assert max(map(len, table.rstrip().splitlines())) <= 62, "but for spaces at the margin"
    assert "everything is done" in " ".join(shown.split())
    for part in ("expert kitchen", "state", "CPU-hours", "together"):
        assert part in shown


def test_parameters_and_bytes_are_those_of_the_stored_models(after: dict[str, Any]) -> None:
    seen, ledger = look(after), Ledger.open(after["store"])
    forest = ledger.log.newest()
    assert forest is not None
    weights = ledger.get(Ref("model", forest.foundation.seed)).blob("model.safetensors").size_bytes
    assert 4 * seen.parameters < weights < 4 * seen.parameters + 10_000  # and a header
    assert seen.parameters == 320 * 32 + 32 * 32 + 12 * 32**2 + 13 * 32 + 2 * 32
    assert seen.non_embedding_parameters == 12 * 32**2 + 13 * 32 + 2 * 32
    assert step(seen, "expert kitchen").stored_bytes == 4 * seen.parameters
    assert step(seen, "seed").stored_bytes == 12 * seen.parameters
    assert step(seen, "transformer-lm").stored_bytes == 3 * 4 * seen.parameters, (
        "two milestones and the finished one"
    )
    blobs = ledger.list_artifacts("tokens")
    assert step(seen, "token blocks").stored_bytes == sum(blob.size_bytes for t in blobs for blob in t.blobs)


def test_hours_and_money_follow_from_the_plans_rate_and_price(fields: dict[str, Any]) -> None:
    cluster = fields["cluster"] | {"gpus_per_expert": 1, "tokens_per_gpu_second": 10, "price_per_gpu_hour": 3}
    seen = look(fields | {"cluster": cluster | {"seed_gpus": 2, "concurrent_experts": 2}})
    tokens = 6 * 3 * 4 * 32  # of the seed, and of three experts together
    scores = step(seen, "scores").device_hours
    assert scores > 0
    assert seen.gpu_hours == pytest.approx(2 * tokens / 10 / 3600 + scores)
    assert seen.cpu_hours == 0
    assert seen.money == pytest.approx(3 * seen.gpu_hours)
    assert step(seen, "seed").device_hours == pytest.approx(tokens / 10 / 3600)
    one_after_another = tokens / 2 + 2 * tokens / 3  # the seed on two GPUs; two experts at once, and then one
    assert seen.wall_hours == pytest.approx(one_after_another / 10 / 3600 + scores / 3)
    told = json.loads(json.dumps(seen.to_json()))
    assert (told["money"], told["gpu_hours"]) == (seen.money, seen.gpu_hours)


def test_a_mixture_of_experts_is_counted_by_what_it_stores_and_by_what_a_token_passes(
    fields: dict[str, Any],
) -> None:
    """It has the feed-forwards of all experts, and was in no sum."""
    llama = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    fields |= {"model": {"config": llama | {"intermediate_size": 256}}, "targets": []}
    fields["cluster"] |= {"gpus_per_expert": 1, "seed_gpus": 1, "tokens_per_gpu_second": 10}
    without, one, two = (
        look(fields | {"merging": {"development_blocks": 2} | merging})
        for merging in (
            {},
            {"mixture_of_experts": {"experts_per_token": 1}},
            {"mixture_of_experts": {"experts_per_token": 2}},
        )
    )
    mixture, size = step(two, "mixture of experts with the average"), 320 * 32 * 2 + 4 * 32**2 + 3 * 32
    assert mixture.state == UNREAD
    assert mixture.stored_bytes == 4 * (size + 3 * 3 * 32 * 256 + 3 * 32), "experts, and a router"
    assert two.bytes_to_store == without.bytes_to_store + mixture.stored_bytes
    assert mixture.device_hours == pytest.approx(3 * 2 * 32 / 3 / 10 / 3600), "forward, on two blocks of each"
    held_out = sum(use.size.held_out or 0 for use in two.texts)
    expert = 3 * 32 * 256 / (without.parameters - 2 * 320 * 32)
    more = step(two, "scores").device_hours - step(one, "scores").device_hours
    assert more == pytest.approx(expert * held_out / 3 / 10 / 3600)
    assert two.wall_hours > one.wall_hours > without.wall_hours


def test_before_the_first_run_hours_are_estimated_from_the_models_flops_and_the_device(
    fields: dict[str, Any],
) -> None:
    cluster = fields["cluster"] | {"gpus_per_expert": 1, "seed_gpus": 1}
    plan = Plan.model_validate(fields | {"cluster": cluster})
    ledger = Ledger.open(plan.store)
    known = preview(plan, ledger, room=Room("there", 8, 16, "NVIDIA H200, driver 1"))
    parameters, layers, width, block = known.parameters, 1, 32, 32
    flops = 6 * parameters + 12 * layers * width * block
    assert known.rate.tokens_per_second == pytest.approx(0.35 * 989e12 / flops)
    assert known.wall_hours < known.gpu_hours
    assert "H200" in known.rate.origin
    unknown = preview(plan, ledger)
    assert "an A100, since the GPU is not known here" in unknown.rate.origin
    assert unknown.gpu_hours == pytest.approx(known.gpu_hours * 989 / 312)
    on_cpu = look(fields)
    assert on_cpu.rate.is_estimate
    assert 1e8 < on_cpu.rate.tokens_per_second * flops < 1e13, "what a CPU does"


def test_passes_over_each_text_are_estimated_first_and_then_counted_and_too_many_are_warned_of(
    fields: dict[str, Any],
) -> None:
    once = look(fields)
    assert once.notes == ()
    for use in once.texts:
        size = Path(next(d for d in fields["domains"] if d["name"] == use.size.name)["text"]).stat().st_size
        assert use.size.is_estimate
        assert use.size.train == pytest.approx(0.8 * size / 4, abs=1)
        assert use.passes == pytest.approx(12 * 4 * 32 / use.size.train)
        assert use.seed_passes == use.expert_passes
    fields["training"] |= {"updates": 1_000}
    plan = Plan.model_validate(fields)
    prepare(plan, in_process(plan))
    often = look(fields)
    for use in often.texts:
        assert not use.size.is_estimate
        assert use.passes == pytest.approx(1_000 * 4 * 32 / use.size.train)
    (note,) = often.notes
    most = max(use.passes for use in often.texts)
    assert f"lower `training.updates` to {int(1_000 * 4 / most)}" in note
    fields["training"] |= {"updates": int(1_000 * 4 / most)}
    assert look(fields).notes == ()


def test_earlier_runs_give_a_rate_for_the_same_kind_of_device_only(after: dict[str, Any]) -> None:
    longer = after | {"store": after["store"], "training": after["training"]}
    market = {"name": "late", "text": after["targets"][0]["text"]}
    seen = look(longer | {"domains": [*after["domains"], market], "targets": []})
    assert seen.rate.origin == "as the newest training in this store went"
    assert seen.cpu_hours > 0
    assert seen.money is None  # hours of a CPU have no price
    gpus = look(
        longer | {"domains": [*after["domains"], market], "targets": [], "cluster": {"gpus_per_expert": 1}}
    )
    assert gpus.rate.is_estimate


def test_a_domain_that_arrives_later_leaves_the_others_done(after: dict[str, Any], tmp_path: Path) -> None:
    late = {"name": "late", "text": str(write_jsonl(tmp_path / "late.jsonl", made_up_documents("late", 100)))}
    fields = after | {"domains": [*after["domains"], late]}
    seen = look(fields)
    changed = {name: state for name, state in states(seen).items() if state != DONE}
    assert changed == {
        "read late": NEW,
        "token blocks": "11 of 11 done, and more once all texts are read",
        "expert late": UNREAD,
        "scores": "46 of 46 done, and more once all texts are read",
    }
    assert step(seen, "seed").tokens == 6 * 3 * 4 * 32  # of the founding domains
    plan = Plan.model_validate(fields)
    prepare(plan, in_process(plan))
    changed = {name: state for name, state in states(look(fields)).items() if state != DONE}
    # 5 models on 8 parts, 6 on 10, and two milestones on the development text of three founding domains
    assert changed == {"expert late": NEW, "scores": "20 of 66 new"}


def test_a_new_target_means_new_blocks_and_no_training(after: dict[str, Any], tmp_path: Path) -> None:
    late = {"name": "fair", "text": str(write_jsonl(tmp_path / "fair.jsonl", made_up_documents("fair", 60)))}
    seen = look(after | {"targets": [*after["targets"], late]})
    changed = {name: state for name, state in states(seen).items() if state != DONE}
    assert changed.keys() == {"read fair", "token blocks", "scores"}
    assert changed["token blocks"].endswith("and more once all texts are read")
    assert seen.cpu_hours == step(seen, "scores").device_hours > 0


def test_texts_that_are_read_and_not_trained_on_are_told_apart(fields: dict[str, Any]) -> None:
    plan = Plan.model_validate(fields)
    prepare(plan, in_process(plan))
    seen = states(look(fields))
    assert {seen[f"read {name}"] for name in NAMES} == {DONE}
    assert [seen[name] for name in ("tokenizer", "token blocks")] == [DONE, DONE]
    assert {seen[name] for name in ("seed", *(f"expert {name}" for name in DOMAINS), "scores")} == {NEW}


def test_blocks_are_counted_where_only_some_are_new(fields: dict[str, Any]) -> None:
    plan = Plan.model_validate(fields)
    driver = in_process(plan)
    prepare(plan, driver)
    manifests = sorted(Path(plan.store, "artifacts", "tokens").iterdir())
    manifests[0].unlink()
    assert states(look(fields))["token blocks"] == f"1 of {len(manifests)} new"


def test_a_file_that_was_touched_is_read_again_and_trainings_stay_done(
    after: dict[str, Any], texts: dict[str, Path], tmp_path: Path
) -> None:
    own = shutil.copy(texts["market"], tmp_path / "market.jsonl")
    fields = after | {"targets": [{"name": "market", "text": str(own)}]}
    plan = Plan.model_validate(fields)
    prepare(plan, in_process(plan))
    assert set(states(look(fields)).values()) == {DONE}
    os.utime(own, ns=(0, 0))
    changed = {name: state for name, state in states(look(fields)).items() if state != DONE}
    assert changed.keys() == {"read market", "token blocks", "scores"}


@pytest.mark.parametrize("lost", ["manifest", "file"])
def test_a_text_that_was_read_and_lost_is_read_again_and_nothing_else_is_made(
    after: dict[str, Any], lost: str
) -> None:
    plan, ledger = Plan.model_validate(after), Ledger.open(after["store"])
    read_results = {read_result.note["name"]: read_result for read_result in ledger.list_artifacts("source")}
    for name in (DOMAINS[0], "market"):
        text = ledger.get(Ref("text", text_of(read_results[name])))
        key = artifact_key(text.ref) if lost == "manifest" else blob_key(text.ref, text.blobs[-1].sha256)
        Path(ledger.storage.address(key)).unlink()
    assert verify(ledger).problems
    assert states(look(after))[f"read {DOMAINS[0]}"] == NEW
    assert states(look(after))[f"read {DOMAINS[1]}"] == DONE
    made = run_plan(plan, in_process(plan)).made
    assert made == {"source": 2}
    assert verify(ledger).problems == ()
    assert set(states(look(after)).values()) == {DONE}


def test_a_lost_text_that_its_source_no_longer_gives_is_one_clear_error(
    after: dict[str, Any], tmp_path: Path
) -> None:
    text = write_jsonl(tmp_path / "later.jsonl", made_up_documents("later", 200))
    stamp = os.stat(text)
    fields = after | {"targets": [{"name": "later", "text": str(text)}]}
    plan, ledger = Plan.model_validate(fields), Ledger.open(after["store"])
    run_plan(plan, in_process(plan))
    (read_result,) = [
        read_result for read_result in ledger.list_artifacts("source") if read_result.note["name"] == "later"
    ]
    Path(ledger.storage.address(f"artifacts/text/{text_of(read_result)}.json")).unlink()
    text.write_bytes(text.read_bytes().replace(b"a", b"e"))
    os.utime(text, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(StepError, match="was lost, and reading its source again gives another") as failed:
        run_plan(plan, in_process(plan))
    assert f"artifacts/text/{text_of(read_result)}.json" in str(failed.value)


def test_a_plan_of_fewer_domains_than_its_forest_is_done(after: dict[str, Any]) -> None:
    seen = look(after | {"domains": after["domains"][1:]})
    assert set(states(seen).values()) == {DONE}


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 64, "n_head": 2}}},
        {"tokenizer": {"train": {"vocabulary": 330}}},
        {"training": {"block_tokens": 16, "updates": 12, "blocks_per_domain_update": 4}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_plan_that_changes_the_foundation_is_refused_as_a_run_refuses_it(
    change: dict[str, Any], after: dict[str, Any]
) -> None:
    with pytest.raises(FoundationError):
        look(after | change)


def test_every_text_that_is_not_there_is_named_at_once(fields: dict[str, Any]) -> None:
    for text in (fields["domains"][1], fields["targets"][0]):
        text["text"] = f"{text['name']}-is-not-there.jsonl"
    with pytest.raises(UserError) as caught:
        look(fields)
    named = re.findall(r"the text of '(\w+)' matches no file\n  found:    \1-is-not-there", str(caught.value))
    assert named == ["harbour", "market"]


def test_a_plan_that_a_run_would_refuse_is_refused(fields: dict[str, Any]) -> None:
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}
    for change, part in (
        ({"domains": [{"name": "a", "text": "none.jsonl"}]}, "matches no file"),
        ({"model": {"config": config | {"n_positions": 16}}}, "block_tokens"),
        ({"model": {"config": config | {"n_heads": 2}}}, "`n_head`"),
        ({"model": {"config": config | {"n_embd": 33}}}, "gpt2"),
        ({"tokenizer": {"pretrained": "no/../tokenizer"}}, "cannot find the pretrained"),
    ):
        with pytest.raises(UserError) as caught:
            look(fields | change)
        assert part in str(caught.value)


def test_a_price_that_prices_nothing_is_told(fields: dict[str, Any]) -> None:
    seen = look(
        fields | {"cluster": fields["cluster"] | {"price_per_gpu_hour": 3, "tokens_per_gpu_second": 10}}
    )
    assert seen.money is None
    assert "prices nothing" in seen.notes[0]


@pytest.fixture
def pretrained(fields: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The plan's fields with a pretrained model and its tokenizer, and without a seed share."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "pretrained"
    small = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=320, **small)).save_pretrained(
        folder
    )
    train_tokenizer(made_up_documents("kitchen", 100), 320, folder)
    training = {name: value for name, value in fields["training"].items() if name != "seed_share"}
    source = {"pretrained": str(folder)}
    return fields | {
        "model": source,
        "tokenizer": source,
        "training": training,
        "baselines": ["transformer-lm"],
    }


def test_a_pretrained_seed_takes_no_updates_and_stores_no_optimizer_and_experts_take_all(
    pretrained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = look(pretrained)
    plan = Plan.model_validate(pretrained)
    prepare(plan, in_process(plan))
    for seen in (before, look(pretrained)):
        seed = step(seen, "seed")
        assert (seed.updates, seed.tokens, seed.stored_bytes) == (0, 0, 4 * seen.parameters)
        assert (step(seen, "expert kitchen").updates, step(seen, "transformer-lm").updates) == (12, 12)
        preview_table(seen, (), consoles(json_output=False)[0])
        assert (
            "note: the pretrained model is the seed: experts train all 12 updates\n"
            in capsys.readouterr().out
        )
        assert seen.to_json()["notes"]


def test_a_seed_share_that_is_written_for_a_pretrained_model_says_what_it_leaves_out(
    pretrained: dict[str, Any],
) -> None:
    pretrained["training"]["seed_share"] = 0.5
    seen = look(pretrained)
    assert (step(seen, "expert kitchen").updates, step(seen, "transformer-lm").updates) == (6, 6)
    assert "updates 1 to 6 of 12 are never made" in seen.notes[0]
    assert not look(
        pretrained | {"model": {"config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}}}
    ).notes


def test_a_pretrained_tokenizer_and_seed_are_new_or_done_whatever_text_is_read(
    pretrained: dict[str, Any],
) -> None:
    before = states(look(pretrained))
    assert (before["tokenizer"], before["seed"], before["expert kitchen"]) == (NEW, NEW, UNREAD)
    plan = Plan.model_validate(pretrained)
    prepare(plan, in_process(plan))
    text = Path(pretrained["store"]).parent / "other.jsonl"
    write_jsonl(text, made_up_documents("other", 100))
    seen = states(look(pretrained | {"domains": [{"name": "other", "text": str(text)}]}))
    assert (seen["tokenizer"], seen["seed"], seen["expert other"]) == (DONE, DONE, UNREAD)
    assert seen["token blocks"] == "2 of 2 done, and more once all texts are read", "those of the target"


def test_memory_of_gpus_is_told_with_bytes_to_store_and_refused_where_it_cannot_be(
    fields: dict[str, Any],
) -> None:
    cluster = fields["cluster"] | {"gpus_per_expert": 0.5, "seed_gpus": 1}
    plan = Plan.model_validate(fields | {"cluster": cluster, "baselines": []})
    ledger = Ledger.open(plan.store)
    unknown = preview(plan, ledger)
    seed, expert = unknown.demands
    assert (seed.label, expert.label) == ("seed", "an expert")
    assert seed.memory is not None
    assert expert.memory is not None
    assert expert.memory.at_once == 2, "a GPU has two of them, and there are three"
    peak = seed.memory.memory(None).peak
    assert peak > 16 * unknown.parameters
    first, second = unknown.memory_lines
    assert first.startswith("memory of seed: about 0.0 GB at its peak on each GPU (weights 0.0, ")
    assert second.endswith(", and 2 at once")
    assert json.loads(json.dumps(unknown.to_json()))["asks"][0]["memory"]["peak"] == peak
    assert unknown.checkpoint_bytes == 3 * 2 * 12 * unknown.parameters, "of three experts at once, two each"
    with pytest.raises(ResourcesError, match="seed does not fit the memory of its GPUs"):
        preview(plan, ledger, room=Room("here", 1, 1, "GPU", peak / 2))


def test_what_is_stored_follows_from_the_type_of_the_weights_and_from_what_experts_change(
    fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "cpu_flops", lambda: 1e11)  # measured, it differs while other tests run
    rounded = look(fields | {"training": fields["training"] | {"weights": "bfloat16"}})
    assert step(rounded, "seed").stored_bytes == 14 * rounded.parameters, "with moments, and the masters"
    assert step(rounded, "expert kitchen").stored_bytes == 2 * rounded.parameters
    lora = look(fields | {"branching": {"train": "lora", "lora": {"rank": 2}}})
    adapter = step(lora, "expert kitchen").stored_bytes // 4
    assert adapter == 2 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32)
    whole, frozen = 6 * lora.parameters, 4 * (lora.parameters + adapter) + 2 * adapter
    faster = (whole + 12 * 32 * 32) / (frozen + 12 * 32 * 32)
    both = step(lora, "seed"), step(lora, "expert kitchen")
    assert both[0].device_hours / both[1].device_hours == pytest.approx(3 * faster), (
        "no gradients of frozen weights"
    )
