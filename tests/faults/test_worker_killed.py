"""Promise 3: "Nothing trained is lost. A finished update is on the worker's disk before its upload starts; after
a lost link or a reboot the upload resumes at the byte offset the aggregator holds, and submitting twice counts
once."

A real process dies exactly at a named point (tests/faults/points.py) and is started again on what it left behind.
Uploads are int8 with error feedback, so the last model tells whether each residual was owed exactly once: it must
be the same bytes as after a run in which nobody was killed.
"""

import signal
import time
from contextlib import asynccontextmanager

import pytest
from safetensors.numpy import save_file

from fedgrpc.v1 import round_pb2
from tests.faults.points import TRAINED_AGAIN, WORKER
from tests.faults.tasks import MODEL, Repeatable
from tests.support.processes import running_process
from tests.support.running_federation import running_aggregator, start_worker
from tests.support.unreliable_link import UnreliableLink

pytestmark = pytest.mark.faults

ROUNDS = 3
EVERY = [point for point in WORKER if point != "reconnecting"]


@asynccontextmanager
async def running_beside_a_steady_worker(folder):
    """An aggregator whose rounds take two workers; one of them is there and never fails."""
    folder.mkdir()
    save_file(MODEL, folder / "initial.safetensors")
    policy = {"quorum": 2, "max_participants": 2, "deadline_s": 300.0, "lease_s": 120.0}
    how = {"upload_recipe": "int8+zstd", "download_recipe": "raw", "max_chunk_bytes": 64 << 10, "evaluate": True}
    how["heartbeat_interval_s"] = 0.05
    async with running_aggregator(folder, rounds=ROUNDS, policy=policy, **how) as running:
        (folder / "steady-data").mkdir()
        steady = start_worker(running, folder, "steady", Repeatable(folder / "steady-data"))
        try:
            yield running
            assert await steady == 0
        finally:
            steady.cancel()


def pi(folder, address, point=None):
    """The worker that is killed."""
    program = ("-m", "fedgrpc") if point is None else ("-m", "tests.faults.killed_at", point)
    (folder / "data").mkdir(exist_ok=True)
    place = ["--aggregator", address, "--serve-address", "none", "--name", "pi", "--state-dir", folder / "pi"]
    task = ["--task", "tests.faults.tasks:Repeatable", "--data", folder / "data", "--drain", "30s"]
    return running_process(
        "worker", *place, *task, "--reconnect-first", "50ms", "--reconnect-cap", "1s", program=program
    )


async def played(running, folder):
    """What the run came to: the last model, and that nothing is lost or counted twice on the way to it."""
    run = await running.until_finished()
    assert run.model_version == ROUNDS + 1
    rounds = [item for item in await running.rounds() if item.kind == round_pb2.TASK_KIND_TRAIN]
    assert [item.phase for item in rounds] == [round_pb2.ROUND_PHASE_COMMITTED] * ROUNDS
    for item in rounds:
        assert sorted(task.worker for task in item.tasks) == ["pi", "steady"]
        assert {task.phase for task in item.tasks} == {round_pb2.TASK_PHASE_ACCEPTED}
    assert list((folder / "pi" / "spool").glob("0*")) == []
    return (running.settings.data_dir / "models" / f"{ROUNDS + 1:06d}.safetensors").read_bytes()


_uninterrupted = []


async def uninterrupted(tmp_path_factory):
    """The last model when nobody is killed; played once."""
    if not _uninterrupted:
        folder = tmp_path_factory.mktemp("uninterrupted") / "run"
        async with (
            running_beside_a_steady_worker(folder) as running,
            pi(folder, running.address) as process,
        ):
            assert await process.ended() == 0
            _uninterrupted.append(await played(running, folder))
    return _uninterrupted[0]


@pytest.mark.parametrize("point", EVERY)
async def test_a_worker_killed_at_this_point_loses_nothing_that_it_has_trained(
    tmp_path, tmp_path_factory, point, recovery_of
):
    expected = await uninterrupted(tmp_path_factory)
    folder = tmp_path / "killed"
    async with running_beside_a_steady_worker(folder) as running:
        async with pi(folder, running.address, point) as process:
            assert await process.ended() == -signal.SIGKILL, process.events
        begun = time.monotonic()
        async with pi(folder, running.address) as process:
            await process.until("connected")
            recovery_of(f"worker killed: {point}", time.monotonic() - begun)
            assert await process.ended() == 0
        assert await played(running, folder) == expected
    again = [2] if point in TRAINED_AGAIN else []
    assert Repeatable.trained(folder / "data") == sorted([1, 2, 3, *again])


async def test_a_worker_killed_while_it_reconnects_loses_nothing_that_it_has_trained(
    tmp_path, tmp_path_factory, recovery_of
):
    """The link goes within a task; the worker dies when it is about to dial again."""
    expected = await uninterrupted(tmp_path_factory)
    folder = tmp_path / "killed"
    async with (
        running_beside_a_steady_worker(folder) as running,
        UnreliableLink(running.address, bytes_per_s=1_000_000) as link,
    ):
        async with pi(folder, link.address, "reconnecting") as process:
            await process.until("task started", round=2)
            link.cut()
            assert await process.ended() == -signal.SIGKILL, process.events
        link.bytes_per_s = None
        link.mend()
        begun = time.monotonic()
        async with pi(folder, link.address) as process:
            await process.until("connected")
            recovery_of("worker killed: reconnecting", time.monotonic() - begun)
            assert await process.ended() == 0
        assert await played(running, folder) == expected
