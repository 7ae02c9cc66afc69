"""What no schema knows: that the parts of the manifests fit each other, the images, and the command line."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedgrpc.cli import aggregator, worker
from fedgrpc.cli.aggregator import upstream_from
from fedgrpc.cli.main import load_command
from fedgrpc.cli.options import SettingsCommand
from fedgrpc.cli.values import DURATION
from fedgrpc.hierarchy.process import Leaf
from fedgrpc.identity.roles import identity_from
from fedgrpc.rpc.server import AGGREGATOR, WORKER
from tests.deploy.manifests import (
    COMPONENTS,
    K8S,
    OVERLAYS,
    ROOT,
    WITH_COMPONENTS,
    Manifests,
    Workload,
    address_dialled,
    dockerfile_of,
    render,
    render_with_components,
    settings_in,
)

# What a person makes before, as k8s/README.md and components/tls say.
BROUGHT = {("Secret", name) for name in ("join", "leaf-join", "aggregator-tls", "leaf-tls")}
# A join token of nobody's.
TOKEN = "fg1.RwegGYlLT1WNmciHX3DVBQuiXinAxxW1xWNo-A3Sn7k.uu4vzr7t.m2qKnqiTIKta9NCkCeXtT49uF65US-yo"
CLASSES = ["raspberry-pi-4", "raspberry-pi-5", "jetson-nano", "jetson-orin-nano"]


@pytest.fixture(scope="module", params=[*OVERLAYS, *(f"{name} with components" for name in WITH_COMPONENTS)])
def manifests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    overlay, _, more = request.param.partition(" with ")
    if more:
        return render_with_components(tmp_path_factory.mktemp("more"), overlay)
    return render(K8S / "overlays" / overlay)


@pytest.fixture
def workloads(manifests: Manifests) -> list[Workload]:
    found = manifests.workloads()
    assert {workload.command for workload in found} == {"aggregator", "worker"}
    return found


def test_every_service_selects_pods_that_have_its_ports(manifests: Manifests) -> None:
    for service in manifests.of("Service"):
        selected = manifests.selected(service["spec"]["selector"], service["metadata"]["namespace"])
        assert len(selected) == 1, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            assert selected[0].ports.get(port["targetPort"], 50051) == port["port"]
            assert port["targetPort"] in selected[0].ports


def test_every_policy_and_budget_selects_pods_and_names_their_ports(manifests: Manifests) -> None:
    for kind, key in (("NetworkPolicy", "podSelector"), ("PodDisruptionBudget", "selector")):
        for item in manifests.of(kind):
            selector = item["spec"][key]["matchLabels"]
            selected = manifests.selected(selector, item["metadata"]["namespace"])
            assert selected, item["metadata"]["name"]
            for rule in item["spec"].get("ingress", ()):
                assert {port["port"] for port in rule["ports"]} <= set(selected[0].ports)


def test_every_pod_is_under_a_network_policy_for_both_directions(
    manifests: Manifests, workloads: list[Workload]
) -> None:
    covered = set()
    for policy in manifests.of("NetworkPolicy"):
        assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        selector = policy["spec"]["podSelector"]["matchLabels"]
        covered |= {item.name for item in manifests.selected(selector, policy["metadata"]["namespace"])}
    assert covered == {workload.name for workload in workloads}


def test_everything_that_a_pod_names_exists(manifests: Manifests, workloads: list[Workload]) -> None:
    for workload in workloads:
        account = manifests.get("ServiceAccount", workload.pod["serviceAccountName"], workload.namespace)
        assert account["automountServiceAccountToken"] is False
        assert workload.pod["automountServiceAccountToken"] is False
        volumes = {volume["name"]: volume for volume in workload.pod["volumes"]}
        assert {mount["name"] for mount in workload.container["volumeMounts"]} == {*volumes, *workload.claims}
        for volume in volumes.values():
            for kind, field in (("Secret", "secret"), ("ConfigMap", "configMap")):
                if field in volume:
                    name = volume[field].get("secretName") or volume[field].get("name")
                    assert (kind, name) in BROUGHT or manifests.get(kind, name, workload.namespace)
        if workload.object["kind"] == "StatefulSet":
            assert workload.object["spec"]["serviceName"]


def test_namespaces_are_among_the_objects(manifests: Manifests) -> None:
    made = {item["metadata"]["name"] for item in manifests.of("Namespace")}
    assert {item["metadata"]["namespace"] for item in manifests.objects if item["kind"] != "Namespace"} <= made


def test_images_are_ours_and_have_a_version(workloads: list[Workload]) -> None:
    baked = set(re.findall(r"\}(fedgrpc-[a-z-]+):", (ROOT / "docker" / "docker-bake.hcl").read_text()))
    for workload in workloads:
        registry, name, tag = re.fullmatch(r"(.+)/(fedgrpc-[a-z-]+):(.+)", workload.container["image"]).groups()
        assert registry in ("registry.example", "localhost")
        assert name in baked
        assert tag != "latest"


def test_pods_are_confined(manifests: Manifests, workloads: list[Workload]) -> None:
    strict = {
        item["metadata"]["name"]
        for item in manifests.of("Namespace")
        if item["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    }
    assert "fedgrpc" in strict
    for workload in workloads:
        user = re.search(r"^USER (\d+):(\d+)$", dockerfile_of(workload.container["image"]).read_text(), re.M)
        assert user is not None
        context = workload.pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert (context["runAsUser"], context["runAsGroup"]) == tuple(map(int, user.groups()))
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert workload.container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not workload.pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        on_the_node = [volume for volume in workload.pod["volumes"] if "hostPath" in volume]
        assert not on_the_node or workload.namespace not in strict


def test_resources_are_bounded(workloads: list[Workload]) -> None:
    for workload in workloads:
        resources = workload.container["resources"]
        assert resources["requests"].keys() == {"cpu", "memory"}
        assert "memory" in resources["limits"]
        assert all("sizeLimit" in v["emptyDir"] for v in workload.pod["volumes"] if v["name"] == "tmp")


def test_probes_ask_the_service_where_it_listens(workloads: list[Workload]) -> None:
    for workload in workloads:
        environment = workload.environment()
        service = {"aggregator": AGGREGATOR, "worker": WORKER}[workload.command]
        variable = {"aggregator": "FEDGRPC_AGGREGATOR_ADDRESS", "worker": "FEDGRPC_WORKER_SERVE_ADDRESS"}
        host, _, port = environment[variable[workload.command]].rpartition(":")
        # Not the loopback interface: the kubelet comes to the pod's own address.
        assert ipaddress.ip_address(host).is_unspecified
        assert workload.ports["grpc"] == int(port)
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = workload.container[name]
            if workload.command == "worker":
                assert probe["grpc"] == {"port": int(port), "service": service}
            else:
                assert probe["exec"]["command"] == ["fedgrpc", "health", "--service", service]
                socket = f"{environment['FEDGRPC_AGGREGATOR_DATA_DIR']}/identity/operator.sock"
                assert environment["FEDGRPC_HEALTH_ADDRESS"] == f"unix:{socket}"


@pytest.fixture
def set_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Set a pod's variables; a file that is only in the pod becomes one that is here."""
    there = tmp_path / "there.pem"
    there.write_text(TOKEN)

    def apply(environment: dict[str, str]) -> None:
        for variable in [name for name in os.environ if name.startswith("FEDGRPC_")]:
            monkeypatch.delenv(variable)
        for variable, value in environment.items():
            inside = value.startswith("/") and not variable.endswith(("_DIR", "_ADDRESS"))
            monkeypatch.setenv(variable, str(there) if inside else value)

    return apply


