"""An update that is here whole is accepted, whatever becomes of its connection."""

import asyncio
import contextlib
import threading
import time

import grpc
import grpc.aio
import numpy as np
import pytest

from fedgrpc.aggregator import acceptance, upload_queue
from fedgrpc.aggregator.receiver import Receiver
from fedgrpc.aggregator.sessions import Sessions
from fedgrpc.aggregator.update_checks import decoding_bytes, max_header_bytes, verify
from fedgrpc.aggregator.worker_calls import WorkerCalls
from fedgrpc.errors import Exhausted, RoundClosed, WrongOffset
from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rounds.round import Round
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import aggregator_pb2 as pb
from tests.support.hand_driven_device import PATIENCE_S, HandDrivenDevice, refused, update_of
from tests.support.hand_driven_device import chunk as upload_chunk
from tests.support.hand_driven_device import chunks as upload_chunks
from tests.support.hand_driven_device import encoded as by_hand
from tests.support.running_federation import running_aggregator
from tests.support.stored_updates import chunk, encoded, header_of


async def tasks_out(running):
    devices = [await running.device(name) for name in "ab"]
    return dict(zip("ab", await asyncio.gather(*(device.task() for device in devices)), strict=True))


def receiver_of(coordinator):
    return Receiver(
        coordinator,
        coordinator.journal,
        coordinator.settings,
        coordinator.scores,
        coordinator.data_folder,
        coordinator.expected_update,
    )


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


async def test_an_update_of_a_device_is_accepted_without_a_list_of_all_workers_of_its_round(tmp_path, monkeypatch):
    """Such a list for each of a thousand updates was a fifth of their cost."""
    async with running_aggregator(tmp_path) as running:
        task = (await tasks_out(running))["a"]
        receiver = receiver_of(running.aggregator.coordinator)
        listed, of = [], Round.workers.fget
        monkeypatch.setattr(Round, "workers", property(lambda round_: listed.append(round_.number) or of(round_)))
        sender = Sender(task)
        sender.may_end.set()
        assert await receiver.receive(sender.header, sender.chunks()) == (len(sender.payload), True)
        assert not listed


@pytest.mark.parametrize("ticks", [*range(12), 20, 50, 100])
async def test_a_connection_lost_about_the_last_byte_leaves_the_update_accepted_or_to_be_continued(
    tmp_path, ticks
):
    """Lost at every step from the end of the stream on."""
    async with running_aggregator(tmp_path, durable=True) as running:
        task = (await tasks_out(running))["a"]
        receiver = receiver_of(running.aggregator.coordinator)
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
        assert len(running.aggregator.coordinator.machine.round.state.accepted) == 1


@pytest.mark.parametrize("lost", [False, True], ids=["still sending", "connection lost"])
async def test_an_upload_whose_file_comes_only_after_the_round_has_closed_leaves_nothing(tmp_path, lost):
    """A disk may take so long for a new file that the round has swept up its uploads before."""
    async with running_aggregator(tmp_path) as running:
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
        receiving = asyncio.create_task(receiver_of(coordinator).receive(sender.header, sender.chunks()))
        await asked.wait()
        await coordinator.stop("closed by the test")
        async with asyncio.timeout(PATIENCE_S):
            while coordinator.machine.round is not None:  # noqa: ASYNC110 - nobody tells of the last of a round
                await asyncio.sleep(0.01)
        if lost:
            receiving.cancel()
        goes_on.set()
        (ended,) = await asyncio.gather(receiving, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError if lost else RoundClosed)
        assert running.kept_updates() == []


async def test_a_silent_upload_hears_at_once_that_its_task_is_closed(tmp_path):
    """It waits for bytes that do not come, so it cannot ask."""
    async with running_aggregator(tmp_path) as running:
        task = (await tasks_out(running))["a"]
        coordinator = running.aggregator.coordinator
        sender = Sender(task, offset=0)
        sender.payload = sender.payload[:-1024]
        receiving = asyncio.create_task(receiver_of(coordinator).receive(sender.header, sender.chunks()))
        await sender.at_the_end.wait()
        calls = WorkerCalls(coordinator, Sessions(coordinator.fleet, 1.0, coordinator.clock))
        await calls.give_back("a", task.token, "out of memory")
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(RoundClosed, match="failed: out of memory"):
                await receiving


