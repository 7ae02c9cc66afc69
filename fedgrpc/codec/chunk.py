"""Chunks: consecutive byte ranges of a payload, each with its offset and CRC-32 (RFC 1952, zlib's)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedgrpc.codec.payload import Read
from fedgrpc.errors import CorruptError, LayoutError, TooLargeError, WrongOffset

try:
    # Nine times as fast, where there is a wheel of it.
    from zlib_ng.zlib_ng import crc32 as _crc32
except ImportError:
    from zlib import crc32 as _crc32

crc32 = _crc32

LEAST_CHUNK_BYTES = 4 << 10
FIRST_CHUNK_BYTES = 64 << 10
CHUNK_BYTES = 1 << 20
# With what frames it, a message fits the 4 MiB that a gRPC client of any language takes by default.
LARGE_CHUNK_BYTES = 2 << 20
# Well under any lease, and long enough that a message's own bytes do not count.
CHUNK_S = 1.0
_GROWTH = 4
_FAST_BYTES_PER_S = 32 << 20


@dataclass(frozen=True)
class Chunk:
    """`data` is the payload's bytes from `offset`; `crc32` is of `data` alone."""

    offset: int
    data: bytes | memoryview
    crc32: int

    def verify(self) -> None:
        """Raise CorruptError unless the CRC fits the data."""
        if crc32(self.data) != self.crc32:
            raise CorruptError(f"the chunk at offset {self.offset} does not match its CRC; send it again")


def chunks(read: Read, size_bytes: int, start_offset: int = 0, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The payload's chunks from `start_offset`; raises WrongOffset beyond its end, CorruptError if short."""
    if not 0 <= start_offset <= size_bytes:
        raise WrongOffset(f"offset {start_offset} is not within the payload of {size_bytes} bytes")
    for offset in range(start_offset, size_bytes, chunk_bytes):
        yield chunk_at(read, offset, min(chunk_bytes, size_bytes - offset))


def chunk_at(read: Read, offset: int, size: int) -> Chunk:
    """The chunk of `size` bytes at `offset`; raises CorruptError where the payload is shorter."""
    data = read(offset, size)
    if len(data) != size:
        raise CorruptError(f"the payload ends at byte {offset + len(data)}, {offset + size} are declared")
    return Chunk(offset, data, crc32(data))


@dataclass
class ChunkSizer:
    """How large the next chunk is best: what the link carries in about `CHUNK_S`, within `least` and `most` bytes.

    A chunk is kept whole or not at all. So on a slow link a broken stream loses little, and a chunk takes far less
    than the lease. An unknown link begins with `FIRST_CHUNK_BYTES`. Beside its bytes a large chunk costs both ends
    no more work than a small one, so a fast link gets the largest.
    """

    most: int = LARGE_CHUNK_BYTES
    chunk_bytes: int = FIRST_CHUNK_BYTES
    least: int = LEAST_CHUNK_BYTES
    _noted_bytes: int = 0
    _noted_s: float = 0.0

    def __post_init__(self) -> None:
        self.chunk_bytes = min(self.chunk_bytes, self.most)

    def note(self, size_bytes: int, took_s: float) -> None:
        """So long it took to hand over a chunk. The first ones only fill buffers: a few are judged together."""
        self._noted_bytes += size_bytes
        self._noted_s += took_s
        if took_s <= 2 * CHUNK_S and self._noted_bytes < (_GROWTH - 1) * self.chunk_bytes:
            return
        fits = _largest_chunk(self._noted_bytes, self._noted_s)
        self.chunk_bytes = max(min(fits, _GROWTH * self.chunk_bytes, self.most), min(self.least, self.most))
        self._noted_bytes, self._noted_s = 0, 0.0

    def after_break(self) -> None:
        """The stream broke off: the next one begins small, and smaller each time, until chunks get through."""
        smaller = min(self.chunk_bytes // _GROWTH, FIRST_CHUNK_BYTES)
        self.chunk_bytes = max(smaller, min(self.least, self.most))
        self._noted_bytes, self._noted_s = 0, 0.0


def _largest_chunk(size_bytes: int, took_s: float) -> int:
    """A power of two that a link which carried `size_bytes` in `took_s` carries in `CHUNK_S`."""
    if size_bytes >= _FAST_BYTES_PER_S * took_s:
        return LARGE_CHUNK_BYTES
    return min(CHUNK_BYTES, 1 << int(CHUNK_S * size_bytes / took_s).bit_length() >> 1)


def check_chunk(chunk: Chunk, expected_offset: int, remaining_bytes: int) -> None:
    """Raise unless the chunk is the next one of an upload that is still owed `remaining_bytes`.

    WrongOffset: it starts elsewhere (duplicated, reordered, overlapping or after a gap). TooLargeError: it
    runs past the declared end. LayoutError: it is empty. CorruptError: its CRC does not fit.
    """
    if chunk.offset != expected_offset:
        raise WrongOffset(f"the chunk starts at offset {chunk.offset}, expected is {expected_offset}")
    if len(chunk.data) > remaining_bytes:
        end = chunk.offset + len(chunk.data)
        raise TooLargeError(f"the chunk ends at byte {end}, declared are {expected_offset + remaining_bytes}")
    if not len(chunk.data):
        raise LayoutError(f"the chunk at offset {chunk.offset} is empty")
    chunk.verify()
