"""Side streams: chunks of one update over several streams, committed in order, within a bound on memory."""

import asyncio
import random
import zlib
from contextlib import asynccontextmanager, suppress

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.aggregator import upload_reader, uploads_in_progress
from fedgrpc.aggregator.upload_reader import ByteBudget, UploadReader
from fedgrpc.codec.chunk import CHUNK_BYTES, Chunk
from fedgrpc.codec.payload import buffer_reader
from fedgrpc.errors import CorruptError, FedgrpcError, LinkError, WrongOffset
from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.rpc.channel import open_channel
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.worker.client import AggregatorClient
from fedgrpc.worker.device import detect
from tests.support import stored_updates as stored
from tests.support.hand_driven_device import PATIENCE_S, chunks, encoded, refused, update_of
from tests.support.running_federation import running_aggregator

ALONE = {"min_workers": 1}
MIB = 1 << 20


class Stream:
    """A side stream without a connection; None among its chunks: the connection is lost."""

    def __init__(self, given):
        self._given = iter(given)

    async def begin(self):
        await asyncio.sleep(0)

    async def late(self):
        """The stream, once those beside it have begun."""
        for _ in range(3):
            await asyncio.sleep(0)
        async for chunk in self:
            yield chunk

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        chunk = next(self._given, StopAsyncIteration)
        if chunk is StopAsyncIteration:
            raise StopAsyncIteration
        if chunk is None:
            raise asyncio.CancelledError
        return chunk


async def _always():
    return None


def _cut(payload, at, rng):
    while at < len(payload):
        data = payload[at : at + rng.choice([700, 4096, 20_000])]
        yield Chunk(at, data, zlib.crc32(data))
        at += len(data)


async def _read(upload, budget, streams, idle_s=30.0):
    """One upload over these streams, the first of them that with the header; the errors that they ended with."""
    reader = UploadReader(upload, budget, CHUNK_BYTES)
    main = asyncio.create_task(reader.run(Stream(streams[0]).late(), idle_s, _always))
    await asyncio.sleep(0)
    sides = [asyncio.create_task(reader.beside(Stream(each))) for each in streams[1:]]
    async with asyncio.timeout(PATIENCE_S):
        last, *errors = await asyncio.gather(main, *sides, return_exceptions=True)
    if isinstance(last, Chunk):
        # The chunk that completes the payload is for the caller to commit.
        upload.append([last])
        last = None
    reader.release()
    return [last, *errors]


@pytest.mark.parametrize("seed", range(20))
async def test_chunks_dealt_in_any_way_over_streams_that_break_arrive_as_they_were_sent(tmp_path, seed):
    rng = random.Random(seed)
    manifest, payload = stored.encoded({"w": np.random.default_rng(seed).normal(size=50_000).astype(np.float32)})
    journal, budget = UploadJournal(tmp_path, durable=False), ByteBudget(64 << 10)
    header, held = stored.header_of(manifest), 0
    for attempt in range(8):
        upload = journal.begin(header, manifest)
        assert upload.size_bytes >= held
        held = upload.size_bytes
        streams = [[] for _ in range(rng.randint(1, 5))]
        for chunk in _cut(payload, held, rng):
            rng.choice(streams).append(chunk)
        breaks = attempt < 7 and len(streams) > 1
        if breaks:
            broken = rng.choice(streams[1:])
            broken.insert(rng.randint(0, len(broken)), None)
        errors = await _read(upload, budget, streams)
        assert budget.taken_bytes == 0
        if not breaks:
            assert errors == [None] * len(streams)
            break
        assert isinstance(errors[0], LinkError)
        upload.close()
    stored_update = upload.finish()
    with stored_update.open() as reader:
        assert reader.tensor("w").tobytes() == payload
    upload.discard()


