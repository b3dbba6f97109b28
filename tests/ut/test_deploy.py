"""The examples for Kubernetes: what its API takes, and names that agree."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from vllm_ascend.model_loader.netloader import cli
from vllm_ascend.model_loader.netloader.config import SECRET_FILE_VARIABLE, parse_config
from vllm_ascend.model_loader.netloader.interaction.api import HEALTHZ
from vllm_ascend.model_loader.netloader.utils import Address, Lookup, Name

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"
KUBERNETES = "1.37"
OBJECTS = {path.name: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))}
SERVICE, READY = OBJECTS["service.yaml"], OBJECTS["service-ready.yaml"]
WORKLOADS = [
    pytest.param(each, id=name) for name, each in OBJECTS.items() if each["kind"] != "Service"
]
WITH_SECRET = ["deployment-cpu-secret.yaml", "deployment-cpu-no-storage.yaml"]

# The fields of its API, but for pods, which are Kubernetes' own.
LEADER_WORKER_SET = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "leaderworkerset.x-k8s.io/v1"},
        "kind": {"const": "LeaderWorkerSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["leaderWorkerTemplate"],
            "additionalProperties": False,
            "properties": {
                "replicas": {"type": "integer", "minimum": 0},
                "startupPolicy": {"enum": ["LeaderCreated", "LeaderReady"]},
                "rolloutStrategy": {"type": "object"},
                "networkConfig": {"type": "object"},
                "leaderWorkerTemplate": {
                    "type": "object",
                    "required": ["workerTemplate"],
                    "additionalProperties": False,
                    "properties": {
                        "size": {"type": "integer", "minimum": 1},
                        "restartPolicy": {
                            "enum": [
                                "RecreateGroupOnPodRestart",
                                "RecreateGroupAfterStart",
                                "None",
                            ]
                        },
                        "leaderTemplate": {"type": "object"},
                        "workerTemplate": {"type": "object"},
                        "subGroupPolicy": {"type": "object"},
                        "volumeClaimTemplates": {"type": "array"},
                        "persistentVolumeClaimRetentionPolicy": {"type": "object"},
                    },
                },
            },
        },
    },
}


def templates(workload):
    """Return the pods of an instance, that of rank 0 first."""
    spec = workload["spec"]
    if workload["kind"] == "Deployment":
        return [spec["template"]]
    group = spec["leaderWorkerTemplate"]
    return [group["leaderTemplate"], group["workerTemplate"]]


def container(template):
    [only] = template["spec"]["containers"]
    return only


def config_of(template):
    arguments = container(template)["args"]
    given = arguments[arguments.index("--model-loader-extra-config") + 1]
    return parse_config(json.loads(given))


def flags(template):
    """Return the arguments of `vllm serve` that have a value after =."""
    pairs = [argument.partition("=") for argument in container(template)["args"]]
    return {name: value for name, sign, value in pairs if sign and name.startswith("--")}


def test_there_is_an_example_of_each_kind():
    assert [*OBJECTS] == [
        "deployment-ascend.yaml",
        "deployment-cpu-no-storage.yaml",
        "deployment-cpu-secret.yaml",
        "deployment-cpu.yaml",
        "leaderworkerset-ascend.yaml",
        "leaderworkerset-cpu.yaml",
        "service-ready.yaml",
        "service.yaml",
    ]


@pytest.mark.parametrize("name", OBJECTS)
def test_the_api_takes_it(name):
    kubernetes = pytest.importorskip("kubernetes_validate")
    given = OBJECTS[name]
    if given["kind"] != "LeaderWorkerSet":
        kubernetes.validate(given, KUBERNETES, strict=True)
        return
    jsonschema.validate(given, LEADER_WORKER_SET)
    for template in templates(given):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        kubernetes.validate(pod, KUBERNETES, strict=True)


def test_the_service_names_pods_before_they_are_ready():
    spec = SERVICE["spec"]
    assert spec["clusterIP"] == "None"
    assert spec["publishNotReadyAddresses"] is True


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_source_of_all_is_the_service_and_the_port_of_rank_0(workload):
    [port] = SERVICE["spec"]["ports"]
    name = Name(Lookup.DNS, SERVICE["metadata"]["name"], port["port"])
    for template in templates(workload):
        config = config_of(template)
        sources = config.sources_of(0)
        assert (sources.addresses, sources.malformed) == ((name,), ())
        assert config.listen_port == port["port"]
        assert config == config_of(templates(workload)[0])


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_service_selects_the_pods_of_rank_0_and_no_others(workload):
    wanted = SERVICE["spec"]["selector"].items()
    assert [wanted <= one["metadata"]["labels"].items() for one in templates(workload)] == (
        [True, False][: len(templates(workload))]
    )
    if workload["kind"] == "Deployment":
        selected = workload["spec"]["selector"]["matchLabels"].items()
        assert selected <= templates(workload)[0]["metadata"]["labels"].items()


@pytest.mark.parametrize("name", OBJECTS)
def test_there_is_no_address(name):
    text = (FOLDER / name).read_text()
    assert not re.search(r"\d+\.\d+\.\d+|[0-9a-f]*::", text)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_it_is_scaled_from_one(workload):
    assert workload["spec"]["replicas"] == 1
    kind, name = workload["kind"].lower(), workload["metadata"]["name"]
    [path] = [path for path, each in OBJECTS.items() if each is workload]
    assert f"kubectl scale {kind}/{name} --replicas=8" in (FOLDER / path).read_text()


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_pod_has_time_to_load_and_to_end(workload):
    leader = templates(workload)[0]
    probe = container(leader)["startupProbe"]
    config = config_of(leader)
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 2 * config.source_wait + 1800
    for template in templates(workload):
        ends_after = int(flags(template)["--shutdown-timeout"])
        assert template["spec"]["terminationGracePeriodSeconds"] >= ends_after + 15


@pytest.mark.parametrize("workload", WORKLOADS)
def test_what_a_pod_refers_to_is_there(workload):
    for template in templates(workload):
        spec, only = template["spec"], container(template)
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for mount in only["volumeMounts"]} == volumes
        assert "/dev/shm" in {mount["mountPath"] for mount in only["volumeMounts"]}
        ports = {port["name"]: port["containerPort"] for port in only.get("ports", ())}
        probes = [value for key, value in only.items() if key.endswith("Probe")]
        assert {probe["httpGet"]["port"] for probe in probes} <= ports.keys()
        if probes:
            assert str(ports["http"]) == flags(template)["--port"]
            assert ports["netloader"] == config_of(template).listen_port
    assert all(key in container(templates(workload)[0]) for key in ("readinessProbe", "resources"))


@pytest.mark.parametrize("kind", ["cpu", "ascend"])
def test_the_pods_of_a_group_are_one_instance(kind):
    leader, worker = templates(OBJECTS[f"leaderworkerset-{kind}.yaml"])
    group = {
        "--nnodes": "$(LWS_GROUP_SIZE)",
        "--node-rank": "$(LWS_WORKER_INDEX)",
        "--master-addr": "$(LWS_LEADER_ADDRESS)",
    }
    assert group.items() <= flags(worker).items() < flags(leader).items()
    assert {*container(worker)["args"]} - {*container(leader)["args"]} == {"--headless"}
    assert container(worker)["resources"] == container(leader)["resources"]
    size = OBJECTS[f"leaderworkerset-{kind}.yaml"]["spec"]["leaderWorkerTemplate"]["size"]
    limits = container(leader)["resources"]["limits"]
    assert int(flags(leader)["--tensor-parallel-size"]) == size * int(
        limits.get("huawei.com/Ascend910", "1")
    )


def secret_of(template, one):
    """Return the name of the Secret, and the path in it, that a container is pointed to."""
    [path] = [each["value"] for each in one["env"] if each["name"] == SECRET_FILE_VARIABLE]
    [mount] = [each for each in one["volumeMounts"] if each["name"] == "secret"]
    [volume] = [each for each in template["spec"]["volumes"] if each["name"] == "secret"]
    assert mount["readOnly"] is True
    assert volume["secret"]["defaultMode"] & 0o007 == 0  # else NetLoader refuses it
    assert volume["secret"]["defaultMode"] & 0o040  # else who is in fsGroup cannot read it
    return volume["secret"]["secretName"], str(Path(path).relative_to(mount["mountPath"]))


@pytest.mark.parametrize("name", WITH_SECRET)
def test_all_containers_have_the_same_secret(name):
    [template] = templates(OBJECTS[name])
    every = [container(template), *template["spec"].get("initContainers", ())]
    secret, key = "netloader", "secret"
    assert [secret_of(template, one) for one in every] == [(secret, key)] * len(every)
    assert f"kubectl create secret generic {secret} --from-file={key}=" in (
        (FOLDER / name).read_text()
    )
    assert template["spec"]["securityContext"]["fsGroup"]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_probe_of_netloader_s_port_is_inside_tls_where_there_is_a_secret(workload):
    for template in templates(workload):
        only = container(template)
        probes = [value["httpGet"] for key, value in only.items() if key.endswith("Probe")]
        secret = any(each["name"] == SECRET_FILE_VARIABLE for each in only["env"])
        for probe in probes:
            if probe["port"] == "netloader":
                assert (probe["path"], probe.get("scheme") == "HTTPS") == (HEALTHZ, secret)
            else:
                assert "scheme" not in probe
    if workload is OBJECTS["deployment-cpu-secret.yaml"]:
        assert "netloader" in {probe["port"] for probe in probes}


def test_an_instance_without_storage_fetches_its_folder_from_one_that_is_ready():
    workload = OBJECTS["deployment-cpu-no-storage.yaml"]
    [template] = templates(workload)
    only, [fetch] = container(template), template["spec"]["initContainers"]
    options = cli.parser().parse_args(fetch["command"][1:])
    assert fetch["command"][:2] == ["netloader", "fetch"]
    [port] = READY["spec"]["ports"]
    assert options.address == Address(READY["metadata"]["name"], port["port"])
    assert READY["spec"]["selector"] == SERVICE["spec"]["selector"]
    assert not READY["spec"].get("publishNotReadyAddresses")
    assert only["args"][0] == str(options.folder)
    assert fetch["image"] == only["image"]
    [models] = [each for each in template["spec"]["volumes"] if each["name"] == "models"]
    assert models == {"name": "models", "emptyDir": {}}
    [mount] = [each for each in fetch["volumeMounts"] if each["name"] == "models"]
    assert options.folder.is_relative_to(mount["mountPath"])
    assert not mount.get("readOnly")
    config = config_of(template)
    assert config.fallback is False  # as there are no weights on disk
    seed = config_of(templates(OBJECTS["deployment-cpu-secret.yaml"])[0])
    assert config.model == seed.model
