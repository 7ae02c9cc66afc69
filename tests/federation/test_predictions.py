"""What plans cost is learned from every committed round, and known again after a restart."""

import pytest

from fedgrpc.v1 import device_pb2
from tests.federation.process import again, aggregator_process, free_address

TIMINGS = {
    1: device_pb2.Timings(download_seconds=1, local_seconds=8, upload_seconds=2),
    2: device_pb2.Timings(download_seconds=3, local_seconds=4, upload_seconds=6),
    3: device_pb2.Timings(download_seconds=2, local_seconds=6, upload_seconds=4),
}


async def play(running, device, count):
    """The device's tasks of that many rounds, each accepted and its round over; the last round's record."""
    for _ in range(count):
        task = await device.task()
        cost = {"timings": TIMINGS[task.round], "peak_memory_bytes": 600 << 20}
        await device.push(task, **cost)
        record = await running.until_ended(task.round)
    return record


async def test_what_a_device_has_cost_is_known_to_an_aggregator_that_was_killed(tmp_path):
    address = free_address()
    arguments = ("--rounds", 5, "--min-workers", 1)
    async with aggregator_process(tmp_path, *arguments, address=address) as (aggregator, running):
        device = await running.device("pi")
        record = await play(running, device, 3)
        # Predicted from two tasks, and nothing at all was known before the first.
        assert record.tasks[0].prediction.local_seconds == pytest.approx(6)
        assert not (await running.round(1)).tasks[0].prediction.HasField("local_seconds")
        assert await aggregator.kill() == -9
    async with aggregator_process(tmp_path, *arguments, address=address) as (_, running):
        (device,) = again(running, device)
        task = await device.task()
        expected = (await running.round()).tasks[0].prediction
        assert task.round == 4
        assert expected.local_seconds == pytest.approx(6)
        assert expected.peak_memory_bytes == pytest.approx(600 << 20, rel=0.01)
