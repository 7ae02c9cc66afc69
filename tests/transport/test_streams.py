"""Streams over real connections: resumed at any byte, bounded in memory, alive through idle hours."""

import asyncio
import gc
import random
import weakref
import zlib

import grpc
import grpc.aio
import numpy as np
import pytest
import structlog

from fedgrpc.aggregator import upload_reader
from fedgrpc.aggregator.upload_reader import ByteBudget, UploadReader
from fedgrpc.codec.chunk import CHUNK_BYTES, Chunk
from fedgrpc.errors import LinkError
from fedgrpc.rpc.channel import CLIENT_OPTIONS, SERVER_OPTIONS, open_channel
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc
from tests.support import stored_updates as stored
from tests.support.echo_service import NAME, echo_service
from tests.support.hand_driven_device import HandDrivenDevice, chunks, encoded, refused, update_of
from tests.support.running_federation import running_aggregator

ALONE = {"min_workers": 1}


@pytest.mark.parametrize("recipe", ["raw", "raw+zstd", "int8"])
async def test_a_download_goes_on_at_any_byte(tmp_path, recipe):
    async with running_aggregator(tmp_path, policy=ALONE, download_recipe=recipe) as running:
        device = await running.device("a")
        task = await device.task()
        header, payload = await device.pull(task)
        size = len(payload)
        offsets = {0, 1, 2047, 2048, size // 2, size - 1, size, *random.Random(1).sample(range(size), 20)}
        for offset in sorted(offsets):
            again, rest = await device.pull(task, offset)
            assert again == header
            assert rest == payload[offset:]
        with refused("OUT_OF_RANGE", f"offset {size + 1} is beyond the payload of {size} bytes"):
            await device.pull(task, size + 1)


async def test_a_download_of_many_chunks_goes_on_beside_their_borders(tmp_path):
    from safetensors.numpy import save_file

    large = np.random.default_rng(0).normal(size=(5 << 18) + 77).astype(np.float32)
    save_file({"w": large}, tmp_path / "initial.safetensors")
    async with running_aggregator(tmp_path, policy=ALONE) as running:
        device = HandDrivenDevice(running.stub, "a")
        payload = large.tobytes()
        for border in range(0, len(payload), CHUNK_BYTES):
            for offset in {max(0, border - 1), border, border + 1}:
                _, rest = await device.pull(version=1, offset=offset)
                assert rest == payload[offset:]


@pytest.mark.parametrize("seed", range(3))
async def test_an_upload_that_breaks_at_any_byte_goes_on_there(tmp_path, seed):
    manifest, payload = encoded(update_of(3.0))
    rng = random.Random(seed)
    async with running_aggregator(tmp_path, policy=ALONE, max_chunk_bytes=1 << 20) as running:
        device = await running.device("a")
        task = await device.task()
        header = pb.PushUpdateRequest(header=device.header(task, manifest))
        at = 0
        while at < len(payload):
            held = await device.held(task)
            assert held.committed_size_bytes == at
            end = min(len(payload), at + rng.choice([1, 7, 100, 1024, 3000]))
            pieces = chunks(payload[:end], at, rng.choice([1, 64, 512]) if end - at < 200 else 512)
            reply = await device.send(header, *pieces)
            at = end
            assert reply.committed_size_bytes == at
        assert reply.complete
        await running.until_finished()
        np.testing.assert_allclose(running.weights(2)["b"], 3.0)


def _uploads(folder, count, size):
    journal = UploadJournal(folder, durable=False)
    values = np.random.default_rng(0).normal(size=size // 4).astype(np.float32)
    manifest, payload = stored.encoded({"w": values})
    uploads = [journal.begin(stored.header_of(manifest, f"t{number}"), manifest) for number in range(count)]
    return uploads, payload


async def _always():
    return None


async def _stored(upload, budget, max_chunk_bytes, stream, look):
    """Read a stream as a receiver does: the chunk that completes the payload is its caller's to commit."""
    reader = UploadReader(upload, budget, max_chunk_bytes)
    last = await reader.run(stream, 30, look)
    if last is not None:
        upload.append([last])
    reader.release()


@pytest.fixture
def patient(monkeypatch):
    """Nobody is taken for slow because this machine is."""
    monkeypatch.setattr(upload_reader, "_GRACE_S", 60.0)


async def test_the_memory_of_all_uploads_together_has_a_bound(tmp_path, patient):
    limit, piece = 1 << 20, 128 << 10
    uploads, payload = _uploads(tmp_path, 12, 3 << 20)
    budget, most = ByteBudget(limit), 0

    async def stream():
        nonlocal most
        for at in range(0, len(payload), piece):
            data = payload[at : at + piece]
            most = max(most, budget.taken_bytes)
            yield Chunk(at, data, zlib.crc32(data))
            await asyncio.sleep(0)

    runs = [_stored(upload, budget, CHUNK_BYTES, stream(), _always) for upload in uploads]
    await asyncio.wait_for(asyncio.gather(*runs), 60)
    assert all(upload.complete for upload in uploads)
    assert budget.taken_bytes == 0
    assert piece < most <= limit
    for upload in uploads:
        upload.finish()
        upload.discard()


class _Growing:
    """Chunks of `small` bytes, then of `large`; remembers those that it gave, and keeps none of them alive."""

    def __init__(self, payload, small, large):
        self._payload, self._at = payload, 0
        self._sizes = iter([small, small])
        self._large = large
        self.given = []

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        data = self._payload[self._at : self._at + next(self._sizes, self._large)]
        if not data:
            raise StopAsyncIteration
        self._at += len(data)
        chunk = Chunk(self._at - len(data), data, zlib.crc32(data))
        self.given.append(weakref.ref(chunk))
        return chunk


async def test_senders_that_turn_to_larger_chunks_stay_within_the_bound(tmp_path, patient):
    small, large = 64 << 10, 256 << 10
    uploads, payload = _uploads(tmp_path, 8, 2 << 20)
    budget, most = ByteBudget(2 * large), []

    async def look():
        most.append(budget.taken_bytes)

    runs = [_stored(upload, budget, large, _Growing(payload, small, large), look) for upload in uploads]
    await asyncio.wait_for(asyncio.gather(*runs), 60)
    assert all(upload.complete for upload in uploads)
    assert large < max(most) <= 2 * large
    for upload in uploads:
        upload.discard()


async def test_what_is_in_the_file_is_not_held_by_an_upload_that_waits_for_memory(tmp_path, patient):
    (upload,), payload = _uploads(tmp_path, 1, 2 << 20)
    budget, piece = ByteBudget(1 << 20), 256 << 10
    stream = _Growing(payload, piece, piece)
    others: list[asyncio.Task] = []

    async def wanted():
        # Somebody else asks for all of it, and so comes before the next chunk of this one.
        if not others:
            others.append(asyncio.create_task(budget.take(1 << 20)))
            await asyncio.sleep(0)

    running = asyncio.create_task(_stored(upload, budget, piece, stream, wanted))
    async with asyncio.timeout(60):
        while not (others and others[0].done()):  # noqa: ASYNC110 - the budget tells nobody
            await asyncio.sleep(0.01)
        # The thread that wrote the chunk lets go of it a moment after it has said so.
        while any(ref() is not None for ref in stream.given):  # noqa: ASYNC110 - nor does a thread
            await asyncio.sleep(0.01)
    assert upload.size_bytes == len(stream.given) * piece
    budget.give_back(1 << 20)
    await asyncio.wait_for(running, 60)
    assert upload.complete
    upload.discard()


def chunks_in_memory():
    return [found for found in gc.get_objects() if type(found) is Chunk]


async def test_the_message_that_came_last_is_not_held_while_the_next_is_waited_for(tmp_path):
    of_other_tests = chunks_in_memory()
    async with running_aggregator(tmp_path, policy=ALONE) as running:
        device = await running.device("a")
        task = await device.task()
        manifest, payload = encoded(update_of())
        call = running.stub.PushUpdate()
        first, *rest = (pb.PushUpdateRequest(header=device.header(task, manifest)), *chunks(payload))
        for message in (first, rest[0]):
            await call.write(message)
        await device.until_held(task, len(rest[0].chunk.data))
        async with asyncio.timeout(60):
            while len(chunks_in_memory()) > len(of_other_tests):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        for message in rest[1:]:
            await call.write(message)
        await call.done_writing()
        assert (await call).complete


async def test_a_sender_that_falls_silent_costs_only_itself(tmp_path):
    (silent, busy), payload = _uploads(tmp_path, 2, 1 << 20)
    budget = ByteBudget(128 << 10)

    async def nothing():
        await asyncio.Event().wait()
        yield Chunk(0, b"", 0)

    async def stream():
        for at in range(0, len(payload), 64 << 10):
            data = payload[at : at + (64 << 10)]
            yield Chunk(at, data, zlib.crc32(data))

    waiting = asyncio.create_task(UploadReader(silent, budget, CHUNK_BYTES).run(nothing(), 2.0, _always))
    await asyncio.sleep(0)
    await asyncio.wait_for(_stored(busy, budget, CHUNK_BYTES, stream(), _always), 60)
    assert busy.complete
    with pytest.raises(LinkError, match="no byte came for 2 s"):
        await waiting
    assert budget.taken_bytes == 0
    for upload in (silent, busy):
        upload.discard()


async def test_a_sender_that_keeps_the_end_of_a_whole_update_back_holds_no_memory(tmp_path):
    (upload,), payload = _uploads(tmp_path, 1, 128 << 10)
    budget, may_end = ByteBudget(1 << 20), asyncio.Event()

    async def stream():
        yield Chunk(0, payload, zlib.crc32(payload))
        await may_end.wait()

    reader = UploadReader(upload, budget, CHUNK_BYTES)
    reading = asyncio.create_task(reader.run(stream(), 30, _always))
    async with asyncio.timeout(60):
        while not upload.complete or budget.taken_bytes:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
    may_end.set()
    # It is committed: there is nothing left for the caller to do.
    assert await reading is None
    upload.discard()


class Work:
    """How long a process has worked that is at it all the time, for so many looks; then it rests."""

    def __init__(self, looks):
        self.looks = looks
        self.looked = 0

    def __call__(self):
        self.looked += 1
        return float(min(self.looked, self.looks))


@pytest.mark.parametrize(("busy_looks", "looks"), [(0, 2), (5, 6), (1000, 17)], ids=["idle", "a while", "always"])
async def test_a_busy_process_is_patient_with_a_sender_for_a_while(tmp_path, busy_looks, looks):
    """It looks twice at each quarter of a second: at its beginning and, while patience is left, at its end."""
    (silent,), _ = _uploads(tmp_path, 1, 1 << 20)
    budget, work = ByteBudget(128 << 10), Work(busy_looks)

    async def nothing():
        await asyncio.Event().wait()
        yield Chunk(0, b"", 0)

    waiting = asyncio.create_task(UploadReader(silent, budget, CHUNK_BYTES, work).run(nothing(), 600.0, _always))
    await asyncio.sleep(0)
    assert budget.taken_bytes == CHUNK_BYTES
    await asyncio.wait_for(budget.take(1), 60)
    assert (budget.taken_bytes, work.looked) == (1, looks)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    silent.discard()


async def test_a_reader_that_stops_reading_keeps_nobody_from_the_model(tmp_path):
    from safetensors.numpy import save_file

    large = np.random.default_rng(0).normal(size=6 << 20).astype(np.float32)
    save_file({"w": large}, tmp_path / "initial.safetensors")
    async with running_aggregator(tmp_path, policy=ALONE) as running:
        stuck = running.stub.PullModel(pb.PullModelRequest(version=1))
        await stuck.read()
        _, payload = await HandDrivenDevice(running.stub, "a").pull(version=1)
        assert payload == large.tobytes()
        rest = bytearray()
        while (message := await stuck.read()) is not grpc.aio.EOF:
            rest += message.chunk.data
        assert rest == payload


async def test_a_reader_that_leaves_is_no_error_and_costs_nothing_any_more(tmp_path):
    from safetensors.numpy import save_file

    large = np.random.default_rng(0).normal(size=6 << 20).astype(np.float32)
    save_file({"w": large}, tmp_path / "initial.safetensors")
    with structlog.testing.capture_logs() as logs:
        async with running_aggregator(tmp_path, policy=ALONE) as running:
            cache = running.aggregator.coordinator.encoded_models.chunk_cache
            alone_bytes = cache.message_bytes
            async with open_channel(running.address) as channel:
                stub = aggregator_pb2_grpc.AggregatorStub(channel)
                pulls = [stub.PullModel(pb.PullModelRequest(version=1)) for _ in range(16)]
                for pull in pulls:
                    await pull.read()
                    await pull.read()
                assert cache.message_bytes < alone_bytes
                for pull in pulls[::2]:
                    pull.cancel()
            # The others lose their connection.
            async with asyncio.timeout(60):
                while cache.message_bytes < alone_bytes:  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.01)
    assert [line for line in logs if line["log_level"] in ("warning", "error")] == []


@pytest.mark.faults
@pytest.mark.parametrize(
    ("options", "survives"),
    [(SERVER_OPTIONS, True), ([("grpc.so_reuseport", 0)], False)],
    ids=["with our options", "with those of gRPC"],
)
async def test_an_idle_connection_that_pings_is_kept(options, survives):
    """Pings as often as gRPC lets us: its server's defaults answer a few with "too many pings"."""
    server = grpc.aio.server(options=options)
    service = echo_service()
    service.add(service.servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    often = {**dict(CLIENT_OPTIONS), "grpc.keepalive_time_ms": 100}
    try:
        async with grpc.aio.insecure_channel(address, options=list(often.items())) as channel:
            echo = channel.unary_unary(f"/{NAME}/unary_unary")
            assert await echo(b"hello") == b"hello"
            changed = channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
            try:
                await asyncio.wait_for(changed, 5.0 if survives else 60.0)
                kept = False
            except TimeoutError:
                kept = True
            assert kept is survives
            assert await echo(b"again", wait_for_ready=True) == b"again"
    finally:
        await server.stop(0)
