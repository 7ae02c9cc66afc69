"""The driver: the one task that opens rounds, selects, commits, and ends the run.

The rule: whatever it does can be cut off at any point. What is not in the database did not happen, and what an
update file holds is still there; the next process goes on from that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

import structlog

from fedgrpc.aggregation.mean import mean_metrics
from fedgrpc.aggregator.assignment import TaskAssigner
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.histories import histories_after, histories_of
from fedgrpc.aggregator.new_version import NewVersion
from fedgrpc.aggregator.recovery import Recovery
from fedgrpc.aggregator.scores import Scores, for_log, scores_of
from fedgrpc.errors import CodecError, IllegalTransition, NotFound, StorageError, UnusableUpdate, UpdateRefused
from fedgrpc.protocol.records import jump_to_proto
from fedgrpc.protocol.rounds import record_of
from fedgrpc.rounds.events import AbandonCause, Abort, Commit, Finished, Select, Tick
from fedgrpc.rounds.history import WorkerHistory
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.round import RoundPhase
from fedgrpc.rounds.state import wake_at, wants_workers
from fedgrpc.rounds.version import Jump, Version
from fedgrpc.rpc.retry import Backoff, Retries
from fedgrpc.runs.events import (
    Drop,
    Ending,
    EndReason,
    EndRun,
    OpenRound,
    RollBack,
    RollBackFailed,
    RolledBack,
    RoundEnded,
    RoundOpened,
    RunPhase,
    Stay,
    UpdatesMerged,
    VersionsPruned,
)
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.round_in_progress import DroppedTask, RoundInProgress
from fedgrpc.storage.data_folder import Use
from fedgrpc.storage.run_store import carried_rows, rows_of
from fedgrpc.v1.round_pb2 import ROUND_PHASE_COMMITTED, TASK_KIND_TRAIN
from fedgrpc.v1.round_pb2 import Round as RoundRecord

log = structlog.get_logger()

_AFTER_ABANDONED = Backoff(first_s=0.5, cap_s=15.0)
# After each look at the whole fleet, this many times as long for everything else.
_REST = 9.0
# Rounds that are looked through for the newest scores after a restart.
_RECENT_ROUNDS = 20
_AFTER_STORAGE_ERROR = Backoff(first_s=0.5, cap_s=15.0)


class Driver:
    """Plays rounds on a coordinator until the run has ended."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._run = coordinator.machine
        self._settings = coordinator.settings
        self._assigner = TaskAssigner(coordinator, coordinator.fleet, coordinator.models, coordinator.local_models)
        self._new_version = NewVersion(coordinator)
        self._record = RoundRecord()
        # Tasks of rounds that are over, whose updates are still to be cleared away; None: all is done.
        self._over: list[str] | None = None
        self._clear_at = 0.0
        self._clearing = Retries(_AFTER_STORAGE_ERROR)
        self._abandoned = Retries(_AFTER_ABANDONED)
        self._log = log.bind(run=self._settings.run_name)

    async def recover(self) -> None:
        """Take up what a former process left in the data folder. Raises `UsageError` and `StorageError`."""
        coordinator, run = self._coordinator, self._run
        await Recovery(coordinator, self._assigner).recover()
        records, _ = await coordinator.in_database(coordinator.store.rounds, run.last_number + 1, _RECENT_ROUNDS)
        coordinator.metrics.restore(run.version, records)

    async def run(self) -> None:
        """Play rounds until the run has ended. Raises `StorageError` only for what waiting cannot mend."""
        run = self._run
        while not run.ended:
            if run.round is None and not await self._open():
                continue
            await self._play()
            await self._after_round()
        if run.rolling_back is not None:
            self._coordinator.answer_roll_back(IllegalTransition(f"the run has ended: {run.ending.text}"))
        await self._clear_away()

    async def _open(self) -> bool:
        """Open the next round if there is one to open now; else wait or end the run."""
        match self._run.next_step(time.time(), self._coordinator.clock()):
            case OpenRound(round_):
                self._coordinator.apply(RoundOpened(round_))
                self._log.debug("round opened", round=round_.number, kind=round_.kind.name)
                return True
            case RollBack() as asked:
                await self._roll_back(asked)
            case EndRun(ending, after_evaluators):
                if not after_evaluators or await self._evaluators_are_done():
                    await self._end(ending if self._run.ending.reason is EndReason.NONE else self._run.ending)
            case Stay():
                await self._wait(None)
        return False

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
                await coordinator.in_database(coordinator.store.finish_round, record, [], {}, version)
                coordinator.last_record = record

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
        await self._clear_away()
        best, last = self._run.versions.best, self._run.versions.last
        for which, version in (("best", best), ("last", last)):
            if version is not None and version.sha256:
                path, told = (
                    str(self._coordinator.models.path(version.version)),
                    for_log(version.scores, "version", "file"),
                )
                self._log.info(f"{which} version", version=version.version, file=path, **told)
        await self._coordinator.end(RunPhase.FINISHED, ending)

    async def _play(self) -> None:
        """Play the round in progress to its end."""
        coordinator, run = self._coordinator, self._run
        while True:
            while coordinator.effects:
                effect = coordinator.effects.popleft()
                if isinstance(effect, Select):
                    await self._until_stored(partial(self._assigner.select, effect))
                elif isinstance(effect, Commit):
                    await self._until_stored(partial(self._commit, effect))
                elif isinstance(effect, Finished):
                    await self._until_stored(partial(self._finish, effect))
                    return
            if run.phase is RunPhase.PAUSED and run.current.state.phase is RoundPhase.SELECTING:
                await self._wait(None)
                continue
            coordinator.wake.clear()
            looked_at = time.perf_counter()
            if wants_workers(run.current.state):
                coordinator.apply(coordinator.workers_available())
            if coordinator.effects:
                continue
            due = wake_at(run.current.state)
            rest_s = _REST * (time.perf_counter() - looked_at)
            await self._wait(due, clear=False)
            due = wake_at(run.current.state)
            if due is not None and coordinator.clock() >= due:
                coordinator.apply(Tick())
            if not coordinator.effects:
                # To look costs as much as the fleet is large, and each poll of a large fleet is news.
                await asyncio.sleep(rest_s)

    async def _wait(self, until: float | None, clear: bool = True) -> None:
        """Wait for news, or for the clock to read `until`; there is time now for what could wait."""
        coordinator = self._coordinator
        if clear:
            coordinator.wake.clear()
        await self._clear_away()
        timeout_s = None if until is None else max(0.0, until - coordinator.clock())
        try:
            async with asyncio.timeout(timeout_s):
                await coordinator.wake.wait()
        except TimeoutError:
            pass

    async def _until_stored(self, act: Callable[[], Awaitable[None]]) -> None:
        """Do what needs the disk. While it fails the health is bad, and everything accepted is kept."""
        data_folder = self._coordinator.data_folder
        retries = Retries(_AFTER_STORAGE_ERROR)
        while True:
            try:
                await act()
                data_folder.works(Use.ROUNDS)
                return
            except (StorageError, NotFound) as error:
                data_folder.failed(Use.ROUNDS, error)
            # It may be full of what is not needed any more.
            await self._clear_away()
            await asyncio.sleep(retries.next_delay_s())

    async def _commit(self, commit: Commit) -> None:
        """Compute and record the new version. An update that turns out unusable is left out: the round then has
        another commit to do, or has ended. What nobody in particular is to blame for ends it.
        """
        try:
            await self._commit_once(self._run.current, commit)
        except UnusableUpdate as error:
            self._coordinator.leave_out(error)
        except (CodecError, UpdateRefused) as error:
            self._coordinator.apply(Abort(str(error), AbandonCause.UNUSABLE))

    async def _commit_once(self, round_: RoundInProgress, commit: Commit) -> None:
        coordinator, run = self._coordinator, self._run
        begun = time.monotonic()
        weights = self._new_version.weights(round_, commit.tokens)
        scales = await self._new_version.scales(round_, weights)
        version: Version | None = None
        if round_.kind is not TaskKind.EVALUATE:
            version = await self._new_version.write(round_, weights, scales)
        merged = UpdatesMerged(
            version,
            coordinator.models.open(version.version).layout if version else run.layout,
            weights,
            scales,
            mean_metrics([(round_.report(token).metrics, weight) for token, weight in weights.items()]),
            bool(self._scores(round_, weights).metrics),
            time.monotonic() - begun,
        )
        await coordinator.apply_after(merged, partial(self._store_end, version=version))

    def _scores(self, round_: RoundInProgress, weights: dict[str, float]) -> Scores:
        return scores_of(round_, weights, self._coordinator.weighing, self._settings.policy.max_share)

    async def _store_end(self, after: RunMachine, version: Version | None = None) -> None:
        """Make durable how a round has ended, and then remember it; with a thousand tasks that takes its time."""
        coordinator, round_, now = self._coordinator, after.current, self._coordinator.clock()

        def store() -> tuple[RoundRecord, dict[str, WorkerHistory]]:
            record = record_of(round_, now)
            rows = [*rows_of(round_), *carried_rows(round_, now)]
            histories = histories_after(round_, coordinator.fleet)
            coordinator.store.finish_round(record, rows, histories, version)
            return record, histories

        self._record, histories = await coordinator.in_database(store)
        coordinator.fleet.remember(histories)
        if coordinator.last_record is None or self._record.number >= coordinator.last_record.number:
            # Before the version is known, whose scores the record is given.
            coordinator.last_record = self._record

    async def _keep_scores(self, round_: RoundInProgress) -> None:
        """What the workers of a committed round say of the version they were given."""
        weights = round_.weights
        scores = self._scores(round_, weights)
        if scores.metrics:
            told = for_log(scores.metrics, "version", "by")
            self._log.info("version scored", version=round_.base_version, by="workers", **told)
        if scores.not_finite:
            self._log.warning("scores not finite", version=round_.base_version, names=scores.not_finite)
        if scores.metrics or scores.not_finite:
            await self._coordinator.keep_scores(
                round_.base_version,
                scores.metrics,
                of_sub_models=scores.of_sub_models,
                not_finite=scores.not_finite,
            )
        number, version = round_.number, self._run.version
        if round_.kind is TaskKind.INITIALIZE:
            giver = next((round_.worker_of(token) for token in weights), "")
            self._log.info("initial model", worker=giver, hint="--initialiser says who may give it")
        if round_.jump is Jump.NORM:
            self._log.warning("the model has become far larger", round=number, version=version)
        if (dominance := round_.dominance) is not None:
            self._log.warning(
                "one worker is over half of the mean",
                round=number,
                worker=dominance.worker,
                share=round(dominance.share, 3),
                hint="--max-examples and --max-share bound it",
            )
        self._log.info("round committed", round=number, version=version, updates=len(weights))

    async def _finish(self, finished: Finished) -> None:
        """Record an abandoned round (a committed one is recorded with its version), and let go of what is over."""
        coordinator, run, round_ = self._coordinator, self._run, self._run.current
        if finished.committed:
            coordinator.local_models.observe(self._record, run.layout)
            await self._keep_scores(round_)
        else:
            await self._store_end(run)
            self._log.warning("round abandoned", round=round_.number, reason=finished.reason)
        fleet, now = coordinator.fleet, coordinator.clock()
        if doubted := fleet.judge(round_.state, now):
            self._log.warning("workers held up rounds again and again", count=len(doubted), workers=doubted[:8])
        over = [token for token in round_.state.tasks if token not in round_.state.carried]
        self._over = [*(self._over or ()), *over]
        coordinator.metrics.observe_round(self._record)
        coordinator.metrics.model_version.set(run.version)
        coordinator.metrics.live_workers.set(sum(fleet.alive(worker, now) for worker in fleet))

    async def _clear_away(self) -> None:
        """Remove the updates and versions of rounds that are over: once nobody waits for the driver.

        What cannot be removed now is tried again at a later wait, and holds nothing up. A process that dies before
        has left it to the next one, which clears it away before it begins.
        """
        coordinator, data_folder = self._coordinator, self._coordinator.data_folder
        if self._over is None or coordinator.clock() < self._clear_at:
            return
        over, self._over = self._over, None
        try:
            await self._remove(over)
            data_folder.works(Use.OLD_FILES)
            self._clearing.reset()
        except StorageError as error:
            self._over = [*over, *(self._over or ())]
            self._clear_at = coordinator.clock() + self._clearing.next_delay_s()
            data_folder.failed(Use.OLD_FILES, error)

    async def _remove(self, over: list[str]) -> None:
        coordinator, run = self._coordinator, self._run
        await asyncio.to_thread(coordinator.journal.discard, over)
        given = [] if run.round is None else [run.round.version_of(token) for token in run.round.state.tasks]
        oldest = min([run.version - self._settings.keep_versions + 1, *given])
        keep, best = frozenset(range(oldest, run.version + 1)), run.versions.best
        wanted = {best.version if best else 0, run.rolling_back.version if run.rolling_back else 0}
        coordinator.apply(VersionsPruned(keep | wanted))
        await coordinator.models.prune(keep, frozenset(wanted))

    async def _after_round(self) -> None:
        coordinator, ended = self._coordinator, self._run.current
        coordinator.effects.clear()
        coordinator.apply(RoundEnded(time.time()))
        dropped = [effect.dropped for effect in coordinator.effects if isinstance(effect, Drop)]
        coordinator.effects.clear()
        coordinator.fleet.wake_evaluators_and(self._run.leases)
        if dropped:
            await self._until_stored(partial(self._drop, dropped))
        if ended.state.phase is RoundPhase.COMMITTED:
            self._abandoned.reset()
        elif ended.kind is not TaskKind.EVALUATE and not self._run.ended and self._run.rolling_back is None:
            await self._after_abandoned(ended)

    async def _after_abandoned(self, ended: RoundInProgress) -> None:
        """Rest, or pause where the next round would only end for the same reason."""
        coordinator = self._coordinator
        if reason := self._run.hopeless(ended, coordinator.fleet, coordinator.clock()):
            self._abandoned.reset()
            await self._until_stored(partial(coordinator.pause_itself, reason))
        else:
            await self._rest(self._abandoned.next_delay_s())

    async def _drop(self, dropped: list[DroppedTask]) -> None:
        coordinator = self._coordinator
        histories = histories_of(dropped, coordinator.fleet)
        rows = [
            (each.token, each.round, each.task.phase, each.task.reason, each.task.loss_cause) for each in dropped
        ]
        await coordinator.in_database(coordinator.store.drop_tasks, rows, histories)
        coordinator.fleet.remember(histories)
        for each in dropped:
            worker, reason = each.task.worker, each.task.reason
            self._log.info("carried-over task dropped", round=each.round, worker=worker, reason=reason)
        self._over = [*(self._over or ()), *(each.token for each in dropped)]

    async def _rest(self, seconds: float) -> None:
        """Wait, whoever polls meanwhile: rounds that fail at once must not spin."""
        coordinator, run = self._coordinator, self._run
        until = coordinator.clock() + seconds
        while not run.ended and run.rolling_back is None and coordinator.clock() < until:
            await self._wait(until)

    async def _evaluators_are_done(self) -> bool:
        """Wait until evaluators that are alive have scored the last version, within the time of a round.

        Returns False where the run is rolled back meanwhile.
        """
        coordinator, run = self._coordinator, self._run
        until = coordinator.clock() + self._settings.policy.deadline_s
        while coordinator.clock() < until and run.rolling_back is None:
            alive = coordinator.fleet.live_evaluators(coordinator.clock())
            if not any(run.evaluations.waiting_for(worker.name, run.version) for worker in alive):
                return True
            await self._wait(min(until, coordinator.clock() + self._settings.policy.lease_s))
        return run.rolling_back is None
