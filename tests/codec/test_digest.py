"""The digest of payloads, by the package and by the C library."""

import os

import pytest

from fedgrpc.codec import digest

try:
    digest._Library()
except OSError:
    pytest.skip("no libxxhash on this machine", allow_module_level=True)


@pytest.mark.parametrize("size", [0, 1, 16, 240, 241, 5000, 1 << 20])
def test_the_library_makes_the_same_digest_of_whatever_pieces(size):
    data = os.urandom(size)
    library, pieces = digest._Library(), digest.new_digest()
    for piece in (data[: size // 3], bytearray(data[size // 3 : size // 2]), memoryview(data)[size // 2 :]):
        library.update(piece)
        pieces.update(piece)
    assert library.digest() == pieces.digest() == digest.digest_of(data)
    assert len(library.digest()) == digest.DIGEST_BYTES
