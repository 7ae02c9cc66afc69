"""Encoded models as messages: the same bytes for all, in messages that are small where many pull."""

import asyncio
import zlib

import numpy as np
import pytest

from fedgrpc.aggregator.chunk_cache import ChunkCache, PayloadFile
from fedgrpc.codec.chunk import CHUNK_BYTES, LARGE_CHUNK_BYTES
from fedgrpc.rpc.framing import parse

KIB, MIB = 1 << 10, 1 << 20
CONTENT = np.random.default_rng(3).bytes(6 * MIB + 300_000)


@pytest.fixture
def payload(tmp_path):
    path = tmp_path / "payload"
    path.write_bytes(b"head" + CONTENT)
    with path.open("rb", buffering=0) as file:
        yield PayloadFile(file, 4, len(CONTENT))


def whole(messages, offset):
    """The bytes of chunk messages, each of which follows the one before and fits its CRC."""
    out = bytearray()
    for message in messages:
        chunk = parse(message)
        assert chunk.offset == offset + len(out)
        assert zlib.crc32(chunk.data) == chunk.crc32
        # Sizes are powers of two, and none goes over a multiple of its own.
        size = 1 << (len(chunk.data) - 1).bit_length()
        assert size <= LARGE_CHUNK_BYTES
        assert chunk.offset // size == (chunk.offset + len(chunk.data) - 1) // size
        out += chunk.data
    return bytes(out)


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES, 5 * CHUNK_BYTES + 7, len(CONTENT) - 1, len(CONTENT)])
async def test_a_payload_comes_whole_from_any_offset(payload, offset):
    cache = ChunkCache(8 * MIB, 16 * MIB)
    messages = [message async for message in cache.messages(payload, offset)]
    assert whole(messages, offset) == CONTENT[offset:]


@pytest.mark.parametrize("offset", [0, 700_000, 4 * MIB + 1])
async def test_those_who_pull_at_the_same_time_share_what_is_on_its_way(payload, offset):
    cache = ChunkCache(8 * MIB, 4 * MIB)
    pulls = [cache.messages(payload, offset) for _ in range(128)]
    firsts = await asyncio.gather(*map(anext, pulls))
    # Where a chunk ends is a multiple of all their sizes: behind it they are smaller, the more there are.
    assert len(firsts[0]) > len(firsts[-1]) or offset % CHUNK_BYTES
    messages = [[first] for first in firsts]
    for _ in range(5):
        for pull, got in zip(pulls, messages, strict=True):
            got.append(await anext(pull))
        assert sum(len(got[-1]) for got in messages) <= 4 * MIB + 32 * KIB
    for pull, got in zip(pulls, messages, strict=True):
        got.extend([message async for message in pull])
        assert whole(got, offset) == CONTENT[offset:]


async def test_messages_are_large_again_once_the_others_are_done_or_gone(payload):
    cache = ChunkCache(8 * MIB, 4 * MIB)
    others = [cache.messages(payload, 0) for _ in range(1000)]
    for other in others:
        await anext(other)
    mine = cache.messages(payload, 0)
    assert len(await anext(mine)) < 17 * KIB
    for other in others:
        await other.aclose()
    sizes = [len(message) async for message in mine]
    assert max(sizes) > MIB
    assert cache.message_bytes == LARGE_CHUNK_BYTES


async def test_nothing_is_kept_once_nobody_pulls(payload, monkeypatch):
    read = []
    pread = PayloadFile.read
    monkeypatch.setattr(PayloadFile, "read", lambda self, at, size: read.append(size) or pread(self, at, size))
    # By this clock all readers are fast, and have chunks of the same sizes.
    cache = ChunkCache(16 * MIB, 16 * MIB, lambda: 0.0)
    first, second = cache.messages(payload, 0), cache.messages(payload, 0)
    assert [message async for message in first]
    once = sum(read)
    # What is read twice was read for chunks that are small at first.
    assert once <= len(CONTENT) + 5 * MIB // 4
    assert [message async for message in second]
    assert sum(read) == 2 * once
    alongside = [cache.messages(payload, 0) for _ in range(2)]
    for pull in alongside:
        await anext(pull)
    for pull in alongside:
        assert [message async for message in pull]
    assert sum(read) == 3 * once


async def test_many_slow_readers_far_apart_read_no_more_than_they_send(payload, monkeypatch):
    read = []
    pread = PayloadFile.read
    monkeypatch.setattr(PayloadFile, "read", lambda self, at, size: read.append(size) or pread(self, at, size))
    cache = ChunkCache(8 * MIB, 1 * MIB)
    sent = 0
    pulls = [cache.messages(payload, at) for at in range(1, len(CONTENT), 100_000)]
    for _ in range(4):
        for pull in pulls:
            sent += len(await anext(pull))
    assert sum(read) <= sent + 2 * 4 * MIB
