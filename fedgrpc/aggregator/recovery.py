"""What a former process left in the data folder, taken up again.

The rule: what is not in the database did not happen, and what an update file holds is accepted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import cast

import numpy as np
import structlog
from google.protobuf.message import DecodeError

from fedgrpc import claims
from fedgrpc.aggregator.assignment import TaskAssigner
from fedgrpc.aggregator.blame import blaming
from fedgrpc.aggregator.changed_settings import OPTIMIZER, changes, compared_text
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.first_model import complaint
from fedgrpc.aggregator.local_models import LocalTask
from fedgrpc.aggregator.new_version import about_version
from fedgrpc.aggregator.norms import content_digest, model_norm
from fedgrpc.aggregator.report import CurrentRound, Report
from fedgrpc.codec.layout import Layout
from fedgrpc.codec.raw import as_bool
from fedgrpc.errors import CorruptError, LayoutError, StorageError, UnusableUpdate, UsageError
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.rounds.events import LossCause, TaskPhase
from fedgrpc.rounds.policy import TaskKind as TaskKinds
from fedgrpc.rounds.state import StoredTask, restore
from fedgrpc.rounds.version import Version
from fedgrpc.rpc.identity import Session
from fedgrpc.storage.model_file import ModelFile, write_model
from fedgrpc.storage.run_store import OpenRound, TaskRow
from fedgrpc.v1 import round_pb2
from fedgrpc.v1.aggregator_pb2 import RUN_PHASE_FINISHED, RUN_PHASE_RUNNING, RunPhase
from fedgrpc.v1.round_pb2 import TASK_KIND_INITIALIZE, TASK_KIND_TRAIN, TaskKind

log = structlog.get_logger()

# The last 16 tasks of a fleet of 10,000 workers.
_RECALLED_BYTES = 64 << 20


class Recovery:
    """Brings a coordinator to where the last process left the run."""

    def __init__(self, coordinator: Coordinator, assigner: TaskAssigner) -> None:
        self._it = coordinator
        self._settings = coordinator.settings
        self._assigner = assigner

    async def recover(self) -> int:
        """Take up what a former process left in the data folder; the number of the last round (0: none).

        Raises `UsageError` and `StorageError`.
        """
        it = self._it
        stored = await it.in_database(it.store.run)
        if stored is not None:
            run_id, name, phase, reason, started_at = stored
            if name != self._settings.run_name:
                raise UsageError(f"the data folder holds the run {name!r}, not {self._settings.run_name!r}")
            it.run.id, it.run.phase = run_id, cast(RunPhase, phase)
            it.run.reason, it.run.started_at = reason, started_at
            it.run.paused_reason = await it.in_database(it.store.paused_reason)
        changed = await self._changed_settings()
        sessions = await it.in_database(it.store.sessions)
        await self._check_folder(stored is not None)
        for registration, history in await it.in_database(lambda: list(it.store.workers())):
            session = Session.parse(sessions.get(registration.worker, ""))
            it.fleet.restore(registration, history, it.clock(), session)
        it.last_record = await it.in_database(it.store.round)
        await self._recover_model()
        await self._take_settings(changed)
        await self._recall_costs()
        open_round = await it.in_database(it.store.open_round)
        if open_round is not None and open_round.record.kind == TASK_KIND_INITIALIZE and it.run.began:
            await self._close(open_round.record, "the first model came from a file")
            open_round = None
        if open_round is not None:
            await self._reopen(open_round)
        met_target = self._settings.target is not None and it.run.reason.endswith(f" has {self._settings.target}")
        if it.run.phase == RUN_PHASE_FINISHED and it.run.trained < self._settings.rounds and not met_target:
            it.run.phase, it.run.reason = RUN_PHASE_RUNNING, ""
        last_number = it.last_record.number if it.last_record else 0
        if open_round is None and not it.run.ended:
            await self._go_on(last_number + 1)
        await self._tell_unknown_updates()
        await asyncio.to_thread(it.journal.keep_only, it.current.state.tasks if it.current else ())
        await it.save_run()
        return last_number

    async def _changed_settings(self) -> dict[str, str]:
        """What is not as at the last start. Raises `UsageError` for a setting that may not change."""
        before = await self._it.in_database(self._it.store.settings)
        return changes(before, compared_text(self._settings)) if before else {}

    async def _take_settings(self, changed: Mapping[str, str]) -> None:
        """Tell what has changed, and keep the settings: nothing refuses to start any more."""
        it = self._it
        if OPTIMIZER in changed:
            log.warning("the server optimizer's state begins anew", changed=changed[OPTIMIZER])
            await asyncio.to_thread(it.models.forget_optimizer_state)
        if changed:
            log.info("settings changed", run=self._settings.run_name, changed=dict(changed))
        await it.in_database(it.store.save_settings, compared_text(self._settings))

    async def _check_folder(self, known: bool) -> None:
        """Folder and database are of one run and one time. Raises `UsageError` where they are not: to go on would
        begin the run anew, or write over what it has made.
        """
        it, folder = self._it, self._settings.data_dir
        version = await it.in_database(it.store.latest_version)
        recorded = 0 if version is None else version.version
        versions = await asyncio.to_thread(it.models.versions)
        newer = [each for each in versions if each > recorded]
        accepted = await asyncio.to_thread(it.journal.accepted)
        if not known:
            if versions or accepted:
                raise UsageError(
                    f"the data folder {folder} holds models or updates, but its database knows of no run: restore "
                    "run.sqlite with run.sqlite-wal, or begin in an empty --data-dir"
                )
            # First of all: from now on a model without a database is noticed.
            await it.save_run()
        elif len(newer) > 1:
            # One is that of a commit which a crash cut off.
            raise UsageError(
                f"the data folder {folder} holds model version {newer[-1]}, but its database is older and ends "
                f"with {recorded}: restore both from one copy, or remove the models above {recorded} to go on"
            )
        elif version is not None and version.sha256 and recorded not in versions:
            raise UsageError(
                f"the database of {folder} ends with model version {recorded}, whose file "
                f"{it.models.path(recorded)} is missing: restore both from one copy"
            )

    async def _recover_model(self) -> None:
        it = self._it
        version = await it.in_database(it.store.latest_version)
        if version is not None:
            for known in await it.in_database(it.store.versions, it.models.versions()):
                it.versions.add(known)
            it.versions.add(version)
            layout: Layout = ()
            if version.sha256:
                model = it.models.open(version.version)
                if await asyncio.to_thread(model.sha256) != version.sha256:
                    raise StorageError(f"the model {model.path} is corrupt: its SHA-256 is not the one recorded")
                await asyncio.to_thread(it.models.check, version.version)
                layout = model.layout
            it.run.take(version, layout)
        if self._settings.initial_model is not None:
            await self._import(ModelFile.open(self._settings.initial_model))

    async def _recall_costs(self) -> None:
        """What plans are predicted from is in the records of the rounds that are over, and nowhere else."""
        it = self._it
        if it.run.began:
            trainers = [worker.name for worker in it.fleet if worker.history.accepted]
            records = it.store.committed_rounds(_RECALLED_BYTES)
            await it.in_database(it.local_models.recall, records, it.run.layout, trainers)

    async def _import(self, model: ModelFile) -> None:
        """Make a safetensors file the first version, unless the run has begun from the same model.

        Raises `UsageError` when it has begun from another one.
        """
        it = self._it
        if wrong := complaint(model.layout):
            raise UsageError(f"the model {model.path} cannot be used: {wrong}")
        first = await asyncio.to_thread(content_digest, model)
        last = it.versions.last
        if it.run.began:
            if last is not None and last.first_model != first:
                raise UsageError(
                    f"initial_model {model.path} is not the model that the run in {self._settings.data_dir} began "
                    "from; leave it out, or take another data folder. To begin anew from it, tell the running "
                    "aggregator `fedgrpc pause` and `fedgrpc rollback 0`, and start it again with this file"
                )
            return
        number = it.run.version + 1
        about = about_version(self._settings.run_name, 0, number)
        write = partial(write_model, it.models.path(number), model.layout, _finite_tensors(model), about)
        digest = await asyncio.to_thread(write)
        norm = await asyncio.to_thread(model_norm, it.models.open(number))
        version = Version(number, 0, digest, norm=norm, first_model=first)
        await it.in_database(it.store.save_version, version)
        it.run.take(version, model.layout)
        it.versions.add(version)
        log.info("initial model", run=self._settings.run_name, file=str(model.path), tensors=len(model.layout))

    async def _close(self, record: round_pb2.Round, reason: str) -> None:
        """Nothing more is to come of the round that was open."""
        record.phase, record.reason = round_pb2.ROUND_PHASE_ABANDONED, reason
        await self._it.in_database(self._it.store.finish_round, record, [], {}, None)

    async def _reopen(self, open_round: OpenRound) -> None:
        """Go on in the round that was open, with the updates that were accepted."""
        it = self._it
        record = open_round.record
        rows, reports = await self._accepted(open_round.tasks)
        policy = self._settings.policy.for_kind(TaskKinds(record.kind))
        tasks = self._stored(rows, record.kind, reports)
        left_s = open_round.deadline_at - time.time()
        granted_s = duration_from_proto(record.reconnect_grace)
        state = restore(record.number, policy, tasks, open_round.aim, left_s, it.clock(), granted_s)
        if record.HasField("deadline"):
            deadline_s = duration_from_proto(record.deadline)
            state = replace(state, deadline_s=deadline_s, deadline_reason=record.deadline_reason)
        started_at = record.started_at.ToNanoseconds() / 1e9
        it.current = current = CurrentRound(state, record.kind, record.base_version, started_at, reports=reports)
        # The wall clock may have been set meanwhile, and a round is not open while nobody is there to play it.
        current.earlier_s = min(max(0.0, time.time() - started_at), state.deadline_s)
        self._take_over(current, rows)
        expected = {task.worker: task.prediction for task in record.tasks if task.HasField("prediction")}
        current.predictions = {row.token: expected[row.worker] for row in rows if row.worker in expected}
        told = {task.worker: (task.download_recipe, task.upload_recipe) for task in record.tasks}
        for row in rows:
            if (recipes := told.get(row.worker, ("", "")))[0]:
                current.recipes[row.token] = recipes
        await self._assigner.prepare_download(current)
        await self._keep_deadline(current, granted_s)
        log.info(
            "round resumed",
            run=self._settings.run_name,
            round=record.number,
            accepted=len(reports),
            time_left_s=round(state.deadline_at - it.clock(), 1) if state.deadline_at is not None else None,
        )

    async def _keep_deadline(self, current: CurrentRound, granted_s: float) -> None:
        """What this restart adds to the round's time is remembered by the next one."""
        it, state = self._it, current.state
        if state.granted_s > granted_s and state.deadline_at is not None:
            wall_deadline = time.time() + state.deadline_at - it.clock()
            await it.in_database(it.store.save_deadline, current.record(it.clock()), wall_deadline)

    async def _go_on(self, number: int) -> None:
        """The round that a former process had not opened yet, with the tasks that the one before carried on."""
        it = self._it
        rows = await it.in_database(it.store.tasks, number)
        policy = self._settings.policy
        if not rows or policy.late != "carry" or not 0 <= it.run.trained < self._settings.rounds:
            return
        rows, reports = await self._accepted(rows)
        tasks = self._stored(rows, TASK_KIND_TRAIN, reports)
        state = restore(number, policy, tasks, 0, None, it.clock())
        it.current = CurrentRound(state, TASK_KIND_TRAIN, it.run.version, time.time(), reports=reports)
        self._take_over(it.current, rows)
        log.info("tasks carried on", run=self._settings.run_name, round=number, accepted=len(reports))

    async def _accepted(self, rows: Iterable[TaskRow]) -> tuple[list[TaskRow], dict[str, Report]]:
        """The tasks, and the reports of the updates that were accepted, by token. An update that would be refused
        today is rejected: no round could use it. Raises `StorageError` where one is gone.
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
        """What came with the update of a task; None where none was accepted."""
        if row.phase in (TaskPhase.REJECTED, TaskPhase.FAILED):
            return None
        try:
            update = self._it.journal.load(row.token)
        except CorruptError as error:
            # A fault of the disk, which a copy may mend: nothing is thrown away before the operator knows.
            raise StorageError(f"cannot read the update of worker {row.worker}: {error}") from error
        if update is not None:
            with blaming(row.token):
                return Report.of(update.header, self._settings.admission)
        if row.phase is TaskPhase.ACCEPTED:
            raise StorageError(f"the accepted update of worker {row.worker} is gone from the data folder")
        return None

    def _stored(
        self, rows: Iterable[TaskRow], kind: TaskKind, reports: Mapping[str, Report]
    ) -> Iterator[StoredTask]:
        rows = list(rows)
        weighing, here = self._it.weighing, frozenset(row.worker for row in rows)
        for row in rows:
            report = reports.get(row.token)
            phase = row.phase if report is None else TaskPhase.ACCEPTED
            weight = 1.0 if report is None else weighing.weight_of(kind, row.worker, report, here)
            cause = row.loss_cause if report is None else LossCause.NONE
            yield StoredTask(row.token, row.worker, phase, row.reason, row.staleness, weight, row.chosen, cause)

    async def _tell_unknown_updates(self) -> None:
        """Accepted updates that no task is known of: the database is of an older time than they are."""
        it = self._it
        unknown = await asyncio.to_thread(it.journal.accepted) - await it.in_database(it.store.known_tokens)
        if unknown:
            log.warning(
                "accepted updates removed",
                run=self._settings.run_name,
                updates=len(unknown),
                reason="the database knows no task of theirs: was it restored from an older copy?",
            )

    def _take_over(self, current: CurrentRound, rows: Iterable[TaskRow]) -> None:
        """What the shell knows of the tasks, and who is at work."""
        fleet = self._it.fleet
        for row in rows:
            worker = fleet.get(row.worker)
            current.device_classes[row.worker] = worker.registration.device.device_class
            if row.local_model:
                current.local_tasks[row.token] = _local_task(row)
            if not current.state.tasks[row.token].phase.final:
                worker.token = row.token


def _local_task(row: TaskRow) -> LocalTask:
    try:
        return LocalTask.from_proto(round_pb2.LocalModel.FromString(row.local_model))
    except (DecodeError, LayoutError) as error:
        raise StorageError(f"the database has no plan for the task of worker {row.worker}: {error}") from error


def _finite_tensors(model: ModelFile) -> Iterator[np.ndarray]:
    for index, spec in enumerate(model.layout):
        values = model.tensor(index)
        if spec.is_trained and not np.isfinite(values).all():
            raise UsageError(
                f"tensor {spec.name!r} of the model {model.path} has values that are not finite; if it is a mask, "
                "let `fedgrpc init` write the file, which tells the roles of tensors"
            )
        yield as_bool(values) if spec.dtype == "bool" else values
