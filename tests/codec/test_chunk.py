from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.codec.chunk import Chunk, check_chunk, chunks
from fedgrpc.codec.payload import buffer_reader
from fedgrpc.errors import CorruptError, LayoutError, TooLargeError, WrongOffset


def chunk(offset: int, data: bytes) -> Chunk:
    return Chunk(offset, data, zlib.crc32(data))


@given(st.binary(max_size=500), st.integers(0, 500), st.integers(1, 70))
def test_chunks_from_any_offset_are_the_rest_of_the_payload(payload: bytes, start: int, chunk_bytes: int) -> None:
    start = min(start, len(payload))
    held = bytearray(payload[:start])
    for part in chunks(buffer_reader(payload), len(payload), start, chunk_bytes):
        check_chunk(part, len(held), len(payload) - len(held))
        held += part.data
    assert held == payload


@pytest.mark.parametrize("offset", [-1, 11])
def test_an_offset_outside_the_payload_is_refused(offset: int) -> None:
    with pytest.raises(WrongOffset, match=str(offset)):
        list(chunks(buffer_reader(b"0123456789"), 10, offset))


def test_a_payload_shorter_than_declared_is_noticed_while_reading() -> None:
    with pytest.raises(CorruptError, match="ends at byte 10"):
        list(chunks(buffer_reader(b"0123456789"), 12, 0, 4))


@pytest.mark.parametrize("offset", [0, 3, 5, 8])
def test_duplicated_overlapping_and_missing_chunks_are_a_wrong_offset_that_names_both(offset: int) -> None:
    with pytest.raises(WrongOffset, match=f"{offset}.*4"):
        check_chunk(chunk(offset, b"abcd"), 4, 100)


def test_a_chunk_past_the_declared_end_is_too_large() -> None:
    with pytest.raises(TooLargeError, match=r"ends at byte 8.*7"):
        check_chunk(chunk(4, b"abcd"), 4, 3)


def test_an_empty_chunk_is_a_layout_error() -> None:
    with pytest.raises(LayoutError):
        check_chunk(chunk(4, b""), 4, 3)


def test_a_chunk_with_one_flipped_bit_is_corrupt() -> None:
    good = chunk(4, b"abcd")
    with pytest.raises(CorruptError, match="offset 4"):
        check_chunk(Chunk(4, b"abce", good.crc32), 4, 100)
