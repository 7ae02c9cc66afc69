"""CRC-32, whoever computes it."""

import zlib

import pytest

from fedgrpc.codec.chunk import crc32


def test_the_check_value_of_the_standard():
    assert crc32(b"123456789") == 0xCBF43926


@pytest.mark.parametrize("size", [0, 1, 7, 4096, 1 << 20])
def test_it_is_that_of_zlib_whole_and_in_pieces(size):
    data = memoryview(bytes(range(256)) * (1 + size // 256))[:size]
    assert crc32(data) == zlib.crc32(data)
    assert crc32(data[size // 3 :], crc32(data[: size // 3])) == zlib.crc32(data)
