"""An overlay on this machine: local images, digits as each node's data, and settings of a test's own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedgrpc.datasets.digits import load_digits
from fedgrpc.datasets.partition import parse_partition
from fedgrpc.datasets.shares import write_shares
from tests.deploy.manifests import K8S, Manifests, Workload, relative, render
from tools.containers.podman import AGGREGATOR_IMAGE, WORKER_IMAGE

Settings = Mapping[tuple[str, str], Sequence[str]]

NODE_USER = 10001


def overlay_here(
    folder: Path, overlay: str, settings: Settings, replicas: Mapping[str, int] | None = None
) -> Manifests:
    """The objects of an overlay as a person would have it in a folder of their own, insecure: no Secrets here.

    `settings` are more lines for ConfigMaps by (name, namespace), `replicas` counts by a StatefulSet's name.
    """
    folder.mkdir()
    insecure = ["insecure", *(["insecure-leaves"] if overlay == "tree" else [])]
    images = (
        ("registry.example/fedgrpc-aggregator", AGGREGATOR_IMAGE),
        ("registry.example/fedgrpc-worker", WORKER_IMAGE),
    )
    content = {
        "resources": [relative(K8S / "overlays" / overlay, folder)],
        "components": [relative(K8S / "components" / name, folder) for name in insecure],
        "images": [
            {"name": name, "newName": image.rpartition(":")[0], "newTag": image.rpartition(":")[2]}
            for name, image in images
        ],
        "configMapGenerator": [
            {"name": name, "namespace": namespace, "behavior": "merge", "literals": list(lines)}
            for (name, namespace), lines in settings.items()
        ],
        "replicas": [{"name": name, "count": count} for name, count in (replicas or {}).items()],
        "patches": [{"target": {"kind": "DaemonSet"}, "patch": yaml.safe_dump(_DIGITS)}],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return render(folder)


_DIGITS = {
    "apiVersion": "apps/v1",
    "kind": "DaemonSet",
    "metadata": {"name": "any"},
    "spec": {
        "template": {
            "spec": {
                "containers": [
                    {"name": "worker", "env": [{"name": "FEDGRPC_WORKER_DATA", "value": "/data/digits.npz"}]}
                ]
            }
        }
    },
}


def node_folders(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Path]]:
    """The two folders of each node: its part of the digits, and state for the pods' user."""
    names = list(names)
    shares = write_shares(folder / "shares", load_digits(), parse_partition("iid"), len(names), seed=0)
    made = {}
    for name, share in zip(names, shares, strict=True):
        data, state = folder / name / "data", folder / name / "state"
        data.mkdir(parents=True)
        state.mkdir()
        share.rename(data / "digits.npz")
        os.chown(state, NODE_USER, NODE_USER)
        made[name] = {"/srv/fedgrpc": data, "/var/lib/fedgrpc": state}
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)
    return made


def workload_of(manifests: Manifests, name: str) -> Workload:
    """The one of that name."""
    (found,) = [item for item in manifests.workloads() if item.name == name]
    return found


def worker_for(manifests: Manifests, labels: Mapping[str, str]) -> Workload:
    """The DaemonSet of a node with these labels."""
    every = [item for item in manifests.workloads() if item.object["kind"] == "DaemonSet"]
    (found,) = [item for item in every if item.runs_on({"fedgrpc.io/worker": "true", **labels})]
    return found


def committed(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rounds of `Pod.status` that wrote a version or scored one."""
    return [item for item in status["rounds"] if item["phase"] == "committed"]


def accepted(status: Mapping[str, Any]) -> set[tuple[str, int]]:
    """(worker, round) of every update in the history of `Pod.status`."""
    return {
        (task["worker"], number_of(item))
        for item in status["rounds"]
        for task in item["tasks"]
        if task["phase"] == "accepted"
    }


def number_of(record: Mapping[str, Any]) -> int:
    """A round's number."""
    return int(record["number"])


def versions_in_a_row(status: Mapping[str, Any]) -> bool:
    """Whether every version up to the present one was committed, once."""
    trained = [item for item in status["rounds"] if item["kind"] != "evaluate"]
    versions = [int(item["committed_version"]) for item in trained if item.get("committed_version")]
    return sorted(versions) == list(range(1, int(status["run"]["model_version"]) + 1))
