"""Whether a large local file is as it was written, far cheaper than a CRC: never for what comes from afar.

    block      every 128 KiB of the content, however it is handed over
    its sum    of its 64-bit words, little-endian, modulo 2^64; a last word that is cut short ends in zero bytes
    value      CRC-32 of the sums of all blocks, 8 bytes each, in order

One changed word changes the sum, and so do pages that a power cut has left empty or as they were before (but for
one in 2^32 of them). Bytes that somebody changes on purpose need a digest.
"""

from __future__ import annotations

import numpy as np

from fedgrpc.codec.crc import crc32

BLOCK_BYTES = 128 << 10
_WORD = 8
_MODULUS = 1 << 64


class WordSum:
    """Takes the content in parts of any size."""

    def __init__(self) -> None:
        self._crc32: int = 0
        self._size_bytes = 0
        self._sum = 0

    def add(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes."""
        view = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
        while view.nbytes:
            room = BLOCK_BYTES - self._size_bytes % BLOCK_BYTES
            self._add_to_block(view[:room])
            if self._size_bytes % BLOCK_BYTES == 0:
                self._crc32, self._sum = crc32(self._sum.to_bytes(_WORD, "little"), self._crc32), 0
            view = view[room:]

    @property
    def value(self) -> int:
        """Of all that was added."""
        if self._size_bytes % BLOCK_BYTES == 0:
            return self._crc32
        return int(crc32(self._sum.to_bytes(_WORD, "little"), self._crc32))

    def _add_to_block(self, data: memoryview) -> None:
        within = self._size_bytes % _WORD
        head = min(-within % _WORD, data.nbytes)
        tail = head + (data.nbytes - head) // _WORD * _WORD
        words = np.frombuffer(data[head:tail], "<u8")
        added = int.from_bytes(data[:head], "little") << (_WORD * within)
        added += int(np.add.reduce(words)) + int.from_bytes(data[tail:], "little")
        self._sum = (self._sum + added) % _MODULUS
        self._size_bytes += data.nbytes
