"""Digest of payloads: XXH3-128 (https://github.com/Cyan4973/xxHash), in its canonical form of 16 bytes.

The rule: this digest finds damage and tells payloads apart, and proves nothing about who made them. Whoever sends
a payload is authenticated and could send any other one. What has to hold against somebody who wants two contents
with one digest is a SHA-256: the identity of a version, of a key, of an entry in the audit log.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import xxhash

DIGEST_BYTES: Final = 16


class Digest(Protocol):
    """A digest in progress, as those of `hashlib` are used."""

    def update(self, data: Any, /) -> None: ...

    def digest(self) -> bytes: ...

    def copy(self) -> Digest: ...


new_digest: Final = xxhash.xxh3_128


def digest_of(data: Any) -> bytes:
    """Return the digest of bytes that are all here."""
    return new_digest(data).digest()