async def test_two_streams_of_one_update_count_once(tmp_path):
    async with running_aggregator(tmp_path) as running:
        task = (await tasks_out(running))["a"]
        coordinator = running.aggregator.coordinator
        receiver = receiver_of(coordinator)
        senders = [Sender(task) for _ in range(4)]
        for sender in senders:
            sender.may_end.set()
        answers = await asyncio.gather(
            *(receiver.receive(sender.header, sender.chunks()) for sender in senders), return_exceptions=True
        )
        if (len(senders[0].payload), True) not in answers:
            # The newest came when the one before it had stored some bytes, and has to go on behind them.
            assert any(isinstance(answer, WrongOffset) for answer in answers)
            again = Sender(task, offset=(await receiver.held("a", task.token)).size_bytes)
            again.may_end.set()
            assert (await receiver.receive(again.header, again.chunks()))[1]
        assert [
            coordinator.machine.round.state.tasks[token].phase
            for token in coordinator.machine.round.state.accepted
        ] == [TaskPhase.ACCEPTED]
        assert running.kept_updates() == [f"{task.token}.update"]


async def test_a_round_that_closes_while_an_update_is_verified_refuses_it_and_keeps_nothing(tmp_path):
    async with running_aggregator(tmp_path, policy={"max_participants": 2, "min_workers": 2}) as running:
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
        receiving = asyncio.create_task(receiver_of(coordinator).receive(sender.header, sender.chunks()))
        await verifying.wait()
        await coordinator.stop("closed by the test")
        goes_on.set()
        with pytest.raises(RoundClosed):
            await receiving
        await asyncio.sleep(0.2)
        assert running.kept_updates() == []
        np.testing.assert_equal((await running.run()).model_version, 1)


async def test_updates_that_end_at_once_are_decoded_one_after_the_other_where_they_are_large(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(acceptance, "DECODING_BYTES", 1)
    at_once, most = 0, 0

    def counting(stored, expected):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.05)
        at_once -= 1
        verify(stored, expected)

    monkeypatch.setattr(acceptance, "verify", counting)
    async with running_aggregator(tmp_path, policy={"min_workers": 5}) as running:
        devices = [await running.device(name) for name in "abcde"]
        tasks = await asyncio.gather(*(device.task() for device in devices))
        pushed = [device.push(task) for device, task in zip(devices, tasks, strict=True)]
        assert all(answer.complete for answer in await asyncio.gather(*pushed))
        assert most == 1
        await running.until_finished()


def test_what_checking_an_update_takes_grows_with_its_largest_tensor():
    small, large = ({"w": np.zeros(size, np.float32), "b": np.zeros(3, np.float32)} for size in (1 << 10, 1 << 20))
    sizes = [decoding_bytes(encoded(tensors)[0]) for tensors in (small, large)]
    assert sizes[1] - sizes[0] == 4 * 4 * ((1 << 20) - (1 << 10))


@pytest.mark.parametrize("recipe", ["raw", "raw+zstd", "entropy:c=1+zstd", "int8+zstd"])
def test_a_header_of_the_runs_model_is_within_its_bound_and_one_of_many_more_tensors_is_not(recipe):
    model = {f"layer-{n}.weight": np.zeros((n, 70), np.float32) for n in range(1, 300)}
    manifest, _ = encoded(model, recipe)
    bound = max_header_bytes(manifest.layout)
    assert header_of(manifest).ByteSize() < bound < 400_000
    masked = {f"{name}{end}": tensor for name, tensor in model.items() for end in ("", "#mask", "#codes")}
    assert header_of(encoded(masked, recipe)[0]).ByteSize() < bound
    many, _ = encoded({str(n): np.zeros(1, np.float32) for n in range(20_000)})
    assert header_of(many).ByteSize() > bound


