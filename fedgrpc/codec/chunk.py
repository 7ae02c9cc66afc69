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
# With its envelope, a message stays below the 4 MiB that gRPC clients of any language accept by default.
LARGE_CHUNK_BYTES = 2 << 20
# Well below any lease, and long enough that the overhead of a message is negligible.
CHUNK_S = 1.0
_GROWTH = 4
_FAST_BYTES_PER_S = 32 << 20


@dataclass(frozen=True)
class Chunk:
    """Bytes of the payload from `offset`; `crc32` is of `data` alone."""

    offset: int
    data: bytes | memoryview
    crc32: int

    def verify(self) -> None:
        """Raise CorruptError unless the CRC fits the data."""
        if crc32(self.data) != self.crc32:
            raise CorruptError(f"the chunk at offset {self.offset} does not match its CRC; send it again")


def chunks(read: Read, size_bytes: int, start_offset: int = 0, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Yield the payload's chunks from `start_offset`. Raises WrongOffset beyond its end, CorruptError if short."""
    if not 0 <= start_offset <= size_bytes:
        raise WrongOffset(f"offset {start_offset} is not within the payload of {size_bytes} bytes")
    for offset in range(start_offset, size_bytes, chunk_bytes):
        yield chunk_at(read, offset, min(chunk_bytes, size_bytes - offset))


def chunk_at(read: Read, offset: int, size: int) -> Chunk:
    """Return the chunk of `size` bytes at `offset`. Raises CorruptError where the payload is shorter."""
    data = read(offset, size)
    if len(data) != size:
        raise CorruptError(f"the payload ends at byte {offset + len(data)}, declared: {offset + size}")
    return Chunk(offset, data, crc32(data))


@dataclass
class ChunkSizer:
    """Size of the next chunk: what the link carries in about `CHUNK_S`, within `least` and `most` bytes.

    A receiver keeps a chunk whole or not at all. Small chunks on a slow link lose little with a broken stream, and
    take far less than the lease. Both ends work as much for a small chunk as for a large one, so a fast link gets
    the largest. An unknown link starts with `FIRST_CHUNK_BYTES`.
    """

    most: int = LARGE_CHUNK_BYTES
    chunk_bytes: int = FIRST_CHUNK_BYTES
    least: int = LEAST_CHUNK_BYTES
    # Chunks that are judged together.
    judged: int = _GROWTH - 1
    _noted_bytes: int = 0
    _noted_s: float = 0.0

    def __post_init__(self) -> None:
        self.chunk_bytes = min(self.chunk_bytes, self.most)

    def note(self, size_bytes: int, took_s: float) -> None:
        """Note how long a chunk took to hand over. A few are judged together: the first ones only fill buffers."""
        self._noted_bytes += size_bytes
        self._noted_s += took_s
        if took_s <= 2 * CHUNK_S and self._noted_bytes < self.judged * self.chunk_bytes:
            return
        fits = _largest_chunk(self._noted_bytes, self._noted_s)
        self.chunk_bytes = max(min(fits, _GROWTH * self.chunk_bytes, self.most), min(self.least, self.most))
        self._noted_bytes, self._noted_s = 0, 0.0

    def after_break(self) -> None:
        """Start small after a broken stream, and smaller each time, until chunks get through."""
        smaller = min(self.chunk_bytes // _GROWTH, FIRST_CHUNK_BYTES)
        self.chunk_bytes = max(smaller, min(self.least, self.most))
        self._noted_bytes, self._noted_s = 0, 0.0


def _largest_chunk(size_bytes: int, took_s: float) -> int:
    """Return the power of two that a link carries in `CHUNK_S`, given that it carried `size_bytes` in `took_s`."""
    if size_bytes >= _FAST_BYTES_PER_S * took_s:
        return LARGE_CHUNK_BYTES
    return min(CHUNK_BYTES, 1 << int(CHUNK_S * size_bytes / took_s).bit_length() >> 1)


def check_chunk(chunk: Chunk, expected_offset: int, remaining_bytes: int) -> None:
    """Raise unless the chunk is the next one of an upload that lacks `remaining_bytes`.

    WrongOffset: it starts elsewhere (duplicated, reordered, overlapping or after a gap). TooLargeError: it
    runs past the declared end. LayoutError: it is empty. CorruptError: its CRC does not fit.
    """
    if chunk.offset != expected_offset:
        raise WrongOffset(f"the chunk starts at offset {chunk.offset}, expected {expected_offset}")
    if len(chunk.data) > remaining_bytes:
        end = chunk.offset + len(chunk.data)
        raise TooLargeError(f"the chunk ends at byte {end}, declared: {expected_offset + remaining_bytes}")
    if not len(chunk.data):
        raise LayoutError(f"the chunk at offset {chunk.offset} is empty")
    chunk.verify()