def test_every_setting_exists_and_takes_its_value(workloads: list[Workload], set_variables: Any) -> None:
    commands = {"aggregator": aggregator, "worker": worker}
    for workload in workloads:
        environment = workload.environment()
        for variable, name, key in settings_in(environment):
            command = load_command(name)
            assert isinstance(command, SettingsCommand)
            assert key in {setting.key for setting in command.settings()}, variable
        set_variables(environment)
        module = commands[workload.command]
        values = module.COMMAND.make_context(workload.command, []).params
        settings = module.settings_from(values)
        if workload.command == "aggregator" and (above := upstream_from(values, settings.data_dir)) is not None:
            Leaf(settings, above)


def test_a_pod_has_longer_to_end_than_its_drain_takes(workloads: list[Workload], set_variables: Any) -> None:
    for workload in workloads:
        set_variables(workload.environment())
        command = {"aggregator": aggregator, "worker": worker}[workload.command].COMMAND
        drain_s = command.make_context(workload.command, []).params["drain_s"]
        # 5 s until a training step notices; 10 s more for a slow device to end in.
        assert workload.pod["terminationGracePeriodSeconds"] >= drain_s + 15


def test_a_worker_stays_when_the_run_has_ended(workloads: list[Workload]) -> None:
    """Kubernetes would start it again, and again."""
    for workload in workloads:
        name, wanted = {
            "aggregator": ("FEDGRPC_AGGREGATOR_STAY", "true"),
            "worker": ("FEDGRPC_WORKER_EXIT_WHEN_RUN_ENDS", "false"),
        }[workload.command]
        assert workload.environment()[name] == wanted


