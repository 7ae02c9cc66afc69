"""Chunks begin with 64 KiB and become what a link carries in a second: 4 KiB to 1 MiB, more on a fast one."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.aggregator.chunk_cache import ChunkCache, PayloadFile
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.codec.chunk import CHUNK_BYTES, FIRST_CHUNK_BYTES, LARGE_CHUNK_BYTES, LEAST_CHUNK_BYTES, ChunkSizer
from fedgrpc.codec.payload import buffer_reader
from fedgrpc.errors import LinkError, WrongOffset
from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.framing import parse
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.worker.client import AggregatorClient
from fedgrpc.worker.device import detect
from tests.support.hand_driven_device import PATIENCE_S, encoded
from tests.support.running_federation import running_aggregator

MIB = 1 << 20
LARGE_UPLOAD_BYTES = AggregatorSettings.max_chunk_bytes
TENSORS = {"w": np.random.default_rng(0).normal(size=(6 << 20) + 77).astype(np.float32)}
MANIFEST, PAYLOAD = encoded(TENSORS)


class Clock:
    """Time that stands still, or passes by `step_s` at every look: how fast the other side seems to be."""

    def __init__(self, step_s=0.0):
        self.step_s = step_s
        self.now_s = 0.0

    def __call__(self):
        self.now_s += self.step_s
        return self.now_s


class Reading:
    """Reads the payload, and remembers in what pieces; `break_at` is a byte that cannot be read."""

    def __init__(self, break_at=None):
        self.sizes = []
        self._break_at = break_at

    def __call__(self, offset, size):
        if self._break_at is not None and offset + size > self._break_at:
            raise LinkError("cut")
        self.sizes.append(size)
        return buffer_reader(PAYLOAD)(offset, size)


@asynccontextmanager
async def uploading(tmp_path, clock, **settings):
    """A client that holds a task, and the header of its update."""
    save_file(TENSORS, tmp_path / "initial.safetensors")
    async with (
        running_aggregator(tmp_path, policy={"min_workers": 1}, **settings) as running,
        open_channel(running.address) as channel,
    ):
        client = AggregatorClient(channel, "a", clock=clock)
        await client.register(detect(), WorkerRole.TRAINER)
        async with asyncio.timeout(PATIENCE_S):
            while (polled := await client.poll(10.0, None)).task is None:
                pass
        token = polled.task.token
        yield client, pb.UpdateHeader(worker="a", token=token, manifest=MANIFEST, example_count=1)
        await running.until_finished()
        np.testing.assert_allclose(running.weights(2)["w"], 2 * TENSORS["w"], rtol=1e-6)


@pytest.mark.parametrize(("mib_per_s", "fast"), [(8, False), (31, False), (32, True), (1000, True)])
def test_a_link_is_fast_from_32_mib_a_second_on(mib_per_s, fast):
    pace = ChunkSizer(chunk_bytes=CHUNK_BYTES)
    for _ in range(9):
        pace.note(pace.chunk_bytes, pace.chunk_bytes / (mib_per_s * MIB))
    assert pace.chunk_bytes == (LARGE_CHUNK_BYTES if fast else CHUNK_BYTES)


@pytest.mark.parametrize("bytes_per_s", [1, 5_000, 20_000, 100_000, 1_000_000, 10_000_000])
def test_a_chunk_takes_about_a_second_once_the_link_is_known(bytes_per_s):
    pace = ChunkSizer()
    for _ in range(30):
        pace.note(pace.chunk_bytes, pace.chunk_bytes / bytes_per_s)
    assert LEAST_CHUNK_BYTES <= pace.chunk_bytes <= CHUNK_BYTES
    assert bytes_per_s / 2 < pace.chunk_bytes <= bytes_per_s or pace.chunk_bytes in (
        LEAST_CHUNK_BYTES,
        CHUNK_BYTES,
    )


def test_each_stream_that_breaks_off_makes_the_next_begin_smaller():
    pace, sizes = ChunkSizer(chunk_bytes=LARGE_CHUNK_BYTES), []
    for _ in range(4):
        pace.after_break()
        sizes.append(pace.chunk_bytes)
    assert sizes == [FIRST_CHUNK_BYTES, FIRST_CHUNK_BYTES // 4, LEAST_CHUNK_BYTES, LEAST_CHUNK_BYTES]


def test_what_fills_the_buffers_of_a_slow_link_at_once_does_not_make_chunks_large():
    pace = ChunkSizer()
    pace.note(pace.chunk_bytes, 0.0)
    assert pace.chunk_bytes == FIRST_CHUNK_BYTES


async def test_an_upload_grows_its_chunks_while_they_are_taken_fast(tmp_path):
    async with uploading(tmp_path, Clock()) as (client, header):
        read = Reading()
        assert await client.pushes.push(header, read, 0)
        assert sum(read.sizes) == len(PAYLOAD)
        assert read.sizes[0] == FIRST_CHUNK_BYTES
        assert LARGE_UPLOAD_BYTES in read.sizes
        # It costs a fast link no more than a dozen messages.
        assert read.sizes.index(LARGE_UPLOAD_BYTES) < 30
        first = read.sizes.index(LARGE_UPLOAD_BYTES)
        assert set(read.sizes[first:-1]) == {LARGE_UPLOAD_BYTES}


async def test_an_upload_to_a_slow_reader_keeps_to_small_chunks(tmp_path):
    async with uploading(tmp_path, Clock(step_s=4.0)) as (client, header):
        read = Reading()
        assert await client.pushes.push(header, read, 0)
        assert max(read.sizes) == FIRST_CHUNK_BYTES
        assert LEAST_CHUNK_BYTES in read.sizes


async def test_an_upload_shrinks_its_chunks_when_the_link_has_become_slow(tmp_path):
    clock = Clock()
    async with uploading(tmp_path, clock) as (client, header):
        read = Reading()

        def report(progress):
            if progress > 0.45:
                clock.step_s = 4.0

        assert await client.pushes.push(header, read, 0, report)
        assert LARGE_UPLOAD_BYTES in read.sizes
        assert min(read.sizes[read.sizes.index(LARGE_UPLOAD_BYTES) : -1]) < CHUNK_BYTES


async def test_an_upload_that_broke_off_goes_on_at_its_byte_in_chunks_of_another_size(tmp_path):
    clock = Clock()
    async with uploading(tmp_path, clock) as (client, header):
        with pytest.raises(LinkError, match="cut"):
            await client.pushes.push(header, Reading(break_at=20 * MIB), 0)
        clock.step_s = 4.0
        offset, sizes = await pushed_on(client, header)
        assert 0 < offset < len(PAYLOAD)
        # Large chunks might break off again and again on a link that has become slow.
        assert max(sizes) <= FIRST_CHUNK_BYTES
        assert sum(sizes) == len(PAYLOAD) - offset


async def pushed_on(client, header):
    """Go on where the aggregator stands: the offset, and the sizes of the chunks from there."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            held, read = await client.pushes.query_push(header.token), Reading()
            try:
                assert await client.pushes.push(header, read, held.committed_size_bytes)
            except WrongOffset:
                # The stream that broke off had bytes that were still being stored.
                continue
            return held.committed_size_bytes, read.sizes


