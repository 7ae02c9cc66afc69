"""Rounds after a restart: the one that was open, and the tasks that the last one carried over.

The rule: what an update file holds is accepted, whatever the database says of its task. An accepted update whose
file is gone stops the start: nothing is thrown away before the operator knows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import structlog
from google.protobuf.message import DecodeError

from fedgrpc import claims
from fedgrpc.aggregator.run_shell import RunShell
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import CorruptError, LayoutError, StorageError, UnusableUpdate, blaming
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.protocol.plans import local_task_from_proto
from fedgrpc.protocol.records import prediction_from_proto
from fedgrpc.protocol.rounds import agreed_from_proto, record_of
from fedgrpc.protocol.updates import report_from_proto
from fedgrpc.rounds.events import LossCause, TaskPhase
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.round import StoredTask, restore
from fedgrpc.runs.events import (
    RoundOpened,
)
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.secure_sum import SecureSum
from fedgrpc.runs.task_context import LocalTask, Report, TaskContext
from fedgrpc.runs.weighing import Weighing
from fedgrpc.storage.task_rows import StoredRound, TaskRow
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.submodels.plan_choice import PlanChoice
from fedgrpc.v1 import round_pb2

log = structlog.get_logger()

# What the workers of a resumed round, by token, are to pull: it is encoded again.
Prepare = Callable[[RoundInProgress, Mapping[str, str]], Awaitable[Mapping[str, TaskContext]]]


class RecoveredRounds:
    """Opens the round of a run that a former process has left behind."""

    def __init__(
        self,
        shell: RunShell,
        journal: UploadJournal,
        settings: AggregatorSettings,
        weighing: Callable[[], Weighing],
        prepare: Prepare,
        secure: Callable[[RoundInProgress], Awaitable[SecureSum | None]],
    ) -> None:
        """`secure` gives the secure sum of a round, where it has one."""
        self._secure = secure
        self._shell = shell
        self._run = shell.machine
        self._journal = journal
        self._settings = settings
        self._weighing = weighing
        self._prepare = prepare

    async def reopen(self, open_round: StoredRound) -> None:
        """Continue the round that was open, with the updates that were accepted."""
        shell, record = self._shell, open_round.record
        kind, now = TaskKind(record.kind), shell.clock()
        rows, reports = await self._accepted(open_round.tasks)
        policy = self._settings.policy.for_kind(kind)
        tasks = self._stored(rows, kind, reports)
        left_s = open_round.deadline_at - time.time()
        granted_s = duration_from_proto(record.reconnect_grace)
        state = restore(record.number, policy, tasks, open_round.aim, left_s, now, granted_s)
        if record.HasField("deadline"):
            deadline_s = duration_from_proto(record.deadline)
            state = replace(state, deadline_s=deadline_s, deadline_reason=record.deadline_reason)
        started_at = record.started_at.ToNanoseconds() / 1e9
        # The wall clock may have been set meanwhile, and a round does not run while no process plays it.
        earlier_s = min(max(0.0, time.time() - started_at), state.deadline_s)
        contexts = self._contexts(rows, reports, record)
        round_ = RoundInProgress(state, kind, record.base_version, started_at, contexts, earlier_s=earlier_s)
        at_work = {token: task.worker for token, task in state.tasks.items() if not task.carried}
        round_ = round_.with_contexts(await self._prepare(round_, at_work))
        round_ = replace(round_, secure=await self._secure(round_))
        shell.apply(RoundOpened(round_))
        await self._keep_deadline(round_, granted_s)
        log.info(
            "round resumed",
            run=self._settings.run_name,
            round=record.number,
            accepted=len(reports),
            time_left_s=round(state.deadline_at - shell.clock(), 1) if state.deadline_at else None,
        )

    async def _keep_deadline(self, round_: RoundInProgress, granted_s: float) -> None:
        """Store what this restart adds to the round's time, for the next one."""
        state, now = round_.state, self._shell.clock()
        if state.granted_s > granted_s and state.deadline_at is not None:
            wall_deadline = time.time() + state.deadline_at - now
            save = self._shell.store.save_deadline
            await self._shell.in_database(save, record_of(round_, now), wall_deadline)

    async def go_on(self, number: int) -> None:
        """Open the round that a former process had not opened yet, with the tasks carried over into it.

        Without such tasks there is nothing to open.
        """
        shell = self._shell
        rows = await shell.in_database(self._shell.store.tasks, number)
        policy = self._settings.policy
        if not rows or policy.late != "carry" or self._run.rules.enough(self._run.trained):
            return
        rows, reports = await self._accepted(rows)
        tasks = self._stored(rows, TaskKind.TRAIN, reports)
        state = restore(number, policy, tasks, 0, None, shell.clock())
        contexts = self._contexts(rows, reports, round_pb2.Round())
        round_ = RoundInProgress(state, TaskKind.TRAIN, self._run.version, time.time(), contexts)
        shell.apply(RoundOpened(round_))
        log.info("tasks carried over", run=self._settings.run_name, round=number, accepted=len(reports))

    async def _accepted(self, rows: Iterable[TaskRow]) -> tuple[list[TaskRow], dict[str, Report]]:
        """Return the tasks, and the reports of the updates that were accepted, by token.

        An update that would be refused today is rejected: no round could use it. Raises `StorageError` where one
        is gone.
        """
        kept, reports = [], {}
        for row in rows:
            try:
                report = await asyncio.to_thread(self._report, row)
            except UnusableUpdate as error:
                reason = claims.REASON.cleaned(str(error))
                log.warning("update left out", round=row.round, worker=row.worker, reason=reason)
                row = replace(row, phase=TaskPhase.REJECTED, reason=reason, loss_cause=LossCause.REFUSED)
            else:
                if report is not None:
                    reports[row.token] = report
            kept.append(row)
        return kept, reports

    def _report(self, row: TaskRow) -> Report | None:
        """Return the report of a task's update; None where none was accepted."""
        if row.phase in (TaskPhase.REJECTED, TaskPhase.FAILED):
            return None
        try:
            update = self._journal.load(row.token)
        except CorruptError as error:
            # A fault of the disk, which a copy may mend: nothing is thrown away before the operator knows.
            raise StorageError(f"cannot read the update of worker {row.worker}: {error}") from error
        if update is not None:
            with blaming(row.token):
                return report_from_proto(update.header, self._settings.admission)
        if row.phase is TaskPhase.ACCEPTED:
            raise StorageError(f"the accepted update of worker {row.worker} is gone from the data folder")
        return None

    def _stored(
        self, rows: Iterable[TaskRow], kind: TaskKind, reports: Mapping[str, Report]
    ) -> Iterator[StoredTask]:
        rows = list(rows)
        weighing, here = self._weighing(), frozenset(row.worker for row in rows)
        for row in rows:
            report = reports.get(row.token)
            phase = row.phase if report is None else TaskPhase.ACCEPTED
            weight = 1.0 if report is None else weighing.weight_of(kind, row.worker, report, here)
            cause = row.loss_cause if report is None else LossCause.NONE
            yield StoredTask(row.token, row.worker, phase, row.reason, row.staleness, weight, row.chosen, cause)

    def _contexts(
        self, rows: Iterable[TaskRow], reports: Mapping[str, Report], record: round_pb2.Round
    ) -> dict[str, TaskContext]:
        """Return the contexts of tasks, by token; `record` has the tasks of a round that was open."""
        recorded = {task.worker: task for task in record.tasks}
        return {row.token: self._context(row, reports.get(row.token), recorded.get(row.worker)) for row in rows}

    def _context(self, row: TaskRow, report: Report | None, recorded: round_pb2.TaskRecord | None) -> TaskContext:
        device_class = self._shell.fleet.get(row.worker).registration.device.device_class
        context = TaskContext(_local_task(row), device_class=device_class, report=report)
        if recorded is None:
            return context
        context = replace(context, agreed=agreed_from_proto(recorded))
        if recorded.HasField("prediction"):
            prediction = recorded.prediction
            choice = PlanChoice(context.local.plan, prediction_from_proto(prediction), prediction.reason)
            context = replace(context, choice=choice)
        return context


def _local_task(row: TaskRow) -> LocalTask:
    if not row.local_model:
        return LocalTask()
    try:
        return local_task_from_proto(round_pb2.LocalModel.FromString(row.local_model))
    except (DecodeError, LayoutError) as error:
        raise StorageError(f"the database has no plan for the task of worker {row.worker}: {error}") from error
