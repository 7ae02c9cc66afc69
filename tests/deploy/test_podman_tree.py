"""The tree overlay in real pods: a root, two leaves, two workers on each: `make deploy-test`.

Every pod dials the names that the manifests say.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from tests.deploy.manifests import Manifests, address_dialled
from tests.deploy.pods import PATIENCE_S, Pod, make_pod, playing
from tools.containers.network import Network

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1200)]

MANY = 1000
LEAVES = ("leaf-aggregator-0", "leaf-aggregator-1")
PER_LEAF = 2
SETTLED_S = 5


def _tree(folder: Path, rounds: int) -> Manifests:
    """The overlay with as many leaves as here, and leases that a stopped process outlives."""
    settings = {
        ("aggregator", "fedgrpc"): (
            "FEDGRPC_AGGREGATOR_TASK=fedgrpc.tasks.digits",
            f"FEDGRPC_AGGREGATOR_ROUNDS={rounds}",
            f"FEDGRPC_AGGREGATOR_MIN_WORKERS={len(LEAVES)}",
            "FEDGRPC_AGGREGATOR_EPOCHS=1",
            "FEDGRPC_AGGREGATOR_LEASE=10m",
        ),
        ("leaf-settings", "fedgrpc"): (
            f"FEDGRPC_AGGREGATOR_MIN_WORKERS={PER_LEAF}",
            "FEDGRPC_AGGREGATOR_LEASE=10m",
        ),
        ("worker", "fedgrpc-workers"): (
            f"LEAVES={len(LEAVES)}",
            "FEDGRPC_WORKER_THREADS=1",
            "FEDGRPC_WORKER_SLOWDOWN=50",
        ),
    }
    return overlay_here(folder, "tree", settings, {"leaf-aggregator": len(LEAVES)})


def _crews(manifests: Manifests) -> dict[str, list[str]]:
    """Node names by the leaf that the overlay's own script gives them: so many for each."""
    some, crews = worker_for(manifests, {}), {name: list[str]() for name in LEAVES}
    for number in range(100):
        node = f"node-{number}"
        leaf = address_dialled(some, some.environment({"spec.nodeName": node})).partition(".")[0]
        if len(crews[leaf]) < PER_LEAF:
            crews[leaf].append(node)
    assert all(len(crew) == PER_LEAF for crew in crews.values())
    return crews


def _hosts(addresses: Mapping[str, str]) -> dict[str, str]:
    """What the cluster's name server would say: the root by its Service, each leaf by its own name."""
    leaves = {f"{name}.leaf-aggregator.fedgrpc.svc": addresses[name] for name in LEAVES}
    return {"aggregator.fedgrpc.svc": addresses["aggregator-0"], **leaves}


def _stopped_with_one_accepted(leaf: Pod, worker: Pod, other: str) -> int:
    """Stop `worker` (SIGSTOP) so that its leaf's round has the update of `other` alone; that round's number.

    A worker that was stopped between two tasks is let go on, and stopped again.
    """
    until_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        worker.send(signal.SIGSTOP)
        for _ in range(10):
            time.sleep(1)
            number = _half_way(leaf, other)
            if number is not None:
                # What it had sent before it stopped has arrived by then, if it was all.
                time.sleep(SETTLED_S)
                if _half_way(leaf, other) == number:
                    return number
        worker.send(signal.SIGCONT)
        time.sleep(1)
    raise AssertionError(f"{worker.name} was never stopped in mid-round\n{leaf.logs()[-4000:]}")


def _half_way(leaf: Pod, other: str) -> int | None:
    """The round that is open at the leaf, when the update of `other` is all that it has."""
    accepted_by: set[str] = set()
    number = None
    for event in leaf.events():
        if event["event"] == "tasks offered" and len(event["workers"]) == PER_LEAF:
            number, accepted_by = int(event["round"]), set()
        elif event["event"] == "update accepted":
            accepted_by.add(event["worker"])
        elif event["event"] == "round committed":
            number = None
    return number if accepted_by == {other} else None


