"""Pods of a rendered StatefulSet or DaemonSet under `podman play kube`, as their controllers would make them.

What podman does not know is done here as Kubernetes does it: fields of the pod become values, node folders and
claims get a place. gRPC probes are left out, and asked by the test; ports are,
too, as podman would publish them on the machine.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.manifests import Workload
from tools.containers.network import Link


@dataclass(frozen=True)
class Pod:
    """One pod: where it runs, and the file that podman plays."""

    name: str
    container: str
    link: Link
    path: Path

    def play(self) -> None:
        """Start it. Raises `AssertionError` with podman's words."""
        # To a pod, podman gives a bridge of its own or the network that podman itself is in; so it goes there.
        self._podman("--network", "host", str(self.path))

    def down(self) -> None:
        """SIGTERM and the grace period, then gone; claims stay."""
        self._podman("--down", str(self.path))

    def _podman(self, *arguments: str) -> None:
        done = self._in_its_network("podman", "play", "kube", *arguments)
        assert done.returncode == 0, done.stderr

    def _in_its_network(self, *command: str) -> subprocess.CompletedProcess[str]:
        there = ["nsenter", f"--net=/run/netns/{self.link.namespace}"]
        return subprocess.run([*there, *command], capture_output=True, text=True, timeout=180)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """`kubectl exec`."""
        return self._in_its_network("podman", "exec", self.container, *command)

    def logs(self) -> str:
        """What it has said so far."""
        done = subprocess.run(["podman", "logs", self.container], capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr


def make_pod(
    workload: Workload,
    name: str,
    link: Link,
    folder: Path,
    node_folders: Mapping[str, Path] | None = None,
    claimed: bool = False,
) -> Pod:
    """Write the pod `name` of a workload, for the node of that name; `claimed`: its volumes are there."""
    spec: dict[str, Any] = deepcopy(dict(workload.pod))
    container = spec["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container.pop(probe)["grpc"]
    del container["ports"]
    own = workload.environment({"spec.nodeName": name, "metadata.name": name})
    container["env"] = [{"name": entry["name"], "value": own[entry["name"]]} for entry in container.get("env", ())]
    for claim in workload.claims:
        spec["volumes"].append({"name": claim, "persistentVolumeClaim": {"claimName": f"{claim}-{name}"}})
    for volume in spec["volumes"]:
        if "hostPath" in volume:
            volume["hostPath"]["path"] = str((node_folders or {})[volume["hostPath"]["path"]])
    spec["volumes"] = [volume for volume in spec["volumes"] if not volume.get("secret", {}).get("optional")]
    mounted = {volume["name"] for volume in spec["volumes"]}
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] in mounted]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": dict(workload.labels)},
        "spec": spec,
    }
    path = folder / f"{name}.yaml"
    path.write_text(
        yaml.safe_dump_all([*_settings_of(workload), *([] if claimed else _claims_of(workload, name)), pod])
    )
    return Pod(name, f"{name}-{container['name']}", link, path)


def _settings_of(workload: Workload) -> list[Any]:
    names = [source["configMapRef"]["name"] for source in workload.container["envFrom"]]
    return [dict(workload.manifests.get("ConfigMap", name, workload.namespace)) for name in names]


def _claims_of(workload: Workload, name: str) -> list[Any]:
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": f"{claim}-{name}"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
        }
        for claim in sorted(workload.claims)
    ]
