"""The worker's side of the `Aggregator` service: domain types in and out, domain errors raised.

    AggregatorClient   registration, polls and what a worker tells of itself and its task; it has
      pushes             updates (`update_pushes`)
      pulls              models (`model_pulls`)
      releases           calls about releases (`release_calls`)

Each call stands alone: nothing here retries (`fedgrpc.worker.caller`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from fedgrpc import tracing
from fedgrpc.codec.encoding import ENCODING_NAMES
from fedgrpc.errors import LayoutError, LinkError
from fedgrpc.privacy.one_time_keys import PublicKeys
from fedgrpc.protocol.descriptions import ModelDescription, description_to_proto
from fedgrpc.protocol.devices import DeviceProfile, profile_to_proto
from fedgrpc.protocol.durations import duration_from_proto, duration_to_proto
from fedgrpc.protocol.secure import keys_to_proto, names_from_proto, parts_from_proto, parts_to_proto
from fedgrpc.protocol.tasks import Registration, Task, WorkerRole, registration_from_proto, task_from_proto
from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rpc.identity import Session
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import aggregator_pb2, aggregator_pb2_grpc, device_pb2, privacy_pb2, round_pb2, tensor_pb2
from fedgrpc.worker.caller import CALL_S, WAIT_MARGIN_S, Caller, one_line
from fedgrpc.worker.held_model import HeldModel
from fedgrpc.worker.model_pulls import ModelPulls
from fedgrpc.worker.release_calls import ReleaseCalls
from fedgrpc.worker.side_streams import Dial
from fedgrpc.worker.task_stream import TaskStream
from fedgrpc.worker.throttle import Throttle
from fedgrpc.worker.update_pushes import UpdatePushes


@dataclass(frozen=True)
class HeldOfRun:
    """Model of one run that a device holds, number of its new examples, and keys for the next secure sum."""

    run_id: str
    model: HeldModel | None
    new_examples: int | None
    keys: PublicKeys | None


@dataclass(frozen=True)
class Polled:
    """Answer to a poll: a task, a run to get ready for, a question, none now, or none ever (`run_ended`)."""

    task: Task | None
    message: aggregator_pb2.Task | None
    run_ended: bool
    introduce: aggregator_pb2.RunTerms | None = None
    question: privacy_pb2.SecureQuestion | None = None


@dataclass(frozen=True)
class Told:
    """Answer to a device in a secure sum; not `ready`: the wait was over first."""

    ready: bool
    roster: frozenset[str]
    parts: Mapping[str, bytes]


@dataclass(frozen=True)
class HeartbeatReply:
    """Answer to a heartbeat."""

    cancel: bool
    reason: str
    time_left_s: float | None


class AggregatorClient:
    """Calls of one worker over one channel."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        worker: str,
        throttle: Throttle | None = None,
        stall_s: float = 300.0,
        encodings: Sequence[str] = ENCODING_NAMES,
        clock: Callable[[], float] = time.monotonic,
        session: Session | None = None,
    ) -> None:
        self._own_metadata = () if session is None else session.metadata
        self.caller = Caller(worker, self._own_metadata, stall_s)
        self._encodings = encodings
        self._introduced_as: tuple[DeviceProfile, WorkerRole, Collection[str], bool] | None = None
        throttle = throttle or Throttle()
        self.pushes = UpdatePushes(self.caller, throttle, clock)
        self.pulls = ModelPulls(self.caller, throttle, clock)
        self.releases = ReleaseCalls(self.caller)
        self._tasks: TaskStream | None = None
        self.use(channel)

    def use(self, channel: grpc.aio.Channel, dial: Dial | None = None) -> None:
        """Make further calls over this channel. Those in progress stay on theirs.

        `dial` opens another channel to the same aggregator, for large updates over long round trips.
        """
        self._stub: Any = aggregator_pb2_grpc.AggregatorStub(channel)  # type: ignore[no-untyped-call]
        if self._tasks is not None:
            self._tasks.close()
        self._tasks = TaskStream(self._stub.PollTasks, self._own_metadata)
        self.pushes.use(channel, dial)
        self.pulls.use(channel)
        self.releases.use(channel)

    async def register(
        self, profile: DeviceProfile, role: WorkerRole, parts: Collection[str] = (), many_runs: bool = False
    ) -> Registration:
        """Register this device, which can do these parts of a local-model plan. Idempotent.

        `many_runs`: it serves every run that it is eligible for.
        """
        request = aggregator_pb2.RegisterRequest(
            worker=self.caller.worker,
            role=role.value,
            device=profile_to_proto(profile),
            encodings=self._encodings,
            compressions=[tensor_pb2.COMPRESSION_NONE, tensor_pb2.COMPRESSION_ZSTD],
            local_model_parts=sorted(parts),
            many_runs=many_runs,
        )
        with domain_errors():
            registration = registration_from_proto(
                await self._stub.Register(request, metadata=self.caller.metadata, timeout=CALL_S)
            )
        self.pushes.max_chunk_bytes = registration.max_chunk_bytes
        self._introduced_as = profile, role, parts, many_runs
        return registration

    async def describe(self, description: ModelDescription, run_id: str = "", refusal: str = "") -> None:
        """Tell what this device knows of the model of a run, or why it takes no tasks of it. Idempotent."""
        request = description_to_proto(self.caller.worker, description)
        request.run_id, request.refusal = run_id, one_line(refusal)
        with domain_errors():
            await self._stub.DescribeModel(request, metadata=self.caller.metadata, timeout=CALL_S)

    async def takes_smaller_chunks(self) -> bool:
        """Register again; return whether the aggregator, perhaps restarted, now takes smaller chunks."""
        before = self.pushes.max_chunk_bytes
        if self._introduced_as is not None:
            await self.register(*self._introduced_as)
        return self.pushes.max_chunk_bytes < before

    async def poll(
        self,
        wait_s: float,
        held: HeldModel | None,
        new_examples: int | None = None,
        others: Collection[HeldOfRun] = (),
        conditions: device_pb2.DeviceConditions | None = None,
        keys: PublicKeys | None = None,
    ) -> Polled:
        """Wait up to `wait_s` for a task; raises UnknownWorker when the aggregator wants a registration.

        `held`, `new_examples` and `keys` are of the aggregator's own run, `others` of each further one.
        """
        request = aggregator_pb2.PollTaskRequest(
            worker=self.caller.worker,
            wait=duration_to_proto(wait_s),
            new_examples=new_examples,
            model_bytes=self.pulls.along_bytes,
        )
        if held is not None:
            request.held_version = held.version
            request.held_digest = held.origin_digest
        if keys is not None:
            request.one_time_keys.CopyFrom(keys_to_proto(keys))
        for run in others:
            told = request.held.add(run_id=run.run_id, new_examples=run.new_examples)
            if run.keys is not None:
                told.one_time_keys.CopyFrom(keys_to_proto(run.keys))
            if run.model is not None:
                told.held_version, told.held_digest = run.model.version, run.model.origin_digest
        if conditions is not None:
            request.conditions.CopyFrom(conditions)
        assert self._tasks is not None
        try:
            reply = await self._tasks.poll(request, wait_s + WAIT_MARGIN_S)
        except LinkError:
            self.pulls.note_lost_poll()
            raise
        if not reply.HasField("task"):
            introduce = reply.introduce if reply.HasField("introduce") else None
            question = reply.question if reply.HasField("question") else None
            return Polled(None, None, reply.run_ended, introduce, question)
        given = reply.task
        self.pulls.keep_along(given.token, reply.model if reply.HasField("model") else None)
        self.caller.metadata = (*self._own_metadata, *tracing.metadata(given.run_id, given.round, given.token))
        try:
            return Polled(task_from_proto(reply.task), reply.task, reply.run_ended)
        except LayoutError as error:
            await self.report_failure(reply.task.token, str(error))
            return Polled(None, None, reply.run_ended)

    async def heartbeat(self, token: str, phase: TaskPhase, progress: float) -> HeartbeatReply:
        """Extend the lease; raises UnknownTask when it is gone."""
        request = aggregator_pb2.HeartbeatRequest(
            worker=self.caller.worker, token=token, phase=round_pb2.TaskPhase.Name(phase.value), progress=progress
        )
        with domain_errors(), self.pushes.sides.timed_call():
            reply = await self._stub.Heartbeat(request, metadata=self.caller.metadata, timeout=CALL_S)
        time_left_s = duration_from_proto(reply.time_left) if reply.HasField("time_left") else None
        return HeartbeatReply(reply.cancel, reply.reason, time_left_s)

    async def exchange(self, token: str, kind: str, parts: Mapping[str, bytes], wait_s: float) -> Told:
        """Send "shares", "proofs" or "answers" of a secure sum; return what the aggregator then tells."""
        request = aggregator_pb2.ExchangePartsRequest(
            worker=self.caller.worker,
            token=token,
            wait=duration_to_proto(wait_s),
            **{kind: parts_to_proto(parts)},
        )
        with domain_errors():
            reply = await self._stub.ExchangeParts(
                request, metadata=self.caller.metadata, timeout=wait_s + WAIT_MARGIN_S
            )
        return Told(reply.ready, names_from_proto(reply.roster), parts_from_proto(reply.parts))

    async def report_failure(self, token: str, reason: str, timeout_s: float = CALL_S) -> None:
        """Give a task back; `reason` is one line for the operator."""
        reason = one_line(reason)
        request = aggregator_pb2.ReportFailureRequest(worker=self.caller.worker, token=token, reason=reason)
        with domain_errors():
            await self._stub.ReportFailure(request, metadata=self.caller.metadata, timeout=timeout_s)

    async def leave(self, timeout_s: float) -> None:
        """Tell the aggregator that this worker ends; raises UnknownWorker when the aggregator does not know it."""
        with domain_errors():
            await self._stub.Leave(
                aggregator_pb2.LeaveRequest(worker=self.caller.worker),
                metadata=self.caller.metadata,
                timeout=timeout_s,
            )
