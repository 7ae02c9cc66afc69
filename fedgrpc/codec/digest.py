"""Digest of payloads: XXH3-128 (https://github.com/Cyan4973/xxHash), in its canonical form of 16 bytes.

The rule: this digest finds damage and tells payloads apart, and proves nothing about who made them. Whoever sends
a payload is authenticated and could send any other one. What has to hold against somebody who wants two contents
with one digest is a SHA-256: the identity of a version, of a key, of an entry in the audit log.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final, Protocol

DIGEST_BYTES: Final = 16
# Where the package is missing: the C library itself, which Debian's apt needs.
_LIBRARY: Final = "libxxhash.so.0"


class Digest(Protocol):
    """A digest in progress, as those of `hashlib` are used."""

    def update(self, data: Any, /) -> None: ...

    def digest(self) -> bytes: ...

    def copy(self) -> Digest: ...


class _Library:
    """XXH3-128 by the C library. Raises OSError where there is none."""

    def __init__(self, like: _Library | None = None) -> None:
        self._calls = ctypes.CDLL(_LIBRARY)
        self._calls.XXH3_createState.restype = ctypes.c_void_p
        self._calls.XXH3_128bits_digest.restype = _Hash128
        self._state = ctypes.c_void_p(self._calls.XXH3_createState())
        self._calls.XXH3_128bits_reset(self._state)
        if like is not None:
            self._calls.XXH3_copyState(self._state, like._state)

    def update(self, data: Any, /) -> None:
        view = memoryview(data).cast("B")
        if view.readonly:
            text = bytes(view)
            self._calls.XXH3_128bits_update(self._state, text, ctypes.c_size_t(len(text)))
        elif view:
            start = ctypes.byref(ctypes.c_char.from_buffer(view))
            self._calls.XXH3_128bits_update(self._state, start, ctypes.c_size_t(view.nbytes))

    def digest(self) -> bytes:
        value = self._calls.XXH3_128bits_digest(self._state)
        return int(value.high).to_bytes(8, "big") + int(value.low).to_bytes(8, "big")

    def copy(self) -> _Library:
        return _Library(self)

    def __del__(self) -> None:
        self._calls.XXH3_freeState(self._state)


class _Hash128(ctypes.Structure):
    _fields_ = (("low", ctypes.c_uint64), ("high", ctypes.c_uint64))


def _by_library() -> Digest:
    return _Library()


def _found() -> Callable[[], Digest]:
    try:
        import xxhash
    except ImportError:
        return _by_library
    made: Callable[[], Digest] = xxhash.xxh3_128
    return made


new_digest: Final = _found()


def digest_of(data: Any) -> bytes:
    """Return the digest of bytes that are all here."""
    digest = new_digest()
    digest.update(data)
    return digest.digest()
