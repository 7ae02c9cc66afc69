"""Polls over one open call, against a real server that follows a script."""

import asyncio

import pytest

from fedgrpc.errors import LinkError, UnknownWorker
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.rpc.channel import open_channel
from fedgrpc.v1 import aggregator_pb2, aggregator_pb2_grpc
from fedgrpc.worker.task_stream import TaskStream
from tests.support.fake_aggregator import PATIENCE_S, FakeAggregator, serving, train_task


class CountingAggregator(FakeAggregator):
    """Counts the streams of polls that were opened, and those that are open."""

    def __init__(self, **script):
        super().__init__(**script)
        self.registered = {"pi-1": None}
        self.opened = self.open = 0
        self.hangs_up = False

    async def PollTasks(self, request_iterator, context):  # noqa: N802
        self.opened, self.open = self.opened + 1, self.open + 1
        try:
            async for response in super().PollTasks(request_iterator, context):
                yield response
                if self.hangs_up:
                    return
        finally:
            self.open -= 1
            async with self.changed:
                self.changed.notify_all()


def poll(wait_s=0.0, worker="pi-1"):
    return aggregator_pb2.PollTaskRequest(worker=worker, wait=duration_to_proto(wait_s))


def stream_on(channel, **options):
    return TaskStream(aggregator_pb2_grpc.AggregatorStub(channel).PollTasks, (), **options)


async def test_all_polls_of_a_worker_take_one_call():
    peer = CountingAggregator(tasks=[train_task("t1")])
    async with serving(peer) as server, open_channel(server.address) as channel:
        stream = stream_on(channel)
        assert (await stream.poll(poll(), PATIENCE_S)).task.token == "t1"
        await peer.finished("t1")
        for _ in range(20):
            assert (await stream.poll(poll(), PATIENCE_S)).run_ended
        assert (peer.opened, peer.calls.count("PollTask")) == (1, 21)
        stream.close()
        await peer.until(lambda: not peer.open)


async def test_a_status_is_raised_as_its_error_and_the_next_poll_opens_another_call():
    peer = CountingAggregator()
    async with serving(peer) as server, open_channel(server.address) as channel:
        stream = stream_on(channel)
        with pytest.raises(UnknownWorker):
            await stream.poll(poll(worker="stranger"), PATIENCE_S)
        assert (await stream.poll(poll(), PATIENCE_S)).run_ended
        assert peer.opened == 2
        stream.close()


async def test_a_poll_that_is_given_up_leaves_no_answer_for_the_next_one():
    peer = CountingAggregator(ends=False)
    async with serving(peer) as server, open_channel(server.address) as channel:
        stream = stream_on(channel)
        waiting = asyncio.create_task(stream.poll(poll(PATIENCE_S), 2 * PATIENCE_S))
        await peer.until(lambda: peer.calls.count("PollTask") == 1)
        waiting.cancel()
        await asyncio.wait([waiting])
        await peer.until(lambda: not peer.open)
        await peer.give(train_task("t2"))
        assert (await stream.poll(poll(), PATIENCE_S)).task.token == "t2"
        assert peer.opened == 2
        stream.close()


async def test_no_answer_in_time_is_a_lost_link():
    peer = CountingAggregator(ends=False)
    async with serving(peer) as server, open_channel(server.address) as channel:
        stream = stream_on(channel)
        with pytest.raises(LinkError, match="no answer"):
            await stream.poll(poll(PATIENCE_S), 0.2)
        await peer.until(lambda: not peer.open)


async def test_a_call_that_ended_between_two_polls_is_replaced():
    peer = CountingAggregator()
    peer.hangs_up = True
    async with serving(peer) as server, open_channel(server.address) as channel:
        stream = stream_on(channel)
        for opened in (1, 2, 3):
            await stream.poll(poll(), PATIENCE_S)
            assert peer.opened == opened
            async with asyncio.timeout(PATIENCE_S):
                await stream._stream.call.code()
        stream.close()


async def test_an_old_call_is_replaced_before_the_server_has_to_cut_it():
    peer, now = CountingAggregator(), [0.0]
    async with serving(peer) as server, open_channel(server.address) as channel:
        stream = stream_on(channel, clock=lambda: now[0])
        for minutes in (0, 20, 40, 60, 80):
            now[0] = 60.0 * minutes
            await stream.poll(poll(), PATIENCE_S)
        assert peer.opened == 3
        stream.close()
        await peer.until(lambda: not peer.open)