@pytest.mark.parametrize("side", [False, True], ids=["over the stream with the header", "over a side stream"])
async def test_a_damaged_chunk_ends_all_streams_of_its_update_and_what_came_before_it_is_kept(tmp_path, side):
    manifest, payload = stored.encoded({"w": np.arange(10_000, dtype=np.float32)})
    upload, budget = (
        UploadJournal(tmp_path, durable=False).begin(stored.header_of(manifest), manifest),
        ByteBudget(1),
    )
    cut = [
        Chunk(at, payload[at : at + 4000], zlib.crc32(payload[at : at + 4000])) for at in range(0, 40_000, 4000)
    ]
    cut[4 + side] = Chunk(cut[4 + side].offset, cut[4 + side].data, 1)
    # It ends at once: nobody waits for the end of a silence that is longer than the test may take.
    errors = await _read(upload, budget, [cut[::2], cut[1::2]], idle_s=2 * PATIENCE_S)
    assert isinstance(errors[0], CorruptError)
    assert isinstance(errors[1], FedgrpcError)
    assert (upload.size_bytes, budget.taken_bytes) == (4000 * (4 + side), 0)
    upload.discard()


async def test_a_chunk_that_nobody_brings_ends_the_upload(tmp_path):
    manifest, payload = stored.encoded({"w": np.arange(10_000, dtype=np.float32)})
    upload, budget = (
        UploadJournal(tmp_path, durable=False).begin(stored.header_of(manifest), manifest),
        ByteBudget(1),
    )
    first, _, third = (stored.chunk(payload, at, at + 4000) for at in range(0, 12_000, 4000))
    errors = await _read(upload, budget, [[first], [third]], idle_s=2 * PATIENCE_S)
    assert [type(error) for error in errors] == [LinkError, LinkError]
    assert (upload.size_bytes, budget.taken_bytes) == (4000, 0)
    # Alone, the stream knows at once.
    (error,) = await _read(upload, budget, [[third]], idle_s=2 * PATIENCE_S)
    assert isinstance(error, WrongOffset)
    assert budget.taken_bytes == 0
    upload.discard()


async def test_side_streams_go_on_while_others_have_all_the_memory_of_uploads(tmp_path, monkeypatch):
    """The chunk of a side stream may be the one that those who have the memory wait for."""
    monkeypatch.setattr(upload_reader, "_GRACE_S", 600.0)
    manifest, payload = stored.encoded({"w": np.arange(10_000, dtype=np.float32)})
    upload = UploadJournal(tmp_path, durable=False).begin(stored.header_of(manifest), manifest)
    cut = [stored.chunk(payload, at, at + 4000) for at in range(0, 40_000, 4000)]
    # The first stream holds all of the budget with the last chunk.
    errors = await _read(upload, ByteBudget(1), [cut[-1:], cut[:-1:2], cut[1:-1:2]])
    assert errors == [None] * 3
    assert upload.complete
    upload.discard()


@pytest.fixture
def none_is_small(monkeypatch):
    """The update of a hand-driven device is large enough for side streams."""
    monkeypatch.setattr(uploads_in_progress, "_SMALL_BYTES", 0)


async def opened_beside(running, device, task):
    """A side stream that the aggregator has granted."""
    call = running.stub.PushUpdate()
    await call.write(pb.PushUpdateRequest(beside={"worker": device.name, "token": task.token}))
    assert "fedgrpc-side" in await call.initial_metadata()
    return call


async def test_an_update_over_two_streams_counts_as_any_other(tmp_path, none_is_small):
    async with running_aggregator(tmp_path, policy=ALONE) as running:
        device = await running.device("a")
        task = await device.task()
        manifest, payload = encoded(update_of(3.0))
        side = asyncio.create_task(opened_beside(running, device, task))
        # It waits for the header of its upload.
        await asyncio.sleep(0.1)
        call = running.stub.PushUpdate()
        await call.write(pb.PushUpdateRequest(header=device.header(task, manifest)))
        side = await side
        for number, message in enumerate(chunks(payload, chunk_bytes=512)):
            await (side if number % 2 else call).write(message)
        for each in (call, side):
            await each.done_writing()
        assert (await call).complete
        await side
        await running.until_finished()
        np.testing.assert_allclose(running.weights(2)["b"], 3.0)


