"""A model payload while it arrives, a `ResumableFile` in a folder.

received       the `ModelHeader` that the aggregator sent first, and how many bytes of the payload are committed
payload        these bytes, and behind them what a former use of the file has left
header.pb      the `ModelHeader`, once the payload is whole; `received` is gone then
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from fedgrpc.codec.manifest import Limits
from fedgrpc.errors import CorruptError
from fedgrpc.protocol.tensors import manifest_from_proto
from fedgrpc.storage.files import RecycledFiles, storage_errors
from fedgrpc.storage.resumable import ResumableFile, committed_bytes
from fedgrpc.v1 import aggregator_pb2

HEADER: Final = "header.pb"
PAYLOAD: Final = "payload"
_RECEIVED: Final = "received"


def received_bytes(folder: Path) -> int:
    """How much of the payload is there. Raises OSError."""
    return committed_bytes(folder / PAYLOAD, folder / _RECEIVED)


class PartialModel(ResumableFile):
    """A download in `folder`, continued where it stands or begun. One task at a time uses it."""

    def __init__(
        self, folder: Path, header: aggregator_pb2.ModelHeader, limits: Limits, recycled: RecycledFiles
    ) -> None:
        """Raises OSError, and LayoutError or TooLargeError for a manifest that is refused."""
        self.folder = folder
        self.header = header
        self.manifest = manifest_from_proto(header.manifest, limits)
        super().__init__(
            folder / PAYLOAD,
            header.SerializeToString(deterministic=True),
            self.manifest.size_bytes,
            self.manifest.sha256,
            recycled,
            head_path=folder / _RECEIVED,
            # What a power cut takes away can be pulled again.
            durable=False,
            what="the model",
        )

    def finish(self) -> None:
        """Leave the whole payload and its header. Raises CorruptError unless it matches its digest."""
        if not self.complete:
            raise CorruptError(f"{self.size_bytes} of the model's {self.expected_bytes} bytes came")
        if not self.matches_digest:
            raise CorruptError("the model's sha256 is not the one its manifest declares")
        with storage_errors(self.folder):
            os.truncate(self.path, self.size_bytes)
            (self.folder / HEADER).write_bytes(self.header.SerializeToString(deterministic=True))
            (self.folder / _RECEIVED).unlink()
