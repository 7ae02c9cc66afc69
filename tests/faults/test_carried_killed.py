"""Promise 4 for an update that outlives its round (`--late carry`): the aggregator dies between the commit of one
round and the tasks of the next, while half of the late update is there. It counts once, in the next round, at its
discount, and the models are byte for byte those of a run that nobody killed.
"""

import asyncio
import hashlib
import signal

import pytest

from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from tests.faults.points import CARRYING
from tests.support.hand_driven_device import HandDrivenDevice, chunks, encoded, update_of
from tests.support.processes import aggregator_process

pytestmark = pytest.mark.faults

RULES = ("--late", "carry", "--max-participants", 2, "--over-selection", 1.5, "--rounds", 2)
ACCEPTED = round_pb2.TASK_PHASE_ACCEPTED
HALF = 2


async def registered(running, *names):
    """Every worker that has registered is waited for, as long as it takes."""
    devices = [HandDrivenDevice(running.stub, name) for name in names]
    for device in devices:
        await device.register()
    return devices


async def round_one(folder, point=None):
    """The late task, with half of its update uploaded when the two others are in; the process dies at `point`."""
    program = ("-m", "fedgrpc") if point is None else ("-m", "tests.faults.killed_at", point)
    async with aggregator_process(folder, *RULES, program=program) as (process, running):
        a, b, late = await registered(running, "a", "b", "late")
        tasks = await asyncio.gather(*(device.task() for device in (a, b, late)))
        header = pb.PushUpdateRequest(header=late.header(tasks[2], encoded(update_of(4.0))[0]))
        assert not (await late.send(header, *chunks(encoded(update_of(4.0))[1])[:HALF])).complete
        for device, task, change in ((a, tasks[0], 1.0), (b, tasks[1], 3.0)):
            assert (await device.push(task, update_of(change))).complete
        if point is None:
            await running.until_ended(1)
            await process.kill()
        else:
            # Round 2 waits for workers, and offers its tasks to those that ask.
            asking = [asyncio.create_task(device.task()) for device in (a, b)]
            assert await process.ended() == -signal.SIGKILL
            await asyncio.gather(*asking, return_exceptions=True)
        return tasks[2], header


async def round_two(folder, task, header):
    """The process after it: the late update goes on where it stopped. Hashes of the two versions made."""
    payload = encoded(update_of(4.0))[1]
    async with aggregator_process(folder, *RULES) as (_, running):
        a, b, late = await registered(running, "a", "b", "late")
        await running.until_ended(1)
        held = (await late.held(task)).committed_size_bytes
        assert held == sum(len(message.chunk.data) for message in chunks(payload)[:HALF])
        assert (await late.send(header, *chunks(payload, held))).complete
        tasks = await asyncio.gather(a.task(), b.task())
        for device, each, change in ((a, tasks[0], 2.0), (b, tasks[1], 5.0)):
            assert (await device.push(each, update_of(change))).complete
        await running.until_finished()
        seen = {item.worker: (item.phase, item.staleness) for item in (await running.round(2)).tasks}
        assert seen == {"a": (ACCEPTED, 0), "b": (ACCEPTED, 0), "late": (ACCEPTED, 1)}
        assert running.kept_updates() == []
        models = running.settings.data_dir / "models"
        return [
            hashlib.sha256((models / f"{version:06d}.safetensors").read_bytes()).digest() for version in (2, 3)
        ]


_uninterrupted = []


async def uninterrupted(tmp_path_factory):
    """The versions where the first process came through the commit; played once."""
    if not _uninterrupted:
        folder = tmp_path_factory.mktemp("carried")
        _uninterrupted.extend(await round_two(folder, *await round_one(folder)))
    return _uninterrupted


@pytest.mark.parametrize("point", CARRYING)
async def test_a_carried_update_outlives_an_aggregator_killed_at_this_point(tmp_path, tmp_path_factory, point):
    expected = await uninterrupted(tmp_path_factory)
    assert await round_two(tmp_path, *await round_one(tmp_path, point)) == expected
