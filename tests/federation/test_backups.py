"""A run goes on from a backup that was taken while it ran."""

import asyncio

import numpy as np
from safetensors.numpy import load_file

from fedgrpc.storage.backup import restore_backup, write_backup
from fedgrpc.v1 import models_pb2 as pb
from fedgrpc.v1 import models_pb2_grpc, round_pb2
from tests.support.running_federation import channel_to, running_aggregator


async def test_a_run_goes_on_from_a_backup_taken_while_an_update_was_accepted(tmp_path):
    source, file = tmp_path / "source", tmp_path / "run.backup"
    source.mkdir()
    async with running_aggregator(source, rounds=3) as running:
        a, b = await running.device("a"), await running.device("b")
        for device, task in zip((a, b), await asyncio.gather(a.task(), b.task()), strict=True):
            await device.push(task)
        await running.until_ended(1)
        async with channel_to(running.settings, running.address) as channel:
            await models_pb2_grpc.ModelsStub(channel).TagVersion(pb.TagVersionRequest(version="1", tag="first"))
        task, later = await asyncio.gather(a.task(), b.task())
        await a.push(task)
        await running.until_task("a", round_pb2.TASK_PHASE_ACCEPTED)
        written = await asyncio.to_thread(write_backup, running.settings.data_dir, file)
        # What happens behind it is not in it.
        await b.push(later)
        await running.until_ended(2)
    assert f"uploads/{task.token}.update" in written.files
    target = tmp_path / "target"
    target.mkdir()
    restore_backup(file, target / "aggregator")
    assert np.array_equal(
        load_file(target / "aggregator" / "models" / "000002.safetensors")["w"], running.weights(2)["w"]
    )
    async with running_aggregator(target, rounds=3) as again:
        record = await again.round()
        assert (record.number, record.phase) == (2, round_pb2.ROUND_PHASE_REPORTING)
        assert {each.worker: each.phase for each in record.tasks}["a"] == round_pb2.TASK_PHASE_ACCEPTED
        async with channel_to(again.settings, again.address) as channel:
            listed = await models_pb2_grpc.ModelsStub(channel).ListVersions(pb.ListVersionsRequest())
        assert [list(each.tags) for each in listed.versions] == [["first"], []]
