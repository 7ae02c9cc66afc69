"""Calls about the versions of a model and their releases, and the download of a version to a file.

The rule: a file under its own name is whole, and has matched the digest that its sender declared. A download that
breaks off is continued by the next one to the same file.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, cast

from fedgrpc.codec.chunk import Chunk
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import PayloadReader, file_reader
from fedgrpc.errors import CorruptError, LinkError, NotFound, WrongOffset
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.protocol.tensors import manifest_from_proto
from fedgrpc.rpc import framing
from fedgrpc.rpc.retry import Backoff, with_retries
from fedgrpc.rpc.status import domain_errors
from fedgrpc.storage.files import storage_errors
from fedgrpc.storage.model_file import write_model
from fedgrpc.storage.resumable import ResumableFile, committed_bytes
from fedgrpc.v1 import models_pb2 as pb
from fedgrpc.v1 import models_pb2_grpc, worker_pb2, worker_pb2_grpc
from fedgrpc.v1.aggregator_pb2 import ModelHeader

_TIMEOUT_S: Final = 30.0
_TRIES: Final = 8
_AGAIN: Final = Backoff(first_s=0.2, cap_s=10.0)
# A stream without a byte for this long has a peer that hangs.
_STALL_S: Final = 300.0

# Streams a model from an offset: its header, then chunks.
Stream = Callable[[int], AsyncGenerator[ModelHeader | Chunk]]
Progress = Callable[[int, int], None]


class ModelClient:
    """Calls of the service `Models`. Raises as `Client`, and what models.proto says of each call."""

    def __init__(self, channel: Any, reaching: Callable[[], AbstractContextManager[None]]) -> None:
        self._stub: Any = models_pb2_grpc.ModelsStub(channel)  # type: ignore[no-untyped-call]
        self._pull = framing.pull_version(channel)
        self._reaching = reaching

    async def _call(self, name: str, request: Any) -> Any:
        with self._reaching():
            return await getattr(self._stub, name)(request, timeout=_TIMEOUT_S)

    async def versions(self, run: str = "") -> pb.ListVersionsResponse:
        """Return the versions of a run that are kept."""
        return cast(pb.ListVersionsResponse, await self._call("ListVersions", pb.ListVersionsRequest(run=run)))

    async def version(self, run: str, name: str) -> pb.GetVersionResponse:
        """Return a version by its number, "latest", "best", "final" or a tag."""
        request = pb.GetVersionRequest(run=run, version=name)
        return cast(pb.GetVersionResponse, await self._call("GetVersion", request))

    async def tag(self, run: str, version: str, tag: str) -> None:
        """Give a version a tag, by which it is kept."""
        await self._call("TagVersion", pb.TagVersionRequest(run=run, version=version, tag=tag))

    async def remove_tag(self, run: str, tag: str) -> None:
        """Take a tag away."""
        await self._call("TagVersion", pb.TagVersionRequest(run=run, tag=tag, remove=True))

    async def start_release(
        self, run: str, version: str, canary: str, conditions: list[str], after_s: float, within_s: float | None
    ) -> pb.Release:
        """Begin to give a version to devices."""
        request = pb.StartReleaseRequest(
            run=run,
            version=version,
            canary=canary,
            conditions=conditions,
            after=duration_to_proto(after_s),
            within=None if within_s is None else duration_to_proto(within_s),
        )
        return cast(pb.Release, (await self._call("StartRelease", request)).release)

    async def abort_release(self, run: str, number: int, reason: str) -> pb.Release:
        """End a release in progress; 0: whichever it is."""
        request = pb.AbortReleaseRequest(run=run, number=number, reason=reason)
        return cast(pb.Release, (await self._call("AbortRelease", request)).release)

    async def releases(self, run: str) -> list[pb.Release]:
        """Return the last releases of a run, newest first, without reports."""
        return list((await self._call("ListReleases", pb.ListReleasesRequest(run=run))).releases)

    async def release(self, run: str, number: int) -> pb.Release:
        """Return a release with its reports; 0: the newest. Raises `NotFound` where nothing was released yet."""
        if not number:
            newest = await self.releases(run)
            if not newest:
                raise NotFound(f"run {run} has no release yet; `fedgrpc release start` makes one")
            number = newest[0].number
        request = pb.ListReleasesRequest(run=run, number=number)
        return cast(pb.Release, (await self._call("ListReleases", request)).releases[0])

    def stream_of(self, run: str, version: int) -> Stream:
        """Return the stream of a version, for `download`."""

        def stream(offset: int) -> AsyncGenerator[ModelHeader | Chunk]:
            request = pb.PullVersionRequest(run=run, version=version, offset=offset)
            return _messages(self._pull(request), self._reaching)

        return stream


class WorkerModels:
    """The models that a worker's own service gives to applications on its device."""

    def __init__(self, channel: Any) -> None:
        self._stub: Any = worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
        self._pull = framing.pull_served(channel)

    async def watch(self, run: str = "") -> AsyncIterator[worker_pb2.WatchModelResponse]:
        """Yield which model is served, now and whenever it changes. Raises `LinkError`."""
        with domain_errors():
            async for news in self._stub.WatchModel(worker_pb2.WatchModelRequest(run=run)):
                yield news

    def stream_of(self, run: str, digest: bytes) -> Stream:
        """Return the stream of the model with this digest, for `download`."""

        def stream(offset: int) -> AsyncGenerator[ModelHeader | Chunk]:
            request = worker_pb2.WorkerPullModelRequest(run=run, digest=digest, offset=offset)
            return _messages(self._pull(request), domain_errors)

        return stream


