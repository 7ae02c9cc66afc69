"""Pods of a rendered StatefulSet or DaemonSet under `podman play kube`, as their controllers would make them.

What podman does not know is done here as Kubernetes does it: fields of the pod become values, node folders and
claims get a place. Probes are left out, and asked by the test; ports are,
too, as podman would publish them on the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.manifests import Workload
from tools.containers.network import Link
from tools.containers.podman import podman

PREFIX = "fgdeploy"
PATIENCE_S = 600


@dataclass(frozen=True)
class Pod:
    """One pod: where it runs, and the file that podman plays."""

    name: str
    container: str
    link: Link
    path: Path
    claims: tuple[str, ...] = field(default=())

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

    def events(self) -> list[dict[str, Any]]:
        """Its log, line by line."""
        return [json.loads(line) for line in self.logs().splitlines() if line.startswith("{")]

    def acknowledged(self) -> set[tuple[str, int]]:
        """(worker, round) of every update that this worker was told is safe."""
        return {(e["worker"], e["round"]) for e in self.events() if e["event"] == "update acknowledged"}

    def pid(self) -> int:
        """Of its process, as this machine counts; 0 while there is none."""
        return int((podman("inspect", "--format", "{{.State.Pid}}", self.container, check=False) or "0").strip())

    def send(self, number: int) -> None:
        """A signal to its process, from the node."""
        os.kill(self.pid(), number)

    def status(self) -> dict[str, Any]:
        """An aggregator's run, rounds and workers; empty while it does not answer."""
        done = self.run("fedgrpc", "status", "--json", "--rounds", "1000")
        answer: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return answer

    def until(self, wanted: Callable[[dict[str, Any]], bool], patience_s: float = PATIENCE_S) -> dict[str, Any]:
        """Its status once it is as wanted. Raises `AssertionError`."""
        until_s = time.monotonic() + patience_s
        while time.monotonic() < until_s:
            status = self.status()
            if status and wanted(status):
                return status
            time.sleep(0.5)
        raise AssertionError(f"not within {patience_s} s: {status}\n{self.logs()[-4000:]}")

    def probed(self, port: int, service: str) -> str:
        """What the kubelet would hear, asking from the node at the pod's own address."""
        command = ["nsenter", f"--net=/run/netns/{PREFIX}-hub", sys.executable, "-m", "fedgrpc", "health"]
        address = f"{self.link.address}:{port}"
        asked = [*command, "--address", address, "--service", service, "--timeout", "10s"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.strip()


def forget(pods: Iterable[Pod]) -> None:
    """Pods and claims, also what a former run has left."""
    for pod in pods:
        podman("pod", "rm", "--force", "--ignore", "--time", "1", pod.name, check=False)
        for claim in pod.claims:
            podman("volume", "rm", "--force", claim, check=False)


@contextmanager
def playing(pods: Sequence[Pod]) -> Iterator[None]:
    """All of them run; at the end what they have said is told, and they go, whoever has taken their place, too."""
    forget(pods)
    try:
        for pod in pods:
            pod.play()
        yield
    finally:
        for pod in pods:
            sys.stdout.write(f"--- {pod.name}\n{pod.logs()[-6000:]}\n")
        forget(pods)


def make_pod(
    workload: Workload,
    name: str,
    link: Link,
    folder: Path,
    node_folders: Mapping[str, Path] | None = None,
    claimed: bool = False,
    hosts: Mapping[str, str] | None = None,
) -> Pod:
    """Write the pod `name` of a workload, for the node of that name; `claimed`: its volumes are there.

    `hosts` are addresses by the names that a cluster's name server would know.
    """
    spec: dict[str, Any] = deepcopy(dict(workload.pod))
    container = spec["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container.pop(probe).keys() & {"grpc", "exec"}
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
    if hosts is not None:
        _know(hosts, spec, folder / f"{name}.hosts")
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
    claims = tuple(f"{claim}-{name}" for claim in sorted(workload.claims))
    return Pod(name, f"{name}-{container['name']}", link, path, claims)


def _know(hosts: Mapping[str, str], spec: dict[str, Any], path: Path) -> None:
    """podman leaves out a pod's hostAliases on the node's network, so names come as a file of the node."""
    path.write_text(
        "".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **hosts}.items())
    )
    spec["volumes"].append({"name": "hosts", "hostPath": {"path": str(path), "type": "File"}})
    spec["containers"][0]["volumeMounts"].append({"name": "hosts", "mountPath": "/etc/hosts", "readOnly": True})


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
