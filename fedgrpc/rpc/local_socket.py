"""Unix socket of an aggregator, for operators on its host: file permissions decide who calls."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedgrpc.errors import UsageError

SOCKET: Final = "operator.sock"
# <sys/un.h> has 108 bytes for a path, and 104 on some systems.
_LONGEST_BYTES: Final = 100


@contextmanager
def local_address(folder: Path) -> Iterator[str]:
    """Yield the address of the socket in `folder`, to listen on or to dial while the block runs.

    The path of a deep folder is too long for a socket, and then goes through a descriptor of the folder.
    Raises `UsageError` when there is no such folder.
    """
    path = folder.absolute() / SOCKET
    if len(os.fsencode(path)) <= _LONGEST_BYTES:
        yield f"unix:{path}"
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"cannot use the folder {folder}: {error.strerror}") from error
    try:
        yield f"unix:/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)
