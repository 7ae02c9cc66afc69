"""Settings that the folder of a simulation was begun with, compared with those asked of it now.

The rule: a folder answers for the settings that it was begun with, and for no others.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from fedgrpc.errors import UsageError

ELSEWHERE: Final = "name another folder with --out"


def as_read(document: Mapping[str, Any]) -> Any:
    """Return a document as a file gives it back: dates are text, and numbers are those of JSON."""
    return json.loads(json.dumps(document, default=str))


def check_same(folder: Path, begun: Any, asked: Any, asker: str, free: Collection[str] = ()) -> None:
    """Raise `UsageError` if a setting has changed, but for those of `free`, each TABLE.KEY.

    Both documents are as `as_read` returns them.
    """
    before, now = _flat(begun), _flat(asked)
    for name in sorted({*now, *before}):
        if now.get(name) != before.get(name) and ".".join(name.split(".")[:2]) not in free:
            raise UsageError(
                f"{folder} was begun with {name} = {before.get(name)!r}, and {asker} asks for "
                f"{now.get(name)!r}: {ELSEWHERE}"
            )


def read_json(path: Path) -> Any:
    """Return what a file holds; None where there is none. Raises `UsageError`."""
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a file that is the old one or the new one at every moment. Raises OSError."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(content, default=dict))
    unfinished.replace(path)


def _flat(document: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by `TABLE.KEY`. Keys of [aggregator] may have dashes, as flags do."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    found: dict[str, Any] = {}
    for key, value in items:
        name = f"{prefix}{str(key).replace('-', '_') if prefix == 'aggregator.' else key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict | list) else {name: value}
    return found
