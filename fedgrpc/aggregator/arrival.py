"""An update on its way in: its file, and how much of it is there.

The rule: no file is made for an update before there is something to store in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedgrpc.codec.chunk import Chunk
from fedgrpc.codec.manifest import Manifest
from fedgrpc.storage.uploads import Upload, UploadJournal
from fedgrpc.v1.aggregator_pb2 import UpdateHeader


class Arrival:
    """An update on its way in, whose file is opened along with the first bytes that are stored in it."""

    def __init__(self, journal: UploadJournal, header: UpdateHeader, manifest: Manifest) -> None:
        self.header = header
        self.manifest = manifest
        self.upload: Upload | None = None
        self._journal = journal
        # Bytes in the file, as far as an ingest process that fills it has told.
        self.told_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Bytes in the file; 0 before it is opened."""
        return self.told_bytes if self.upload is None else self.upload.size_bytes

    def opened(self) -> Upload:
        """Return the upload, begun or continued by the first call. Blocks. Raises `StorageError`."""
        if self.upload is None:
            self.upload = self._journal.begin(self.header, self.manifest)
        return self.upload

    def append(self, batch: Sequence[Chunk]) -> None:
        """Commit chunks. Blocks. Raises as `Upload.append`."""
        self.opened().append(batch)

    def whole(self, last: Chunk | None) -> Upload:
        """Return the upload with its last chunk, which may be in it already (None). Blocks. Raises as `append`."""
        if last is not None:
            self.append([last])
        return self.opened()

    def close(self, discard: bool) -> None:
        """Leave the file to be continued, or nothing of it. Blocks."""
        if self.upload is not None and discard:
            self.upload.discard()
        elif self.upload is not None and not self.upload.closed:
            self.upload.close()
