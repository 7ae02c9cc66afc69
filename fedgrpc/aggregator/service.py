"""The `Aggregator` service: protobuf in, the coordinator and the receiver behind it, protobuf out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from itertools import islice

import grpc.aio

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.delta_bases import Held
from fedgrpc.aggregator.ingest_downloads import download_order
from fedgrpc.aggregator.negotiation import RAW, reduction_for
from fedgrpc.aggregator.payload_encoder import EncodedModel, Pull
from fedgrpc.aggregator.receiver import Receiver
from fedgrpc.aggregator.registering import Registering
from fedgrpc.aggregator.roles import check_claim
from fedgrpc.aggregator.sessions import Sessions, check_speaker
from fedgrpc.aggregator.upload_reader import UploadChunks
from fedgrpc.aggregator.views import (
    MAX_PAGE_BYTES,
    Pieces,
    RunView,
    Watching,
    fitting,
    numbers,
    page_of,
    watch_interval_s,
)
from fedgrpc.aggregator.worker_calls import WorkerCalls
from fedgrpc.codec.chunk import Chunk
from fedgrpc.codec.digest import DIGEST_BYTES
from fedgrpc.errors import FedgrpcError, LayoutError, NotFound, WrongOffset
from fedgrpc.protocol.descriptions import description_from_proto
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.protocol.tensors import chunk_from_proto
from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rpc.admission import caller, quota_key
from fedgrpc.rpc.identity import Session, peer_of
from fedgrpc.rpc.relayed_calls import RelayedCall
from fedgrpc.rpc.server_stream import send
from fedgrpc.runs.task_context import Downlink
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc

_MAX_PAGE = 1000
_AROUND_CHUNK_BYTES = 64 << 10
_MAX_ROUND = (1 << 63) - 1


class AggregatorService(aggregator_pb2_grpc.AggregatorServicer):
    """Each method is one RPC of aggregator.proto, which says what it does and how it fails."""

    def __init__(
        self,
        coordinator: Coordinator,
        sessions: Sessions,
        settings_text: Mapping[str, str],
        registering: Registering | None = None,
    ) -> None:
        self._coordinator = coordinator
        self._sessions = sessions
        self._run = coordinator.machine
        self._fleet = coordinator.fleet
        self._models = coordinator.encoded_models
        self._terms = coordinator.terms
        self._store = coordinator.store
        self._settings = coordinator.settings
        self.calls = WorkerCalls(coordinator, sessions, registering)
        self._receiver = Receiver(
            coordinator,
            coordinator.journal,
            coordinator.settings,
            coordinator.scores,
            coordinator.data_folder,
            coordinator.expected_update,
        )
        self.view = RunView(coordinator, settings_text)
        self._watching = Watching(self.view.watched, lambda: coordinator.changes.revision)
        self._pieces = Pieces()
        self.max_header_bytes = self._receiver.max_header_bytes

    @property
    def max_message_bytes(self) -> int:
        """Size of the largest message that any call needs now: gRPC collects each before anyone sees it."""
        return max(self._settings.max_chunk_bytes + _AROUND_CHUNK_BYTES, self.max_header_bytes())

    async def Register(
        self, request: pb.RegisterRequest, context: grpc.aio.ServicerContext
    ) -> pb.RegisterResponse:
        check_claim(caller(), request)
        await self.calls.register(request, Session.of(context), peer_of(context))
        return pb.RegisterResponse(
            run=self._settings.run_name,
            run_id=self._run.id,
            poll_wait=duration_to_proto(self._settings.poll_wait_s),
            heartbeat_interval=duration_to_proto(self._settings.heartbeat_s),
            lease=duration_to_proto(self._settings.policy.lease_s),
            max_chunk_bytes=self._settings.max_chunk_bytes,
            max_payload_bytes=self._settings.max_payload_bytes,
            learning_task=self._settings.learning_task,
            model=self._settings.model,
            describe_model=True,
            tell_channels=self.calls.asks_channels,
            without_metrics=not self._settings.privacy.metrics,
        )

    def _check_caller(self, context: grpc.aio.ServicerContext, worker: str) -> None:
        check_speaker(self._fleet, self._sessions, context, worker)

    async def DescribeModel(
        self, request: pb.DescribeModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.DescribeModelResponse:
        self._check_caller(context, request.worker)
        await self.calls.describe(request.worker, description_from_proto(request))
        return pb.DescribeModelResponse()

    async def model_of(self, worker: str, token: str, held: Held | None) -> EncodedModel | None:
        """Return the model of a task as a pull would bring it; None: there is none, and a pull will say why."""
        if not self._run.layout:
            return None
        try:
            return await self._models.get(self._pull_of(worker, token, held))
        except FedgrpcError:
            return None

    async def PullModel(self, request: pb.PullModelRequest, context: grpc.aio.ServicerContext) -> None:
        encoded = await self._models.get(self._pull(request, context))
        size_bytes = encoded.manifest.size_bytes
        if request.offset > size_bytes:
            raise WrongOffset(f"offset {request.offset} is beyond the payload of {size_bytes} bytes")
        await send(context, encoded.header)
        if encoded.payload is None:
            return
        if isinstance(context, RelayedCall):
            await context.do(download_order(encoded.payload, request.offset, self._settings.max_chunk_bytes))
            return
        async with aclosing(self._models.chunk_cache.messages(encoded.payload, request.offset)) as messages:
            async for message in messages:
                await send(context, message)
                # Yielded, it would be held here and by gRPC until the next one is there.
                del message

    def _pull(self, request: pb.PullModelRequest, context: grpc.aio.ServicerContext) -> Pull:
        """Return what is pulled: the model of a task, or without one a version as it is."""
        if not request.token:
            caller().check_reader()
            version = request.version or self._run.version
            if not version:
                raise NotFound("there is no model version yet")
            return Pull(version, Downlink(RAW))
        self._check_caller(context, request.worker)
        held = (request.base_version, checked_digest(request.base_digest)) if request.base_version else None
        return self._pull_of(request.worker, request.token, held)

    def _pull_of(self, worker: str, token: str, held: Held | None) -> Pull:
        version, task = self._terms.given(worker, token)
        assert task.agreed is not None
        reduction = reduction_for(self._fleet.get(worker), task.local.plan)
        return Pull(version, task.agreed.downlink, held, task.local.sub_model, reduction)

    async def Heartbeat(
        self, request: pb.HeartbeatRequest, context: grpc.aio.ServicerContext
    ) -> pb.HeartbeatResponse:
        self._check_caller(context, request.worker)
        phase = _open_phase(request.phase)
        beat = await self.calls.heartbeat(
            request.worker, request.token, phase, min(1.0, max(0.0, request.progress))
        )
        response = pb.HeartbeatResponse(cancel=beat.cancel, reason=beat.reason)
        if beat.time_left_s is not None:
            response.time_left.CopyFrom(duration_to_proto(beat.time_left_s))
        return response

    async def PushUpdate(
        self, request_iterator: AsyncIterator[pb.PushUpdateRequest | Chunk], context: grpc.aio.ServicerContext
    ) -> pb.PushUpdateResponse:
        # The chunks do not come from the iterator, which would hold each until the next one is there.
        return await self.take_update(first_message(await anext(request_iterator, None)), context)

    async def take_update(
        self, first: pb.PushUpdateRequest, context: grpc.aio.ServicerContext
    ) -> pb.PushUpdateResponse:
        """Take an update, or what a side stream has of one, whose first message has come.

        Raises as `PushUpdate` says.
        """
        if first.HasField("beside"):
            self._check_caller(context, first.beside.worker)
            await self._receiver.receive_beside(first.beside.worker, first.beside.token, UploadChunks(context))
            return pb.PushUpdateResponse()
        self._check_caller(context, first.header.worker)
        whole = chunk_from_proto(first.whole) if first.HasField("whole") else None
        size_bytes, complete = await self._receiver.receive(first.header, UploadChunks(context), whole)
        return pb.PushUpdateResponse(committed_size_bytes=size_bytes, complete=complete)

    async def QueryPush(
        self, request: pb.QueryPushRequest, context: grpc.aio.ServicerContext
    ) -> pb.QueryPushResponse:
        self._check_caller(context, request.worker)
        held = await self._receiver.held(request.worker, request.token)
        response = pb.QueryPushResponse(committed_size_bytes=held.size_bytes, complete=held.complete)
        if held.retry_after_s:
            response.retry_after.CopyFrom(duration_to_proto(held.retry_after_s))
        return response

    async def ExchangeParts(
        self, request: pb.ExchangePartsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ExchangePartsResponse:
        self._check_caller(context, request.worker)
        self._fleet.get(request.worker).heard(self._coordinator.clock())
        return await self._coordinator.secure_sums.exchange(request)

    async def ReportFailure(
        self, request: pb.ReportFailureRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReportFailureResponse:
        self._check_caller(context, request.worker)
        await self.calls.give_back(request.worker, request.token, request.reason)
        return pb.ReportFailureResponse()

    async def Leave(self, request: pb.LeaveRequest, context: grpc.aio.ServicerContext) -> pb.LeaveResponse:
        self._check_caller(context, request.worker)
        self._coordinator.leave(request.worker)
        return pb.LeaveResponse()

    async def GetRun(self, request: pb.GetRunRequest, context: grpc.aio.ServicerContext) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=self.view.run())

    async def GetRound(
        self, request: pb.GetRoundRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetRoundResponse:
        wanted, start = request.number if request.HasField("number") else None, 0
        if request.page_token:
            wanted, start = numbers(request.page_token, 2, "GetRound")
        record = self.view.round()
        if wanted is not None and (record is None or record.number != wanted):
            record = await self._coordinator.in_database(self._store.round, min(wanted, _MAX_ROUND))
        if record is None:
            raise NotFound("no round yet" if wanted is None else f"there is no round {wanted}")
        page, after = page_of(record, start, request.page_size)
        return pb.GetRoundResponse(round=page, next_page_token=f"{record.number}.{after}" if after else "")

    async def ListRounds(
        self, request: pb.ListRoundsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListRoundsResponse:
        size = min(request.page_size or 100, _MAX_PAGE)
        (below,) = numbers(request.page_token, 1, "ListRounds") if request.page_token else (_MAX_ROUND,)
        records, more = await self._coordinator.in_database(
            self._coordinator.store.rounds, below, size, MAX_PAGE_BYTES
        )
        pages = [page_of(record)[0] for record in records]
        return pb.ListRoundsResponse(rounds=pages, next_page_token=str(records[-1].number) if more else "")

    async def WatchRounds(
        self, request: pb.WatchRoundsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[bytes]:
        interval_s = watch_interval_s(request.max_rate_hz)
        seen = -1
        with self._watching.watcher(quota_key(context)):
            while True:
                await self._coordinator.changes.wait(seen)
                last = self._run.ended or self._coordinator.stopping
                seen, message = self._watching.latest(fresh=last)
                yield message
                if last:
                    return
                await asyncio.sleep(interval_s)

    async def GetPrivacy(
        self, request: pb.GetPrivacyRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetPrivacyResponse:
        return pb.GetPrivacyResponse(ledger=self.view.privacy())

    async def ListWorkers(
        self, request: pb.ListWorkersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListWorkersResponse:
        (start,) = numbers(request.page_token, 1, "ListWorkers") if request.page_token else (0,)
        listed = list(islice(self._fleet, start, start + min(request.page_size or _MAX_PAGE, _MAX_PAGE)))
        workers = fitting(await self._pieces.list_of(map(self.view.worker, listed)))
        after = start + len(workers)
        more = workers and after < len(self._fleet)
        return pb.ListWorkersResponse(workers=workers, next_page_token=str(after) if more else "")

    async def PauseRun(
        self, request: pb.PauseRunRequest, context: grpc.aio.ServicerContext
    ) -> pb.PauseRunResponse:
        await self._coordinator.pause()
        return pb.PauseRunResponse(run=self.view.run())

    async def ResumeRun(
        self, request: pb.ResumeRunRequest, context: grpc.aio.ServicerContext
    ) -> pb.ResumeRunResponse:
        await self._coordinator.resume()
        return pb.ResumeRunResponse(run=self.view.run())

    async def RollBackRun(
        self, request: pb.RollBackRunRequest, context: grpc.aio.ServicerContext
    ) -> pb.RollBackRunResponse:
        await self._coordinator.roll_back(min(request.version, _MAX_ROUND), " ".join(request.reason.split())[:500])
        return pb.RollBackRunResponse(run=self.view.run())

    async def ListRuns(
        self, request: pb.ListRunsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListRunsResponse:
        return pb.ListRunsResponse(runs=[self.view.summary()])

    async def StopRun(self, request: pb.StopRunRequest, context: grpc.aio.ServicerContext) -> pb.StopRunResponse:
        await self._coordinator.stop(" ".join(request.reason.split())[:500])
        return pb.StopRunResponse(run=self.view.run())


def first_message(message: object) -> pb.PushUpdateRequest:
    """Return the first message of a `PushUpdate`, if it may be one. Raises `LayoutError`."""
    if isinstance(message, pb.PushUpdateRequest) and message.WhichOneof("content") in ("header", "beside"):
        return message
    raise LayoutError("the first message of an update is its header, or says to which upload it is beside")


def checked_digest(digest: bytes) -> bytes:
    """A digest as a worker names it, empty for none. Raises `LayoutError` for any other size."""
    if len(digest) not in (0, DIGEST_BYTES):
        raise LayoutError(f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}")
    return digest


def _open_phase(number: int) -> TaskPhase:
    """The phase a worker may report. Raises `LayoutError` for any other."""
    try:
        phase = TaskPhase(number)
    except ValueError:
        raise LayoutError(f"unknown task phase {number}") from None
    if not phase.open:
        raise LayoutError(f"{phase.name.lower()} is not for a worker to say")
    return phase
