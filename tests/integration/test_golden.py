"""One plan whose every number is known: a change of structure changes none of them.

Grown in this process: a seed, three experts, a Transformer-LM, a DEMix, a domain that is added from the
average, and the verdict. Weights are compared bit for bit on the kinds of machine that wrote them, rows of the
verdict within rounding anywhere. `python -m tests.integration.test_golden` writes `golden.json` anew: say in
the commit why the numbers changed. With `--add`, what other kinds of machine wrote stays.
"""

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from btm_cluster.identity import identity_of
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.operations.run import run_plan
from btm_cluster.plan import Plan
from tests.conftest import DOMAINS, TARGETS, in_process, made_up_documents, plan_fields, write_jsonl

GOLDEN = Path(__file__).with_name("golden.json")


def grow_golden(folder: Path) -> dict[str, Any]:
    """Identities, weights and rows of the plan."""
    torch.set_num_threads(1)
    texts = {
        name: write_jsonl(folder / f"{name}.jsonl", made_up_documents(name, 120 if name in DOMAINS else 40))
        for name in (*DOMAINS, *TARGETS)
    }
    fields = plan_fields(texts, folder / "store")
    fields["baselines"] = ["transformer-lm", "demix"]
    fields["training"] |= {"updates": 24, "seed_share": 0.5, "learning_rate": 1e-2}
    fields["branching"] = {"start": "posterior"}
    fields["cluster"]["micro_batch_blocks"] = 4  # the last bits depend on it
    domains = fields["domains"]
    first = Plan.model_validate(fields | {"domains": domains[:2]})
    run_plan(first, in_process(first))
    whole = Plan.model_validate(fields)
    run = run_plan(whole, in_process(whole))
    ledger = Ledger.open(whole.store)
    expert = run.forest.expert(domains[2]["name"])
    assert len(expert.parents) == 2, "the later domain starts from the average of two experts"
    models = {"seed": run.forest.foundation.seed} | {one.domain: one.identity for one in run.forest.experts}
    rivals = [
        model for model in ledger.list_artifacts("model") if model.facts.get("role") == "transformer-lm"
    ]
    (finished,) = [
        model.identity for model in rivals if model.recipe["last_update"] == whole.training.updates
    ]
    models |= {"transformer-lm": finished}
    weights = {
        name: ledger.get(Ref("model", identity)).blob("model.safetensors").sha256
        for name, identity in models.items()
    }
    rows = {
        f"{split}: {row.system}": {text: cell.perplexity for text, cell in row.cells.items()}
        for split, of_split in run.verdict.rows.items()
        for row in of_split
    }
    names = {identity: name for name, identity in models.items()}
    texts_read = {one.domain: one.text for one in run.forest.experts}
    parents = {names[parent.identity]: parent.weight for parent in expert.parents}
    return {
        "identities": models | {"tokenizer": run.forest.foundation.tokenizer},
        "texts": texts_read,
        "rows": rows,
        "bits": {machine(): {"weights": weights, "parents": parents, "rows": identity_of(rows)}},
    }


def machine() -> str:
    """What the last bits of a sum depend on: MKL chooses its kernels by the CPU's maker and model."""
    capability = torch.backends.cpu.get_cpu_capability()
    said = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in said.read_text().splitlines()] if said.exists() else []
    cpu = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    model = "/".join(cpu.get(name, "unknown") for name in ("vendor_id", "cpu family", "model"))
    return f"{platform.machine()} {model} {capability} torch {torch.__version__}"


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return grow_golden(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return dict(json.loads(GOLDEN.read_text()))


def test_texts_and_identities_are_those_that_were_written_down(
    grown: dict[str, Any], golden: dict[str, Any]
) -> None:
    assert grown["texts"] == golden["texts"]
    # The identity of an expert that starts from an average hangs on nothing that a machine rounds.
    assert grown["identities"] == golden["identities"]


def test_the_rows_of_the_verdict_are_those_that_were_written_down(
    grown: dict[str, Any], golden: dict[str, Any]
) -> None:
    assert grown["rows"].keys() == golden["rows"].keys()
    for name, row in golden["rows"].items():
        assert grown["rows"][name] == pytest.approx(row, rel=1e-3), name


def test_weights_are_the_same_bit_for_bit_on_the_same_kind_of_machine(
    grown: dict[str, Any], golden: dict[str, Any]
) -> None:
    ((here, bits),) = grown["bits"].items()
    if here not in golden["bits"]:
        pytest.skip(f"written on {', '.join(golden['bits'])}, this is {here}")
    assert bits == golden["bits"][here]


def write(keeps_others: bool) -> None:
    """Writes what this machine computes."""
    with tempfile.TemporaryDirectory() as scratch:
        grown = grow_golden(Path(scratch))
    others = json.loads(GOLDEN.read_text())["bits"] if keeps_others else {}
    GOLDEN.write_text(json.dumps({**grown, "bits": others | grown["bits"]}, indent=1) + "\n")


if __name__ == "__main__":
    write(keeps_others="--add" in sys.argv)
