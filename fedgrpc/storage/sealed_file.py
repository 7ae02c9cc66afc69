"""Small files of JSON under a digest: one that a disk has damaged is never taken for another value.

the SHA-256 of what follows, 64 hexadecimal digits, and a newline
JSON
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedgrpc.errors import CorruptError
from fedgrpc.storage.files import storage_errors, write_file


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that only its owner may read, durably. Raises `StorageError`."""
    text = json.dumps(content).encode()
    with storage_errors(path):
        write_file(path, _seal(text) + text, private=True)


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return the content; None: there is no file. Raises `CorruptError` for a damaged one, and `StorageError`."""
    with storage_errors(path, "read"):
        data = path.read_bytes() if path.exists() else None
    if data is None:
        return None
    head, newline, text = data.partition(b"\n")
    if head + newline != _seal(text):
        raise CorruptError(f"{path} is damaged: its content is not that of its digest")
    content: dict[str, Any] = json.loads(text)
    return content


def _seal(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode() + b"\n"
