"""Delivery of spooled updates to the aggregator.

The rule: an update is sent until the aggregator acknowledges it as durable, or refuses it for good. Every try
starts at the byte that the aggregator asks for. Sending again what has arrived is harmless.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import structlog

from fedgrpc import tracing
from fedgrpc.aio import Interrupted, run_until_interrupted
from fedgrpc.codec.payload import Read, verify_digest
from fedgrpc.errors import (
    CorruptError,
    Exhausted,
    FedgrpcError,
    LinkError,
    NameTaken,
    RoundClosed,
    TooLargeError,
    UpdateRefused,
    WrongOffset,
)
from fedgrpc.protocol.devices import Activity
from fedgrpc.protocol.records import timings_to_proto
from fedgrpc.protocol.tasks import task_from_proto
from fedgrpc.protocol.tensors import manifest_from_proto
from fedgrpc.rounds.history import Timings
from fedgrpc.v1 import round_pb2
from fedgrpc.worker.client import AggregatorClient
from fedgrpc.worker.secure_memory import SecureMemory
from fedgrpc.worker.spool import Spool, SpooledUpdate
from fedgrpc.worker.status import StatusPublisher
from fedgrpc.worker.update_pushes import Pushed

_TRIES: Final = 3
# A floor for the aggregator's retry delay: one of zero must not make a busy loop.
_LEAST_WAIT_S: Final = 0.05

# Keeps a task's lease until the task must stop, then returns why.
Beat = Callable[[str], Coroutine[Any, Any, str]]

log = structlog.get_logger()


class Delivery:
    """Sends the updates of one spool, one at a time."""

    def __init__(
        self,
        client: AggregatorClient,
        spool: Spool,
        publisher: StatusPublisher,
        beat: Beat,
        secure: SecureMemory | None = None,
        only_secure: bool = False,
    ) -> None:
        """`secure` has what this device fixed of secure sums; `only_secure`: it sends no other training."""
        self._secure = secure
        self._only_secure = only_secure
        self._client = client
        self._spool = spool
        self._publisher = publisher
        self._beat = beat
        self._began: tuple[str, float] = ("", 0.0)

    async def deliver(self, update: SpooledUpdate, moved: Callable[[float], None], new: bool = False) -> bool:
        """Send until acknowledged (True), or refused for good and dropped (False). `new`: it was never sent.

        Raises:
            LinkError, Exhausted, ...: it may be taken later; the update stays in the spool.
        """
        # The time of an upload is that of all its sessions.
        if self._began[0] != update.token:
            self._began = (update.token, time.monotonic())
        try:
            await self._send(update, moved, new)
        except FedgrpcError as error:
            # A refused name, also of a copied folder, says nothing against the update: keep it for the next start.
            if error.retryable or isinstance(error, NameTaken):
                raise
            await asyncio.to_thread(self._spool.drop, update)
            self._publisher.show(last_error=str(error))
            self._log_of(update).warning("update refused", reason=str(error))
            return False
        await asyncio.to_thread(self._spool.acknowledge, update)
        self._show_acknowledged(update)
        return True

    async def _send(self, update: SpooledUpdate, moved: Callable[[float], None], new: bool) -> None:
        self._publisher.enter(Activity.UPLOADING)
        masked = update.task.HasField("secure")
        if self._only_secure and not masked and update.task.kind == round_pb2.TASK_KIND_TRAIN:
            # Of a former process, which had another setting.
            raise UpdateRefused("this device sends no update that is not masked: its --only-secure")
        if self._secure is not None and masked:
            await asyncio.to_thread(_fix_masked, self._secure, update)
        try:
            await run_until_interrupted(self._push(update, moved, new), self._beat(update.token))
        except Interrupted as interruption:
            # A lease also ends when its update is accepted: the order to stop may have crossed the
            # acknowledgement.
            if not (await self._client.pushes.query_push(update.token)).complete:
                raise RoundClosed(str(interruption)) from interruption

    async def _push(self, update: SpooledUpdate, moved: Callable[[float], None], new: bool) -> None:
        # A new update has no bytes on the aggregator, so skip the query.
        held = Pushed(0, False) if new else await self._client.pushes.query_push(update.token)
        tries_left, wait_s = _TRIES, held.retry_after_s
        with update.reader() as read:
            while not held.complete:
                if not tries_left:
                    raise LinkError("the aggregator took the update's last byte but does not acknowledge it")
                if wait_s:
                    self._log_of(update).info("upload waits for a slot", wait_s=round(wait_s, 2))
                    await asyncio.sleep(wait_s)
                tries_left -= 1
                try:
                    if await self._client.pushes.push(update.header, read, held.committed_size_bytes, moved):
                        return
                except Exhausted as refusal:
                    if refusal.retry_after_s is None:
                        raise
                    # A refusal that names a delay is no failure and counts as no try. Waiting needs no bound of
                    # its own, since the heartbeats run meanwhile and end it with the round.
                    tries_left, wait_s = tries_left + 1, max(refusal.retry_after_s, _LEAST_WAIT_S)
                    continue
                except (WrongOffset, CorruptError) as error:
                    await self._explain(error, update, read, tries_left)
                except TooLargeError:
                    # An aggregator that was restarted may take smaller chunks than the former one.
                    if not await self._client.takes_smaller_chunks():
                        raise
                held = await self._client.pushes.query_push(update.token)
                wait_s = held.retry_after_s

    async def _explain(
        self, error: WrongOffset | CorruptError, update: SpooledUpdate, read: Read, tries_left: int
    ) -> None:
        """Return if another try may help; raise if it cannot, or the tries are used up.

        Raises:
            CorruptError: the payload on this disk is itself corrupt, or never arrives intact.
            LinkError: the aggregator's offset and ours do not meet; a later session asks again.
        """
        if isinstance(error, CorruptError):
            # The bytes were damaged on this disk or on the way. Only a damaged disk makes another try useless.
            await asyncio.to_thread(verify_digest, manifest_from_proto(update.header.manifest), read)
            if not tries_left:
                raise error
        elif not tries_left:
            raise LinkError(f"the upload's offset is not the aggregator's: {error}") from error

    def _show_acknowledged(self, update: SpooledUpdate) -> None:
        timings = Timings(
            download_s=update.header.timings.download_seconds,
            local_s=update.header.timings.local_seconds,
            upload_s=time.monotonic() - self._began[1],
        )
        self._publisher.show(last_timings=timings, last_error="")
        tracing.task_delivered(
            *(update.task.run_id, update.task.round, update.token),
            *(update.header.worker, timings_to_proto(timings)),
        )
        self._log_of(update).info(
            "update acknowledged",
            bytes=update.size_bytes,
            examples=update.header.example_count,
            download_s=round(timings.download_s, 3),
            local_s=round(timings.local_s, 3),
            upload_s=round(timings.upload_s, 3),
        )

    def _log_of(self, update: SpooledUpdate) -> Any:
        task = task_from_proto(update.task)
        return log.bind(run=task.run, round=task.round, worker=update.header.worker)


def _fix_masked(memory: SecureMemory, update: SpooledUpdate) -> None:
    """Fix that this update has the masks of its task, before a byte of it is sent.

    Raises `UpdateRefused` once another has.
    """
    digest = manifest_from_proto(update.header.manifest).digest
    memory.fix(update.token, memory.of(update.token).with_masked(digest))
