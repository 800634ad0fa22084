"""The plan: what is read from YAML, what is refused, and how a refusal is worded."""

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from btm_cluster.errors import PlanError, UserError
from btm_cluster.operations.init import STARTER_PLAN
from btm_cluster.operations.quickstart import PLAN_FILE, QUICKSTART_PLAN, TEXT_FOLDER, TEXTS
from btm_cluster.operations.schema import plan_reference
from btm_cluster.plan import BranchingPlan, Plan, SearchPlan, plan_schema, read_plan
from btm_cluster.plan.problems import _sections, describe_problems
from btm_cluster.plan.synonyms import SYNONYMS
from btm_cluster.plan.training import TrainingPlan

MINIMAL = """\
name: n
store: s
domains: [{name: a, text: a.txt}]
tokenizer: {train: {}}
model: {preset: gpt3-125m}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Writes a plan file as it is given."""

    def write(document: str | bytes) -> Path:
        path = tmp_path / "plan.yaml"
        path.write_bytes(document.encode() if isinstance(document, str) else document)
        return path

    return write


def refusal(path: Path) -> str:
    """The words with which a plan is refused."""
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    return str(caught.value)


def entries(words: str) -> dict[str, str]:
    """A refusal's problems by field; every one of them has its three lines."""
    by_field: dict[str, str] = {}
    for entry in words.split("\n- ")[1:]:
        field, _, rest = entry.partition("\n")
        assert [line.split(":")[0].strip() for line in rest.splitlines()] == [
            "found",
            "expected",
            "remedy",
        ], entry
        assert all(line.split(":", 1)[1].strip() for line in rest.splitlines()), entry
        by_field[field] = by_field.get(field, "") + rest
    return by_field


def test_the_starter_parses_and_comments_every_choice_that_it_makes(write: Callable[[str], Path]) -> None:
    plan = read_plan(write(STARTER_PLAN))
    assert plan.domains[0].text[0].endswith("/text/news/*.jsonl.zst")
    assert plan.baselines == ("transformer-lm",)
    assert STARTER_PLAN.count("#") > 20
    adapters = STARTER_PLAN.replace("# branching:", "branching:").replace("#   train: lora", "  train: lora")
    assert read_plan(write(adapters)).branching == BranchingPlan(train="lora"), "at LoRA's own rate"


