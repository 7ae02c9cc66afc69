"""The `Models` service: protobuf in, `RunModels` of each run behind it, protobuf out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import Final

import grpc.aio

from fedgrpc import claims
from fedgrpc.aggregator.negotiation import RAW
from fedgrpc.aggregator.payload_encoder import Pull
from fedgrpc.aggregator.registry import WorkerRegistry
from fedgrpc.aggregator.run_models import RunModels
from fedgrpc.aggregator.sessions import Sessions, check_speaker
from fedgrpc.aggregator.views import fitting
from fedgrpc.aio import Changes
from fedgrpc.errors import NotFound, UsageError, WrongIdentity, WrongOffset
from fedgrpc.identity.roles import DEVICE_ROLES
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.protocol.records import metrics_from_proto, version_to_proto
from fedgrpc.protocol.releases import release_to_proto, report_to_proto, wanted_to_proto
from fedgrpc.rpc.admission import caller, note
from fedgrpc.runs.conditions import Condition
from fedgrpc.runs.task_context import Downlink
from fedgrpc.v1 import models_pb2 as pb
from fedgrpc.v1 import models_pb2_grpc

_DAY_S: Final = 86_400.0
_WITHIN: Final = 10
_CANARY: Final = "10%"
_MAX_NUMBER: Final = (1 << 63) - 1


class ModelService(models_pb2_grpc.ModelsServicer):
    """Each method is one RPC of models.proto, which says what it does and how it fails."""

    def __init__(
        self,
        runs: Callable[[], Iterable[RunModels]],
        fleet: WorkerRegistry,
        sessions: Sessions,
        clock: Callable[[], float],
        changes: Changes,
        poll_wait_s: float,
    ) -> None:
        """`runs` are those that the aggregator has; `changes` tells when devices are to serve something else."""
        self._runs = runs
        self._fleet = fleet
        self._sessions = sessions
        self._clock = clock
        self._changes = changes
        self._poll_wait_s = poll_wait_s

    def _find(self, name: str) -> RunModels:
        runs = [run for run in self._runs() if not name or run.is_called(name)]
        if len(runs) == 1:
            return runs[0]
        if runs:
            raise UsageError(f"there are {len(runs)} runs here: name one, as in {runs[0].name}@best")
        raise NotFound(f"there is no run {name[:80]!r} here" if name else "there is no run here")

    async def ListVersions(
        self, request: pb.ListVersionsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListVersionsResponse:
        run = self._find(request.run)
        versions = run.coordinator.machine.versions
        there = [number for number in versions if (known := versions.get(number)) and known.sha256]
        records = await asyncio.to_thread(lambda: [_record(run, number) for number in there])
        return pb.ListVersionsResponse(**_about(run), versions=(each for each in records if each is not None))

    async def GetVersion(
        self, request: pb.GetVersionRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetVersionResponse:
        run = self._find(request.run)
        number = run.number_of(request.version)
        record = await asyncio.to_thread(_record, run, number)
        if record is None:
            raise NotFound(f"version {number} is kept no more; see `fedgrpc model list`")
        return pb.GetVersionResponse(**_about(run), version=record)

    async def PullVersion(
        self, request: pb.PullVersionRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[bytes]:
        run = self._find(request.run)
        self._check_may_pull(run, request, context)
        models = run.coordinator.encoded_models
        encoded = await models.get(Pull(min(request.version, _MAX_NUMBER), Downlink(RAW)))
        size_bytes = encoded.manifest.size_bytes
        if request.offset > size_bytes:
            raise WrongOffset(f"offset {request.offset} is beyond the payload of {size_bytes} bytes")
        # Header and chunks have the same numbers in both messages.
        yield encoded.header
        if encoded.payload is None:
            return
        async with aclosing(models.chunk_cache.messages(encoded.payload, request.offset)) as messages:
            async for message in messages:
                yield message
                # The generator would hold it until the next one is there.
                del message

    def _check_may_pull(
        self, run: RunModels, request: pb.PullVersionRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Raise `WrongIdentity` for a device that is to serve another version."""
        identity = caller()
        if not request.worker and (identity.local or identity.role not in DEVICE_ROLES):
            return
        self._check_device(request.worker, context)
        wanted = run.wanted(request.worker)
        if wanted is None or wanted.version != request.version:
            raise WrongIdentity(f"no release gives version {request.version} to {request.worker[:80]!r}")

    async def TagVersion(
        self, request: pb.TagVersionRequest, context: grpc.aio.ServicerContext
    ) -> pb.TagVersionResponse:
        run = self._find(request.run)
        if request.remove:
            await run.remove_tag(request.tag)
        else:
            await run.tag(request.version, request.tag)
            note(version=str(run.tags.get(request.tag, "")))
        return pb.TagVersionResponse()

    async def StartRelease(
        self, request: pb.StartReleaseRequest, context: grpc.aio.ServicerContext
    ) -> pb.StartReleaseResponse:
        run = self._find(request.run)
        after_s = duration_from_proto(request.after)
        within_s = duration_from_proto(request.within) if request.HasField("within") else None
        release = await run.start(
            *(
                request.version,
                request.canary or _CANARY,
                tuple(map(Condition.parse, request.conditions)),
                after_s,
            ),
            max(_DAY_S, _WITHIN * after_s) if within_s is None else within_s,
            str(caller()),
        )
        note(release=str(release.number), number=str(release.version))
        return pb.StartReleaseResponse(release=release_to_proto(release, run.name))

    async def AbortRelease(
        self, request: pb.AbortReleaseRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortReleaseResponse:
        run = self._find(request.run)
        release = await run.abort(min(request.number, _MAX_NUMBER), claims.REASON.cleaned(request.reason))
        note(release=str(release.number))
        return pb.AbortReleaseResponse(release=release_to_proto(release, run.name))

    async def ListReleases(
        self, request: pb.ListReleasesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListReleasesResponse:
        run = self._find(request.run)
        if request.number:
            found = await run.release(min(request.number, _MAX_NUMBER))
            message = release_to_proto(found, run.name)
            # The canaries first: of a large fleet not all fit.
            names = sorted(found.reports, key=lambda name: (name not in found.canaries, name))
            message.reports.extend(fitting(report_to_proto(name, found.reports[name]) for name in names))
            return pb.ListReleasesResponse(releases=[message])
        releases, counts = await run.last_releases()
        messages = [release_to_proto(each, run.name) for each in releases]
        for message in messages:
            message.report_count = counts.get(message.number, 0)
        return pb.ListReleasesResponse(releases=messages)

    async def FollowReleases(
        self, request: pb.FollowReleasesRequest, context: grpc.aio.ServicerContext
    ) -> pb.FollowReleasesResponse:
        worker = request.worker
        self._check_device(worker, context)
        served = {(each.run_id, each.version, each.release) for each in request.served}
        wait_s = min(duration_from_proto(request.wait), self._poll_wait_s)
        try:
            async with asyncio.timeout(wait_s):
                while not self._stopping() and served == _keys(self._wanted(worker)):
                    await self._changes.wait(self._changes.revision)
        except TimeoutError:
            pass
        return pb.FollowReleasesResponse(wanted=self._wanted(worker))

    def _stopping(self) -> bool:
        return any(run.coordinator.stopping for run in self._runs())

    def _check_device(self, worker: str, context: grpc.aio.ServicerContext) -> None:
        """Note a call of a device. Raise unless the caller speaks for a worker that is registered."""
        check_speaker(self._fleet, self._sessions, context, worker)
        self._fleet.get(worker).heard(self._clock())

    def _wanted(self, worker: str) -> list[pb.ServedVersion]:
        """Return what the device is to serve of every run that has something for it."""
        wanted = [(run, run.wanted(worker)) for run in self._runs()]
        return [wanted_to_proto(each, run.name, run.id) for run, each in wanted if each is not None]

    async def ReportRelease(
        self, request: pb.ReportReleaseRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReportReleaseResponse:
        self._check_device(request.worker, context)
        run = self._find(request.run_id)
        scores = metrics_from_proto(request.scores)
        failure = claims.REASON.cleaned(request.failure)
        await run.report(request.worker, min(request.release, _MAX_NUMBER), scores, failure)
        return pb.ReportReleaseResponse()


def _keys(wanted: Iterable[pb.ServedVersion]) -> set[tuple[str, int, int]]:
    return {(each.run_id, each.version, each.release) for each in wanted}


def _about(run: RunModels) -> dict[str, str]:
    return {"run": run.name, "run_id": run.id, "learning_task": run.coordinator.settings.learning_task}


def _record(run: RunModels, number: int) -> pb.VersionRecord | None:
    """Return what is known of a version; None where it was let go meanwhile. Reads its file."""
    machine, models = run.coordinator.machine, run.coordinator.models
    known, best, last = machine.versions.get(number), machine.versions.best, machine.versions.last
    if known is None:
        return None
    try:
        layout = models.open(number).layout
        written_at = models.path(number).stat().st_mtime_ns
    except (NotFound, OSError):
        return None
    record = pb.VersionRecord(
        version=version_to_proto(known),
        size_bytes=sum(spec.nbytes for spec in layout),
        tags=sorted(tag for tag, tagged in run.tags.items() if tagged == number),
        best=best is not None and best.version == number,
        latest=last is not None and last.version == number,
        release=_release_of(run, number),
    )
    record.written_at.FromNanoseconds(written_at)
    return record


def _release_of(run: RunModels, number: int) -> int:
    """Return the release that gives a version to devices; 0: none does."""
    for release in (run.releases.active, run.releases.done):
        if release is not None and release.version == number:
            return release.number
    return 0