def test_whom_a_pod_dials_is_there_and_its_policy_lets_it(manifests: Manifests, workloads: list[Workload]) -> None:
    dialled = 0
    for workload in workloads:
        for host, port in _dials(workload):
            dialled += 1
            *_, name, namespace, _ = host.split(".")
            service = manifests.get("Service", name, namespace)
            assert port in {item["port"] for item in service["spec"]["ports"]}
            (target,) = manifests.selected(service["spec"]["selector"], namespace)
            if host.count(".") == 3:
                pod, number = host.split(".")[0].rsplit("-", 1)
                assert service["spec"]["clusterIP"] == "None"
                assert (pod, int(number) < target.object["spec"]["replicas"]) == (target.name, True)
            assert _may_dial(manifests, workload, target, port)
            assert not _may_dial(manifests, workload, target, 22)
    assert dialled >= len(workloads) - 1


def _dials(workload: Workload) -> Iterator[tuple[str, int]]:
    for name in ["pi-1", "pi-2", "pi-3", "jetson-1"] if "command" in workload.container else ["pod-1"]:
        environment = workload.environment({"spec.nodeName": name})
        for variable in ("FEDGRPC_WORKER_AGGREGATOR", "FEDGRPC_AGGREGATOR_UPSTREAM"):
            address = environment.get(variable)
            if "command" in workload.container:
                address = address_dialled(workload, environment)
            if address is not None:
                host, _, port = address.rpartition(":")
                yield host, int(port)


def _may_dial(manifests: Manifests, source: Workload, target: Workload, port: int) -> bool:
    """Whether the policies of `source` let it, as Kubernetes reads them: any rule of any of them."""
    rules = [
        rule
        for policy in manifests.of("NetworkPolicy")
        if source in manifests.selected(policy["spec"]["podSelector"]["matchLabels"], source.namespace)
        for rule in policy["spec"]["egress"]
    ]
    return any(_allows(rule, target, port) for rule in rules)


def _allows(rule: Any, target: Workload, port: int) -> bool:
    numbers = {target.ports.get(item["port"], item["port"]) for item in rule["ports"]}
    peers = rule.get("to")
    selected = peers is None or any(
        peer["podSelector"]["matchLabels"].items() <= target.labels.items() for peer in peers
    )
    return selected and port in numbers