async def _messages(
    call: Any, errors: Callable[[], AbstractContextManager[None]]
) -> AsyncGenerator[ModelHeader | Chunk]:
    with errors():
        try:
            while True:
                async with asyncio.timeout(_STALL_S):
                    message = await anext(aiter(call), None)
                if message is None:
                    return
                yield message if isinstance(message, Chunk) else message.header
        except TimeoutError as error:
            raise LinkError(f"no byte moved for {_STALL_S:g} s") from error
        finally:
            call.cancel()


async def download(
    stream: Stream, path: Path, about: Mapping[str, str], progress: Progress = lambda done, size: None
) -> Manifest:
    """Write a model to the safetensors file `path`, with the metadata `about`; return its manifest.

    Raises what the stream raises, `CorruptError` for bytes that do not match their digest, and `StorageError`. The
    next call for the same file continues where this one stopped.
    """
    partial = path.with_name(f".{path.name}.download")

    async def attempt() -> tuple[ResumableFile, Manifest]:
        offset = await asyncio.to_thread(committed_bytes, partial)
        try:
            return await _fetch(stream, partial, offset, progress)
        except WrongOffset:
            # What is here is of another payload, which may have been longer.
            partial.unlink(missing_ok=True)
            raise

    retried = (LinkError, CorruptError, WrongOffset)
    with storage_errors(path):
        file, manifest = await with_retries(attempt, attempts=_TRIES, backoff=_AGAIN, retry_on=retried)
        await asyncio.to_thread(_write, file, manifest, path, about)
    return manifest


async def _fetch(stream: Stream, partial: Path, offset: int, progress: Progress) -> tuple[ResumableFile, Manifest]:
    """Return the whole payload. Raises `WrongOffset` where the bytes that are here are of another one."""
    async with aclosing(stream(offset)) as messages:
        header = await anext(messages, None)
        if not isinstance(header, ModelHeader):
            raise LinkError("the model stream came without its header")
        manifest = manifest_from_proto(header.manifest)
        text = header.manifest.SerializeToString(deterministic=True)
        file = ResumableFile(partial, text, manifest.size_bytes, manifest.digest, what="the model")
        with _closed_on_error(file):
            if file.size_bytes != offset:
                raise WrongOffset(f"{file.size_bytes} bytes of this payload are here, not {offset}")
            async for chunk in messages:
                if not isinstance(chunk, Chunk):
                    raise CorruptError("a second header came within a model stream")
                await asyncio.to_thread(file.append, [chunk])
                progress(file.size_bytes, manifest.size_bytes)
            if not file.complete:
                raise LinkError("the model stream ended early")
            same = not header.sha256 or await asyncio.to_thread(file.sha256) == header.sha256
            if not (file.matches_digest and same):
                file.discard()
                raise CorruptError("the model's digest is not the one its manifest declares")
    return file, manifest


@contextmanager
def _closed_on_error(file: ResumableFile) -> Iterator[None]:
    """Close the file if the block does not end as it should, also by a cancellation."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            file.close()
        raise


def _write(file: ResumableFile, manifest: Manifest, path: Path, about: Mapping[str, str]) -> None:
    """Make a model file of a payload, one tensor at a time, and remove the payload."""
    file.close()
    with file.path.open("rb") as payload:
        at = file_reader(payload.fileno())
        reader = PayloadReader(manifest, lambda offset, size: at(file.payload_start + offset, size))
        write_model(path, manifest.layout, (array for _, array in reader), about)
    file.path.unlink()
