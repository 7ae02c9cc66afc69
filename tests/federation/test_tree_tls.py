"""TLS between aggregators, as processes: each end shows a certificate and checks the other's."""

import asyncio

import pytest

from fedgrpc.rpc.channel import Tls, open_channel
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc, round_pb2
from tests.support.certificates import make_authority, make_certificate, tls_flags
from tests.support.processes import free_address, running_process
from tests.support.running_federation import settings_for

pytestmark = pytest.mark.faults

ROLES = {"root": None, "leaf": "leaf", "x": "trainer", "y": "trainer", "stranger": "trainer", "operator": "viewer"}
ROUND = ("--selection-window", "200ms", "--lease", "60s", "--encoding", "raw")


@pytest.fixture
def pki(tmp_path):
    folder = tmp_path / "pki"
    make_authority(folder)
    for name, role in ROLES.items():
        make_certificate(folder, name, role)
    return folder


def root_process(tmp_path, pki, *arguments):
    place = ["--data-dir", tmp_path / "root", "--address", "127.0.0.1:0"]
    place += ["--initial-model", settings_for(tmp_path).initial_model]
    return running_process("aggregator", *place, *ROUND, "--min-workers", 1, *tls_flags(pki, "root"), *arguments)


def leaf_process(tmp_path, port, *arguments):
    place = ["--data-dir", tmp_path / "leaf", "--address", "127.0.0.1:0", "--min-workers", 2]
    link = ["--upstream", f"127.0.0.1:{port}", "--upstream-name", "leaf"]
    return running_process("aggregator", *place, *ROUND, *link, *arguments)


def worker_process(tmp_path, pki, port, name):
    data = tmp_path / f"data-{name}"
    data.mkdir()
    place = ["--aggregator", f"127.0.0.1:{port}", "--serve-address", "none"]
    place += ["--name", name, "--state-dir", tmp_path / name]
    task = ["--task", "tests.support.learning_tasks:Recorded", "--data", data]
    return running_process("worker", *place, *task, *tls_flags(pki, name))


async def seen_at(port, pki):
    """(rounds, workers) of the aggregator there."""
    tls = Tls(pki / "ca.pem", pki / "operator.pem", pki / "operator.key")
    async with open_channel(f"127.0.0.1:{port}", tls) as channel:
        stub = aggregator_pb2_grpc.AggregatorStub(channel)
        rounds = (await stub.ListRounds(pb.ListRoundsRequest())).rounds
        return rounds, (await stub.ListWorkers(pb.ListWorkersRequest())).workers


async def test_rounds_pass_through_two_levels_of_mutual_tls_and_a_killed_aggregator_below(tmp_path, pki):
    async with root_process(tmp_path, pki, "--rounds", 3, "--stay", "--no-evaluate") as root:
        port = (await root.until("serving"))["port"]
        both = [*tls_flags(pki, "leaf", "--upstream-tls"), *tls_flags(pki, "leaf"), "--address", free_address()]
        async with leaf_process(tmp_path, port, *both) as leaf:
            below = (await leaf.until("serving"))["port"]
            async with worker_process(tmp_path, pki, below, "x"), worker_process(tmp_path, pki, below, "y"):
                await root.until("round committed", round=1)
                await leaf.kill()
                async with leaf_process(tmp_path, port, *both) as again:
                    await again.until("connected")
                    await root.until("round committed", round=3)
        rounds, workers = await seen_at(port, pki)
    assert [worker.worker for worker in workers] == ["leaf"]
    for record in rounds:
        (task,) = record.tasks
        assert (task.phase, task.merged_updates) == (round_pb2.TASK_PHASE_ACCEPTED, 2)


@pytest.mark.parametrize("wrong", ["no certificate", "another authority", "no TLS"])
async def test_an_aggregator_that_cannot_show_or_trust_a_certificate_stays_outside(tmp_path, pki, wrong):
    flags = {"no certificate": ["--upstream-tls-ca", pki / "ca.pem"], "no TLS": []}
    make_authority(pki / "other")
    flags["another authority"] = tls_flags(pki, "leaf", "--upstream-tls", "other/ca.pem")
    async with root_process(tmp_path, pki) as root:
        port = (await root.until("serving"))["port"]
        async with leaf_process(tmp_path, port, *flags[wrong]) as leaf:
            for _ in range(2):
                await leaf.until("disconnected", since=len(leaf.events))
            assert not [event for event in leaf.events if event["event"] in ("serving", "connected")]
        assert not (await seen_at(port, pki))[1]
        assert not root.over


async def test_what_opens_the_link_below_opens_nothing_above(tmp_path, pki):
    """Where each link has an authority of its own."""
    make_authority(pki / "fleet")
    for name in ("leaf", "x", "y", "stranger"):
        make_certificate(pki / "fleet", name, ROLES[name])
    async with root_process(tmp_path, pki, "--stay") as root:
        port = (await root.until("serving"))["port"]
        fleet = pki / "fleet"
        async with leaf_process(
            tmp_path, port, *tls_flags(pki, "leaf", "--upstream-tls"), *tls_flags(fleet, "leaf")
        ) as leaf:
            below = (await leaf.until("serving"))["port"]
            async with (
                worker_process(tmp_path, fleet, below, "x"),
                worker_process(tmp_path, fleet, below, "y"),
                worker_process(tmp_path, fleet, port, "stranger") as stranger,
            ):
                await asyncio.gather(root.until("round committed", round=2), stranger.until("disconnected"))
        assert [worker.worker for worker in (await seen_at(port, pki))[1]] == ["leaf"]