def test_both_sides_of_every_connection_agree_on_who_vouches_for_whom(workloads: list[Workload]) -> None:
    for workload in workloads:
        environment = workload.environment()
        served = {_authority_of(w.environment()) for w in workloads if w.command == "aggregator"}
        (authority,) = served
        wanted = {"insecure": set(), "built-in": {"JOIN"}, "own": {"TLS_CERT", "TLS_KEY", "TLS_CA"}}[authority]
        prefix = "FEDGRPC_WORKER_" if workload.command == "worker" else "FEDGRPC_AGGREGATOR_UPSTREAM_"
        ways = ("JOIN", "TLS_CERT", "TLS_KEY", "TLS_CA")
        given = {way for way in ways if prefix + way in environment}
        dials = workload.command == "worker" or "FEDGRPC_AGGREGATOR_UPSTREAM" in environment
        assert given == (wanted if dials else set()), workload.name


def _authority_of(environment: dict[str, str]) -> str:
    own = {f"FEDGRPC_AGGREGATOR_TLS_{what}" in environment for what in ("CERT", "KEY", "CA")}
    assert len(own) == 1
    if environment.get("FEDGRPC_AGGREGATOR_INSECURE") == "true":
        assert own == {False}
        return "insecure"
    return "own" if own == {True} else "built-in"


def test_only_what_says_so_is_insecure(manifests: Manifests, request: pytest.FixtureRequest) -> None:
    insecure = {_authority_of(w.environment()) for w in manifests.workloads() if w.command == "aggregator"}
    name = request.node.callspec.params["manifests"]
    assert (insecure == {"insecure"}) == (name.startswith("dev") or "insecure" in name)


def test_the_certificates_of_the_example_name_members_and_the_secrets_that_pods_mount() -> None:
    items = list(yaml.safe_load_all((K8S / "components" / "tls" / "cert-manager.yaml").read_text()))
    issuers = {item["metadata"]["name"] for item in items if item["kind"] == "ClusterIssuer"}
    certificates = [item["spec"] for item in items if item["kind"] == "Certificate"]
    assert {spec["issuerRef"]["name"] for spec in certificates} <= issuers
    (server,) = [spec for spec in certificates if "dnsNames" in spec]
    assert ("Secret", server["secretName"]) in BROUGHT
    edge = render(K8S / "overlays" / "edge").workloads()
    (host,) = {
        w.environment()["FEDGRPC_WORKER_AGGREGATOR"].partition(":")[0] for w in edge if w.command == "worker"
    }
    assert host in server["dnsNames"]
    members = [identity_from(spec["uris"]) for spec in certificates if "uris" in spec]
    assert [(member.name, member.role) for member in members] == [("pi-1", "trainer"), ("alice", "operator")]


def test_every_component_is_tried_with_an_overlay() -> None:
    assert {name for _, used in WITH_COMPONENTS.values() for name in used} == set(COMPONENTS)


def test_a_leaf_shows_the_certificate_of_its_own_name(tmp_path: Path) -> None:
    (leaf,) = [w for w in render_with_components(tmp_path, "tree").workloads() if w.name == "leaf-aggregator"]
    names = [entry["name"] for entry in leaf.container["env"]]
    # Kubernetes fills in the variables that come before.
    assert names.index("FEDGRPC_AGGREGATOR_UPSTREAM_NAME") == 0
    environment = leaf.environment({"metadata.name": "leaf-aggregator-2"})
    for variable in ("FEDGRPC_AGGREGATOR_TLS_CERT", "FEDGRPC_AGGREGATOR_UPSTREAM_TLS_CERT"):
        assert environment[variable] == "/etc/fedgrpc/tls/leaf-aggregator-2.crt"


