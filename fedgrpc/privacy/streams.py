"""Streams of random numbers that follow from a key: the same key and label give the same numbers, wherever.

The rule: a stream is drawn by a cipher (ChaCha20, RFC 8439) under a key that HKDF-SHA256 (RFC 5869) derives for
its label. So nobody without the key can tell it from chance, and one that is drawn again, after a crash, is the
same.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedgrpc.codec.layout import Array

KEY_BYTES: Final = 32
_PIECE: Final = 1 << 15
_BLOCK_BYTES: Final = 64
_ZEROS: Final = memoryview(bytes(1 << 17))
_WORDS: Final = {8: "u1", 16: "<u2", 32: "<u4", 64: "<u8"}


def derived_key(key: bytes, label: bytes) -> bytes:
    """Return the 32 byte key of `label` under `key`, which has at least 32 bytes of entropy."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=label).derive(key)


class RandomStream:
    """Random words under `key` (32 bytes), in order. A key serves one stream: its nonce is zero.

    It begins at byte `start`, a multiple of 64 below 2^38: the cipher counts blocks of that size in 32 bits.
    """

    def __init__(self, key: bytes, start: int = 0) -> None:
        if start % _BLOCK_BYTES or not 0 <= start < _BLOCK_BYTES << 32:
            raise ValueError(f"a stream begins at a multiple of {_BLOCK_BYTES} bytes, not at {start}")
        nonce = (start // _BLOCK_BYTES).to_bytes(4, "little") + bytes(12)
        self._cipher = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()

    def raw(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        return self._cipher.update(bytes(count))

    def fill(self, words: Array) -> None:
        """Overwrite `words` (little-endian, contiguous) with the next ones: all of their bits are random."""
        into = words.reshape(-1).view(np.uint8)
        for start in range(0, into.size, len(_ZEROS)):
            piece = into[start : start + len(_ZEROS)]
            self._cipher.update_into(_ZEROS[: piece.size], piece.data)

    def words(self, count: int, bits: int) -> Array:
        """Return the next `count` numbers, uniform from 0 to 2^bits - 1, in the dtype of `word_dtype`."""
        words = np.empty(count, word_dtype(bits))
        self.fill(words)
        words &= words.dtype.type((1 << bits) - 1)
        return words

    def normals(self, count: int) -> Array:
        """Return the next `count` numbers of the standard normal distribution, float64.

        Box and Muller (1958), from 53 random bits each. An odd count draws one more, and drops it.
        """
        drawn = np.empty((count + 1) // 2 * 2)
        for start in range(0, drawn.size, _PIECE):
            piece = drawn[start : start + _PIECE]
            # From 2^-53 to 1: the logarithm of 0 has no value.
            uniform = ((self.words(piece.size, 64) >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
            radius, angle = np.sqrt(-2 * np.log(uniform[0::2])), 2 * np.pi * uniform[1::2]
            piece[0::2], piece[1::2] = radius * np.cos(angle), radius * np.sin(angle)
        return drawn[:count]


def word_dtype(bits: int) -> np.dtype[np.unsignedinteger]:
    """Return the narrowest unsigned dtype, little-endian, of `bits` bits (1 to 64, else ValueError)."""
    if not 1 <= bits <= 64:
        raise ValueError(f"words have 1 to 64 bits, not {bits}")
    return np.dtype(next(name for most, name in _WORDS.items() if bits <= most))
