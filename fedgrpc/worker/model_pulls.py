"""Pulls of models: along with a task where the model is small, otherwise as a stream that resumes at any byte.

The rule: a model may come along with its task if the link carries it at once, as the last streams showed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import grpc.aio

from fedgrpc.aio import BatchPipeline
from fedgrpc.codec.chunk import FIRST_CHUNK_BYTES, LARGE_CHUNK_BYTES, Chunk
from fedgrpc.errors import CorruptError, LinkError, WrongOffset
from fedgrpc.protocol.tensors import chunk_from_proto
from fedgrpc.rpc import framing
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import aggregator_pb2, models_pb2
from fedgrpc.worker.caller import Caller, Moved, Report, cancelled_on_exit, ignore
from fedgrpc.worker.held_model import HeldModel, Source
from fedgrpc.worker.model_folder import ModelFolder, PartialModel
from fedgrpc.worker.throttle import Pacer, Throttle

# A model comes along with its task if the link carries it in this time.
_ALONG_S: Final = 0.5


class ModelPulls:
    """Downloads the models of one worker. `use` gives it a channel, first of all."""

    def __init__(self, caller: Caller, throttle: Throttle, clock: Callable[[], float]) -> None:
        self._caller = caller
        self._throttle = throttle
        self._clock = clock
        # The most bytes of a model that may come along with the next task.
        self.along_bytes = FIRST_CHUNK_BYTES
        # The model that came along with the last task, under the task's token.
        self._along: tuple[str, aggregator_pb2.TaskModel] | None = None

    def use(self, channel: grpc.aio.Channel) -> None:
        """Make further calls over this channel. Those in progress stay on theirs."""
        self._pull_model = framing.pull_model(channel)
        self._pull_version = framing.pull_version(channel)

    def keep_along(self, token: str, model: aggregator_pb2.TaskModel | None) -> None:
        """Keep the model that came along with a task, if one did, until it is pulled; forget the one before."""
        self._along = None if model is None else (token, model)

    def note_lost_poll(self) -> None:
        """Ask for a smaller model along with the next task: a lost answer may have been too large for the link."""
        self.along_bytes = min(self.along_bytes, FIRST_CHUNK_BYTES) // 4

    async def pull(
        self, folder: ModelFolder, source: Source, token: str = "", report: Report = ignore
    ) -> HeldModel:
        """Download a task's model into `folder`, from the byte where the last attempt stopped, unless it is held.

        `token` is that of the task; without one the version of `source`, given by a release, comes raw.

        Raises:
            LinkError: the connection was lost; the bytes received are kept, and the next call resumes there.
            CorruptError: a chunk or the whole payload does not match; the next call resumes or starts over.
            UnknownTask, RoundClosed, NotFound: the aggregator has no such task any more, or no such version.
            LayoutError, TooLargeError: the manifest is refused.
        """
        along, self._along = self._along, None
        if along is not None and token and along[0] == token:
            with suppress(CorruptError, WrongOffset):
                if (taken := await self._taken_along(along[1], folder, source, report)) is not None:
                    return taken
        offset = await asyncio.to_thread(folder.partial_size_bytes, source) if folder.has_partial else 0
        try:
            return await self._pull_from(folder, source, token, offset, report)
        except WrongOffset:
            if not offset:
                raise
        # The aggregator's payload is another than the one whose first bytes are kept here.
        await asyncio.to_thread(folder.drop_partial)
        return await self._pull_from(folder, source, token, 0, report)

    async def _taken_along(
        self, model: aggregator_pb2.TaskModel, folder: ModelFolder, source: Source, report: Report
    ) -> HeldModel | None:
        """Store the model that came along with its task; None: it has to be pulled. Raises as `pull`."""
        header, base = model.header, folder.base_for(source)
        if base is not None and header.base_version == base.version == source.version:
            return base
        if header.base_version and (base is None or base.version != header.base_version):
            return None

        def store() -> HeldModel:
            partial = folder.open_partial(source, header, 0)
            try:
                partial.append([chunk_from_proto(model.chunk)])
            finally:
                partial.close()
            return folder.finish(partial)

        await Pacer(self._throttle.link_bits_per_second).wait(len(model.chunk.data), ignore)
        held = await asyncio.to_thread(store)
        report(1.0)
        return held

    async def _pull_from(
        self, folder: ModelFolder, source: Source, token: str, offset: int, report: Report
    ) -> HeldModel:
        """Pull one stream from `offset`. Raises WrongOffset when its payload is not the one kept here."""
        base = folder.base_for(source) if token else None
        with domain_errors():
            async with (
                self._caller.stall_guard() as moved,
                cancelled_on_exit(self._model_stream(source, token, base, offset)) as call,
            ):
                header = _header_of(await call.read())
                if base is not None and header.base_version == base.version == source.version:
                    return base
                partial = await asyncio.to_thread(folder.open_partial, source, header, offset)
                begun_s = self._clock()
                try:
                    await self._receive(call, partial, moved, report)
                finally:
                    partial.close()
                self._note_rate(partial.size_bytes - offset, self._clock() - begun_s)
        return await asyncio.to_thread(folder.finish, partial)

    def _model_stream(self, source: Source, token: str, base: HeldModel | None, offset: int) -> Any:
        if not token:
            released = models_pb2.PullVersionRequest(
                run=source.run, version=source.version, worker=self._caller.worker, offset=offset
            )
            return self._pull_version(released, metadata=self._caller.metadata)
        request = aggregator_pb2.PullModelRequest(worker=self._caller.worker, token=token, offset=offset)
        if base is not None:
            request.base_version, request.base_digest = base.version, base.origin_digest
        return self._pull_model(request, metadata=self._caller.metadata)

    async def _receive(self, call: Any, partial: PartialModel, moved: Moved, report: Report) -> None:
        pacer = Pacer(self._throttle.link_bits_per_second)
        async with BatchPipeline(partial.append) as pipeline:
            while (chunk := await call.read()) is not grpc.aio.EOF:
                if not isinstance(chunk, Chunk):
                    raise CorruptError("a second header came within a model stream")
                await pacer.wait(len(chunk.data), moved)
                await pipeline.put(chunk)
                moved(0)
                # A payload of no bytes has no chunks: `append` refuses this one. Do not divide by zero before.
                report(partial.size_bytes / max(1, partial.manifest.size_bytes))
            await pipeline.drain()
        if partial.size_bytes < partial.manifest.size_bytes:
            raise LinkError("the model stream ended early")

    def _note_rate(self, size_bytes: int, took_s: float) -> None:
        """Note how fast a model came: the next one may come along with its task where the link carries it at once.

        Nobody sees how long a model takes that comes with the answer to a poll, so T_download lacks that.
        """
        carried = min(LARGE_CHUNK_BYTES, int(_ALONG_S * size_bytes / max(took_s, 1e-3)))
        # What is smaller tells of the round trip, too: the link carries more.
        self.along_bytes = carried if size_bytes >= FIRST_CHUNK_BYTES else max(carried, self.along_bytes)


def _header_of(message: Any) -> aggregator_pb2.ModelHeader:
    kinds = (aggregator_pb2.PullModelResponse, models_pb2.PullVersionResponse)
    if not isinstance(message, kinds) or not message.HasField("header"):
        raise LinkError("the model stream came without its header")
    return message.header