def test_a_worker_of_a_tree_joins_with_a_token_of_its_leaf() -> None:
    some = next(item for item in render(K8S / "overlays" / "tree").workloads() if item.command == "worker")
    environment = {**some.environment(), "FEDGRPC_WORKER_NAME": "pi-1"}
    leaf = address_dialled(some, environment).partition(".")[0]
    assert address_dialled(some, environment, "$FEDGRPC_WORKER_JOIN") == f"/etc/fedgrpc/join/{leaf}"


@pytest.mark.parametrize("device_class", [*CLASSES, None])
def test_each_labelled_node_gets_one_worker_that_knows_its_class(device_class: str | None) -> None:
    labels = {"fedgrpc.io/worker": "true", "kubernetes.io/arch": "arm64"}
    if device_class is not None:
        labels["fedgrpc.io/device-class"] = device_class
    found = [item for item in render(K8S / "overlays" / "edge").workloads() if item.object["kind"] == "DaemonSet"]
    assert len(found) == len(CLASSES) + 1
    (own,) = [item for item in found if item.runs_on(labels)]
    assert own.environment()["FEDGRPC_WORKER_DEVICE_CLASS"] == (device_class or "other")
    assert own.environment({"spec.nodeName": "pi-7"})["FEDGRPC_WORKER_NAME"] == "pi-7"
    assert not any(item.runs_on({**labels, "fedgrpc.io/worker": "false"}) for item in found)
    assert {"key": "fedgrpc.io/edge", "operator": "Exists"} in own.pod["tolerations"]


def test_a_jetson_gets_its_gpu_and_nobody_else_one() -> None:
    for item in render(K8S / "overlays" / "edge").workloads():
        gpus = item.container["resources"]["limits"].get("nvidia.com/gpu", 0)
        orin = item.name == "worker-jetson-orin-nano"
        assert (gpus, item.pod.get("runtimeClassName")) == ((1, "nvidia") if orin else (0, None))
        assert ("worker-jetson" in item.container["image"].rpartition("/")[2]) is orin


def test_every_worker_of_a_tree_has_a_leaf_and_every_leaf_has_workers() -> None:
    manifests = render(K8S / "overlays" / "tree")
    leaf = next(item for item in manifests.workloads() if item.name == "leaf-aggregator")
    root = next(item for item in manifests.workloads() if item.name == "aggregator")
    some = next(item for item in manifests.workloads() if item.command == "worker")
    replicas = leaf.object["spec"]["replicas"]
    assert root.environment()["FEDGRPC_AGGREGATOR_MIN_WORKERS"] == str(replicas)
    environment = some.environment()
    leaves = {
        address_dialled(some, {**environment, "FEDGRPC_WORKER_NAME": f"device-{number}"}) for number in range(50)
    }
    wanted = {f"leaf-aggregator-{number}.leaf-aggregator.fedgrpc.svc:50051" for number in range(replicas)}
    assert leaves == wanted


def test_an_aggregator_that_moves_ends_before_the_cluster_starts_another() -> None:
    manifests = render(K8S / "overlays" / "replicated")
    (workload,) = [item for item in manifests.workloads() if item.object["kind"] == "StatefulSet"]
    spec = workload.object["spec"]["template"]["spec"]
    environment = workload.environment()
    cut_off_s = sum(
        DURATION.convert(environment[f"FEDGRPC_AGGREGATOR_{name}"], None, None)
        for name in ("WITNESS_AFTER", "DRAIN")
    )
    patience_s = {each["key"]: each["tolerationSeconds"] for each in spec["tolerations"]}
    assert patience_s.keys() == {"node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready"}
    assert min(patience_s.values()) >= 2 * (cut_off_s + spec["terminationGracePeriodSeconds"])
    (claim,) = workload.object["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
    port = int(environment["FEDGRPC_AGGREGATOR_WITNESS"].rpartition(":")[2])
    policy = manifests.get("NetworkPolicy", "aggregator", "fedgrpc")
    assert port in {each["port"] for rule in policy["spec"]["egress"] for each in rule["ports"]}
