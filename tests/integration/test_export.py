"""`btm export` and the ways to merge: folders that transformers opens, the YAML of the same average, weights
from a text of the user's, and a hub that is a stub on loopback."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from btm_cluster.cli import app, run_command
from btm_cluster.equations.perplexity import BYTES, TOKENS, bits_per_byte
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.steps.stored import documents_of, open_model
from tests.conftest import write_jsonl
from tests.integration.conftest import GrownForest, copy_store

Btm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def btm(capsys: pytest.CaptureFixture[str]) -> Btm:
    """The command line in this process: exit code, output and errors."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command(lambda: app([str(argument) for argument in arguments], standalone_mode=False))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def plan_path(grown: GrownForest, tmp_path: Path) -> Path:
    """The grown forest's plan, on a copy of its store."""
    plan = copy_store(grown.prepared.plan, tmp_path / "store")
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(json.loads(plan.model_dump_json(exclude_defaults=True))))
    return path


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, whichever file it lies in."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def is_the_stored(folder: Path, model: Artifact, ledger: Ledger) -> None:
    """What transformers opens predicts as the stored model does."""
    opened, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    stored = open_model(ledger, model)
    read = AutoTokenizer.from_pretrained(folder)("harbour market", return_tensors="pt").input_ids
    torch.testing.assert_close(opened.eval()(read).logits, stored.eval()(read).logits, rtol=0, atol=0)


def by_mergekit(file: Path) -> dict[str, torch.Tensor]:
    """What mergekit's documentation says of its YAML, in float64, place by place where signs are elected."""
    recipe = yaml.safe_load(file.read_text())
    models = [(weights_in(Path(one["model"])), one["parameters"]) for one in recipe["models"]]
    weight = [parameters["weight"] for _, parameters in models]
    found = {}
    for name in models[0][0]:
        tensors = [tensors[name].double() for tensors, _ in models]
        if recipe["merge_method"] == "linear":
            found[name] = sum(w * t for w, t in zip(weight, tensors, strict=True))
            continue
        base = weights_in(Path(recipe["base_model"]))[name].double()
        vectors = [tensor - base for tensor in tensors]
        if recipe["merge_method"] == "task_arithmetic":
            assert not recipe["parameters"]["normalize"]
            found[name] = base + sum(w * v for w, v in zip(weight, vectors, strict=True))
            continue
        kept = []
        for (_, parameters), vector in zip(models, vectors, strict=True):
            flat = torch.zeros_like(vector).flatten()
            best = vector.abs().flatten().topk(max(1, int(parameters["density"] * vector.numel()))).indices
            flat[best] = vector.flatten()[best]
            kept.append(flat.view_as(vector))
        stacked = torch.stack(kept)
        agrees = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
        scale = recipe["parameters"].get("lambda", 1.0)
        found[name] = base + scale * (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return found


@pytest.mark.parametrize(
    "method", [("uniform",), ("task-arithmetic",), ("ties", "--density", "0.3", "--scale", "0.8")], ids=str
)
def test_a_store_is_exported_with_an_average_and_the_yaml_that_gives_it(
    method: tuple[str, ...], grown: GrownForest, tmp_path: Path, btm: Btm
) -> None:
    plan = copy_store(grown.prepared.plan, tmp_path / "store")
    to, recipe = tmp_path / "models", tmp_path / "merge.yaml"
    call = ("export", "--store", plan.store, "--all", "--average", *method, "--mergekit", recipe, "--to", to)
    code, out, err = btm(*call, "--shard-size", "40KB", "--json")
    assert code == 0, err
    names = [one["model"] for one in json.loads(out)["models"]]
    assert names == ["seed", *(f"experts/{name}" for name in grown.grown.forest.domains), "average"]
    ledger = Ledger.open(plan.store)
    (average,) = (
        model
        for model in ledger.list_artifacts("model")
        if model.facts.get("role") == "average" and model.note["name"] == method[0]
    )
    models = [ledger.get(Ref("model", grown.grown.forest.foundation.seed)), *grown.experts, average]
    for name, model in zip(names, models, strict=True):
        index = json.loads((to / name / "model.safetensors.index.json").read_text())
        shards = sorted(set(index["weight_map"].values()))
        assert len(shards) > 1
        assert shards == sorted(file.name for file in (to / name).glob("*.safetensors"))
        assert all((to / name / s).stat().st_size < 45_000 for s in shards), (
            "no tensor here is larger than 40 kB"
        )
        is_the_stored(to / name, model, ledger)
    expected = by_mergekit(recipe)
    found = weights_in(to / "average")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=2e-6, msg=name)
    if method[0] != "uniform":
        assert average.inputs["base"] == (Ref("model", grown.grown.forest.foundation.seed),)
        assert not torch.equal(
            found["transformer.wte.weight"], weights_in(to / "seed")["transformer.wte.weight"]
        )


