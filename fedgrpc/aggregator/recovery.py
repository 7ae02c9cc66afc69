"""Recovery of a run from what a former process left in the data folder.

The rule: what is not in the database did not happen, and what an update file holds is accepted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
import structlog

from fedgrpc.aggregator import protected_layouts
from fedgrpc.aggregator.assignment import TaskAssigner
from fedgrpc.aggregator.changed_settings import ALGORITHM, OPTIMIZER, changes, compared_text
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.first_model import complaint
from fedgrpc.aggregator.new_version import about_version
from fedgrpc.aggregator.recovered_rounds import RecoveredRounds
from fedgrpc.algorithms.companions import companions_of, first_values
from fedgrpc.algorithms.registry import algorithm_of
from fedgrpc.codec.layout import Layout
from fedgrpc.codec.raw import as_bool
from fedgrpc.errors import StorageError, UsageError
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.version import Version
from fedgrpc.rpc.identity import Session
from fedgrpc.runs.events import (
    Ending,
    EndReason,
    RunPhase,
    RunRestored,
    VersionKnown,
    VersionTaken,
)
from fedgrpc.storage.model_file import ModelFile, write_model
from fedgrpc.storage.task_rows import RunRow
from fedgrpc.v1 import round_pb2
from fedgrpc.v1.round_pb2 import TASK_KIND_INITIALIZE

log = structlog.get_logger()

# The last 16 tasks of a fleet of 10,000 workers.
_RECALLED_BYTES = 64 << 20


class Recovery:
    """Brings a run to where the last process left it."""

    def __init__(self, coordinator: Coordinator, assigner: TaskAssigner) -> None:
        self._coordinator = coordinator
        self._run = coordinator.machine
        self._store = coordinator.store
        self._models = coordinator.models
        self._local_models = coordinator.local_models
        self._journal = coordinator.journal
        self._settings = coordinator.settings
        self._rounds = RecoveredRounds(
            coordinator,
            coordinator.journal,
            coordinator.settings,
            lambda: coordinator.weighing,
            assigner.prepare_again,
            coordinator.secure_sums.recovered,
        )

    async def recover(self) -> None:
        """Take up what a former process left in the data folder. Raises `UsageError` and `StorageError`."""
        coordinator, run, store = self._coordinator, self._run, self._store
        stored = await coordinator.in_database(store.run)
        if stored is not None:
            if stored.name != self._settings.run_name:
                raise UsageError(f"the data folder holds the run {stored.name!r}, not {self._settings.run_name!r}")
            coordinator.apply(_restored(stored))
        changed = await self._changed_settings()
        sessions = await coordinator.in_database(store.sessions)
        await self._check_folder(stored is not None)
        for registration, history in await coordinator.in_database(lambda: list(store.workers())):
            if coordinator.fleet.find(registration.worker) is None:
                # Other runs share the fleet, and one of them may have restored it already.
                session = Session.parse(sessions.get(registration.worker, ""))
                coordinator.fleet.restore(registration, coordinator.clock(), session)
            coordinator.workers.remember({registration.worker: history})
        ended = await coordinator.records.restore()
        coordinator.apply(ended)
        await coordinator.releases.open()
        await self._recover_model()
        await self._recall_costs()
        open_round = await coordinator.in_database(store.open_round)
        if open_round is not None and open_round.record.kind == TASK_KIND_INITIALIZE and run.began:
            await self._close(open_round.record, "the first model came from a file")
            open_round = None
        if open_round is not None and (
            reason := await coordinator.secure_sums.lost(
                open_round.record.number, TaskKind(open_round.record.kind), changed
            )
        ):
            await self._close(open_round.record, reason)
            coordinator.apply(replace(ended, last_number=max(run.last_number, open_round.record.number)))
            open_round = None
        # Only now: a process that dies before has to find again what has changed.
        await self._take_settings(changed)
        if open_round is not None:
            await self._rounds.reopen(open_round)
        if stored is not None and self._goes_on(changed):
            coordinator.apply(replace(_restored(stored), phase=RunPhase.RUNNING, ending=Ending()))
        if open_round is None and not run.ended:
            await self._rounds.go_on(run.last_number + 1)
        await self._tell_unknown_updates()
        await asyncio.to_thread(self._journal.keep_only, run.round.state.tasks if run.round else ())
        await coordinator.save_run()

    def _goes_on(self, changed: Mapping[str, str]) -> bool:
        """Return whether a run that has ended has more to do now: more rounds, another target, more patience."""
        run, names = self._run, {name.partition(".")[0] for name in changed}
        cause = {EndReason.TARGET_MET: "target", EndReason.NOT_BETTER: "patience"}.get(run.ending.reason)
        still_met = cause is not None and cause not in names
        return run.phase is RunPhase.FINISHED and not run.rules.enough(run.trained) and not still_met

    async def _changed_settings(self) -> dict[str, str]:
        """Return the settings that differ from the last start. Raises `UsageError` for one that may not."""
        before = await self._coordinator.in_database(self._store.settings)
        return changes(before, compared_text(self._settings)) if before else {}

    async def _take_settings(self, changed: Mapping[str, str]) -> None:
        """Tell what has changed, and keep the settings: nothing refuses to start any more."""
        # An algorithm may have a step of its own, whose state means nothing to another.
        if stepping := changed.get(OPTIMIZER) or changed.get(ALGORITHM):
            log.warning("the server optimizer starts over", changed=stepping)
            await asyncio.to_thread(self._models.forget_optimizer_state)
        if changed:
            log.info("settings changed", run=self._settings.run_name, changed=dict(changed))
        await self._coordinator.in_database(self._store.save_settings, compared_text(self._settings))

    async def _check_folder(self, known: bool) -> None:
        """Check that folder and database are of one run and one time. Raises `UsageError` where they are not:
        continuing would start the run over, or overwrite what it has made.
        """
        folder = self._settings.data_dir
        version = await self._coordinator.in_database(self._store.latest_version)
        recorded = 0 if version is None else version.version
        versions = await asyncio.to_thread(self._models.versions)
        newer = [each for each in versions if each > recorded]
        accepted = await asyncio.to_thread(self._journal.accepted)
        if not known:
            if versions or accepted:
                raise UsageError(
                    f"the data folder {folder} holds models or updates, but its database knows of no run: restore "
                    "run.sqlite with run.sqlite-wal, or begin in an empty --data-dir"
                )
            # First of all: from now on a model without a database is noticed.
            await self._coordinator.save_run()
        elif len(newer) > 1:
            # One is that of a commit which a crash cut off.
            raise UsageError(
                f"the data folder {folder} holds model version {newer[-1]}, but its database is older and ends "
                f"with {recorded}: restore both from one copy, or remove the models above {recorded} to continue"
            )
        elif version is not None and version.sha256 and recorded not in versions:
            raise UsageError(
                f"the database of {folder} ends with model version {recorded}, whose file "
                f"{self._models.path(recorded)} is missing: restore both from one copy"
            )

    async def _recover_model(self) -> None:
        version = await self._coordinator.in_database(self._store.latest_version)
        if version is not None:
            for known in await self._coordinator.in_database(self._store.versions, self._models.versions()):
                self._coordinator.apply(VersionKnown(known))
            layout: Layout = ()
            if version.sha256:
                model = self._models.open(version.version)
                if await asyncio.to_thread(model.sha256) != version.sha256:
                    raise StorageError(f"the model {model.path} is corrupt: its SHA-256 is not the one recorded")
                await asyncio.to_thread(self._models.check, version.version)
                layout = model.layout
            self._coordinator.apply(VersionTaken(version, layout))
        if self._settings.initial_model is not None:
            await self._import(ModelFile.open(self._settings.initial_model))
        private, secure = self._settings.privacy.on, self._settings.secure.on
        if unfit := protected_layouts.complaint(self._run.layout, private=private, secure=secure):
            raise UsageError(unfit)

    async def _recall_costs(self) -> None:
        """Read what plans are predicted from in the records of past rounds: it stands nowhere else."""
        if self._run.began:
            workers = self._coordinator.workers
            trainers = [worker.name for worker in self._coordinator.fleet if workers.history(worker.name).accepted]
            records = self._store.committed_rounds(_RECALLED_BYTES)
            await self._coordinator.in_database(self._local_models.recall, records, self._run.layout, trainers)

    async def _import(self, model: ModelFile) -> None:
        """Make a safetensors file the first version, unless the run has begun from the same model.

        Raises `UsageError` when it has begun from another one.
        """
        if wrong := complaint(model.layout):
            raise UsageError(f"the model {model.path} cannot be used: {wrong}")
        first = await asyncio.to_thread(model.content_digest)
        last = self._run.versions.last
        if self._run.began:
            if last is not None and last.first_model != first:
                raise UsageError(
                    f"initial_model {model.path} is not the model that the run in {self._settings.data_dir} began "
                    "from; leave it out, or take another data folder. To start over from it, tell the running "
                    "aggregator `fedgrpc pause` and `fedgrpc rollback 0`, and start it again with this file"
                )
            return
        number = self._run.version + 1
        about = about_version(self._settings.run_name, 0, number)
        algorithm = algorithm_of(self._settings.plan.algorithm)
        beside = companions_of(algorithm, model.layout)
        layout = (*model.layout, *(each.spec for each in beside))
        companions = (first_values(algorithm, each, model.named(each.name)) for each in beside)
        tensors = chain(_finite_tensors(model), companions)
        write = partial(write_model, self._models.path(number), layout, tensors, about)
        digest = await asyncio.to_thread(write)
        norm = await asyncio.to_thread(self._models.open(number).norm)
        version = Version(number, 0, digest, norm=norm, first_model=first)
        await self._coordinator.in_database(self._store.save_version, version)
        self._coordinator.apply(VersionTaken(version, layout))
        log.info("initial model", run=self._settings.run_name, file=str(model.path), tensors=len(model.layout))

    async def _close(self, record: round_pb2.Round, reason: str) -> None:
        """Abandon the round that was open."""
        record.phase, record.reason = round_pb2.ROUND_PHASE_ABANDONED, reason
        await self._coordinator.in_database(self._store.finish_round, record, [], {}, None)

    async def _tell_unknown_updates(self) -> None:
        """Accepted updates that no task is known of: the database is of an older time than they are."""
        known = await self._coordinator.in_database(self._store.known_tokens)
        unknown = await asyncio.to_thread(self._journal.accepted) - known
        if unknown:
            log.warning(
                "accepted updates removed",
                run=self._settings.run_name,
                updates=len(unknown),
                reason="the database knows no task of theirs: was it restored from an older copy?",
            )


def _restored(stored: RunRow) -> RunRestored:
    return RunRestored(
        stored.id,
        stored.phase,
        Ending(stored.end_reason, stored.reason),
        stored.started_at,
        stored.paused_reason,
    )


def _finite_tensors(model: ModelFile) -> Iterator[np.ndarray]:
    for index, spec in enumerate(model.layout):
        values = model.tensor(index)
        if spec.is_trained and not np.isfinite(values).all():
            raise UsageError(
                f"tensor {spec.name!r} of the model {model.path} has values that are not finite; if it is a mask, "
                "let `fedgrpc init` write the file, which tells the roles of tensors"
            )
        yield as_bool(values) if spec.dtype == "bool" else values
