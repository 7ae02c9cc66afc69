"""The `Aggregator` service of a process with many runs: each call finds its run once, here, and goes on there.

Calls about tasks are of the run that their token names, calls of operators of the run that they name. What is of
the whole fleet, registrations and the list of workers, is answered here, and polls in `HostPolls`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Final

from grpc.aio import ServicerContext as Context

from fedgrpc import claims
from fedgrpc.aggregator.host_polls import CheckKeys, HostPolls
from fedgrpc.aggregator.hosted_run import HostedRun
from fedgrpc.aggregator.models_along import LEAST_BYTES
from fedgrpc.aggregator.roles import check_claim
from fedgrpc.aggregator.run_directory import RunDirectory
from fedgrpc.aggregator.run_texts import received_texts
from fedgrpc.aggregator.service import first_message
from fedgrpc.aggregator.sessions import check_speaker
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.views import numbers
from fedgrpc.codec.chunk import Chunk
from fedgrpc.errors import Exhausted, NotFound, UsageError
from fedgrpc.protocol.devices import bounded_registration
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.rpc import framing
from fedgrpc.rpc.admission import caller, note
from fedgrpc.rpc.identity import Session, is_on_this_machine, peer_of
from fedgrpc.rpc.ingest import IngestProcesses
from fedgrpc.rpc.server_stream import send
from fedgrpc.runs.events import DeviceReplaced
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc

_MAX_PAGE: Final = 1000
_ANSWERED_WITHIN_S: Final = 5.0


class HostService(aggregator_pb2_grpc.AggregatorServicer):
    """Each method is one RPC of aggregator.proto, which says what it does and how it fails."""

    def __init__(
        self,
        runs: RunDirectory,
        settings: AggregatorSettings,
        is_revoked: Callable[[str], bool],
        check_keys: CheckKeys = lambda run_id, worker, keys: None,
    ) -> None:
        """`check_keys`: see `HostPolls`."""
        self._runs = runs
        self._is_revoked = is_revoked
        self._settings = settings
        self._fleet = runs.common.fleet
        self._sessions = runs.common.sessions
        self._clock = runs.common.clock
        self._polls = HostPolls(runs, settings, check_keys)
        self.ingest: IngestProcesses | None = None

    def max_header_bytes(self) -> int:
        """Size of the largest header that an update of any run can need."""
        return max((run.service.max_header_bytes() for run in self._runs), default=0)

    # Calls of workers about the fleet.

    async def Register(self, request: pb.RegisterRequest, context: Context) -> pb.RegisterResponse:
        check_claim(caller(), request)
        bound = self._runs.bound
        if bound is None and not request.many_runs:
            raise Exhausted("there is no run here yet; try again", retry_after_s=_ANSWERED_WITHIN_S)
        self._fleet.check(request)
        if self._runs.own is not None:
            bound = self._runs.own
            replaced = await bound.service.calls.register(request, Session.of(context), peer_of(context))
        else:
            assert self._runs.registering is not None
            registration = bounded_registration(request)
            replaced = await self._runs.registering.register(registration, Session.of(context), peer_of(context))
        for run in self._runs:
            # A device that registers may have changed its mind, and its former process is gone.
            run.fleet.refusals.pop(request.worker, None)
            run.fleet.ready.discard(request.worker)
            if replaced and run is not bound:
                run.coordinator.apply(DeviceReplaced(request.worker))
            run.coordinator.wake.set()
        return self._registered(None if request.many_runs and self._runs.own is None else bound)

    def _registered(self, run: HostedRun | None) -> pb.RegisterResponse:
        settings = self._settings if run is None else run.settings
        response = pb.RegisterResponse(
            poll_wait=duration_to_proto(settings.poll_wait_s),
            heartbeat_interval=duration_to_proto(settings.heartbeat_s),
            lease=duration_to_proto(settings.policy.lease_s),
            max_chunk_bytes=settings.max_chunk_bytes,
            max_payload_bytes=settings.max_payload_bytes,
        )
        if run is not None:
            response.run, response.run_id = run.name, run.id
            response.learning_task, response.model = settings.learning_task, settings.model
            response.options.update(settings.task_options)
            response.describe_model, response.tell_channels = True, run.service.calls.asks_channels
            response.without_metrics = not settings.privacy.metrics
        return response

    async def DescribeModel(self, request: pb.DescribeModelRequest, context: Context) -> pb.DescribeModelResponse:
        check_speaker(self._fleet, self._sessions, context, request.worker)
        worker = self._fleet.get(request.worker)
        run = self._runs.of_id(request.run_id) if request.run_id else self._runs.bound
        if run is None:
            raise NotFound("there is no such run here any more")
        if request.refusal:
            run.fleet.refusals[worker.name] = claims.REASON.cleaned(request.refusal)
            run.fleet.ready.discard(worker.name)
            run.coordinator.news()
            return pb.DescribeModelResponse()
        with run.calling():
            if worker.name not in run.fleet.ready and not run.is_own:
                # Its history in this run is kept beside it, over restarts.
                store, session = run.coordinator.store, str(worker.holder.session or "")
                await run.coordinator.in_database(store.save_worker, worker.registration, session)
            response = await run.service.DescribeModel(request, context)
        run.fleet.ready.add(worker.name)
        return response

    async def PollTask(self, request: pb.PollTaskRequest, context: Context) -> pb.PollTaskResponse:
        # Nobody tells when this answer has left.
        request.model_bytes = min(request.model_bytes, LEAST_BYTES)
        with ExitStack() as sending:
            answer, model = await self._answer(request, context, sending)
            if model:
                answer.model.ParseFromString(model)
            return answer

    async def PollTasks(self, request_iterator: AsyncIterator[pb.PollTasksRequest], context: Context) -> None:
        async for request in request_iterator:
            with ExitStack() as sending:
                # Yielded, each would be held here and by gRPC until the next one is there.
                await send(context, framing.polled(*await self._answer(request.poll, context, sending)))

    async def _answer(
        self, request: pb.PollTaskRequest, context: Context, sending: ExitStack
    ) -> tuple[pb.PollTaskResponse, bytes]:
        """Return the answer to a poll of the worker that calls. Otherwise as `HostPolls.answer`."""
        check_speaker(self._fleet, self._sessions, context, request.worker)
        return await self._polls.answer(self._fleet.get(request.worker), request, sending)

    async def Leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveResponse:
        check_speaker(self._fleet, self._sessions, context, request.worker)
        self._fleet.get(request.worker)
        for run in self._runs:
            run.coordinator.leave(request.worker)
        return pb.LeaveResponse()

    # Calls of workers about a task.

    async def PullModel(self, request: pb.PullModelRequest, context: Context) -> None:
        run = self._runs.of_token(request.token) if request.token else self._runs.find(request.run)
        with run.calling():
            await run.service.PullModel(request, context)

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatResponse:
        return await self._of_task("Heartbeat", request, context)  # type: ignore[no-any-return]

    async def QueryPush(self, request: pb.QueryPushRequest, context: Context) -> pb.QueryPushResponse:
        return await self._of_task("QueryPush", request, context)  # type: ignore[no-any-return]

    async def ExchangeParts(self, request: pb.ExchangePartsRequest, context: Context) -> pb.ExchangePartsResponse:
        return await self._of_task("ExchangeParts", request, context)  # type: ignore[no-any-return]

    async def ReportFailure(self, request: pb.ReportFailureRequest, context: Context) -> pb.ReportFailureResponse:
        return await self._of_task("ReportFailure", request, context)  # type: ignore[no-any-return]

    async def _of_task(self, method: str, request: Any, context: Context) -> Any:
        run = self._runs.of_token(request.token)
        with run.calling():
            return await getattr(run.service, method)(request, context)

    async def PushUpdate(
        self, request_iterator: AsyncIterator[pb.PushUpdateRequest | Chunk], context: Context
    ) -> pb.PushUpdateResponse:
        # The first message says of which task the update is. The rest stays with gRPC.
        first = first_message(await anext(request_iterator, None))
        run = self._runs.of_token(first.header.token or first.beside.token)
        with run.calling():
            return await run.service.take_update(first, context)

    # Calls of operators.

    async def _of_run(self, method: str, request: Any, context: Context) -> Any:
        run = self._runs.find(request.run)
        with run.calling():
            return await getattr(run.service, method)(request, context)

    async def GetPrivacy(self, request: pb.GetPrivacyRequest, context: Context) -> pb.GetPrivacyResponse:
        return await self._of_run("GetPrivacy", request, context)  # type: ignore[no-any-return]

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        response: pb.GetRunResponse = await self._of_run("GetRun", request, context)
        if (ingest := self.ingest) is not None:
            response.run.ingest.CopyFrom(
                pb.IngestProcesses(
                    wanted=ingest.wanted_count,
                    serving=ingest.serving_count,
                    restarts=ingest.restarts,
                    memory_bytes=ingest.memory_bytes,
                )
            )
        return response

    async def GetRound(self, request: pb.GetRoundRequest, context: Context) -> pb.GetRoundResponse:
        return await self._of_run("GetRound", request, context)  # type: ignore[no-any-return]

    async def ListRounds(self, request: pb.ListRoundsRequest, context: Context) -> pb.ListRoundsResponse:
        return await self._of_run("ListRounds", request, context)  # type: ignore[no-any-return]

    async def PauseRun(self, request: pb.PauseRunRequest, context: Context) -> pb.PauseRunResponse:
        return await self._of_run("PauseRun", request, context)  # type: ignore[no-any-return]

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Context) -> pb.ResumeRunResponse:
        return await self._of_run("ResumeRun", request, context)  # type: ignore[no-any-return]

    async def RollBackRun(self, request: pb.RollBackRunRequest, context: Context) -> pb.RollBackRunResponse:
        return await self._of_run("RollBackRun", request, context)  # type: ignore[no-any-return]

    async def StopRun(self, request: pb.StopRunRequest, context: Context) -> pb.StopRunResponse:
        return await self._of_run("StopRun", request, context)  # type: ignore[no-any-return]

    async def WatchRounds(self, request: pb.WatchRoundsRequest, context: Context) -> AsyncIterator[bytes]:
        run = self._runs.find(request.run)
        with run.calling():
            async for message in run.service.WatchRounds(request, context):
                yield message

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Context) -> pb.ListWorkersResponse:
        try:
            run = self._runs.find(request.run)
        except (NotFound, UsageError):
            if request.run or not len(self._runs):
                raise
            run = next(iter(self._runs))
        response = await run.service.ListWorkers(request, context)
        for record in response.workers:
            self._add_fleet(record)
        return response

    def _add_fleet(self, record: pb.WorkerRecord) -> None:
        """Add to a worker's record what is of the whole fleet: which runs it serves, and whether it may call."""
        if self._is_revoked(record.worker):
            record.state = pb.WORKER_STATE_REVOKED
            return
        worker = self._fleet.find(record.worker)
        if worker is None:
            return
        record.conditions.CopyFrom(worker.conditions)
        for run in self._runs:
            if record.worker in run.coordinator.machine.leases:
                record.run, record.state = run.name, pb.WORKER_STATE_BUSY
            if refusal := run.fleet.refusal(worker):
                record.refusals[run.name] = refusal
            elif run.fleet.may_serve(worker):
                record.eligible_for.append(run.name)

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        (start,) = numbers(request.page_token, 1, "ListRuns") if request.page_token else (0,)
        size = min(request.page_size or _MAX_PAGE, _MAX_PAGE)
        runs = list(self._runs)
        listed = [self._summary(run) for run in runs[start : start + size]]
        more = start + size < len(runs)
        return pb.ListRunsResponse(runs=listed, next_page_token=str(start + size) if more else "")

    def _summary(self, run: HostedRun) -> pb.RunSummary:
        now = self._clock()
        supply = run.fleet.live_trainers(now)
        demand = run.fleet.demand(now, supply)
        summary = run.service.view.summary()
        summary.requires, summary.priority = run.settings.requires, run.settings.priority
        summary.quota = run.settings.quota or 0
        summary.eligible_workers, summary.wanted_workers = supply, demand.room
        if demand.waited_s:
            summary.waiting.CopyFrom(duration_to_proto(demand.waited_s))
        return summary

    async def SubmitRun(self, request: pb.SubmitRunRequest, context: Context) -> pb.SubmitRunResponse:
        note(run=request.name)
        run = await self._runs.submit(request.name, _texts(request.settings, context))
        return pb.SubmitRunResponse(run=run.service.view.run())

    async def SetRun(self, request: pb.SetRunRequest, context: Context) -> pb.SetRunResponse:
        name = self._runs.find(request.run).name
        run, changed = await self._runs.change(name, _texts(request.settings, context))
        note(run=name, **{f"set {key}": text for key, text in changed.items()})
        return pb.SetRunResponse(run=run.service.view.run(), changed=changed)

    async def CloneRun(self, request: pb.CloneRunRequest, context: Context) -> pb.CloneRunResponse:
        name = self._runs.find(request.run).name
        note(run=name, clone=request.name)
        run = await self._runs.clone(name, request.name, _texts(request.settings, context), request.version)
        return pb.CloneRunResponse(run=run.service.view.run())

    async def RemoveRun(self, request: pb.RemoveRunRequest, context: Context) -> pb.RemoveRunResponse:
        name = self._runs.find(request.run).name
        note(run=name)
        await self._runs.remove(name)
        return pb.RemoveRunResponse()


def _texts(settings: Iterable[pb.RunSetting], context: Context) -> dict[str, Sequence[str]]:
    """Return settings by name, which the audit log has too. Raises `UsageError`."""
    # With --insecure callers from other machines are local, too.
    texts = received_texts(settings, caller().local and is_on_this_machine(context))
    note(settings=", ".join(f"{name}={' '.join(values)}" for name, values in texts.items()))
    return texts
