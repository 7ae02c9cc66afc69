"""What `kubectl apply -k` would send, read as objects, with what Kubernetes itself would make of them."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
# Overlays as a person would put them together: (overlay, its components, in the order in which they are said).
WITH_COMPONENTS = {
    "dev, seen": ("dev", ["monitoring"]),
    "edge": ("edge", ["monitoring", "tls"]),
    "tree": ("tree", ["monitoring", "tls", "tls-leaves"]),
    "edge, insecure": ("edge", ["insecure"]),
    "tree, insecure": ("tree", ["insecure", "insecure-leaves"]),
}

Object = Mapping[str, Any]


def kubectl() -> str:
    """The one that pip installed beside this Python, or else the machine's."""
    found = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
    if found is None:
        pytest.skip("no kubectl: it comes with pip install '.[dev]' on Linux")
    return found


@functools.cache
def render(folder: Path) -> Manifests:
    """The objects of a kustomization, which does not change meanwhile."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return Manifests(tuple(item for item in yaml.safe_load_all(done.stdout) if item))


def render_with_components(tmp_path: Path, name: str) -> Manifests:
    """One of `WITH_COMPONENTS`."""
    overlay, components = WITH_COMPONENTS[name]
    content = {
        "resources": [relative(K8S / "overlays" / overlay, tmp_path)],
        "components": [relative(K8S / "components" / component, tmp_path) for component in components],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return render(tmp_path)


def relative(target: Path, start: Path) -> str:
    """kustomize takes relative paths alone."""
    up = "/".join([".."] * len(start.resolve().relative_to("/").parts))
    return f"{up}{target.resolve()}"


@dataclass(frozen=True)
class Workload:
    """A StatefulSet or a DaemonSet, and the pods that it makes."""

    object: Object
    manifests: Manifests

    @property
    def name(self) -> str:
        return str(self.object["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.object["metadata"]["namespace"])

    @property
    def labels(self) -> Mapping[str, str]:
        """Of its pods."""
        return dict(self.object["spec"]["template"]["metadata"]["labels"])

    @property
    def pod(self) -> Object:
        """The pods' spec."""
        spec: Object = self.object["spec"]["template"]["spec"]
        return spec

    @property
    def container(self) -> Object:
        """The only one."""
        (container,) = self.pod["containers"]
        assert "initContainers" not in self.pod
        return dict(container)

    @property
    def command(self) -> str:
        """`aggregator` or `worker`."""
        return "worker" if self.labels["app.kubernetes.io/name"] == "worker" else "aggregator"

    @property
    def ports(self) -> Mapping[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    @property
    def claims(self) -> set[str]:
        """Names of the volumes that a StatefulSet adds."""
        return {claim["metadata"]["name"] for claim in self.object["spec"].get("volumeClaimTemplates", ())}

    def environment(self, own_fields: Mapping[str, str] | None = None) -> dict[str, str]:
        """The image's, the ConfigMaps', the container's; what comes from fields of the pod is in `own_fields`."""
        found = image_environment(self.container["image"])
        for source in self.container.get("envFrom", ()):
            found |= self.manifests.get("ConfigMap", source["configMapRef"]["name"], self.namespace)["data"]
        for entry in self.container.get("env", ()):
            if "value" in entry:
                found[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], entry["value"])
            else:
                path = entry["valueFrom"]["fieldRef"]["fieldPath"]
                found[entry["name"]] = (own_fields or {}).get(path) or self._label(path) or "pod-1"
        return found

    def _label(self, path: str) -> str | None:
        match = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
        if match is None:
            return None
        # The number of a StatefulSet's pod is a label that its controller adds.
        return {**self.labels, "apps.kubernetes.io/pod-index": "1"}[match[1]]

    def runs_on(self, node_labels: Mapping[str, str]) -> bool:
        """Whether a DaemonSet's pod is for a node with these labels, whatever its taints."""
        wanted = self.pod.get("nodeSelector", {})
        if any(node_labels.get(key) != value for key, value in wanted.items()):
            return False
        affinity = self.pod.get("affinity", {}).get("nodeAffinity", {})
        terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms")
        return terms is None or any(_matches(term["matchExpressions"], node_labels) for term in terms)


def _matches(expressions: list[Object], labels: Mapping[str, str]) -> bool:
    assert {expression["operator"] for expression in expressions} == {"DoesNotExist"}
    return all(expression["key"] not in labels for expression in expressions)


@dataclass(frozen=True)
class Manifests:
    """Everything that one kustomization renders."""

    objects: tuple[Object, ...]

    def of(self, kind: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] == kind]

    def get(self, kind: str, name: str, namespace: str) -> Object:
        """The one object of this name. Raises `AssertionError` where there is none."""
        found = [
            item
            for item in self.of(kind)
            if (item["metadata"]["name"], item["metadata"]["namespace"]) == (name, namespace)
        ]
        assert len(found) == 1, f"{len(found)} objects {kind} {namespace}/{name}"
        return found[0]

    def workloads(self) -> list[Workload]:
        return [Workload(item, self) for item in (*self.of("StatefulSet"), *self.of("DaemonSet"))]

    def selected(self, selector: Mapping[str, str], namespace: str) -> list[Workload]:
        """Those whose pods a selector means."""
        return [
            workload
            for workload in self.workloads()
            if workload.namespace == namespace and selector.items() <= workload.labels.items()
        ]


def address_dialled(workload: Workload, environment: Mapping[str, str], instead: str = "") -> str:
    """Run the pod's script by this machine's shell; what it would start `fedgrpc worker --aggregator` with.

    `instead` is another expression of the shell to look at in that place.
    """
    *shell, script = [*workload.container["command"], *workload.container["args"]]
    assert script.count("exec fedgrpc worker --aggregator ") == 1
    show = f'printf %s "{instead}"; : ' if instead else "printf %s "
    told = script.replace("exec fedgrpc worker --aggregator ", show)
    done = subprocess.run([*shell, told], env={**environment, "PATH": "/usr/bin:/bin"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def image_environment(image: str) -> dict[str, str]:
    """What the image's Dockerfile sets in its last stage."""
    last_stage = dockerfile_of(image).read_text().rpartition("\nFROM ")[2]
    return dict(re.findall(r"\b(FEDGRPC_\w+)=(\S+)", last_stage))


def dockerfile_of(image: str) -> Path:
    """The file that makes an image of ours."""
    name = image.rpartition("/")[2].partition(":")[0].removeprefix("fedgrpc-")
    return ROOT / "docker" / f"{name}.Dockerfile"


def settings_in(environment: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(variable, command, key) of each setting of fedgrpc."""
    for variable in environment:
        match = re.fullmatch(r"FEDGRPC_([A-Z]+)_([A-Z_]+)", variable)
        if match is not None:
            yield variable, match[1].lower(), match[2].lower()