def test_a_card_says_what_a_model_is_and_how_well_it_predicts(
    grown: GrownForest, plan_path: Path, tmp_path: Path, btm: Btm
) -> None:
    code, _, err = btm(
        *("export", plan_path, "--in-process", "--expert", "kitchen"),
        *("--license", "cc-by-4.0", "--to", tmp_path / "kitchen"),
    )
    assert code == 0, err
    _, front, text = (tmp_path / "kitchen" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["branch-train-merge"],
        "license": "cc-by-4.0",
    }
    seed = grown.grown.forest.foundation.seed
    assert "The expert of the domain kitchen" in text
    assert "blocks of 32 tokens, each read after `<|endoftext|>`" in text
    assert "exp of the mean negative log-probability" in text
    assert f"| the seed | `{seed}` | 1.000000 |" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| market |"))
    result = next(one for one in grown.evaluation.results if (one.text, one.split) == ("market", "test"))
    figures = [
        f"{torch.exp(-result.logp[system][TOKENS].sum() / result.sizes_UD[TOKENS].sum()):.2f} ("
        for system in ("seed", "Transformer-LM")
    ]
    assert f"| {int(result.sizes_UD[TOKENS].sum()):,} |" in row
    assert all(figure in row for figure in figures)
    bits = bits_per_byte(result.logp["seed"][BYTES].sum(), result.sizes_UD[BYTES].sum())
    assert f"), {bits:.4f} |" in row
    config = json.loads((tmp_path / "kitchen" / "config.json").read_text())
    assert config["n_positions"] == 32
    assert AutoTokenizer.from_pretrained(tmp_path / "kitchen").model_max_length == 32


def test_a_given_text_weighs_experts_as_the_same_text_of_the_plan_does_and_is_not_stored(
    grown: GrownForest, plan_path: Path, tmp_path: Path, btm: Btm
) -> None:
    ledger = Ledger.open(str(tmp_path / "store"))
    market = grown.text("market")
    documents = list(documents_of(ledger, market.identity, "development"))
    given = write_jsonl(
        tmp_path / "given.jsonl", [*reversed(documents), documents[0]]
    )  # another order, and one twice
    before = {entry.key for entry in ledger.storage.list("")}
    call = ("merge", plan_path, "--in-process", "--text", given)
    code, out, err = btm(*call, "--to", tmp_path / "merged", "--json")
    assert code == 0, err
    told = json.loads(out)
    planned = ledger.get(grown.averages["posterior for market"]).facts["weights"]
    names = {expert.identity: expert.domain for expert in grown.grown.forest.experts}
    assert told["weights"] == pytest.approx({names[one]: weight for one, weight in planned.items()}, abs=1e-5)
    experts = told["text"]["experts"]
    assert {name: one["weight"] for name, one in experts.items() if one["weight"]} == told["weights"]
    assert sum(one["block_mean"] for one in experts.values()) == pytest.approx(1)
    assert all(one["block_deviation"] > 0 for one in experts.values())
    assert told["text"]["tokens"] == grown_tokens(ledger, market.tokens["development"])
    new = {entry.key for entry in ledger.storage.list("")} - before
    (manifest,) = (key for key in new if key.startswith("artifacts/"))
    made = ledger.read_manifest(manifest)
    assert made is not None
    (timeline,) = (key for key in new if key.endswith("/timeline.json"))
    assert new <= {manifest, timeline, f"blobs/{made.blob('model.safetensors').sha256}"}
    told_of_run = ledger.storage.read(timeline).decode()
    assert "given" not in told_of_run.replace("weights for a given text", "")
    assert sorted(made.recipe["weights"]) == sorted(one["weight"] for one in experts.values())
    assert "given.jsonl" not in json.dumps([made.recipe, made.facts, made.note])

    code, out, err = btm(*call, "--weights", "argmax", "--to", tmp_path / "one")
    assert code == 0, err
    best = max(experts, key=lambda name: experts[name]["block_mean"])
    assert f"wrote {tmp_path / 'one'}: 1 {best}" in out
    assert " ± " in out


def grown_tokens(ledger: Ledger, tokens: tuple[Ref, ...]) -> int:
    return sum(ledger.get(ref).facts["tokens"] for ref in tokens)


