"""Checks of a run's first model, whether a file or a worker brings it.

The rule: whatever is taken here every worker can pull, and every reader of files can read.
"""

from __future__ import annotations

from typing import Final

from fedgrpc.aggregation.partial_aggregate import REST, WEIGHTS
from fedgrpc.aggregation.partial_update import CODES, MASK
from fedgrpc.codec.layout import Layout
from fedgrpc.codec.manifest import Limits
from fedgrpc.protocol.tensors import layout_to_proto
from fedgrpc.rpc.channel import MAX_MESSAGE_BYTES
from fedgrpc.storage.model_header import METADATA

# A manifest travels in one message, with each tensor's encoding beside its name and shape.
_MAX_LAYOUT_BYTES: Final = MAX_MESSAGE_BYTES // 2
_LONGEST_NAME: Final = 1000
# "w#mask" beside "w" would be taken for the mask of w.
_SUFFIXES: Final = (MASK, CODES, WEIGHTS, REST)


def complaint(layout: Layout, max_bytes: int | None = None) -> str:
    """Return the fault of a first model of this layout in one line; "": none. It has up to `max_bytes`."""
    count, most = len(layout), Limits().max_tensors
    if not 1 <= count <= most:
        return f"it has {count} tensors; it may have 1 to {most}"
    for spec in layout:
        for name in (spec.name, *spec.tied_names):
            if wrong := _wrong_name(name):
                return f"no tensor may be called {name[:80]!r}: {wrong}"
    size_bytes = sum(spec.nbytes for spec in layout)
    if max_bytes is not None and size_bytes > max_bytes:
        return f"it has {size_bytes} bytes, and --max-model allows {max_bytes}"
    told_bytes = sum(spec.ByteSize() for spec in layout_to_proto(layout))
    if told_bytes > _MAX_LAYOUT_BYTES:
        return f"its names and shapes take {told_bytes} bytes, too many for one message"
    return ""


def _wrong_name(name: str) -> str:
    """Say why a tensor may not have this name, since names reach terminals, files and others' code; "": it may."""
    if name == METADATA:
        return "that is the metadata of a file"
    if not name.isprintable() or not 1 <= len(name) <= _LONGEST_NAME:
        return f"a name has 1 to {_LONGEST_NAME} printable characters"
    if "\\" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        return "that is a path"
    if name.endswith(_SUFFIXES):
        return f"{', '.join(_SUFFIXES)} are for what updates say of a tensor"
    return ""