@pytest.mark.faults
async def test_a_stream_that_carries_hardly_anything_gives_its_slot_to_one_who_waits_and_goes_on_later(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(upload_queue, "_PACE_S", 0.3)
    async with running_aggregator(tmp_path, max_uploads=1) as running, asyncio.timeout(PATIENCE_S):
        tasks = await tasks_out(running)
        manifest, payload = by_hand(update_of())
        slow, fast = HandDrivenDevice(running.stub, "a"), HandDrivenDevice(running.stub, "b")
        header = slow.header(tasks["a"], manifest)
        stream = running.stub.PushUpdate()
        await stream.write(pb.PushUpdateRequest(header=header))
        await stream.write(upload_chunk(payload[:-20], 0))
        await slow.until_held(tasks["a"], len(payload) - 20)
        answer = None
        while answer is None:
            try:
                with domain_errors():
                    answer = await fast.push(tasks["b"])
            except Exhausted:
                await asyncio.sleep(0.1)
        assert answer.complete
        assert await stream.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await slow.held(tasks["a"])).committed_size_bytes == len(payload) - 20
        rest = upload_chunk(payload[-20:], len(payload) - 20)
        assert (await slow.send(pb.PushUpdateRequest(header=header), rest)).complete
        await running.until_finished()


async def test_a_stream_that_carries_its_share_keeps_its_slot(tmp_path, monkeypatch):
    monkeypatch.setattr(upload_queue, "_PACE_S", 0.3)
    async with running_aggregator(tmp_path, max_uploads=1) as running, asyncio.timeout(PATIENCE_S):
        tasks = await tasks_out(running)
        manifest, payload = by_hand(update_of())
        steady, other = HandDrivenDevice(running.stub, "a"), HandDrivenDevice(running.stub, "b")
        stream = running.stub.PushUpdate()
        await stream.write(pb.PushUpdateRequest(header=steady.header(tasks["a"], manifest)))
        for at in range(0, len(payload), 512):
            await stream.write(upload_chunk(payload[at : at + 512], at))
            with refused("RESOURCE_EXHAUSTED", "uploads are running", "Exhausted"):
                await other.push(tasks["b"])
            await asyncio.sleep(0.1)
        await stream.done_writing()
        assert (await stream).complete


@pytest.mark.faults
async def test_streams_that_need_long_take_turns_with_those_who_wait(tmp_path, monkeypatch):
    for name, seconds in {"_PACE_S": 0.3, "_LONG_S": 0.6, "_LEAST_BYTES_PER_S": 1}.items():
        monkeypatch.setattr(upload_queue, name, seconds)
    async with running_aggregator(tmp_path, max_uploads=1) as running, asyncio.timeout(PATIENCE_S):
        tasks = await tasks_out(running)
        manifest, payload = by_hand(update_of())
        slow, fast = HandDrivenDevice(running.stub, "a"), HandDrivenDevice(running.stub, "b")
        stream = running.stub.PushUpdate()
        await stream.write(pb.PushUpdateRequest(header=slow.header(tasks["a"], manifest)))
        answer, at = None, 0
        while answer is None:
            with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                await stream.write(upload_chunk(payload[at : at + 2], at))
                at += 2
            try:
                with domain_errors():
                    answer = await fast.push(tasks["b"])
            except Exhausted:
                await asyncio.sleep(0.1)
        assert answer.complete
        assert await stream.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await slow.held(tasks["a"])).committed_size_bytes > 0


async def test_an_update_in_tiny_chunks_is_refused(tmp_path):
    async with running_aggregator(tmp_path) as running:
        tasks = await tasks_out(running)
        manifest, payload = by_hand(update_of())
        device = HandDrivenDevice(running.stub, "a")
        header = pb.PushUpdateRequest(header=device.header(tasks["a"], manifest))
        with refused("INVALID_ARGUMENT", "send larger ones", "LayoutError"):
            await device.send(header, *upload_chunks(payload, chunk_bytes=1))
        held = (await device.held(tasks["a"])).committed_size_bytes
        assert held == 256
        assert (await device.send(header, *upload_chunks(payload, held))).complete