async def test_a_side_stream_that_breaks_off_ends_the_upload_which_goes_on_where_it_was(tmp_path, none_is_small):
    async with running_aggregator(tmp_path, policy=ALONE) as running:
        device = await running.device("a")
        task = await device.task()
        manifest, payload = encoded(update_of(3.0))
        header = pb.PushUpdateRequest(header=device.header(task, manifest))
        call = running.stub.PushUpdate()
        await call.write(header)
        side = await opened_beside(running, device, task)
        first, second, third = chunks(payload, chunk_bytes=512)[:3]
        await side.write(first)
        await call.write(third)
        await device.until_held(task, 512)
        side.cancel()
        with refused("UNAVAILABLE", "a side stream of this upload broke off", "LinkError"):
            await call
        held = (await device.held(task)).committed_size_bytes
        assert held == second.chunk.offset
        assert (await device.send(header, *chunks(payload, held))).complete


def _second(payload, **changes):
    """The second of two chunks, changed."""
    piece = chunks(payload, chunk_bytes=512)[1]
    for name, value in changes.items():
        setattr(piece.chunk, name, value)
    return piece


HOSTILE = {
    "overlapping": (lambda payload: _second(payload, offset=100), "OUT_OF_RANGE", "WrongOffset"),
    "out of range": (lambda payload: _second(payload, offset=1 << 50), "UNAVAILABLE", "LinkError"),
    "damaged": (lambda payload: _second(payload, crc32=1), "DATA_LOSS", "CorruptError"),
    "empty": (lambda payload: _second(payload, data=b"", crc32=0), "INVALID_ARGUMENT", "LayoutError"),
    "too large": (
        lambda payload: _second(payload, data=bytes(MIB + 1), crc32=zlib.crc32(bytes(MIB + 1))),
        "RESOURCE_EXHAUSTED",
        "TooLargeError",
    ),
    "a header": (lambda payload: pb.PushUpdateRequest(header={"worker": "a"}), "INVALID_ARGUMENT", "LayoutError"),
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_hostile_chunk_of_a_side_stream_ends_its_own_upload_alone(tmp_path, none_is_small, kind):
    make, status, error = HOSTILE[kind]
    async with running_aggregator(tmp_path, policy={"min_workers": 2}) as running:
        hostile, other = await running.device("a"), await running.device("b")
        task, others = await asyncio.gather(hostile.task(), other.task())
        manifest, payload = encoded(update_of(3.0))
        header = pb.PushUpdateRequest(header=hostile.header(task, manifest))
        call = running.stub.PushUpdate()
        await call.write(header)
        side = await opened_beside(running, hostile, task)
        await call.write(chunks(payload, chunk_bytes=512)[0])
        await hostile.until_held(task, 512)
        await side.write(make(payload))
        # The stream with the header ends: it has brought all, and what is missing comes no more.
        await side.done_writing()
        if kind == "out of range":
            await call.done_writing()
        with refused(status, "", error):
            await call
        assert (await hostile.held(task)).committed_size_bytes == 512
        assert (await hostile.send(header, *chunks(payload, 512))).complete
        theirs = pb.PushUpdateRequest(header=other.header(others, manifest))
        assert (await other.send(theirs, *chunks(payload))).complete
        await running.until_finished()


async def test_a_small_update_has_no_side_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads_in_progress, "_HEADER_S", 0.2)
    async with running_aggregator(tmp_path, policy=ALONE) as running:
        device = await running.device("a")
        task = await device.task()
        manifest, payload = encoded(update_of(3.0))
        call = running.stub.PushUpdate()
        await call.write(pb.PushUpdateRequest(header=device.header(task, manifest)))
        first, *rest = chunks(payload, chunk_bytes=512)
        await call.write(first)
        await device.until_held(task, 512)
        with refused("UNAVAILABLE", "not in progress", "LinkError"):
            await (await running.stub.PushUpdate(iter([beside(device, task)])))
        for message in rest:
            await call.write(message)
        await call.done_writing()
        assert (await call).complete


