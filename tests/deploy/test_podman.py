"""The base and the workers of two nodes, from the manifests as they are, in real pods: `make deploy-test`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.fleet import (
    accepted,
    committed,
    node_folders,
    number_of,
    overlay_here,
    versions_in_a_row,
    worker_for,
    workload_of,
)
from tests.deploy.manifests import Manifests
from tests.deploy.pods import make_pod, playing
from tools.containers.network import Network

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1200)]

MANY = 1000
NODES = {"pi-1": {"fedgrpc.io/device-class": "raspberry-pi-4"}, "box-1": {}}


def _fleet(folder: Path, aggregator_address: str, rounds: int) -> Manifests:
    leading = ("FEDGRPC_AGGREGATOR_TASK=fedgrpc.tasks.digits", f"FEDGRPC_AGGREGATOR_ROUNDS={rounds}")
    # Slow enough for a rollout to meet a round in flight.
    working = (f"FEDGRPC_WORKER_AGGREGATOR={aggregator_address}", "FEDGRPC_WORKER_SLOWDOWN=8")
    settings = {
        ("aggregator", "fedgrpc"): (*leading, "FEDGRPC_AGGREGATOR_DEADLINE=2m", "FEDGRPC_AGGREGATOR_EPOCHS=1"),
        ("worker", "fedgrpc-workers"): working,
    }
    return overlay_here(folder, "edge", settings)


def test_pods_of_the_manifests_finish_a_run_through_a_rollout_in_mid_round(
    network: Network, tmp_path: Path
) -> None:
    link = network.attach("aggregator")
    address = f"{link.address}:50051"
    first = _fleet(tmp_path / "first", address, MANY)
    leader = make_pod(workload_of(first, "aggregator"), "aggregator-0", link, tmp_path)
    folders = node_folders(tmp_path, NODES)
    workers = {
        name: make_pod(worker_for(first, labels), name, network.attach(name), tmp_path, folders[name])
        for name, labels in NODES.items()
    }
    pods = [leader, *workers.values()]
    with playing(pods):
        before = leader.until(lambda status: len(committed(status)) >= 2)
        assert leader.probed(50051, "fedgrpc.v1.Aggregator") == "SERVING"
        for pod in workers.values():
            assert pod.probed(50052, "fedgrpc.v1.Worker") == "SERVING"
        assert leader.run("touch", "/opt/new").returncode != 0

        # A changed setting: SIGTERM, a new pod, the same claim. The round in flight goes on.
        rounds = len(committed(before)) + 3
        changed = _fleet(tmp_path / "changed", address, rounds)
        leader.down()
        leader = make_pod(workload_of(changed, "aggregator"), "aggregator-0", link, tmp_path, claimed=True)
        leader.play()
        after = leader.until(lambda status: status["run"]["phase"] == "finished")

        kept = {number_of(item): item for item in after["rounds"]}
        for item in committed(before):
            assert kept[number_of(item)]["committed_version"] == item["committed_version"]
        assert int(after["run"]["model_version"]) >= rounds
        assert versions_in_a_row(after)
        told = set().union(*(pod.acknowledged() for pod in workers.values()))
        assert len(told) >= 2 * (rounds - 1)
        assert told <= accepted(after)
        classes = {item["worker"]: item["device"]["device_class"] for item in after["workers"]}
        assert classes == {"pi-1": "raspberry-pi-4", "box-1": "other"}
        # They stay, for a next run: a DaemonSet would start them again and again.
        assert all(pod.run("fedgrpc", "health").returncode == 0 for pod in workers.values())
