from __future__ import annotations

import zlib

import numpy as np
import pytest

from fedgrpc.codec.wordsum import BLOCK_BYTES, WordSum


def sum_of(content: bytes, cuts: list[int] | None = None) -> int:
    found, start = WordSum(), 0
    for stop in [*sorted(cuts or []), len(content)]:
        found.add(content[start:stop])
        start = stop
    return found.value


def slow_sum(content: bytes) -> int:
    """As the module says it, word by word."""
    crc = 0
    for at in range(0, len(content), BLOCK_BYTES):
        block = content[at : at + BLOCK_BYTES]
        words = [int.from_bytes(block[i : i + 8], "little") for i in range(0, len(block), 8)]
        crc = zlib.crc32((sum(words) % 2**64).to_bytes(8, "little"), crc)
    return crc


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 300_001])
def test_the_sum_is_that_of_the_words_however_the_content_is_cut(size: int) -> None:
    rng = np.random.default_rng(size)
    content = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
    for _ in range(20):
        cuts = rng.integers(0, size + 1, rng.integers(0, 9)).tolist()
        assert sum_of(content, cuts) == slow_sum(content), cuts


def test_arrays_are_summed_as_the_bytes_that_they_lie_in() -> None:
    array = np.random.default_rng(0).standard_normal((77, 1001)).astype(np.float32)
    found = WordSum()
    found.add(array[:3].data)
    found.add(array[3:].data)
    assert found.value == sum_of(array.tobytes())


@pytest.mark.parametrize("page", [0, 31, 32, 60])
def test_a_page_that_is_empty_or_of_another_file_is_noticed(page: int) -> None:
    rng = np.random.default_rng(1)
    content, other = (rng.standard_normal(70_000).astype(np.float32).tobytes() for _ in range(2))
    at = 4096 * page
    for damage in (bytes(4096), other[at : at + 4096], content[:4096] if page else content[4096:8192]):
        assert sum_of(content[:at] + damage + content[at + 4096 :]) != sum_of(content)


def test_blocks_that_have_changed_places_are_noticed() -> None:
    one, two = bytes(BLOCK_BYTES), b"\1" * BLOCK_BYTES
    assert sum_of(one + two) != sum_of(two + one)
