"""The digest of payloads."""

import os

import pytest

from fedgrpc.codec.digest import DIGEST_BYTES, digest_of, new_digest


@pytest.mark.parametrize("size", [0, 1, 16, 240, 241, 5000, 1 << 20])
def test_pieces_of_any_kind_have_the_digest_of_the_whole(size):
    data, pieces = os.urandom(size), new_digest()
    for piece in (data[: size // 3], bytearray(data[size // 3 : size // 2]), memoryview(data)[size // 2 :]):
        pieces.update(piece)
    assert pieces.digest() == digest_of(data)
    assert len(pieces.digest()) == DIGEST_BYTES


def test_the_digest_of_nothing_is_that_of_the_reference_implementation():
    assert digest_of(b"").hex() == "99aa06d3014798d86001c324468d497f"
