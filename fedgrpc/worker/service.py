"""The `Worker` service, with which the device's owner and its applications watch and steer the worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import BinaryIO, Protocol

import grpc.aio

from fedgrpc.codec.chunk import Chunk, chunks
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import file_reader
from fedgrpc.errors import NotFound, StorageError, WrongOffset
from fedgrpc.protocol.devices import status_to_proto
from fedgrpc.protocol.tensors import manifest_to_proto
from fedgrpc.rpc.framing import message_of
from fedgrpc.v1 import aggregator_pb2, worker_pb2, worker_pb2_grpc
from fedgrpc.worker.held_model import HeldModel
from fedgrpc.worker.model_folder import ModelFolder
from fedgrpc.worker.released_models import ReleasedModels
from fedgrpc.worker.status import StatusPublisher


class Steering(Protocol):
    """Controls of a worker that the service calls."""

    def pause(self) -> None:
        """Take no further task."""

    def resume(self) -> None:
        """Take tasks again."""

    def drain(self) -> None:
        """Finish the present task, then end."""


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Serves one worker's status, held model and controls."""

    def __init__(
        self, publisher: StatusPublisher, models: ModelFolder, released: ReleasedModels, steering: Steering
    ) -> None:
        self._publisher = publisher
        self._models = models
        self._released = released
        self._steering = steering
        self._making_raw = asyncio.Lock()

    async def GetStatus(
        self, request: worker_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.GetStatusResponse:
        """Return the present status."""
        return worker_pb2.GetStatusResponse(status=status_to_proto(self._publisher.status))

    async def WatchStatus(
        self, request: worker_pb2.WatchStatusRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.WatchStatusResponse]:
        """Stream the status, and every change of it."""
        async for status in self._publisher.watch():
            yield worker_pb2.WatchStatusResponse(status=status_to_proto(status))

    async def PullModel(
        self, request: worker_pb2.WorkerPullModelRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.WorkerPullModelResponse | bytes]:
        """Stream the served model in the raw recipe. The file stays readable while a newer version replaces it."""
        held, _, manifest, file = await self._opened(request.run)
        with file:
            if request.digest not in (b"", manifest.digest):
                raise NotFound("the model with that digest is served no more; ask for the present one")
            if request.offset > manifest.size_bytes:
                raise WrongOffset(f"offset {request.offset} is beyond the payload of {manifest.size_bytes} bytes")
            header = _header(held, manifest)
            yield worker_pb2.WorkerPullModelResponse(header=header)
            pieces = chunks(file_reader(file.fileno()), manifest.size_bytes, request.offset)
            while (message := await asyncio.to_thread(_next_message, pieces)) is not None:
                yield message

    async def _opened(self, run: str) -> tuple[HeldModel, int, Manifest, BinaryIO]:
        """Return what applications get, opened, and its release. Raises `NotFound` and `StorageError`."""
        while True:
            held, release = self._served(run)
            try:
                async with self._making_raw:
                    return held, release, *await asyncio.to_thread(held.open_raw)
            except StorageError:
                # A release may have been withdrawn meanwhile: then something else is served now.
                if self._served(run)[0] is held:
                    raise

    def _served(self, run: str) -> tuple[HeldModel, int]:
        """Return what applications get, and the release that gives it, 0 for none. Raises `NotFound`."""
        released = self._released.served(run) or self._released.served(self._publisher.status.run)
        held = self._models.held
        if released is not None and run in ("", released.run, released.run_id):
            if released.model is None:
                raise NotFound(f"version {released.version} is on its way to this device")
            return released.model, released.release
        if held is None or run not in ("", held.source.run, self._publisher.status.run):
            raise NotFound("this device holds no model yet; it gets one with its first task")
        return held, 0

    async def WatchModel(
        self, request: worker_pb2.WatchModelRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.WatchModelResponse]:
        """Stream which model is served, and every change of it."""
        told: worker_pb2.WatchModelResponse | None = None
        async for _ in self._publisher.watch():
            news = await self._news(request.run)
            if news != told:
                yield news
            told = news

    async def _news(self, run: str) -> worker_pb2.WatchModelResponse:
        try:
            held, release, manifest, file = await self._opened(run)
        except NotFound:
            return worker_pb2.WatchModelResponse()
        file.close()
        header = _header(held, manifest)
        return worker_pb2.WatchModelResponse(header=header, run_id=held.source.run, release=release)

    async def Pause(
        self, request: worker_pb2.PauseRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.PauseResponse:
        """Take no further task until `Resume`."""
        self._steering.pause()
        return worker_pb2.PauseResponse(status=status_to_proto(self._publisher.status))

    async def Resume(
        self, request: worker_pb2.ResumeRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ResumeResponse:
        """Take tasks again."""
        self._steering.resume()
        return worker_pb2.ResumeResponse(status=status_to_proto(self._publisher.status))

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.DrainResponse:
        """Finish the present task, then end the process."""
        self._steering.drain()
        return worker_pb2.DrainResponse(status=status_to_proto(self._publisher.status))


def _header(held: HeldModel, manifest: Manifest) -> aggregator_pb2.ModelHeader:
    """Return the header of a held model in the raw recipe, with the SHA-256 that came with it, if any."""
    return aggregator_pb2.ModelHeader(
        version=held.version, manifest=manifest_to_proto(manifest), sha256=held.record.header.sha256
    )


def _next_message(pieces: Iterator[Chunk]) -> bytes | None:
    chunk = next(pieces, None)
    return None if chunk is None else message_of(chunk)