async def test_side_streams_are_shared_among_uploads_and_none_is_of_another_worker(
    tmp_path, monkeypatch, none_is_small
):
    monkeypatch.setattr(uploads_in_progress, "_HEADER_S", 0.2)
    async with running_aggregator(tmp_path, policy={"min_workers": 2}, max_upload_memory_bytes=MIB) as running:
        a, b = await running.device("a"), await running.device("b")
        tasks = dict(zip((a, b), await asyncio.gather(a.task(), b.task()), strict=True))
        with refused("UNAVAILABLE", "not in progress", "LinkError"):
            await (await running.stub.PushUpdate(iter([beside(a, tasks[a])])))
        manifest, _ = encoded(update_of())
        calls = []
        for device in (a, b):
            calls.append(running.stub.PushUpdate())
            await calls[-1].write(pb.PushUpdateRequest(header=device.header(tasks[device], manifest)))
            # Two chunks of 1 MiB fit twice the memory: one for each of two uploads.
            calls.append(await opened_beside(running, device, tasks[device]))
        with refused("RESOURCE_EXHAUSTED", "enough side streams", "Exhausted"):
            await running.stub.PushUpdate(iter([beside(a, tasks[a])]))
        with refused("PERMISSION_DENIED", ""):
            await running.stub.PushUpdate(iter([beside(b, tasks[a])]))
        for call in calls:
            call.cancel()


def beside(device, task):
    return pb.PushUpdateRequest(beside={"worker": device.name, "token": task.token})


TENSORS = {"w": np.random.default_rng(0).normal(size=(6 << 20) + 77).astype(np.float32)}
MANIFEST, PAYLOAD = encoded(TENSORS)


@asynccontextmanager
async def far_client(tmp_path, round_trip_s):
    """A client that takes its aggregator for far, the header of its update, and the channels that it dials."""
    save_file(TENSORS, tmp_path / "initial.safetensors")
    dialled = []
    async with (
        running_aggregator(tmp_path, policy=ALONE) as running,
        open_channel(running.address) as channel,
    ):

        def dial():
            dialled.append(running.address)
            return open_channel(running.address)

        client = AggregatorClient(channel, "a")
        client.use(channel, dial)
        await client.register(detect(), WorkerRole.TRAINER)
        async with asyncio.timeout(PATIENCE_S):
            while (polled := await client.poll(10.0, None)).task is None:
                pass
        client.pushes.sides.round_trip_s = round_trip_s
        yield (
            client,
            pb.UpdateHeader(worker="a", token=polled.task.token, manifest=MANIFEST, example_count=1),
            dialled,
        )
        await running.until_finished()
        np.testing.assert_allclose(running.weights(2)["w"], 2 * TENSORS["w"], rtol=1e-6)


@pytest.mark.parametrize(("round_trip_s", "count"), [(0.009, 0), (0.05, 10), (3.0, 12)])
async def test_the_farther_the_aggregator_the_more_streams_has_an_upload(tmp_path, round_trip_s, count):
    async with far_client(tmp_path, round_trip_s) as (client, header, dialled):
        told = []
        assert await client.pushes.push(header, buffer_reader(PAYLOAD), 0, told.append)
        assert len(dialled) == count
        assert told == sorted(told)
        assert told[-1] == 1.0


async def test_a_worker_that_has_made_no_small_call_asks_how_far_the_aggregator_is(tmp_path):
    async with far_client(tmp_path, 0.0) as (client, header, _):
        assert await client.pushes.push(header, buffer_reader(PAYLOAD), 0)
        assert 0 < client.pushes.sides.round_trip_s < PATIENCE_S


async def test_a_far_upload_that_broke_off_goes_on(tmp_path):
    async with far_client(tmp_path, 0.1) as (client, header, dialled):

        def cut(offset, size):
            if offset + size > 20 * MIB:
                raise LinkError("cut")
            return buffer_reader(PAYLOAD)(offset, size)

        with pytest.raises(LinkError, match="cut"):
            await client.pushes.push(header, cut, 0)
        held = await client.pushes.query_push(header.token)
        assert not held.complete
        # Chunks of the broken streams may still be on their way. A worker asks again then.
        while True:
            with suppress(WrongOffset):
                assert await client.pushes.push(header, buffer_reader(PAYLOAD), held.committed_size_bytes)
                break
            held = await client.pushes.query_push(header.token)
        assert dialled


async def test_a_worker_asks_for_no_more_side_streams_than_it_was_granted_last(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads_in_progress, "_MEMORY", 0.25)
    async with far_client(tmp_path, 0.1) as (client, header, dialled):
        assert await client.pushes.push(header, buffer_reader(PAYLOAD), 0)
        assert len(dialled) == 12
        assert client.pushes.sides.wanted(len(PAYLOAD)) == 2
