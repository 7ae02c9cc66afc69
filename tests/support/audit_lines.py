"""Lines of an audit log with their seals checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fedgrpc.identity.audit import Position, check_line


def verified(lines: Iterable[bytes]) -> Iterable[tuple[dict[str, Any], Position]]:
    """Yield each record with the end of the log behind it. Raises `CorruptError` at the first broken seal."""
    end = Position()
    for line in lines:
        record, end = check_line(line, end)
        yield record, end
