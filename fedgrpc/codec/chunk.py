"""Chunks: consecutive byte ranges of a payload, each with its offset and CRC-32 (RFC 1952, zlib's)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedgrpc.codec.crc import crc32
from fedgrpc.codec.payload import Read
from fedgrpc.errors import CorruptError, LayoutError, TooLargeError, WrongOffset

CHUNK_BYTES = 1 << 20
LARGE_CHUNK_BYTES = 4 << 20
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
class Pace:
    """How large chunks are best: `least` bytes, so that a broken stream loses little, and `most` on a fast link.

    Beside its bytes a large chunk costs both ends no more work than a small one.
    """

    least: int = CHUNK_BYTES
    most: int = LARGE_CHUNK_BYTES
    fast: bool = False

    @property
    def chunk_bytes(self) -> int:
        """Of the next chunk."""
        return self.most if self.fast else self.least

    def note(self, size_bytes: int, took_s: float) -> None:
        """So long it took to hand over a chunk."""
        self.fast = size_bytes >= _FAST_BYTES_PER_S * took_s


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