def test_a_plan_is_frozen_and_survives_pickling(write: Callable[[str], Path]) -> None:
    plan = read_plan(write(STARTER_PLAN))
    assert pickle.loads(pickle.dumps(plan)) == plan
    with pytest.raises(ValidationError):
        plan.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "section", "nearest"),
    [
        ("tokeniser", None, "tokenizer"),
        ("updats", "training", "updates"),
        ("prise_per_gpu_hour", "cluster", "price_per_gpu_hour"),
        ("posteriour", "merging", "posterior"),
        ("seed_shares", "training", "seed_share"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_name(
    key: str, section: str | None, nearest: str, write: Callable[[str], Path]
) -> None:
    fields = yaml.safe_load(MINIMAL)
    (fields if section is None else fields.setdefault(section, {}))[key] = 1
    words = refusal(write(yaml.safe_dump(fields)))
    assert f"did you mean `{nearest}`?" in entries(words)[f"{section}.{key}" if section else key]


@pytest.mark.parametrize(
    ("key", "section", "remedy"),
    [
        ("batch_size", "training", "`training.blocks_per_domain_update`: blocks that an expert takes"),
        ("num-train-epochs", "training", "`training.updates`: epochs times the tokens of a domain"),
        ("lr", None, "here it is `training.learning_rate`"),
        ("seed", "training", "here it is `training.random_seed`"),
        ("n_layer", "model", "here it is `model.config`"),
    ],
)
def test_a_name_that_other_tools_have_is_refused_with_the_plans_own(
    key: str, section: str | None, remedy: str, write: Callable[[str], Path]
) -> None:
    fields = yaml.safe_load(MINIMAL)
    (fields if section is None else fields.setdefault(section, {}))[key] = 1
    words = refusal(write(yaml.safe_dump(fields)))
    assert remedy in entries(words)[f"{section}.{key}" if section else key]


@pytest.mark.parametrize(
    ("line", "key", "field"),
    [
        (
            "study: {branching: [{train: lora, rank: 8}]}",
            "study.branching[0].rank",
            "study.branching[0].lora.rank",
        ),
        (
            "study: {branching: [{train: lora, alpha: 8}]}",
            "study.branching[0].alpha",
            "study.branching[0].lora.alpha",
        ),
        ("study: {branching: [{train: lora, r: 8}]}", "study.branching[0].r", "study.branching[0].lora.rank"),
        (
            "branching: {train: lora, lora: {lora_alpha: 8}}",
            "branching.lora.lora_alpha",
            "branching.lora.alpha",
        ),
        (
            "branching: {train: lora, target_modules: [q]}",
            "branching.target_modules",
            "branching.lora.modules",
        ),
        ("updates: 8", "updates", "training.updates"),
        ("pretrained: x", "pretrained", "tokenizer.pretrained` or `model.pretrained"),
    ],
)
def test_a_key_in_the_wrong_section_is_refused_with_the_place_where_it_belongs(
    line: str, key: str, field: str, write: Callable[[str], Path]
) -> None:
    """`rank` beside `train: lora` was asked whether it meant `train`."""
    assert f"here it is `{field}`" in entries(refusal(write(MINIMAL + line + "\n")))[key]


@pytest.mark.parametrize("name", SYNONYMS)
def test_another_tools_name_stands_for_a_field_that_is_there_and_has_another_name(name: str) -> None:
    section: Any = Plan
    assert name == name.lower().replace("-", "_")
    *sections, last = SYNONYMS[name].field.split(".")
    for part in sections:
        (section,) = _sections(section.model_fields[part.removesuffix("[]")].annotation)
    assert last in section.model_fields
    assert name != last


def test_a_relative_path_begins_at_the_folder_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began in the current folder, so that a plan meant other texts from elsewhere."""
    (tmp_path / "plans" / "models" / "mine").mkdir(parents=True)
    path = tmp_path / "plans" / "plan.yaml"
    fields = yaml.safe_load(MINIMAL) | {"store": "../store", "model": {"pretrained": "models/mine"}}
    fields["tokenizer"] = {"pretrained": "hub/name"}
    fields["domains"] = [{"name": "a", "text": ["./a/*.txt", "/b/../c.txt", "~/d.txt", "s3://bucket/e.txt"]}]
    path.write_text(yaml.safe_dump(fields))

    def seen(plan: Plan) -> tuple[str, str | None, str | None, str]:
        return plan.store, plan.model.pretrained, plan.tokenizer.pretrained, plan.domains[0].folder

    here = (f"{tmp_path}/store", f"{path.parent}/models/mine", "hub/name", str(path.parent))
    (tmp_path / "link").symlink_to("plans")
    for folder, named in ((path.parent, "plan.yaml"), (tmp_path, "link/plan.yaml"), (Path("/"), path)):
        monkeypatch.chdir(folder)
        plan = read_plan(named)
        assert seen(plan) == here
        assert list(plan.domains[0].text) == fields["domains"][0]["text"], "identities hang on it"
    monkeypatch.chdir(tmp_path / "plans" / "models")
    assert read_plan(fields).store == f"{tmp_path}/plans/store", "without a file, from the current folder"


def test_in_a_jobs_copy_paths_are_those_of_each_nodes_own_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers begin in the copy of their node, which may lie elsewhere."""
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    (copy / "plans" / "mine").mkdir(parents=True)
    fields = yaml.safe_load(MINIMAL) | {"store": "/shared/store", "model": {"pretrained": "mine"}}
    fields["tokenizer"] = {"pretrained": "mine"}
    for folder in (copy, copy / "plans"):
        (folder / "plan.yaml").write_text(yaml.safe_dump(fields))
    monkeypatch.chdir(copy)
    plan = read_plan("plans/plan.yaml")
    assert (plan.model.pretrained, plan.domains[0].folder) == ("plans/mine", "plans")
    assert read_plan("plan.yaml").domains[0].folder == ""
    assert read_plan(fields).domains[0].folder == ""


@pytest.mark.parametrize("named", ["plan.yaml", "../plan.yaml", None])
def test_in_a_jobs_copy_a_plan_is_read_from_its_root_alone(
    named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `cd sub`, the driver stamped a text below sub, and workers opened another of that name at the root."""
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    (copy / "sub").mkdir(parents=True)
    for folder in (copy, copy / "sub"):
        (folder / "plan.yaml").write_text(MINIMAL)
    monkeypatch.chdir(copy / "sub")
    with pytest.raises(UserError, match=f"expected: {copy}, this Ray job's copy"):
        read_plan(named or yaml.safe_load(MINIMAL))


def test_a_key_that_resembles_nothing_is_refused_with_all_known_names(write: Callable[[str], Path]) -> None:
    words = entries(refusal(write(MINIMAL + "branching: {xyzzy: 1}\n")))
    assert "known here: train, lora, start, optimizer" in words["branching.xyzzy"]


def test_all_problems_of_a_plan_are_shown_at_once(write: Callable[[str], Path]) -> None:
    words = entries(
        refusal(
            write("""\
nam: n
store: 3
domains:
  - {name: A B, text: t}
  - {name: b, txt: t}
  - {name: b}
  - {name: b, text: u, dataset: {name: x}}
targets: {name: x}
tokenizer: {train: {vocabulary: 10}, pretrained: x}
model: {preset: gpt3-125, config: {}}
reading: {development_share: 0.6, test_share: 0.6, bad_documents: ignore}
training: {updates: -3, learning_rate: .nan}
baselines: [transformer-lm, transformer-lm]
cluster: {gpus_per_expert: 1.5, retries: true}
""")
        )
    )
    assert words.keys() == {
        *(
            "name",
            "nam",
            "store",
            "domains[0].name",
            "domains[1].txt",
            "domains[1]",
            "domains[2]",
            "domains[3]",
        ),
        *("domains, targets", "targets", "tokenizer.train.vocabulary", "tokenizer", "model.preset", "model"),
        *(
            "model.config",
            "reading",
            "reading.bad_documents",
            "training.updates",
            "training.learning_rate",
            "baselines",
        ),
        *("cluster.gpus_per_expert", "cluster.retries"),
    }
    assert "'b' 3 times" in words["domains, targets"]
    assert 'write it in quotes: "3"' in words["store"]
    assert "did you mean `gpt3-125m`?" in words["model.preset"]


def test_a_domain_with_a_bad_name_and_without_text_is_told_both(write: Callable[[str], Path]) -> None:
    words = entries(refusal(write(MINIMAL.replace("{name: a, text: a.txt}", "{name: Bad!}, {name: b}"))))
    assert words.keys() == {"domains[0].name", "domains[0]", "domains[1]"}


PROBLEMS = {
    "domains: []": ("domains", "at least one entry"),
    'store: ""': ("store", "visible characters"),
    'store: "a\\0b"': ("store", "visible characters"),
    "name: 2024": ("name", 'write it in quotes: "2024"'),
    "name: no": ("name", "write it in quotes"),
    "name: kitchen-ü": ("name", "lower-case letters, digits"),
    "name: ../../etc": ("name", "lower-case letters, digits"),
    "name: ''": ("name", "lower-case letters, digits"),
    "domains: [{name: a, text: ''}]": ("domains[0].text[0]", "visible characters"),
    "domains: [{name: a, text: 'gs://b/k'}]": ("domains[0].text[0]", "s3://"),
    "domains: [{name: a, test: t}]": ("domains[0]", "training text for a domain"),
    "domains: [a]": ("domains[0]", "keys such as name, text"),
    "domains: [{name: a, dataset: {name: d, test_split: train}}]": ("domains[0].dataset", "every split once"),
    "domains: [{name: a, text: '*.txt.gz', field: body}]": ("domains[0].field", "only where files have rows"),
    "domains: [{name: a, text: [a.jsonl, b.csv], delimiter: x}]": (
        "domains[0].delimiter",
        "only for plain text",
    ),
    "domains: [{name: a, dataset: {name: d}, delimiter: x}]": ("domains[0].delimiter", "beside a `dataset`"),
    "targets: [{name: b, text: a.txt}]": ("domains, targets", "'a' and 'b' have the same text"),
    "targets: [{name: a, text: b.txt}]": ("domains, targets", "'a' 2 times"),
    "tokenizer: gpt2": ("tokenizer", "keys such as train, pretrained"),
    "tokenizer: {}": ("tokenizer", "exactly one of `train`, `pretrained`"),
    "model:": ("model", "keys such as preset"),
    "model: {config: {n_layer: 2}}": ("model.config", "`model_type`"),
    "model: {config: {model_type: gpt2, x: .nan}}": ("model.config", "finite numbers"),
    "model: {config: {model_type: gpt2, x: 2020-01-01}}": ("model.config", "plain values"),
    "model: {config: &c {model_type: gpt2, x: *c}}": ("model.config", "plain values"),
    "model: {pretrained: some-model}": ("tokenizer", "`tokenizer: {pretrained: some-model}`"),
    "reading: {development_share: 0.5, test_share: 0.5}": ("reading", "less than 1"),
    "reading: {test_share: 0}": ("reading", "test text for every domain"),
    "reading: {longest_document_characters: 0}": (
        "reading.longest_document_characters",
        "greater than or equal to 1",
    ),
    "training: {updates: 1, seed_share: 0.9}": ("training", "at least one update for the experts"),
    "branching: {lora: {rank: 8}}": ("branching.lora", "nothing, since experts train all"),
    "branching: {train: lora, lora: {rank: 0}}": ("branching.lora.rank", "greater than or equal to 1"),
    "branching: {train: lora, lora: {modules: []}}": ("branching.lora.modules", "at least"),
    "branching: {train: lora, lora: {modules: [all-linear, lm_haed]}}": ("branching.lora.modules", "alone"),
    "branching: {train: qlora}": ("branching.train", "'all', 'feed-forward' or 'lora'"),
    "training: {updates: 1.5}": ("training.updates", "a valid integer"),
    "training: {block_tokens: 1e400}": ("training.block_tokens", "finite"),
    "training: {learning_rate: 0}": ("training.learning_rate", "greater than 0"),
    "training: {learning_rate: .inf}": ("training.learning_rate", "finite"),
    "training: {epsilon: -.inf}": ("training.epsilon", "finite"),
    "training: {weight_decay: .inf}": ("training.weight_decay", "finite"),
    "training: {betas: [0.9]}": ("training.betas[1]", "a value"),
    "training: {seed_share: 1}": ("training.seed_share", "less than 1"),
    "training: {random_seed: -1}": ("training.random_seed", "greater than or equal to 0"),
    "training: {random_seed: 99999999999999999999}": ("training.random_seed", "less than"),
    "training: {updates: 1" + 400 * "0" + "}": ("training.updates", "less than or equal to"),
    "training: 3": ("training", "keys such as block_tokens"),
    "branching: {start: posterio}": ("branching.start", "did you mean `posterior`?"),
    "merging: {discount: 1.5}": ("merging.discount", "less than or equal to 1"),
    "merging: {posterior: fuller}": (
        "merging.posterior",
        "'calibrated', 'full', 'last-token', 'window' or 'gate'",
    ),
    "merging: {posterior: gate, top_k: 2}": ("merging.top_k", "a gate has no prior"),
    "merging: {posterior: gate, prior: ema}": ("merging.prior", "a gate has no prior"),
    "merging: {cluster_temperature: 0.2}": ("merging.cluster_temperature", "no cluster model is named"),
    "merging: {window_tokens: 8, posterior: full}": ("merging.window_tokens", "the posterior is `full`"),
    "merging: {window_tokens: 8}": ("merging.window_tokens", "the posterior is `calibrated`"),
    "training: {updates: 12, seed_share: 0.01}": (
        "training.seed_share",
        "a share that comes to an update, or 0",
    ),
    "cluster: {seed_gpus: 129}": ("cluster.seed_gpus", "at most 128"),
    "cluster: {sharding: full}": ("cluster.sharding", "a group of several GPUs"),
    "training: {optimizer: muon}\ncluster: {sharding: full, seed_gpus: 2}": (
        "training.optimizer",
        "no whole matrix",
    ),
    "study: {sizes: [{name: a, model: {preset: gpt3-125m}, training: {optimizer: muon}}]}\n"
    "cluster: {sharding: full, seed_gpus: 2}": ("study.sizes[0].training.optimizer", "no whole matrix"),
    "cluster: {gpus_per_expert: 0.00005}": ("cluster.gpus_per_expert", "at least 0.0001"),
    "cluster: {gpus_per_expert: .inf}": ("cluster.gpus_per_expert", "finite"),
    "cluster: {checkpoint_minutes: .inf}": ("cluster.checkpoint_minutes", "finite"),
    "cluster: {micro_batch_blocks: 0}": (
        "cluster.micro_batch_blocks",
        "a whole number of at least 1, or 'auto'",
    ),
    "cluster: {micro_batch_blocks: auot}": ("cluster.micro_batch_blocks", "or 'auto'"),
    "cluster: {retries: -1}": ("cluster.retries", "greater than or equal to 0"),
    "1: 2": ("[1]", "a name"),
}


@pytest.mark.parametrize("line", PROBLEMS, ids=lambda line: line[:50])
def test_each_problem_names_its_field_and_what_was_expected(line: str, write: Callable[[str], Path]) -> None:
    fields = yaml.safe_load(MINIMAL)
    kept = {key: value for key, value in fields.items() if not line.startswith(f"{key}:")}
    words = entries(refusal(write(yaml.safe_dump(kept) + line + "\n")))
    field, part = PROBLEMS[line]
    assert list(words) == [field], words
    assert part in words[field]


@pytest.mark.parametrize(("written", "blocks"), [('"16"', 16), ("1e1", 10), ("8.0", 8), ("auto", "auto")])
def test_blocks_at_once_are_read_as_every_other_number_is(
    written: str, blocks: int | str, write: Callable[[str], Path]
) -> None:
    plan = read_plan(write(MINIMAL + f"cluster: {{micro_batch_blocks: {written}}}\n"))
    assert plan.cluster.micro_batch_blocks == blocks


def test_a_problem_with_a_default_says_what_leaving_it_out_means(write: Callable[[str], Path]) -> None:
    words = entries(refusal(write(MINIMAL + "training: {updates: many}\n")))
    assert (
        "leave it out for 80000 (Whole budget: seed updates and then expert updates)"
        in words["training.updates"]
    )


@pytest.mark.parametrize(
    ("document", "part"),
    [
        ("", "found:    nothing"),
        ("- a\n- b\n", "found:    a list"),
        ("just text", "found:    one text"),
        ("42", "found:    42"),
        ("name: a\n\tstore: b\n", "indent with spaces, not tabs"),
        ("name: a\nname: b\n", "line 2, column 1: the key `name` stands twice"),
        ("training: {updates: 1, updates: 2}", "the key `updates` stands twice"),
        ("name: a\n---\nname: b\n", "line 2"),
        ("name: 2024-13-45\n", "month must be in 1..12"),
        ("a: " + "[" * 1200, "recursion"),
        ("a: 1" + 5000 * "0", "digits"),
        ("? [a]\n: b\n", "unhashable key"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: *b", "undefined alias"),
        ("name: [", "line 1"),
        (b"\xff\xfen\0a\0", "in UTF-8"),
        (b"\0" * 100, "not YAML"),
        (b"x" * (1 << 20) + b"y", "1048577 bytes"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_file_that_is_no_plan_is_refused_in_one_error(
    document: str | bytes, part: str, write: Callable[[str | bytes], Path]
) -> None:
    words = refusal(write(document))
    assert part in words
    assert "remedy:" in words


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (
        tmp_path,
        tmp_path / "none.yaml",
        loop,
        Path("/dev/zero"),
        tmp_path / ("x" * 5000),
        Path("a\0b"),
    ):
        words = refusal(path)
        assert "cannot read the plan" in words
        assert "remedy:" in words


def test_what_yaml_reads_as_something_else_is_taken_as_it_was_meant(write: Callable[[str], Path]) -> None:
    plan = read_plan(
        write(
            MINIMAL
            + "training: {updates: 1e5, learning_rate: 1e-3, seed_share: '0.25'}\n"
            + "cluster: {compile: off, seed_gpus: '2'}\n"
        )
    )
    assert plan.training.updates == 100_000
    assert (plan.training.learning_rate, plan.training.seed_share) == (1e-3, 0.25)
    assert (plan.cluster.compile, plan.cluster.seed_gpus) == ("off", 2)


def test_anchors_and_merge_keys_work(write: Callable[[str], Path]) -> None:
    document = MINIMAL.replace(
        "[{name: a, text: a.txt}]",
        "[&first {name: a, text: a.jsonl, field: body}, {<<: *first, name: b, text: b.jsonl}]",
    )
    first, second = read_plan(write(document)).domains
    assert (first.name, first.field) == ("a", "body")
    assert (second.name, Path(second.text[0]).name, second.field) == ("b", "b.jsonl", "body")


def test_an_alias_that_expands_to_billions_of_values_is_refused_briefly(write: Callable[[str], Path]) -> None:
    lines = ["x0: &x0 [a, a]"] + [f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]" for i in range(1, 40)]
    words = refusal(write("\n".join([*lines, "domains: *x39", "model: {preset: *x39}"])))
    assert len(words) < 50_000


def test_two_texts_of_different_fields_or_files_may_share_the_rest(write: Callable[[str], Path]) -> None:
    long = "/corpus/" + "x" * 200
    texts = f"[{{name: a, text: {long}/a.jsonl}}, {{name: b, text: {long}/b.jsonl}}, {{name: c, text: {long}/b.jsonl, field: c}}]"
    assert len(read_plan(write(MINIMAL.replace("[{name: a, text: a.txt}]", texts))).domains) == 3


def _properties(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for section, definition in {"Plan": schema, **schema["$defs"]}.items():
        for name, field in definition["properties"].items():
            yield f"{section}.{name}", field


def test_the_schema_describes_every_field_and_closes_every_section() -> None:
    schema = plan_schema()
    assert json.loads(json.dumps(schema)) == schema
    undescribed = [name for name, field in _properties(schema) if not field.get("description")]
    assert not undescribed
    assert all(d["additionalProperties"] is False for d in (schema, *schema["$defs"].values()))
    assert "rules" not in schema["properties"]
    assert not {"ge", "gt", "le", "lt"} & {key for _, field in _properties(schema) for key in field}
    training = schema["$defs"]["TrainingPlan"]["properties"]
    assert (training["block_tokens"]["minimum"], training["seed_share"]["exclusiveMaximum"]) == (8, 1)


def test_the_reference_has_every_field() -> None:
    for name in {name.partition(".")[2] for name, _ in _properties(plan_schema())}:
        assert f"| `{name}` | " in plan_reference()


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.dates(),
    st.binary(max_size=3),
)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), v, max_size=3),
)


def _places(value: Any, above: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [above, *(place for key, child in children for place in _places(child, (*above, key)))]


WHOLE = yaml.safe_load(STARTER_PLAN)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(_places(WHOLE)[1:]), value=VALUES)
def test_whatever_stands_in_a_field_the_plan_is_read_or_refused(
    place: tuple[str | int, ...], value: Any, write: Callable[[str], Path]
) -> None:
    fields = copy.deepcopy(WHOLE)
    section = fields
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    path = write(yaml.safe_dump(fields))
    try:
        words = str(read_plan(path))
    except PlanError as exc:
        words = str(exc)
    assert words.startswith("name=") or entries(words)


def test_what_is_not_written_of_branching_follows_from_what_experts_train(fields: dict[str, Any]) -> None:
    def seen(**branching: Any) -> tuple[str, float]:
        plan = Plan.model_validate(fields | {"branching": branching})
        assert Plan.model_validate(plan.model_dump(mode="json")) == plan
        assert BranchingPlan(**branching) == plan.branching
        return plan.branching.start, plan.branching.learning_rate_scale

    assert seen() == ("posterior", 1)
    assert seen(train="feed-forward") == ("seed", 1)
    assert seen(train="lora") == ("seed", 10)
    assert seen(train="lora", start="posterior", learning_rate_scale=1) == ("posterior", 1)


def test_a_pretrained_model_has_no_seed_share_unless_the_plan_writes_one(fields: dict[str, Any]) -> None:
    pretrained = fields | {"model": {"pretrained": "gpt2"}, "tokenizer": {"pretrained": "gpt2"}}
    training = {name: value for name, value in fields["training"].items() if name != "seed_share"}
    assert Plan.model_validate(pretrained | {"training": training}).training.seed_updates == 0
    without = {name: value for name, value in pretrained.items() if name != "training"}
    plan = Plan.model_validate(without)
    assert (plan.training.seed_share, plan.training.updates) == (0, 80_000)
    assert Plan.model_validate(plan.model_dump(mode="json", exclude_defaults=True)) == plan, (
        "as a study keeps it"
    )
    assert Plan.model_validate(pretrained).training.seed_share == fields["training"]["seed_share"]
    for part in ({}, {"training": {"updates": 9}}, {"training": TrainingPlan(updates=9)}):
        assert Plan(**without | part).training.seed_share == 0
    written = {"training": TrainingPlan(seed_share=0.5)}
    assert Plan(**without | written).training.seed_share == 0.5
    assert Plan.model_validate(fields | {"training": training}).training.seed_share == 0.5


def test_what_applies_or_says_no_more_than_a_default_is_accepted(fields: dict[str, Any]) -> None:
    for merging in (
        {"window_tokens": 8, "posterior": "window"},
        {"cluster_temperature": 0.2, "clusters": "found"},
        {"discount": 0.9, "posterior": "full"},  # of the calibrated ensemble, which stands beside it
        {"top_k": 9},  # a forest may grow beyond its plan
    ):
        assert Plan.model_validate(fields | {"merging": merging})
    assert Plan.model_validate(fields | {"merging": {"window_tokens": 8}, "study": {}}), (
        "which measures every posterior"
    )
    assert Plan.model_validate(Plan.model_validate(fields).model_dump())


def test_there_is_nothing_to_keep_of_a_pretrained_models_optimizer(fields: dict[str, Any]) -> None:
    pretrained = fields | {"model": {"pretrained": "gpt2"}, "tokenizer": {"pretrained": "gpt2"}}
    assert Plan.model_validate(pretrained | {"branching": {"optimizer": "reset"}})
    with pytest.raises(ValidationError) as wrong:
        Plan.model_validate(pretrained | {"branching": {"optimizer": "keep"}})
    assert "branching.optimizer" in "".join(describe_problems(wrong.value, Plan))


def test_an_expansions_conditions_are_checked_as_all_else(fields: dict[str, Any]) -> None:
    given = {"accept_if": {"development_perplexity_rise_at_most": 0.01}, "inbox": {"most_gigabytes": 5}}
    assert Plan.model_validate(fields | {"expansion": given}).expansion.inbox.most_files == 10_000
    with pytest.raises(ValidationError) as wrong:
        Plan.model_validate(fields | {"expansion": {"accept_if": {}, "inbox": {"most_gigabyte": 5}}})
    words = "".join(describe_problems(wrong.value, Plan))
    assert "did you mean `most_gigabytes`?" in words
    assert "expansion.accept_if.development_perplexity_rise_at_most" in words


REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "plan",
    sorted(map(str, (REPOSITORY / "jobs").rglob("*.yaml")))
    + sorted(map(str, (REPOSITORY / "docs").rglob("plan*.yaml"))),
)
def test_every_plan_that_is_shipped_is_one(plan: str) -> None:
    assert read_plan(plan).domains


def test_the_quickstarts_plan_reads_the_text_that_is_written_with_it(tmp_path: Path) -> None:
    (tmp_path / PLAN_FILE).write_text(QUICKSTART_PLAN)
    plan = read_plan(tmp_path / PLAN_FILE)
    for text in (*plan.domains, *plan.targets):
        assert text.text[0].endswith(f"{TEXT_FOLDER}/{text.name}.jsonl")
        assert text.name in TEXTS


@pytest.mark.parametrize(
    ("study", "words"),
    [
        ({"random_seeds": [1, 1]}, "1 2 times"),
        ({"systems": ["demix", "demix"]}, "demix 2 times"),
        ({"sizes": [{"name": "a", "model": {"pretrained": "gpt2"}}]}, "a study grows its own seeds"),
        ({"random_seeds": []}, "at least one entry"),
        ({"trials": [{"learning_rate": 0.1}, {"learning_rate": 0.1}]}, "each once"),
        ({"search": {}}, "no setting"),
        ({"search": {"learning_rate": {"loguniform": [0.1, 0.01]}}}, "a lower bound and a higher one"),
        ({"search": {"learning_rate": {"grid": [0.1, 0.1]}}}, "each once"),
        ({"search": {"learning_rate": {"grid": [0.1], "uniform": [0.1, 1]}}}, "exactly one of"),
        ({"search": {"learning_rate": {"grid": [0.1, 0.2]}, "samples": 2}}, "the same recipes again"),
        (
            {"search": {"learning_rate": {"grid": [0.1]}}, "trials": [{"learning_rate": 0.1}]},
            "leave out the other",
        ),
        (
            {"sizes": [{"name": "a", "model": {"preset": "gpt3-125m"}, "training": {"random_seed": 3}}]},
            "give it in `study.random_seeds`",
        ),
    ],
)
def test_a_study_that_would_train_twice_or_not_at_all_is_refused(
    tmp_path: Path, study: dict[str, Any], words: str
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(MINIMAL + yaml.safe_dump({"study": study}))
    with pytest.raises(PlanError, match=words):
        read_plan(file)


@pytest.mark.parametrize(
    ("search", "rungs", "trials"),
    [
        ({"learning_rate": {"loguniform": [1e-4, 1e-2]}, "samples": 6}, (0.125, 0.375, 1), 6),
        (
            {"blocks_per_domain_update": {"grid": [8, 16]}, "first_rung": 0.25, "reduction_factor": 2},
            (0.25, 0.5, 1),
            2,
        ),
        (
            {
                "learning_rate": {"grid": [1e-3, 1e-2, 1e-1]},
                "blocks_per_domain_update": {"grid": [8, 16]},
                "first_rung": 0.5,
            },
            (0.5, 1),
            6,
        ),
        ({"learning_rate": {"grid": [1e-3]}, "first_rung": 0.333}, (0.333, 1), 1),  # and not 0.999
    ],
)
def test_a_searchs_rungs_and_trials_follow_from_its_space(
    search: dict[str, Any], rungs: tuple[float, ...], trials: int
) -> None:
    space = SearchPlan.model_validate(search)
    assert (space.rungs, space.trials) == (rungs, trials)
