"""Uploads that an ingest process takes: it stores, checks and seals the chunks of an update into the run's folder.

The run's process has examined the header and given the upload its slot. It hears how far the upload is, and counts
the update once it is sealed.

The rule: a file is written by one process at a time. The run's process takes it up again only after the ingest
process has said that it is done, or has died.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from fedgrpc.aggregation.admission import AdmissionPolicy
from fedgrpc.aggregator.update_checks import check_plain, decoding_bytes
from fedgrpc.aggregator.upload_reader import ByteBudget, UploadReader, chunk_of
from fedgrpc.aio import until_done
from fedgrpc.codec.chunk import Chunk
from fedgrpc.codec.manifest import Manifest
from fedgrpc.errors import CodecError, UpdateRefused
from fedgrpc.protocol.tensors import manifest_from_proto
from fedgrpc.rpc.framing import push_request
from fedgrpc.rpc.ingest_process import Caller
from fedgrpc.rpc.relay import fields_of, joined
from fedgrpc.storage.files import storage_errors
from fedgrpc.storage.grouped_syncs import GroupedSyncs
from fedgrpc.storage.uploads import Upload
from fedgrpc.v1.aggregator_pb2 import UpdateHeader

UPLOAD: Final = b"upload"
_PROGRESS_INTERVAL_S: Final = 0.1
_CHECKERS: Final = 4


class Stored(Enum):
    """Progress of an ingest process with an update."""

    PART = b"part"
    WHOLE = b"whole"
    SEALED = b"sealed"


@dataclass(frozen=True)
class UploadOrder:
    """An upload to take. `folder` is that of the journal.

    `admission` are the bounds on a plain update. None: the run's process checks and seals this one.
    """

    folder: Path
    durable: bool
    idle_s: float
    max_chunk_bytes: int
    admission: AdmissionPolicy | None

    def encoded(self, header: UpdateHeader) -> bytes:
        """Return it with the update's header as bytes."""
        return joined(
            (UPLOAD, json.dumps({**asdict(self), "folder": str(self.folder)}), header.SerializeToString())
        )

    @classmethod
    def decoded(cls, body: bytes) -> tuple[UploadOrder, UpdateHeader]:
        """Return what `encoded` made bytes of."""
        _, text, header = fields_of(body)
        told = json.loads(text)
        admission = None if told["admission"] is None else AdmissionPolicy(**told["admission"])
        told |= {"folder": Path(told["folder"]), "admission": admission}
        return cls(**told), UpdateHeader.FromString(header)


class IngestUploads:
    """The uploads of one ingest process. Lives on one event loop."""

    def __init__(self, memory_bytes: int, decoding_bytes: int) -> None:
        """`memory_bytes` bounds chunks on their way to files, `decoding_bytes` what is decoded at a time."""
        self._memory = ByteBudget(memory_bytes)
        self._decoding = ByteBudget(decoding_bytes)
        self._checking = threading.BoundedSemaphore(_CHECKERS)
        self._opening = threading.Lock()
        self._syncs: dict[Path, GroupedSyncs] = {}

    async def take(self, order_bytes: bytes, caller: Caller) -> bytes:
        """Take an upload until its stream ends; see `Stored`. Raises as `PushUpdate` says."""
        order, header = UploadOrder.decoded(order_bytes)
        manifest = manifest_from_proto(header.manifest)
        upload = await self._opened(order, header, manifest)
        told_at = time.monotonic()

        async def tell_now_and_then() -> None:
            nonlocal told_at
            if time.monotonic() - told_at >= _PROGRESS_INTERVAL_S:
                told_at = time.monotonic()
                caller.tell(upload.size_bytes)

        reader = UploadReader(upload, self._memory, order.max_chunk_bytes)
        try:
            last = await reader.run(_chunks(caller), order.idle_s, tell_now_and_then)
            if last is None and not upload.complete:
                caller.tell(upload.size_bytes)
                return Stored.PART.value
            caller.tell(manifest.size_bytes)
            # An update that is here whole outlives its connection.
            finishing = asyncio.create_task(self._finished(upload, last, order.admission))
            await until_done(finishing)
            return finishing.result().value
        finally:
            reader.release()
            if not upload.closed:
                await asyncio.to_thread(upload.close)

    async def _opened(self, order: UploadOrder, header: UpdateHeader, manifest: Manifest) -> Upload:
        """Begin or continue an upload. Cancelled, it raises only once its file is closed again."""
        beginning = asyncio.create_task(asyncio.to_thread(self._begun, order, header, manifest))
        if (cancelled := await until_done(beginning)) is not None:
            if beginning.exception() is None:
                await asyncio.to_thread(beginning.result().close)
            raise cancelled
        return beginning.result()

    def _begun(self, order: UploadOrder, header: UpdateHeader, manifest: Manifest) -> Upload:
        with self._opening:
            syncs = self._syncs.setdefault(order.folder, GroupedSyncs(order.folder))
        with storage_errors("an update", "store"):
            part = order.folder / f"{header.token}.part"
            # Not from the recycled ones, which are the run's process's.
            return Upload(part, header, manifest, None, syncs, order.durable)

    async def _finished(self, upload: Upload, last: Chunk | None, policy: AdmissionPolicy | None) -> Stored:
        size_bytes = decoding_bytes(upload.manifest)
        await self._decoding.take(size_bytes)
        try:
            return await asyncio.to_thread(self._finish, upload, last, policy)
        finally:
            self._decoding.give_back(size_bytes)

    def _finish(self, upload: Upload, last: Chunk | None, policy: AdmissionPolicy | None) -> Stored:
        """Commit the last chunk, if there is one. Then verify and seal the update, where that is done here."""
        if last is not None:
            upload.append([last])
        if policy is None:
            return Stored.WHOLE
        stored = upload.finish()
        try:
            with self._checking:
                check_plain(stored, policy)
        except (CodecError, UpdateRefused) as error:
            upload.discard()
            raise UpdateRefused(str(error)) from error
        upload.seal()
        return Stored.SEALED


async def _chunks(caller: Caller) -> AsyncIterator[Chunk]:
    while (message := await caller.read()) is not None:
        chunk = chunk_of(push_request(message))
        # Else this frame would hold it until the next one is there.
        del message
        yield chunk
        del chunk