def _ended(status: Mapping[str, Any], number: int) -> bool:
    return any(number_of(item) == number for item in committed(status))


def test_pods_of_the_tree_go_on_when_a_leaf_is_killed_and_another_replaced(
    network: Network, tmp_path: Path
) -> None:
    first = _tree(tmp_path / "first", MANY)
    crews = _crews(first)
    nodes = [node for crew in crews.values() for node in crew]
    links = {name: network.attach(name) for name in ("aggregator-0", *LEAVES, *nodes)}
    hosts = _hosts({name: link.address for name, link in links.items()})
    folders = node_folders(tmp_path, nodes)
    leaf_set = workload_of(first, "leaf-aggregator")
    root = make_pod(workload_of(first, "aggregator"), "aggregator-0", links["aggregator-0"], tmp_path, hosts=hosts)
    leaves = {name: make_pod(leaf_set, name, links[name], tmp_path, hosts=hosts) for name in LEAVES}
    assert len({claim for leaf in leaves.values() for claim in leaf.claims}) == len(LEAVES)
    workers = {
        node: make_pod(worker_for(first, {}), node, links[node], tmp_path, folders[node], hosts=hosts)
        for node in nodes
    }
    pods = [root, *leaves.values(), *workers.values()]
    with playing(pods):
        root.until(lambda status: len(committed(status)) >= 2)
        for leaf in leaves.values():
            assert leaf.probed(50051, "fedgrpc.v1.Aggregator") == "SERVING"

        # SIGKILL in mid-round, with one of two updates accepted: the container starts again.
        killed, (stopped, other) = leaves[LEAVES[0]], crews[LEAVES[0]]
        number = _stopped_with_one_accepted(killed, workers[stopped], other)
        before = killed.pid()
        killed.send(signal.SIGKILL)
        killed.until(lambda status: killed.pid() not in (0, before))
        workers[stopped].send(signal.SIGCONT)
        status = killed.until(lambda status: _ended(status, number))
        assert {(stopped, number), (other, number)} <= accepted(status)
        resumed = [event for event in killed.events() if event["event"] == "round resumed"]
        assert [(event["round"], event["accepted"]) for event in resumed] == [(number, 1)]

        # The other one's pod is replaced: SIGTERM, then a pod of the same name with the same claim.
        leaves[LEAVES[1]].down()
        replaced = make_pod(leaf_set, LEAVES[1], links[LEAVES[1]], tmp_path, claimed=True, hosts=hosts)
        replaced.play()
        so_far = len(committed(root.status()))
        root.until(lambda status: len(committed(status)) >= so_far + 2)

        # So is the root's, for a changed setting. What it committed is there, and the run comes to its end.
        seen = root.until(lambda status: len(committed(status)) >= so_far + 2)
        rounds = len(committed(seen)) + 2
        root.down()
        changed = workload_of(_tree(tmp_path / "changed", rounds), "aggregator")
        root = make_pod(changed, "aggregator-0", links["aggregator-0"], tmp_path, claimed=True, hosts=hosts)
        root.play()
        after = root.until(lambda status: status["run"]["phase"] == "finished")

        assert versions_in_a_row(after)
        assert accepted(seen) <= accepted(after)
        roles = {item["worker"]: item["device"]["device_class"] for item in after["workers"]}
        assert roles == dict.fromkeys(LEAVES, "aggregator")
        trained = [item for item in committed(after) if item["kind"] == "train"]
        assert len(trained) >= rounds - 1
        for item in trained:
            merged = {task["worker"]: int(task["merged_updates"]) for task in item["tasks"]}
            assert merged == dict.fromkeys(LEAVES, PER_LEAF), item
        # What a worker was told is safe is in its leaf's history, and each node dialled the leaf that it should.
        for name, crew in crews.items():
            held = accepted(leaves[name].status())
            for node in crew:
                told = workers[node].acknowledged()
                assert len(told) >= len(trained)
                assert told <= held
