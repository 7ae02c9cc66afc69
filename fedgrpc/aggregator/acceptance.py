"""Acceptance of an update: check its header, verify its bytes, make it durable, and only then count it.

The rule: nothing of an update counts before all of it does.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, Protocol

import structlog

from fedgrpc.aggregator.run_shell import RunShell
from fedgrpc.aggregator.update_checks import DECODING_BYTES, ExpectedUpdate, decoding_bytes, examine, verify
from fedgrpc.aggregator.upload_reader import ByteBudget
from fedgrpc.codec.manifest import Manifest
from fedgrpc.errors import CodecError, LayoutError, RoundClosed, StorageError, TooLargeError, UpdateRefused
from fedgrpc.runs.events import UpdateAccepted
from fedgrpc.runs.task_context import Report
from fedgrpc.runs.weighing import Weighing
from fedgrpc.storage.update_file import StoredUpdate
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.v1.aggregator_pb2 import UpdateHeader

# Updates that are verified at the same time; threads, which then wait for the disk.
_CHECKERS: Final = 4
_SEALERS: Final = 16

log = structlog.get_logger()


class WholeUpload(Protocol):
    """An update whose bytes are all here, such as an `Upload`."""

    def finish(self) -> StoredUpdate:
        """Return the update, ready to be examined. Raises `CorruptError` for other bytes than were declared."""

    def seal(self) -> StoredUpdate:
        """Accept the update. Raises `StorageError`."""

    def discard(self) -> None:
        """Leave nothing of it."""


class Acceptance:
    """Accepts the updates of one run, whose files are in `journal`. Lives on one event loop."""

    def __init__(
        self,
        shell: RunShell,
        journal: UploadJournal,
        run_name: str,
        expected: Callable[[str, str], ExpectedUpdate],
    ) -> None:
        """`expected(worker, token)` says what an open task asks of its update."""
        self._shell = shell
        self._run = shell.machine
        self._journal = journal
        self._expected = expected
        self._decoding = ByteBudget(DECODING_BYTES)
        self._checkers = ThreadPoolExecutor(_SEALERS, thread_name_prefix="checking")
        self._checking = threading.BoundedSemaphore(_CHECKERS)
        self._log = log.bind(run=run_name)

    def examined(self, header: UpdateHeader) -> tuple[Manifest, Report, ExpectedUpdate]:
        """Check the header of an open task's update. A refusal is for good. Raises as `examine`."""
        try:
            expected = self._expected(header.worker, header.token)
            manifest, report = examine(header, expected)
        except (LayoutError, TooLargeError, UpdateRefused) as error:
            self._shell.reject(header.token, str(error))
            raise
        return manifest, report, expected

    async def accept(
        self,
        token: str,
        manifest: Manifest,
        report: Report,
        expected: ExpectedUpdate,
        whole: Callable[[], WholeUpload],
    ) -> None:
        """Have the whole update verified and made durable, and count it. `whole` is called in a thread.

        Raises `UpdateRefused`, `RoundClosed` and `StorageError`.
        """
        # Many updates that end at once wait here for memory to decode them.
        size_bytes = decoding_bytes(manifest)
        await self._decoding.take(size_bytes)
        try:
            with self.sealing(token):
                loop = asyncio.get_running_loop()
                sealed = await loop.run_in_executor(self._checkers, self._verify_and_seal, whole, expected)
        finally:
            self._decoding.give_back(size_bytes)
        self._journal.remember(token, sealed)
        await self.count(token, report, expected)

    @contextmanager
    def sealing(self, token: str) -> Iterator[None]:
        """Record a refusal of the update that the block checks and seals."""
        try:
            yield
        except StorageError:
            # A round that has closed meanwhile has swept its uploads away: that is no fault of the disk.
            if not self._run.takes_update(token):
                raise RoundClosed("the round of this task has ended") from None
            raise
        except UpdateRefused as error:
            self._shell.reject(token, str(error))
            raise

    async def count(self, token: str, report: Report, expected: ExpectedUpdate) -> None:
        """Count a durable update. Raises `RoundClosed` when it came too late, and removes it."""
        try:
            self._count(token, report, expected.weighing)
        except RoundClosed:
            await asyncio.to_thread(self._journal.discard, [token])
            raise

    def _count(self, token: str, report: Report, weighing: Weighing) -> None:
        """Count a durable update. Raises `RoundClosed` when it came too late."""
        round_ = self._run.round_of(token)
        worker = round_.worker_of(token)
        # Only a leaf's weight depends on who else is here, and to list a thousand workers takes a millisecond.
        here = round_.state.workers if report.merged_updates else ()
        weight = weighing.weight_of(round_.kind, worker, report, here)
        self._shell.apply(UpdateAccepted(token, weight, report))
        about = {"round": round_.number, "worker": worker}
        self._log.info("update accepted", **about, examples=report.example_count, bytes=report.upload_bytes)
        if report.unchanged:
            self._log.warning("training changed nothing", **about)

    def _verify_and_seal(self, whole: Callable[[], WholeUpload], expected: ExpectedUpdate) -> StoredUpdate:
        """Return the accepted update. Raises `UpdateRefused` for good, `CorruptError` and `StorageError`."""
        upload = whole()
        stored = upload.finish()
        try:
            with self._checking:
                verify(stored, expected)
        except (CodecError, UpdateRefused) as error:
            upload.discard()
            # The digest matches, so these are the bytes that were sent: `CorruptError` would ask for them again.
            raise UpdateRefused(str(error)) from error
        return upload.seal()
