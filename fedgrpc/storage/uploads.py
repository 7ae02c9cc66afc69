"""The journal of updates: one file per update, and the files of accepted updates ARE the record of acceptance.

    TOKEN.part     an upload in progress, a `ResumableFile`
    TOKEN.update   a whole, verified, durable update: renaming into this name is what accepts it

    recycled/      files of updates that are done with, to be overwritten by the next

The header of a file is its `UpdateHeader`. Whoever decides by a file checks it first (`StoredUpdate.check`).

Tokens name files only after the coordinator has found them among its own. Everything here blocks, and runs off the
event loop.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from google.protobuf.message import DecodeError

from fedgrpc.codec.manifest import Manifest
from fedgrpc.errors import CodecError, CorruptError, StorageError
from fedgrpc.protocol.tensors import manifest_from_proto
from fedgrpc.storage.files import RecycledFiles, storage_errors
from fedgrpc.storage.grouped_syncs import GroupedSyncs
from fedgrpc.storage.resumable import ResumableFile, committed_bytes, read_header
from fedgrpc.storage.update_file import StoredUpdate
from fedgrpc.v1.aggregator_pb2 import UpdateHeader

_MAX_RECYCLED = 32
# A new file costs more than the bytes of a small update: those of a round of a thousand stay for the next.
_MAX_RECYCLED_BYTES = 256 << 20
# Headers of updates, together: in memory one takes ten times as much, and several KiB at least.
_REMEMBERED_BYTES = 256 << 10
_LEAST_HEADER_BYTES = 1 << 10


class Upload(ResumableFile):
    """An update on its way in. One task at a time uses it."""

    def __init__(
        self,
        part: Path,
        header: UpdateHeader,
        manifest: Manifest,
        recycled: RecycledFiles | None,
        syncs: GroupedSyncs,
        durable: bool = True,
    ) -> None:
        """Raises OSError."""
        self._syncs = syncs
        self.header = header
        self.manifest = manifest
        text = header.SerializeToString(deterministic=True)
        super().__init__(
            part, text, manifest.size_bytes, manifest.digest, recycled, durable=durable, what="an update"
        )

    def finish(self) -> StoredUpdate:
        """The whole update, ready to be examined. Raises `CorruptError` when its digest does not match."""
        if not self.matches_digest:
            # Each chunk had its CRC, so the sender lied or its disk did: no part of it is worth keeping.
            self.discard()
            raise CorruptError("the payload does not match its digest; send it again from the start")
        return self._stored(self.path)

    def seal(self) -> StoredUpdate:
        """Accept the update: durable, if it is to be, then under its final name. Raises `StorageError`."""
        # From this rename on the update counts, whatever happens to this process: recovery looks for the name.
        final = self.path.with_suffix(".update")
        self.publish(final, self._syncs.sync)
        return self._stored(final)

    def _stored(self, path: Path) -> StoredUpdate:
        return StoredUpdate(path, self.header, self.manifest, self.payload_start)


class UploadJournal:
    """The folder of updates."""

    def __init__(self, folder: Path, durable: bool = True) -> None:
        """Open the folder; `durable`: accepted updates survive a power cut. Raises OSError."""
        self.folder = folder
        self._durable = durable
        self._recycled = RecycledFiles(folder / "recycled", _MAX_RECYCLED, _MAX_RECYCLED_BYTES)
        # Updates that end together share a sync of their names.
        self._syncs = GroupedSyncs(folder)
        self._sealed: dict[str, StoredUpdate] = {}
        self._sealed_bytes = 0
        self._remembering = threading.Lock()

    def begin(self, header: UpdateHeader, manifest: Manifest) -> Upload:
        """Begin or continue the upload of `header.token`. Raises `StorageError`."""
        with storage_errors("an update", "store"):
            part = self.folder / f"{header.token}.part"
            return Upload(part, header, manifest, self._recycled, self._syncs, self._durable)

    def committed_bytes(self, token: str) -> int:
        """Payload bytes committed of an upload in progress; 0 when none is. Raises `StorageError`."""
        with storage_errors("an upload", "read"):
            return committed_bytes(self.folder / f"{token}.part")

    def remember(self, token: str, update: StoredUpdate) -> None:
        """Keep an update that was just sealed, while there is room, so that the commit need not parse it again."""
        with self._remembering:
            if token not in self._sealed and self._sealed_bytes + _counted(update) <= _REMEMBERED_BYTES:
                self._sealed_bytes += _counted(update)
                self._sealed[token] = update

    def load(self, token: str) -> StoredUpdate | None:
        """Open the accepted update of `token`; None where there is none.

        Raises `StorageError` when it cannot be read, and `CorruptError` when it is none.
        """
        if (sealed := self._sealed.get(token)) is not None:
            return sealed
        path = self.folder / f"{token}.update"
        try:
            text, payload_start = read_header(path)
            header = UpdateHeader.FromString(text)
            manifest = manifest_from_proto(header.manifest)
        except FileNotFoundError:
            return None
        # Not now is not never: only content that was read may be called damaged.
        except OSError as error:
            raise StorageError(f"cannot read the update {path}: {error}") from error
        except (DecodeError, CodecError) as error:
            raise CorruptError(f"the update {path} is damaged: {error}") from error
        return StoredUpdate(path, header, manifest, payload_start)

    def accepted(self) -> frozenset[str]:
        """Tokens of all accepted updates in the folder. Raises `StorageError`."""
        with storage_errors(self.folder):
            return frozenset(path.stem for path in self.folder.glob("*.update"))

    def discard(self, tokens: Iterable[str]) -> None:
        """Remove uploads and updates of these tokens. Raises `StorageError`."""
        with storage_errors(self.folder):
            for token in tokens:
                with self._remembering:
                    if (sealed := self._sealed.pop(token, None)) is not None:
                        self._sealed_bytes -= _counted(sealed)
                # Removed, not recycled: an upload that nobody wants any more may still be writing to its part.
                (self.folder / f"{token}.part").unlink(missing_ok=True)
                self._recycled.keep(self.folder / f"{token}.update")

    def keep_only(self, tokens: Iterable[str]) -> None:
        """Remove what belongs to no task any more, left by a process that died. Raises `StorageError`."""
        # Tasks end in the database before their files go, so a kill in between leaves files without a task.
        wanted = set(tokens)
        with storage_errors(self.folder):
            for path in self.folder.iterdir():
                if path.is_file() and path.stem not in wanted:
                    path.unlink(missing_ok=True)


def _counted(update: StoredUpdate) -> int:
    """Return the bytes that a remembered update counts for."""
    return max(_LEAST_HEADER_BYTES, update.payload_start)
