"""The first model: asked of a device that can hold it, and nobody else; what is told where none can."""

import asyncio

from fedgrpc.protocol.tensors import channels_to_proto
from fedgrpc.submodels.channels import ChannelGroup, ChannelMap, Segment
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from tests.support.running_federation import running_aggregator

MIB = 1 << 20


async def arrive(running, name, memory_mib, model_mib=100, process_mib=200):
    """A device that has registered and told the size of the model, and polls."""
    device = await running.device(name, device={"memory_bytes": memory_mib * MIB})
    await running.stub.DescribeModel(
        pb.DescribeModelRequest(worker=name, model_bytes=model_mib * MIB, process_bytes=process_mib * MIB)
    )
    return device


async def test_the_largest_of_the_idle_devices_gives_the_first_model(tmp_path):
    async with running_aggregator(tmp_path, initial_model=None) as running:
        await running.stub.PauseRun(pb.PauseRunRequest())
        devices = [await arrive(running, name, mib) for name, mib in (("a", 500), ("b", 4000), ("c", 900))]
        polls = [asyncio.create_task(device.task()) for device in devices]
        for device in devices:
            await running.until_polling(device.name)
        await running.stub.ResumeRun(pb.ResumeRunRequest())
        task = await polls[1]
        assert task.kind == round_pb2.TASK_KIND_INITIALIZE
        assert not polls[0].done()
        for poll in polls:
            poll.cancel()


async def test_a_device_that_cannot_hold_the_model_is_never_asked_and_the_run_says_what_it_waits_for(tmp_path):
    async with running_aggregator(tmp_path, initial_model=None) as running:
        small = await arrive(running, "small", 399)
        reply = await small.poll(0.3)
        assert not reply.HasField("task")
        reason = (await running.run()).reason
        assert "no device here can give the first model" in reason
        assert "small: a model of 100 MiB takes 400 MiB there, of 399" in reason
        assert "--initial-model" in reason
        large = await arrive(running, "large", 400)
        assert (await large.task()).kind == round_pb2.TASK_KIND_INITIALIZE
        assert (await running.run()).reason == ""


async def test_a_device_of_unknown_memory_or_model_may_give_the_first_model(tmp_path):
    async with running_aggregator(tmp_path, initial_model=None) as running:
        unknown = await arrive(running, "unknown", 0)
        assert (await unknown.task()).kind == round_pb2.TASK_KIND_INITIALIZE
    (tmp_path / "second").mkdir()
    async with running_aggregator(tmp_path / "second", initial_model=None) as running:
        device = await running.device("untold", device={"memory_bytes": 1})
        assert (await device.task()).kind == round_pb2.TASK_KIND_INITIALIZE


async def test_channels_that_do_not_fit_the_model_are_not_taken_and_the_next_ones_are(tmp_path):
    plans = PlanTable(LocalModelPlan(0.5))
    async with running_aggregator(tmp_path, local_models=plans, policy={"min_workers": 2}) as running:
        devices = [await running.device(name) for name in ("a", "b")]
        assert (await devices[0].register()).tell_channels
        for device, channels in zip(devices, (41, 40), strict=True):
            told = ChannelMap((ChannelGroup(channels),), {"b": ((Segment(0),),)})
            await running.stub.DescribeModel(
                pb.DescribeModelRequest(worker=device.name, channels=channels_to_proto(told))
            )
        assert not (await devices[0].register()).tell_channels
        tasks = await asyncio.gather(*(device.task() for device in devices))
        assert [task.local_model.sub_model for task in tasks] == ["prefix:0.5"] * 2