def test_calls_that_cannot_be_met_are_refused_before_anything_is_written(
    plan_path: Path, tmp_path: Path, btm: Btm
) -> None:
    store, to = tmp_path / "store", tmp_path / "models"
    before = set(tmp_path.rglob("*"))
    export = ("export", "--store", store, "--to", to)
    merge = ("merge", plan_path, "--to", to)
    for call, part in {
        ("export", "--to", to, "--seed"): "btm export needs a forest",
        ("export", plan_path, "--store", store, "--to", to, "--seed"): "both",
        export: "one kind of model",
        (*export, "--seed", "--expert", "kitchen"): "--expert and --seed",
        (*export, "--expert", "cellar"): "harbour, kitchen, orchard",
        (*export, "--average", "posterior"): "name a plan instead of --store",
        (*export, "--average", "mean"): "uniform, task-arithmetic, ties",
        (*export, "--average", "uniform", "--mergekit", to): "--all",
        (*export, "--seed", "--scale", "2"): "--scale is of an average",
        (*export, "--average", "uniform", "--scale", "2"): "--average ties",
        (*export, "--average", "task-arithmetic", "--density", "0.5"): "--density is of one method",
        (*export, "--average", "ties", "--density", "0"): "at most 1",
        (*export, "--average", "ties", "--scale", "nan"): "a finite one",
        (*export, "--seed", "--shard-size", "5 miles"): "such as 5GB",
        (*export, "--moe"): "--moe needs the forest's plan",
        (*export, "--seed", "--rest", "seed"): "--rest is of a mixture of experts",
        (*export, "--seed", "--public"): "--push-to-hub",
        (*export, "--seed", "--to", store): "already exists",
        (*merge, "--weights", "learned", "--text", plan_path): "--weights argmax or --weights posterior",
        (*merge, "--for", "market", "--text", plan_path): "two texts to merge for",
        (*merge, "--text", tmp_path / "none.txt"): "none.txt",
        (*merge, "--weights", "ties", "--for", "market"): "the same for every text",
    }.items():
        code, out, err = btm(*call)
        assert (code, out) == (2, ""), call
        assert part in err, call
    assert set(tmp_path.rglob("*")) == before


class Hub(ThreadingHTTPServer):
    """As much of the hub as a push needs, on loopback."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubRequest)
        self.commits: dict[str, dict[str, bytes]] = {}
        """Files by repository."""
        self.created: list[dict[str, Any]] = []
        self.public: set[str] = set()
        self.role = "write"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _HubRequest(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, body: Any, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer good":
            self.answer(401, {"error": "Invalid user token."})
        elif self.path == "/api/whoami-v2":
            token = {"accessToken": {"role": self.server.role}}
            self.answer(200, {"name": "me", "orgs": [{"name": "lab"}], "auth": token})
        else:
            repository = "/".join(self.path.split("/")[3:5])
            if repository in self.server.public:
                self.answer(200, {"id": repository, "private": False, "siblings": [], "tags": []})
            elif repository in self.server.commits:
                files = [{"rfilename": name} for name in self.server.commits[repository]]
                tree = [{"type": "file", "path": one["rfilename"], "size": 1, "oid": "0"} for one in files]
                info = {"id": repository, "private": True, "siblings": files, "tags": [], "sha": "0" * 40}
                self.answer(200, tree if "/tree/" in self.path else info)
            else:
                self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            name = "{organization}/{name}".format(**{"organization": "me"} | json.loads(body))
            self.server.commits.setdefault(name, {})
            self.answer(200, {"url": f"{self.server.address}/{name}"})
        elif "/preupload/" in self.path:
            files = [
                one | {"uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            repository = "/".join(self.path.split("/")[3:5])
            files = self.server.commits[repository]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            self.answer(
                200, {"commitUrl": f"{self.server.address}/{repository}/commit/0", "commitOid": "0" * 40}
            )
        else:
            self.answer(200, {})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub, and an environment that leads to it and has no token."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    # Read when huggingface_hub was imported; a process of its own reads the environment.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "hf-home" / "token"))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_folder_is_pushed_to_a_private_repository_whose_old_weights_go(
    grown: GrownForest, hub: Hub, tmp_path: Path
) -> None:
    hub.commits["lab/legal"] = {"model-00001-of-00002.safetensors": b"old", "notes.md": b"ours"}
    to = tmp_path / "seed"
    call = (
        "export",
        "--store",
        grown.prepared.plan.store,
        "--seed",
        "--to",
        str(to),
        "--push-to-hub",
        "lab/legal",
    )
    done = subprocess.run(
        [sys.executable, "-m", "btm_cluster", *call],
        env={**os.environ, "HF_TOKEN": "good", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.address}/lab/legal" in done.stdout
    (created,) = hub.created
    assert created.get("private") or created.get("visibility") == "private"
    pushed = hub.commits["lab/legal"]
    assert pushed.pop("notes.md") == b"ours"
    assert pushed == {file.name: file.read_bytes() for file in to.iterdir()}


def test_what_the_hub_would_refuse_is_refused_before_anything_is_written(
    grown: GrownForest, hub: Hub, tmp_path: Path, btm: Btm, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.public.add("lab/open")

    def refused(repository: str, part: str) -> None:
        code, out, err = btm(
            *("export", "--store", grown.prepared.plan.store, "--all"),
            *("--to", tmp_path / "models", "--push-to-hub", repository),
        )
        assert (code, out) == (2, ""), err
        assert part in err
        assert not (tmp_path / "models").exists()
        assert not hub.created

    refused("me/model", "there is no token for the hub")
    monkeypatch.setenv("HF_TOKEN", "bad")
    refused("me/model", "the hub refused the token")
    monkeypatch.setenv("HF_TOKEN", "good")
    refused("somebody/model", "a token of me, lab")
    refused("model", "OWNER/NAME")
    hub.public.add("lab/open-seed")
    refused("lab/open", "the repository lab/open-seed is public")
    hub.role = "read"
    refused("me/model", "may only read")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused("me/model", "the hub did not answer")