async def test_chunks_are_never_larger_than_the_aggregator_takes(tmp_path):
    async with uploading(tmp_path, Clock(), max_chunk_bytes=3 * MIB // 2) as (client, header):
        read = Reading()
        assert await client.pushes.push(header, read, 0)
        assert max(read.sizes) == 3 * MIB // 2


@pytest.fixture
def payload(tmp_path):
    path = tmp_path / "payload"
    path.write_bytes(PAYLOAD)
    with path.open("rb", buffering=0) as file:
        yield PayloadFile(file, 0, len(PAYLOAD))


async def test_a_download_grows_and_shrinks_its_chunks_with_its_reader(payload):
    clock, sizes = Clock(), []
    async for message in ChunkCache(16 * MIB, 16 * MIB, clock).messages(payload, 0):
        sizes.append(len(parse(message).data))
        if sum(sizes) > 15 * MIB:
            clock.step_s = 4.0
    assert sizes[:11] == [64 << 10] * 4 + [256 << 10] * 3 + [MIB] * 3 + [LARGE_CHUNK_BYTES]
    assert min(sizes) < MIB
    assert sum(sizes) == len(PAYLOAD)


async def test_a_download_goes_on_within_a_large_chunk(payload):
    async def rest(offset):
        messages = ChunkCache(16 * MIB, 16 * MIB, Clock()).messages(payload, offset)
        return b"".join([bytes(parse(message).data) async for message in messages])

    for offset in (4 * MIB + 1, 6 * MIB, 8 * MIB - 1, len(PAYLOAD) - 5):
        assert await rest(offset) == PAYLOAD[offset:]
