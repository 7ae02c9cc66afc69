"""Rounds of a leaf: each carries out a task of the parent, and its updates become one mean.

    task.pb         the task of the present round, or of the last one
    mean.*          the mean of that round (fedgrpc.hierarchy.partial_aggregate)
    secure_bounds   bounds of the next secure sum, from the last one's mean

The rule: an interrupted round continues. It outlives this process and the link to the parent, and ends early only
when the parent no longer wants it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import structlog
from google.protobuf.message import DecodeError

from fedgrpc import claims
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.driver import Upkeep
from fedgrpc.aggregator.new_version import AcceptedUpdates
from fedgrpc.aggregator.recovery import Recovery
from fedgrpc.aggregator.secure_sums import BOUNDS, bounds_text
from fedgrpc.aggregator.task_terms import TrainingInstructions
from fedgrpc.codec.layout import Array, Layout
from fedgrpc.errors import CodecError, CorruptError, NotFinite, StorageError
from fedgrpc.hierarchy.handoff import ParentTask, TaskHandoff, VersionToScore
from fedgrpc.hierarchy.partial_aggregate import AggregateFile, Tensors, mean_tensors, own_tensors
from fedgrpc.protocol.plans import plan_table_from_proto
from fedgrpc.protocol.secure import groups_complaint
from fedgrpc.protocol.tensors import channels_from_proto
from fedgrpc.protocol.updates import report_to_proto
from fedgrpc.rounds.events import Abort
from fedgrpc.rounds.policy import RoundPolicy, TaskKind
from fedgrpc.rounds.round import Round, RoundPhase
from fedgrpc.rounds.version import Version
from fedgrpc.runs.events import ParentLeads, ParentWaits, RunPhase, VersionTaken
from fedgrpc.runs.merge import Merge
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.task_context import Report
from fedgrpc.storage.files import storage_errors, write_file
from fedgrpc.storage.model_file import write_model
from fedgrpc.storage.sealed_file import read_sealed, write_sealed
from fedgrpc.v1 import aggregator_pb2

log = structlog.get_logger()


class ParentRounds:
    """Rounds for tasks of `handoff`, in the run `run_id` of the parent. A `RoundSource` and a `TaskReceiver`."""

    def __init__(
        self,
        coordinator: Coordinator,
        upkeep: Upkeep,
        updates: AcceptedUpdates,
        *,
        handoff: TaskHandoff,
        run_id: str,
    ) -> None:
        self._coordinator = coordinator
        self._run = coordinator.machine
        self._settings = coordinator.settings
        self._upkeep = upkeep
        self._updates = updates
        folder = self._settings.data_dir / "parent"
        self._run_id = run_id
        self._mean = AggregateFile(folder)
        self._task_path = folder / "task.pb"
        self._bounds_path = folder / "secure_bounds"
        self._task = aggregator_pb2.Task()
        self._handoff = handoff
        handoff.receiver = self

    async def recover(self, recovery: Recovery) -> None:
        """See `RoundSource.recover`: with the instructions of the round in progress."""
        self._task = await asyncio.to_thread(self._read_task)
        if self._task.token:
            self._handoff.resuming = True
            self._take_instructions(self._task)
        await recovery.recover()
        self._coordinator.apply(ParentLeads(self._run_id))
        await self._coordinator.save_run()
        if self._run.round is not None and self._run.round.number != self._task.round:
            self._abandon("its task of the parent is not known any more")

    def _read_task(self) -> aggregator_pb2.Task:
        try:
            with storage_errors(self._task_path):
                text = self._task_path.read_bytes() if self._task_path.exists() else b""
            return aggregator_pb2.Task.FromString(text)
        except DecodeError as error:
            raise StorageError(f"cannot read {self._task_path}: {error}") from error

    def _take_instructions(self, task: aggregator_pb2.Task) -> None:
        """Ask workers for what the parent asks for. Raises `LayoutError`."""
        plans = plan_table_from_proto(task.leaf.local_models)
        self._coordinator.terms.instructions = TrainingInstructions.from_parent(task, self._settings)
        if self._settings.local_models.trivial:
            self._coordinator.local_models.use(plans)

    # The hand-over (`TaskReceiver`).

    def on_task(self, task: ParentTask) -> None:
        """See `TaskReceiver.on_task`."""
        if self._run.round is not None and task.token != self._task.token:
            self._abandon("the parent has another task")
        elif self._run.round is not None:
            # A round from before a restart ends in time for the parent, too.
            self._coordinator.apply(ParentWaits(task.due_at))
        self._coordinator.wake.set()

    def on_version(self) -> None:
        """See `TaskReceiver.on_version`."""
        self._coordinator.wake.set()

    def on_withdrawn(self, task: ParentTask, reason: str) -> None:
        """See `TaskReceiver.on_withdrawn`."""
        if task.token == self._task.token:
            self._abandon(reason)

    def _abandon(self, reason: str) -> None:
        if self._run.round is not None and self._run.round.may_end:
            self._coordinator.apply(Abort(reason))

    # What the driver asks for (`RoundSource`).

    async def next_round(self) -> RoundInProgress | None:
        """Return a round for the task that has no answer. Without one, count workers, and wait."""
        self._count_workers()
        parent_task = self._handoff.next_task()
        if (shown := self._handoff.take_version()) is not None:
            await self._show(*shown)
        if parent_task is None or self._run.phase is RunPhase.PAUSED:
            await self._upkeep.until(self._coordinator.clock() + self._settings.policy.lease_s)
            return None
        if (mean := await asyncio.to_thread(self._mean.load, parent_task.token)) is not None:
            self._handoff.done(parent_task.token, mean)
            return None
        if wrong := self._complaint(parent_task.task):
            self._handoff.failed(parent_task.token, wrong)
            return None
        try:
            await self._upkeep.until_stored(partial(self._accept, parent_task))
        except CodecError as error:
            self._handoff.failed(parent_task.token, str(error))
            return None
        if self._handoff.next_task() is not parent_task:
            return None
        policy = self._policy(parent_task)
        state = Round(parent_task.task.round, policy, self._coordinator.clock())
        kind, version = TaskKind(parent_task.task.kind), self._run.version
        return RoundInProgress(state, kind, version, time.time(), due_at=parent_task.due_at)

    def _complaint(self, task: aggregator_pb2.Task) -> str:
        """Say why this leaf cannot train as the parent's operator promises it to devices; "": it can."""
        trains = TaskKind(task.kind) is TaskKind.TRAIN
        return groups_complaint(task.leaf, self._settings.secure) if trains else ""

    def _count_workers(self) -> None:
        enough = self._coordinator.workers_available().live_count >= self._settings.policy.needed_idle
        if enough and self._run.phase is not RunPhase.PAUSED:
            self._handoff.enough_workers.set()
        else:
            self._handoff.enough_workers.clear()
        if self._coordinator.fleet.live_evaluators(self._coordinator.clock()):
            self._handoff.evaluators.set()
        else:
            self._handoff.evaluators.clear()

    async def _show(self, shown: VersionToScore, done: asyncio.Future[None]) -> None:
        """Make a version known to evaluators before there is a round of it, if there ever is one."""
        record = self._coordinator.records.last
        try:
            if self._run.version < shown.version:
                written_in = 0 if record is None else record.number
                keep = partial(self._keep_version, shown.version, written_in, shown.layout, shown.given)
                await self._upkeep.until_stored(keep)
        except CodecError as error:
            if not done.done():
                done.set_exception(error)
        else:
            if not done.done():
                done.set_result(None)

    async def _accept(self, parent_task: ParentTask) -> None:
        """Make the task's version this aggregator's own, and the task durable."""
        task = parent_task.task
        if TaskKind(task.kind) is not TaskKind.INITIALIZE and self._run.version != task.model_version:
            # The scores of this version come with this round's updates. They belong to the round before.
            await self._keep_version(
                task.model_version, max(0, task.round - 1), parent_task.layout, parent_task.given
            )
        self._take_instructions(task)
        local_models, layout = self._coordinator.local_models, self._run.layout
        if task.leaf.HasField("channels"):
            await asyncio.to_thread(local_models.learn, channels_from_proto(task.leaf.channels), layout)
        elif layout:
            await asyncio.to_thread(local_models.learn_told, layout)
        await asyncio.to_thread(self._write_task, task)
        self._task = task

    async def _keep_version(
        self, number: int, written_in: int, layout: Layout, given: Mapping[str, Array]
    ) -> None:
        path = self._coordinator.models.path(number)
        bounds = await asyncio.to_thread(self._read_bounds)
        about = {BOUNDS: bounds} if bounds else {}
        digest = await asyncio.to_thread(write_model, path, layout, given.values(), about)
        version = Version(number, written_in, digest, trained=number - 1)
        await self._coordinator.in_database(self._coordinator.store.save_version, version)
        self._coordinator.apply(VersionTaken(version, layout))
        # Wake evaluators that wait for something to score.
        self._coordinator.fleet.wake_all()

    def _write_task(self, task: aggregator_pb2.Task) -> None:
        with storage_errors(self._task_path):
            write_file(self._task_path, task.SerializeToString())

    def _read_bounds(self) -> str:
        """Return the bounds of the next secure sum; "": as in a first round, also where the file is damaged."""
        try:
            told = read_sealed(self._bounds_path)
        except CorruptError as error:
            log.warning("the bounds of the next secure sum begin anew", reason=str(error))
            return ""
        return "" if told is None else str(told["bounds"])

    def _write_bounds(self, means: Mapping[str, Array]) -> None:
        clip_norm = self._coordinator.terms.instructions.clip_norm
        assert clip_norm is not None
        write_sealed(self._bounds_path, {"bounds": bounds_text(means, clip_norm)})

    def _policy(self, parent_task: ParentTask) -> RoundPolicy:
        """Return this aggregator's own policy, within the time that the parent leaves."""
        policy = self._settings.policy.for_kind(TaskKind(parent_task.task.kind))
        if parent_task.due_at is None:
            return policy
        left_s = max(0.001, parent_task.due_at - self._coordinator.clock())
        timeout_s = policy.selection_timeout_s
        return replace(policy, selection_timeout_s=left_s if timeout_s is None else min(left_s, timeout_s))

    async def write(self, round_: RoundInProgress, merge: Merge) -> tuple[Version | None, Layout]:
        """See `RoundSource.write`: write the mean. Only the root makes versions."""
        header, tokens, load = self._header(round_, merge), list(merge.weights), self._updates.load
        await asyncio.to_thread(self._updates.check, round_, tokens)
        for token in tokens:
            told = load(token).header
            if told.HasField("channels") and not header.HasField("channels"):
                header.channels.CopyFrom(told.channels)
        tensors: Tensors = iter(())
        if round_.kind is TaskKind.INITIALIZE:
            tensors = own_tensors(tokens[0], load(tokens[0]))
        elif round_.kind is TaskKind.TRAIN:
            tensors = mean_tensors(self._coordinator.models.open(round_.base_version), merge, load)
        if merge.means is not None:
            await asyncio.to_thread(self._write_bounds, merge.means)
        try:
            await asyncio.to_thread(self._mean.write, header, tensors)
        except NotFinite as error:
            raise await asyncio.to_thread(self._updates.blamed, error, merge) from error
        return None, self._run.layout

    def _header(self, round_: RoundInProgress, merge: Merge) -> aggregator_pb2.UpdateHeader:
        """Return the header of the mean: sums of counts, within their bounds, and means of scores."""
        reports, scores = [round_.report(token) for token in merge.weights], merge.scores
        mean = Report(
            example_count=claims.EXAMPLES.total(report.example_count for report in reports),
            steps=claims.STEPS.total(report.steps for report in reports),
            metrics=merge.training_metrics,
            evaluation_metrics=scores.metrics,
            evaluation_example_count=claims.EXAMPLES.clamped(scores.example_count),
            scores_not_finite=frozenset(scores.not_finite),
            scores_of_sub_models=scores.of_sub_models,
        )
        if round_.kind is not TaskKind.INITIALIZE:
            mean = replace(
                mean,
                merged_updates=claims.MERGED_UPDATES.total(report.merged_updates or 1 for report in reports),
                weight=claims.WEIGHT.clamped(merge.weight),
                accumulated_steps=claims.ACCUMULATED_STEPS.clamped(merge.accumulated_steps),
            )
        if merge.summed is not None:
            # Each of its devices says one example: what it weighs is in the sum.
            mean = replace(mean, example_count=claims.EXAMPLES.clamped(math.ceil(merge.summed)))
        return report_to_proto(mean, self._task.token)

    async def ended(self, round_: RoundInProgress) -> None:
        """See `RoundSource.ended`: answer the task. The next round starts when the parent hands over its task."""
        token = self._task.token
        mean = await asyncio.to_thread(self._mean.load, token)
        if round_.state.phase is RoundPhase.COMMITTED and mean is not None:
            self._handoff.done(token, mean)
        else:
            self._handoff.failed(token, f"its own round was abandoned: {round_.state.reason}")
