"""The base and the workers of two nodes, from the manifests as they are, in real pods: `make deploy-test`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedgrpc.data.digits import load_digits
from fedgrpc.data.partition import parse_partition
from fedgrpc.data.shares import write_shares
from tests.deploy.manifests import K8S, Manifests, Workload, relative, render
from tests.deploy.pods import Pod, make_pod
from tools.containers.network import Network, NetworkError
from tools.containers.podman import AGGREGATOR_IMAGE, WORKER_IMAGE, podman, why_not

pytestmark = [pytest.mark.containers, pytest.mark.timeout(900)]

PATIENCE_S = 240
MANY = 1000
NODES = {"pi-1": {"fedgrpc.io/device-class": "raspberry-pi-4"}, "box-1": {}}
PREFIX = "fgdeploy"


def _fleet(folder: Path, aggregator_address: str, rounds: int) -> Manifests:
    """The edge overlay with local images and digits, as a person would have it in a folder of their own.

    There is no cluster to resolve the aggregator's name.
    """
    folder.mkdir()
    aggregator, worker = (image.rpartition(":") for image in (AGGREGATOR_IMAGE, WORKER_IMAGE))
    content = {
        "resources": [relative(K8S / "overlays" / "edge", folder)],
        "images": [
            {"name": "registry.example/fedgrpc-aggregator", "newName": aggregator[0], "newTag": aggregator[2]},
            {"name": "registry.example/fedgrpc-worker", "newName": worker[0], "newTag": worker[2]},
        ],
        "configMapGenerator": [
            {
                "name": "aggregator",
                "namespace": "fedgrpc",
                "behavior": "merge",
                "literals": [
                    "FEDGRPC_AGGREGATOR_TASK=fedgrpc.tasks.digits",
                    f"FEDGRPC_AGGREGATOR_ROUNDS={rounds}",
                    "FEDGRPC_AGGREGATOR_DEADLINE=2m",
                    "FEDGRPC_AGGREGATOR_EPOCHS=1",
                ],
            },
            {
                "name": "worker",
                "namespace": "fedgrpc-workers",
                "behavior": "merge",
                # Slow enough for a rollout to meet a round in flight.
                "literals": [f"FEDGRPC_WORKER_AGGREGATOR={aggregator_address}", "FEDGRPC_WORKER_SLOWDOWN=8"],
            },
        ],
        "patches": [
            {
                "target": {"kind": "DaemonSet"},
                "patch": yaml.safe_dump(
                    {
                        "apiVersion": "apps/v1",
                        "kind": "DaemonSet",
                        "metadata": {"name": "any"},
                        "spec": {
                            "template": {
                                "spec": {
                                    "containers": [
                                        {
                                            "name": "worker",
                                            "env": [{"name": "FEDGRPC_WORKER_DATA", "value": "/data/digits.npz"}],
                                        }
                                    ]
                                }
                            }
                        },
                    }
                ),
            }
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return render(folder)


@pytest.fixture
def network() -> Iterator[Network]:
    reason = why_not(AGGREGATOR_IMAGE, WORKER_IMAGE)
    if reason is not None:
        pytest.skip(reason)
    try:
        with Network(PREFIX) as made:
            yield made
    except NetworkError as error:
        pytest.skip(f"no network of its own: {error}")


@pytest.fixture
def nodes(tmp_path: Path) -> dict[str, dict[str, Path]]:
    """The two folders of each node: its part of the digits, and state for user 10001."""
    shares = write_shares(tmp_path / "shares", load_digits(), parse_partition("iid"), len(NODES), seed=0)
    made = {}
    for name, share in zip(NODES, shares, strict=True):
        data, state = tmp_path / name / "data", tmp_path / name / "state"
        data.mkdir(parents=True)
        state.mkdir()
        share.rename(data / "digits.npz")
        os.chown(state, 10001, 10001)
        made[name] = {"/srv/fedgrpc": data, "/var/lib/fedgrpc": state}
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    return made


def _worker_for(manifests: Manifests, labels: dict[str, str]) -> Workload:
    every = [item for item in manifests.workloads() if item.object["kind"] == "DaemonSet"]
    (found,) = [item for item in every if item.runs_on({"fedgrpc.io/worker": "true", **labels})]
    return found


def _aggregator(manifests: Manifests) -> Workload:
    return next(item for item in manifests.workloads() if item.name == "aggregator")


def _status(pod: Pod) -> dict[str, Any]:
    done = pod.run("fedgrpc", "status", "--json", "--rounds", "100")
    answer: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return answer


def _until(pod: Pod, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    until_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        status = _status(pod)
        if status and wanted(status):
            return status
        time.sleep(0.5)
    raise AssertionError(f"not within {PATIENCE_S} s: {status}\n{pod.logs()[-4000:]}")


def _committed(status: dict[str, Any]) -> int:
    return sum(item["phase"] == "ROUND_PHASE_COMMITTED" for item in status["rounds"])


def _forget(pods: list[Pod]) -> None:
    """Also what a former run has left."""
    for pod in pods:
        podman("pod", "rm", "--force", "--ignore", "--time", "1", pod.name, check=False)
    podman("volume", "rm", "--force", "data-aggregator-0", check=False)


def _probe(address: str, service: str) -> str:
    """What the kubelet would ask, from the node, at the pod's own address."""
    command = ["nsenter", f"--net=/run/netns/{PREFIX}-hub", sys.executable, "-m", "fedgrpc", "health"]
    done = subprocess.run(
        [*command, "--address", address, "--service", service, "--timeout", "10s"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout.strip()


def _acknowledged(logs: str) -> set[tuple[str, int]]:
    """(worker, round) of every update that the aggregator has told a worker it holds."""
    lines = [json.loads(line) for line in logs.splitlines() if line.startswith("{")]
    return {(line["worker"], line["round"]) for line in lines if line["event"] == "update acknowledged"}


def test_pods_of_the_manifests_finish_a_run_through_a_rollout_in_mid_round(
    network: Network, nodes: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    link = network.attach("aggregator")
    address = f"{link.address}:50051"
    first = _fleet(tmp_path / "first", address, MANY)
    leader = make_pod(_aggregator(first), "aggregator-0", link, tmp_path)
    workers = {
        name: make_pod(_worker_for(first, labels), name, network.attach(name), tmp_path, nodes[name])
        for name, labels in NODES.items()
    }
    pods = [leader, *workers.values()]
    _forget(pods)
    try:
        for pod in pods:
            pod.play()
        before = _until(leader, lambda status: _committed(status) >= 2)
        assert _probe(address, "fedgrpc.v1.Aggregator") == "SERVING"
        for pod in workers.values():
            assert _probe(f"{pod.link.address}:50052", "fedgrpc.v1.Worker") == "SERVING"
        assert leader.run("touch", "/opt/new").returncode != 0

        # A changed setting: SIGTERM, a new pod, the same claim. The round in flight goes on.
        rounds = _committed(before) + 3
        changed = _fleet(tmp_path / "changed", address, rounds)
        leader.down()
        leader = make_pod(_aggregator(changed), "aggregator-0", link, tmp_path, claimed=True)
        leader.play()
        after = _until(leader, lambda status: status["run"]["phase"] == "RUN_PHASE_FINISHED")

        kept = {item.get("number", "0"): item for item in after["rounds"]}
        for item in before["rounds"]:
            if item["phase"] == "ROUND_PHASE_COMMITTED":
                assert kept[item.get("number", "0")]["committed_version"] == item["committed_version"]
        assert int(after["run"]["model_version"]) >= rounds
        trained = [item for item in after["rounds"] if item["kind"] != "TASK_KIND_EVALUATE"]
        versions = [int(item["committed_version"]) for item in trained if item.get("committed_version")]
        assert sorted(versions) == list(range(1, int(after["run"]["model_version"]) + 1))
        accepted = {
            (task["worker"], int(item.get("number", "0")))
            for item in after["rounds"]
            for task in item["tasks"]
            if task["phase"] == "TASK_PHASE_ACCEPTED"
        }
        told = set().union(*(_acknowledged(pod.logs()) for pod in workers.values()))
        assert len(told) >= 2 * (rounds - 1)
        assert told <= accepted
        classes = {item["worker"]: item["device"]["device_class"] for item in after["workers"]}
        assert classes == {"pi-1": "raspberry-pi-4", "box-1": "other"}
        # They stay, for a next run: a DaemonSet would start them again and again.
        assert all(pod.run("fedgrpc", "health").returncode == 0 for pod in workers.values())
    finally:
        for pod in pods:
            sys.stdout.write(f"--- {pod.name}\n{pod.logs()[-6000:]}\n")
        _forget(pods)
