"""Rounds as the run itself asks for them: each makes a version.

The rule: a run ends, rolls back or pauses itself between two rounds, once that is durable.
"""

from __future__ import annotations

import time
from functools import partial

import structlog

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.driver import Upkeep
from fedgrpc.aggregator.new_version import AcceptedUpdates, NewVersion
from fedgrpc.aggregator.recovery import Recovery
from fedgrpc.aggregator.round_records import for_log
from fedgrpc.codec.layout import Layout
from fedgrpc.errors import NotFound, StorageError
from fedgrpc.protocol.records import jump_to_proto
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.round import RoundPhase
from fedgrpc.rounds.version import Version
from fedgrpc.rpc.retry import Backoff
from fedgrpc.runs.events import (
    Ending,
    EndReason,
    EndRun,
    OpenRound,
    RollBack,
    RollBackFailed,
    RolledBack,
    RunPhase,
    Stay,
)
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.merge import Merge
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.v1.round_pb2 import ROUND_PHASE_COMMITTED, TASK_KIND_TRAIN
from fedgrpc.v1.round_pb2 import Round as RoundRecord

log = structlog.get_logger()

_AFTER_ABANDONED = Backoff(first_s=0.5, cap_s=15.0)


class OwnRounds:
    """Rounds as the run itself asks for them. A `RoundSource`."""

    def __init__(self, coordinator: Coordinator, upkeep: Upkeep, updates: AcceptedUpdates) -> None:
        self._coordinator = coordinator
        self._run = coordinator.machine
        self._settings = coordinator.settings
        self._upkeep = upkeep
        self._models = coordinator.models
        self._new_version = NewVersion(
            coordinator.machine, coordinator.settings, updates, coordinator.models, coordinator.local_models
        )
        # Rounds in a row that were abandoned.
        self.abandoned = 0
        self._log = log.bind(run=self._settings.run_name)

    async def recover(self, recovery: Recovery) -> None:
        """See `RoundSource.recover`."""
        await recovery.recover()

    async def next_round(self) -> RoundInProgress | None:
        """See `RoundSource.next_round`. Also rolls the run back, and ends it."""
        match self._run.next_step(time.time(), self._coordinator.clock()):
            case OpenRound(round_):
                return round_
            case RollBack() as asked:
                await self._roll_back(asked)
            case EndRun(ending, after_evaluators):
                if not after_evaluators or await self._evaluators_are_done():
                    await self._end(ending if self._run.ending.reason is EndReason.NONE else self._run.ending)
            case Stay():
                await self._upkeep.until(None)
        return None

    async def write(self, round_: RoundInProgress, merge: Merge) -> tuple[Version | None, Layout]:
        """See `RoundSource.write`. A round that only evaluates makes no version."""
        if round_.kind is TaskKind.EVALUATE:
            return None, self._run.layout
        noise = await self._coordinator.releases.enter(round_, merge)
        version = await self._new_version.write(round_, merge, noise)
        return version, self._models.open(version.version).layout

    async def ended(self, round_: RoundInProgress) -> None:
        """See `RoundSource.ended`. After an abandoned round: rest, or pause where the next would end alike."""
        coordinator, run = self._coordinator, self._run
        if round_.state.phase is RoundPhase.COMMITTED:
            self.abandoned = 0
        elif round_.kind is TaskKind.EVALUATE or run.ended or run.rolling_back is not None:
            return
        elif reason := run.hopeless(round_, coordinator.candidates, coordinator.clock()):
            self.abandoned = 0
            await self._upkeep.until_stored(partial(coordinator.pause_itself, reason))
        else:
            # Without jitter: there is one aggregator, and a simulation of it is the same each time.
            await self._rest(_AFTER_ABANDONED.ceiling_s(self.abandoned))
            self.abandoned += 1

    async def _rest(self, seconds: float) -> None:
        """Wait, even if workers poll meanwhile: rounds that fail at once must not spin."""
        coordinator, run = self._coordinator, self._run
        until = coordinator.clock() + seconds
        while not run.ended and run.rolling_back is None and coordinator.clock() < until:
            await self._upkeep.until(until)

    async def _roll_back(self, asked: RollBack) -> None:
        """Make a copy of the version that is asked for the latest one, durably, and answer."""
        coordinator, run = self._coordinator, self._run
        number = run.last_number + 1
        record = RoundRecord(number=number, phase=ROUND_PHASE_COMMITTED, kind=TASK_KIND_TRAIN, reason=asked.text)
        record.base_version, record.rolled_back_to = run.version, asked.version
        record.started_at.FromNanoseconds(time.time_ns())
        try:
            version, layout = await self._new_version.roll_back(asked.version, number)
            record.committed_version, record.jump = version.version, jump_to_proto(version.jump)
            record.metrics.update(version.metrics)
            record.evaluator_metrics.update(version.evaluator_metrics)

            async def store(after: RunMachine) -> None:
                await coordinator.records.roll_back(record, version)

            await coordinator.apply_after(RolledBack(version, layout, number), store)
        except (StorageError, NotFound) as error:
            coordinator.apply(RollBackFailed())
            coordinator.answer_roll_back(error)
            return
        self._log.warning(asked.text, round=number, version=version.version)
        coordinator.metrics.model_version.set(version.version)
        coordinator.fleet.wake_evaluators_and(run.leases)
        coordinator.answer_roll_back()

    async def _end(self, ending: Ending) -> None:
        await self._upkeep.clear_away()
        best, last = self._run.versions.best, self._run.versions.last
        for which, version in (("best", best), ("last", last)):
            if version is not None and version.sha256:
                path = str(self._coordinator.models.path(version.version))
                told = for_log(version.scores, "version", "file")
                self._log.info(f"{which} version", version=version.version, file=path, **told)
        await self._coordinator.end(RunPhase.FINISHED, ending)

    async def _evaluators_are_done(self) -> bool:
        """Wait until evaluators that are alive have scored the last version, within the time of a round.

        Returns False where the run is rolled back meanwhile.
        """
        coordinator, run = self._coordinator, self._run
        until = coordinator.clock() + self._settings.policy.deadline_s
        while coordinator.clock() < until and run.rolling_back is None:
            alive = coordinator.candidates.live_evaluators(coordinator.clock())
            if not any(run.evaluations.waiting_for(worker.name, run.version) for worker in alive):
                return True
            await self._upkeep.until(min(until, coordinator.clock() + self._settings.policy.lease_s))
        return run.rolling_back is None
