"""Versions of files, to notice that data has changed since it was read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

# Each file costs microseconds. In a larger folder only the first files are compared.
_MOST_FILES: Final = 100_000


def version_of(path: Path) -> object:
    """Return a value that changes once the file, or a file in the folder, is written, replaced, added or removed.

    The value is made of names, inodes, sizes and times of change, without reading files. Links are followed, each
    folder once. A missing path has a value, too.
    """
    found = frozenset(islice(_marks(path, set()), _MOST_FILES))
    return found or "gone"


def _marks(path: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[object, ...]]:
    try:
        status = path.stat()
        yield os.fspath(path), status.st_ino, status.st_size, status.st_mtime_ns
        if not stat.S_ISDIR(status.st_mode) or (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        below = sorted(path.iterdir())
    except OSError:
        return
    for each in below:
        yield from _marks(each, seen)
