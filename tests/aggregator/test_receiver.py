"""An update that is here whole is accepted, whatever becomes of its connection."""

import asyncio
import threading

import numpy as np
import pytest

from fedgrpc.aggregator.receiver import Receiver
from fedgrpc.errors import RoundClosed
from fedgrpc.rounds.events import TaskPhase
from tests.aggregator.updates import chunk, encoded, header_of
from tests.federation.federation import PATIENCE_S, aggregating, update_of


async def tasks_out(running):
    devices = [await running.device(name) for name in "ab"]
    return dict(zip("ab", await asyncio.gather(*(device.task() for device in devices)), strict=True))


class Sender:
    """Chunks of an update, and a moment before the stream ends."""

    def __init__(self, task, offset=0):
        manifest, self.payload = encoded(update_of())
        self.header = header_of(manifest, task.token)
        self.offset = offset
        self.at_the_end = asyncio.Event()
        self.may_end = asyncio.Event()

    async def chunks(self):
        for start in range(self.offset, len(self.payload), 1024):
            yield chunk(self.payload, start, start + 1024)
        self.at_the_end.set()
        await self.may_end.wait()


@pytest.mark.parametrize("ticks", [*range(12), 20, 50, 100])
async def test_a_connection_lost_about_the_last_byte_leaves_the_update_accepted_or_to_be_continued(
    tmp_path, ticks
):
    """Lost at every step from the end of the stream on."""
    async with aggregating(tmp_path, durable=True) as running:
        task = (await tasks_out(running))["a"]
        receiver = Receiver(running.aggregator.coordinator)
        sender = Sender(task)
        receiving = asyncio.create_task(receiver.receive(sender.header, sender.chunks()))
        await sender.at_the_end.wait()
        sender.may_end.set()
        for _ in range(ticks):
            await asyncio.sleep(0)
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        there = await receiver.held("a", task.token)
        held, complete = there.size_bytes, there.complete
        assert complete or 0 < held <= len(sender.payload)
        again = Sender(task, offset=held)
        again.may_end.set()
        assert (await receiver.receive(again.header, again.chunks()))[1]
        assert (await receiver.held("a", task.token)).complete
        assert len(running.aggregator.coordinator.current.state.accepted) == 1


@pytest.mark.parametrize("lost", [False, True], ids=["still sending", "connection lost"])
async def test_an_upload_whose_file_comes_only_after_the_round_has_closed_leaves_nothing(tmp_path, lost):
    """A disk may take so long for a new file that the round has swept up its uploads before."""
    async with aggregating(tmp_path) as running:
        task = (await tasks_out(running))["a"]
        coordinator = running.aggregator.coordinator
        asked, goes_on, begin = asyncio.Event(), threading.Event(), coordinator.journal.begin
        loop = asyncio.get_running_loop()

        def slowly(*about):
            loop.call_soon_threadsafe(asked.set)
            assert goes_on.wait(PATIENCE_S)
            return begin(*about)

        coordinator.journal.begin = slowly
        sender = Sender(task)
        receiving = asyncio.create_task(Receiver(coordinator).receive(sender.header, sender.chunks()))
        await asked.wait()
        await coordinator.stop("closed by the test")
        async with asyncio.timeout(PATIENCE_S):
            while coordinator.current is not None:  # noqa: ASYNC110 - nobody tells of the last of a round
                await asyncio.sleep(0.01)
        if lost:
            receiving.cancel()
        goes_on.set()
        (ended,) = await asyncio.gather(receiving, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError if lost else RoundClosed)
        assert running.kept_updates() == []


async def test_two_streams_of_one_update_count_once(tmp_path):
    async with aggregating(tmp_path) as running:
        task = (await tasks_out(running))["a"]
        coordinator = running.aggregator.coordinator
        receiver = Receiver(coordinator)
        senders = [Sender(task) for _ in range(4)]
        for sender in senders:
            sender.may_end.set()
        answers = await asyncio.gather(
            *(receiver.receive(sender.header, sender.chunks()) for sender in senders), return_exceptions=True
        )
        assert (len(senders[0].payload), True) in answers
        assert [coordinator.current.state.tasks[token].phase for token in coordinator.current.state.accepted] == [
            TaskPhase.ACCEPTED
        ]
        assert running.kept_updates() == [f"{task.token}.update"]


async def test_a_round_that_closes_while_an_update_is_verified_refuses_it_and_keeps_nothing(tmp_path):
    async with aggregating(tmp_path, policy={"max_participants": 2, "min_workers": 2}) as running:
        tasks = await tasks_out(running)
        coordinator = running.aggregator.coordinator
        verifying, goes_on, begin = asyncio.Event(), threading.Event(), coordinator.journal.begin
        loop = asyncio.get_running_loop()

        def with_a_slow_end(*about):
            upload = begin(*about)
            finish = upload.finish

            def slowly():
                loop.call_soon_threadsafe(verifying.set)
                assert goes_on.wait(PATIENCE_S)
                return finish()

            upload.finish = slowly
            return upload

        coordinator.journal.begin = with_a_slow_end
        sender = Sender(tasks["a"])
        sender.may_end.set()
        receiving = asyncio.create_task(Receiver(coordinator).receive(sender.header, sender.chunks()))
        await verifying.wait()
        await coordinator.stop("closed by the test")
        goes_on.set()
        with pytest.raises(RoundClosed):
            await receiving
        await asyncio.sleep(0.2)
        assert running.kept_updates() == []
        np.testing.assert_equal((await running.run()).model_version, 1)
