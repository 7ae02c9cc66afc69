"""The driver: the one task that opens rounds, selects, commits, and ends the run.

The rule: whatever it does can be cut off at any point. What is not in the database did not happen, and what an
update file holds is still there; the next process goes on from that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import structlog

from fedgrpc.aggregation.mean import mean_metrics
from fedgrpc.aggregator.assignment import TaskAssigner
from fedgrpc.aggregator.carrying import Dropped, carried_rows, ending_here, going_on
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.histories import histories_after, histories_of
from fedgrpc.aggregator.new_version import NewVersion
from fedgrpc.aggregator.recovery import Recovery
from fedgrpc.aggregator.report import CurrentRound
from fedgrpc.aggregator.run_state import RollBack
from fedgrpc.aggregator.scores import for_log, scores_of
from fedgrpc.errors import CodecError, IllegalTransition, NotFound, StorageError, UnusableUpdate, UpdateRefused
from fedgrpc.protocol.records import jump_to_proto
from fedgrpc.rounds.events import AbandonCause, Abort, Commit, Committed, Finished, Select, TaskPhase, Tick
from fedgrpc.rounds.history import WorkerHistory
from fedgrpc.rounds.policy import TaskKind as TaskKinds
from fedgrpc.rounds.round import Round, RoundPhase, Streak
from fedgrpc.rounds.state import step, wake_at, wants_workers
from fedgrpc.rounds.version import Jump, Version
from fedgrpc.rpc.retry import Backoff, Retries
from fedgrpc.storage.data_folder import Use
from fedgrpc.v1.aggregator_pb2 import RUN_PHASE_FINISHED, RUN_PHASE_PAUSED
from fedgrpc.v1.round_pb2 import (
    ROUND_PHASE_COMMITTED,
    TASK_KIND_EVALUATE,
    TASK_KIND_INITIALIZE,
    TASK_KIND_TRAIN,
    TaskKind,
)
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
        self._it = coordinator
        self._settings = coordinator.settings
        self._assigner = TaskAssigner(coordinator)
        self._new_version = NewVersion(coordinator)
        self._last_number = 0
        self._record = RoundRecord()
        # Tasks of rounds that are over, whose updates are still to be cleared away; None: all is done.
        self._over: list[str] | None = None
        self._clear_at = 0.0
        self._clearing = Retries(_AFTER_STORAGE_ERROR)
        self._closing_evaluation = self._settings.evaluate
        self._abandoned = Retries(_AFTER_ABANDONED)
        self._streak = Streak()
        self._log = log.bind(run=self._settings.run_name)

    async def recover(self) -> None:
        """Take up what a former process left in the data folder. Raises `UsageError` and `StorageError`."""
        it = self._it
        self._last_number = await Recovery(it, self._assigner).recover()
        records, _ = await it.in_database(it.store.rounds, self._last_number + 1, _RECENT_ROUNDS)
        it.metrics.restore(it.run.version, records)

    async def run(self) -> None:
        """Play rounds until the run has ended. Raises `StorageError` only for what waiting cannot mend."""
        it = self._it
        while not it.run.ended:
            if it.current is None and not await self._open():
                continue
            await self._play()
            await self._after_round()
        if it.rolling_back is not None:
            it.rolling_back.done.set_exception(IllegalTransition(f"the run has ended: {it.run.reason}"))
        await self._clear_away()

    async def _open(self) -> bool:
        """Open the next round if there is one to open now; else wait or end the run."""
        it = self._it
        if it.rolling_back is not None:
            await self._roll_back(it.rolling_back)
            return False
        if it.run.phase == RUN_PHASE_PAUSED:
            await self._wait(None)
            return False
        if it.run.reason:
            await self._end(it.run.reason)
            return False
        if it.run.began and it.run.trained >= self._settings.rounds and not self._closing_evaluation:
            await self._wait_for_evaluators()
            if it.rolling_back is not None:
                return False
            await self._end(it.run.reason or f"all {self._settings.rounds} rounds are done")
            return False
        kind = self._next_kind()
        first = kind == TASK_KIND_INITIALIZE and not it.run.version
        number = 0 if first else self._last_number + 1
        state = Round(number, self._settings.policy.for_kind(TaskKinds(kind)), it.clock())
        it.current = CurrentRound(state, kind, it.run.version, time.time())
        self._log.debug("round opened", round=number, kind=TaskKind.Name(kind))
        return True

    async def _roll_back(self, asked: RollBack) -> None:
        """Make a copy of the version that is asked for the latest one, durably, and answer."""
        it = self._it
        number = self._last_number + 1
        record = RoundRecord(number=number, phase=ROUND_PHASE_COMMITTED, kind=TASK_KIND_TRAIN, reason=asked.text)
        record.base_version, record.rolled_back_to = it.run.version, asked.version
        record.started_at.FromNanoseconds(time.time_ns())
        try:
            version, layout = await self._new_version.roll_back(asked.version, number)
            record.committed_version, record.jump = version.version, jump_to_proto(version.jump)
            record.metrics.update(version.metrics)
            record.evaluator_metrics.update(version.evaluator_metrics)
            await it.in_database(it.store.finish_round, record, [], {}, version)
        except (StorageError, NotFound) as error:
            it.rolling_back = None
            asked.done.set_exception(error)
            return
        it.rolling_back, self._last_number, it.last_record = None, number, record
        it.run.take(version, layout)
        it.versions.add(version)
        self._closing_evaluation = self._settings.evaluate
        self._log.warning(asked.text, round=number, version=version.version)
        it.metrics.model_version.set(version.version)
        it.fleet.wake_concerned()
        it.changes.notify()
        asked.done.set_result(None)

    async def _end(self, reason: str) -> None:
        await self._clear_away()
        best, last = self._it.versions.best, self._it.versions.last
        for which, version in (("best", best), ("last", last)):
            if version is not None and version.sha256:
                path, told = str(self._it.models.path(version.version)), for_log(version.scores, "version", "file")
                self._log.info(f"{which} version", version=version.version, file=path, **told)
        await self._it.end(RUN_PHASE_FINISHED, reason)

    def _next_kind(self) -> TaskKind:
        if not self._it.run.began:
            return TASK_KIND_INITIALIZE
        return TASK_KIND_TRAIN if self._it.run.trained < self._settings.rounds else TASK_KIND_EVALUATE

    async def _play(self) -> None:
        """Play the round in progress to its end."""
        it = self._it
        assert it.current is not None
        while True:
            while it.effects:
                effect = it.effects.popleft()
                if isinstance(effect, Select):
                    await self._until_stored(partial(self._assigner.select, it.current, effect))
                elif isinstance(effect, Commit):
                    await self._until_stored(partial(self._commit, it.current, effect))
                else:
                    await self._until_stored(partial(self._finish, it.current, effect))
                    return
            if it.run.phase == RUN_PHASE_PAUSED and it.current.state.phase is RoundPhase.SELECTING:
                await self._wait(None)
                continue
            it.wake.clear()
            looked_at = time.perf_counter()
            if wants_workers(it.current.state):
                it.dispatch(it.pool())
            if it.effects:
                continue
            due = wake_at(it.current.state)
            rest_s = _REST * (time.perf_counter() - looked_at)
            await self._wait(due, clear=False)
            due = wake_at(it.current.state)
            if due is not None and it.clock() >= due:
                it.dispatch(Tick())
            if not it.effects:
                # To look costs as much as the fleet is large, and each poll of a large fleet is news.
                await asyncio.sleep(rest_s)

    async def _wait(self, until: float | None, clear: bool = True) -> None:
        """Wait for news, or for the clock to read `until`; there is time now for what could wait."""
        it = self._it
        if clear:
            it.wake.clear()
        await self._clear_away()
        timeout_s = None if until is None else max(0.0, until - it.clock())
        try:
            async with asyncio.timeout(timeout_s):
                await it.wake.wait()
        except TimeoutError:
            pass

    async def _until_stored(self, act: Callable[[], Awaitable[None]]) -> None:
        """Do what needs the disk. While it fails the health is bad, and everything accepted is kept."""
        it = self._it
        retries = Retries(_AFTER_STORAGE_ERROR)
        while True:
            try:
                await act()
                it.data_folder.works(Use.ROUNDS)
                return
            except (StorageError, NotFound) as error:
                it.data_folder.failed(Use.ROUNDS, error)
            # It may be full of what is not needed any more.
            await self._clear_away()
            await asyncio.sleep(retries.next_delay_s())

    async def _commit(self, current: CurrentRound, commit: Commit) -> None:
        """Compute and record the new version. An update that turns out unusable is left out: the round then has
        another commit to do, or has ended. What nobody in particular is to blame for ends it.
        """
        try:
            await self._commit_once(current, commit)
        except UnusableUpdate as error:
            self._it.leave_out(error)
        except (CodecError, UpdateRefused) as error:
            self._it.dispatch(Abort(str(error), AbandonCause.UNUSABLE))

    async def _commit_once(self, current: CurrentRound, commit: Commit) -> None:
        it = self._it
        begun = time.monotonic()
        weights = self._new_version.weights(current, commit.tokens)
        current.scales = await self._new_version.scales(current, weights)
        version: Version | None = None
        if current.kind != TASK_KIND_EVALUATE:
            version = await self._new_version.write(current, weights)
        layout = it.models.open(version.version).layout if version else it.run.layout
        current.jump = version.jump if version else Jump.NONE
        after, _ = step(current.state, Committed(version.version if version else current.base_version), it.clock())
        current.weights = weights
        current.global_s = time.monotonic() - begun
        pairs = [(current.reports[token], weight) for token, weight in weights.items()]
        current.training_metrics = mean_metrics([(report.metrics, weight) for report, weight in pairs])
        await self._store_end(current, after, version)
        # It is stored: no wait from here on, or a second try would store it twice.
        if version is not None:
            it.run.take(version, layout)
            it.versions.add(version)
        it.dispatch(Committed(version.version if version else current.base_version))

    async def _store_end(self, current: CurrentRound, ended: Round, version: Version | None) -> None:
        """Make durable how a round has ended, and then remember it; with a thousand tasks that takes its time."""
        it, now = self._it, self._it.clock()

        def store() -> tuple[RoundRecord, dict[str, WorkerHistory]]:
            record = replace(current, state=ended).record(now)
            rows = [*current.rows(ended), *carried_rows(current, ended, now)]
            histories = histories_after(current, ended, it.fleet)
            it.store.finish_round(record, rows, histories, version)
            return record, histories

        self._record, histories = await it.in_database(store)
        it.fleet.remember(histories)
        if it.last_record is None or self._record.number >= it.last_record.number:
            # Before the version is known, whose scores the record is given.
            it.last_record = self._record

    async def _keep_scores(self, current: CurrentRound) -> None:
        """What the workers of a committed round say of the version they were given."""
        scores = scores_of(current, current.weights, self._it.weighing, self._settings.policy.max_share)
        self._closing_evaluation = self._settings.evaluate and bool(scores.metrics)
        if scores.metrics:
            told = for_log(scores.metrics, "version", "by")
            self._log.info("version scored", version=current.base_version, by="workers", **told)
        if scores.not_finite:
            self._log.warning("scores not finite", version=current.base_version, names=scores.not_finite)
        if scores.metrics or scores.not_finite:
            await self._it.keep_scores(
                current.base_version,
                scores.metrics,
                of_sub_models=scores.of_sub_models,
                not_finite=scores.not_finite,
            )
        number, version, updates = current.state.number, self._it.run.version, len(current.weights)
        if current.kind == TASK_KIND_INITIALIZE:
            giver = next((current.state.tasks[token].worker for token in current.weights), "")
            self._log.info("initial model", worker=giver, hint="--initialiser says who may give it")
        if current.jump is Jump.NORM:
            self._log.warning("the model has become far larger", round=number, version=version)
        if (dominance := current.dominance) is not None:
            self._log.warning(
                "one worker is over half of the mean",
                round=number,
                worker=dominance.worker,
                share=round(dominance.share, 3),
                hint="--max-examples and --max-share bound it",
            )
        self._log.info("round committed", round=number, version=version, updates=updates)

    async def _finish(self, current: CurrentRound, finished: Finished) -> None:
        """Record an abandoned round (a committed one is recorded with its version), and let go of what is over."""
        it = self._it
        if finished.committed:
            it.local_models.observe(self._record, it.run.layout)
            await self._keep_scores(current)
        else:
            await self._store_end(current, current.state, None)
            self._log.warning("round abandoned", round=current.state.number, reason=finished.reason)
        over = [token for token in current.state.tasks if token not in current.state.carried]
        it.fleet.release(over)
        if doubted := it.fleet.judge(current.state, it.clock()):
            self._log.warning("workers held up rounds again and again", count=len(doubted), workers=doubted[:8])
        self._over = [*(self._over or ()), *over]
        self._last_number = max(self._last_number, self._record.number)
        it.metrics.observe_round(self._record)
        it.metrics.model_version.set(it.run.version)
        it.metrics.live_workers.set(sum(it.fleet.alive(worker, it.clock()) for worker in it.fleet))

    async def _clear_away(self) -> None:
        """Remove the updates and versions of rounds that are over: once nobody waits for the driver.

        What cannot be removed now is tried again at a later wait, and holds nothing up. A process that dies before
        has left it to the next one, which clears it away before it begins.
        """
        if self._over is None or self._it.clock() < self._clear_at:
            return
        over, self._over = self._over, None
        try:
            await self._remove(over)
            self._it.data_folder.works(Use.OLD_FILES)
            self._clearing.reset()
        except StorageError as error:
            self._over = [*over, *(self._over or ())]
            self._clear_at = self._it.clock() + self._clearing.next_delay_s()
            self._it.data_folder.failed(Use.OLD_FILES, error)

    async def _remove(self, over: list[str]) -> None:
        it = self._it
        await asyncio.to_thread(it.journal.discard, over)
        current = it.current
        given = [] if current is None else [current.version_of(token) for token in current.state.tasks]
        oldest = min([it.run.version - self._settings.keep_versions + 1, *given])
        keep, best = frozenset(range(oldest, it.run.version + 1)), it.versions.best
        wanted = {best.version if best else 0, it.rolling_back.version if it.rolling_back else 0}
        it.versions.keep_only(keep | wanted)
        await it.models.prune(keep, frozenset(wanted))

    async def _after_round(self) -> None:
        it = self._it
        assert it.current is not None
        kind, state, phase = it.current.kind, it.current.state, it.current.state.phase
        it.effects.clear()
        dropped = self._carry_on(it.current)
        it.fleet.wake_concerned()
        it.changes.notify()
        if dropped:
            await self._until_stored(partial(self._drop, dropped))
        if kind == TASK_KIND_EVALUATE:
            self._closing_evaluation = False
        elif phase is RoundPhase.COMMITTED:
            self._abandoned.reset()
            self._streak = Streak()
        elif not it.run.ended and it.rolling_back is None:
            await self._after_abandoned(state)

    async def _after_abandoned(self, state: Round) -> None:
        """Rest, or pause where the next round would only end for the same reason."""
        self._streak = self._streak.after(state)
        if not self._streak.hopeless or self._others_deliver():
            await self._rest(self._abandoned.next_delay_s())
            return
        lost = (task for task in state.tasks.values() if task.phase is not TaskPhase.ACCEPTED and task.reason)
        first = min(lost, key=lambda task: task.phase not in (TaskPhase.FAILED, TaskPhase.REJECTED), default=None)
        told = f" ({first.worker}: {first.reason})" if first else ""
        reason = f"{self._streak.count} rounds in a row were abandoned for one reason: {state.reason}{told}"
        self._streak = Streak()
        self._abandoned.reset()
        await self._until_stored(partial(self._it.pause_itself, reason))

    def _others_deliver(self) -> bool:
        """Whether the task can be done, and without those that failed: a few bad workers pause no run."""
        others = self._it.fleet.live_trainers(self._it.clock(), self._streak.workers)
        return self._streak.delivered and others >= self._settings.policy.needed_idle

    def _carry_on(self, ended: CurrentRound) -> list[Dropped]:
        """Open the next round at once if this one carries tasks on, for news of them may come any time."""
        it, now = self._it, self._it.clock()
        it.current, dropped = None, ending_here(ended, now)
        goes_on = not it.run.ended and not it.run.reason and it.rolling_back is None
        if ended.state.carried and goes_on and self._next_kind() == ended.kind:
            policy = self._settings.policy.for_kind(TaskKinds(ended.kind))
            number = self._last_number + 1
            it.current, dropped = going_on(ended, number, policy, it.run.version, time.time(), now)
        it.fleet.release(each.token for each in dropped)
        return dropped

    async def _drop(self, dropped: list[Dropped]) -> None:
        it = self._it
        histories = histories_of(dropped, it.fleet)
        rows = [
            (each.token, each.round, each.task.phase, each.task.reason, each.task.loss_cause) for each in dropped
        ]
        await it.in_database(it.store.drop_tasks, rows, histories)
        it.fleet.remember(histories)
        for each in dropped:
            worker, reason = each.task.worker, each.task.reason
            self._log.info("carried task dropped", round=each.round, worker=worker, reason=reason)
        self._over = [*(self._over or ()), *(each.token for each in dropped)]

    async def _rest(self, seconds: float) -> None:
        """Wait, whoever polls meanwhile: rounds that fail at once must not spin."""
        it = self._it
        until = it.clock() + seconds
        while not it.run.ended and it.rolling_back is None and it.clock() < until:
            await self._wait(until)

    async def _wait_for_evaluators(self) -> None:
        """Evaluators that are alive may score the last version, within the time of a round."""
        it = self._it
        until = it.clock() + self._settings.policy.deadline_s
        while it.clock() < until and it.rolling_back is None:
            alive = it.fleet.live_evaluators(it.clock())
            if not any(it.evaluations.waiting_for(worker.name, it.run.version) for worker in alive):
                return
            await self._wait(min(until, it.clock() + self._settings.policy.lease_s))
