"""The driver: the one task that opens rounds, selects workers, and commits.

    RoundSource   gives the driver its rounds, and makes of their updates what is to be made
                  (fedgrpc.aggregator.own_rounds, fedgrpc.hierarchy.parent_rounds)
    Upkeep        waits of the driver: for news, and for a disk that works

The rule: whatever the driver does can be cut off at any point. What is not in the database did not happen, and
what an update file holds is still there. The next process continues from that. Nothing that can wait holds a round
up, and nothing accepted is dropped because the disk fails.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import structlog

from fedgrpc import claims, tracing
from fedgrpc.aggregation.robust.aggregation import aggregation_of
from fedgrpc.aggregator.assignment import TaskAssigner
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.histories import histories_of
from fedgrpc.aggregator.new_version import AcceptedUpdates
from fedgrpc.aggregator.recovery import Recovery
from fedgrpc.codec.layout import Layout
from fedgrpc.errors import (
    CodecError,
    FedgrpcError,
    IllegalTransition,
    NotFound,
    StorageError,
    UnusableUpdate,
    UpdateRefused,
)
from fedgrpc.privacy.secure_round import Ask, TellRoster
from fedgrpc.rounds.events import AbandonCause, Abort, Commit, Finished, Rejected, Select, Tick
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.round import RoundPhase, wants_workers
from fedgrpc.rounds.version import Jump, Version
from fedgrpc.rpc.retry import Backoff, Retries
from fedgrpc.runs.events import Drop, RoundEnded, RoundOpened, RunPhase, UpdatesMerged, VersionsPruned
from fedgrpc.runs.keeping import kept
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.merge import Merge
from fedgrpc.runs.round_in_progress import DroppedTask, RoundInProgress
from fedgrpc.storage.data_folder import Use
from fedgrpc.v1.round_pb2 import Round as RoundRecord

log = structlog.get_logger()

# After each look at the whole fleet, this many times as long for everything else.
_REST = 9.0
_AFTER_STORAGE_ERROR = Backoff(first_s=0.5, cap_s=15.0)
# Rounds that are looked through for the newest scores after a restart.
_RECENT_ROUNDS = 20


class RoundSource(Protocol):
    """Gives a driver its rounds, one at a time, and takes what they make."""

    async def recover(self, recovery: Recovery) -> None:
        """Take up what a former process left, with the help of `recovery`. Raises as it does."""

    async def next_round(self) -> RoundInProgress | None:
        """Return the round to play now. None: look again, or the run has ended."""

    async def write(self, round_: RoundInProgress, merge: Merge) -> tuple[Version | None, Layout]:
        """Make what the round makes of these updates durable. Returns its version, if it has one, and the layout.

        Raises `StorageError`, `UnusableUpdate` for an update that is to be left out, and `CodecError` or
        `UpdateRefused` when no update in particular is to blame.
        """

    async def ended(self, round_: RoundInProgress) -> None:
        """Act on the end of a round, committed or abandoned, before the next one."""


class Upkeep:
    """Waits, and removes the updates and versions of rounds that are over while the driver has nothing to do."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        # Tasks of finished rounds whose updates are still on the disk. None: everything is cleared away.
        self._over: list[str] | None = None
        self._clear_at = 0.0
        self._clearing = Retries(_AFTER_STORAGE_ERROR)

    def over(self, tokens: Iterable[str]) -> None:
        """Note tasks whose updates are not needed any more."""
        self._over = [*(self._over or ()), *tokens]

    async def until(self, time_s: float | None, clear: bool = True) -> None:
        """Wait for news, or for the aggregator's clock to read `time_s`. `clear`: for news from now on only."""
        coordinator = self._coordinator
        if clear:
            coordinator.wake.clear()
        await self.clear_away()
        timeout_s = None if time_s is None else max(0.0, time_s - coordinator.clock())
        try:
            async with asyncio.timeout(timeout_s):
                await coordinator.wake.wait()
        except TimeoutError:
            pass

    async def until_stored(self, act: Callable[[], Awaitable[None]]) -> None:
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
            # The disk may be full of what is not needed any more.
            await self.clear_away()
            await asyncio.sleep(retries.next_delay_s())

    async def clear_away(self) -> None:
        """Remove the updates and versions of rounds that are over.

        A removal that fails is retried at a later wait. What a process leaves by its death is removed by the next
        one before it begins.
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
        coordinator, run = self._coordinator, self._coordinator.machine
        await asyncio.to_thread(coordinator.journal.discard, over)
        given = [] if run.round is None else [run.round.version_of(token) for token in run.round.state.tasks]
        best, back = run.versions.best, run.rolling_back
        named = {best.version if best else 0, back.version if back else 0, *coordinator.named_versions()}
        keep, models = kept(
            run.version, coordinator.settings.keep_versions, min(given, default=run.version), named
        )
        coordinator.apply(VersionsPruned(keep | models))
        await coordinator.encoded_models.prune(keep, models)


Rounds = Callable[[Coordinator, Upkeep, AcceptedUpdates], RoundSource]


class Driver:
    """Plays the rounds of a source on a coordinator until the run has ended."""

    def __init__(self, coordinator: Coordinator, rounds: Rounds) -> None:
        self._coordinator = coordinator
        self._run = coordinator.machine
        self._settings = coordinator.settings
        self._assigner = TaskAssigner(coordinator)
        self._upkeep = Upkeep(coordinator)
        rule = aggregation_of(self._settings.aggregation)
        self._updates = AcceptedUpdates(coordinator.journal, coordinator.models, coordinator.local_models, rule)
        self._source = rounds(coordinator, self._upkeep, self._updates)
        self._holders = 0
        # Of the round that ended last.
        self._record = RoundRecord()
        self._merge = Merge({})
        self._log = log.bind(run=self._settings.run_name)

    async def recover(self) -> None:
        """Take up what a former process left in the data folder. Raises `UsageError` and `StorageError`."""
        coordinator, run = self._coordinator, self._run
        await self._source.recover(Recovery(coordinator, self._assigner))
        records, _ = await coordinator.in_database(coordinator.store.rounds, run.last_number + 1, _RECENT_ROUNDS)
        coordinator.metrics.restore(run.version, records)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Select no more workers and open no more rounds while the block runs."""
        self._holders += 1
        self._coordinator.news()
        try:
            yield
        finally:
            self._holders -= 1
            self._coordinator.news()

    async def run(self) -> None:
        """Play rounds until the run has ended. Raises `StorageError` only for what waiting cannot mend."""
        run = self._run
        while not run.ended:
            if run.round is None:
                if self._holders:
                    await self._upkeep.until(None)
                    continue
                if (round_ := await self._source.next_round()) is None:
                    continue
                self._coordinator.apply(RoundOpened(round_))
                self._log.debug("round opened", round=round_.number, kind=round_.kind.name)
            await self._play()
            await self._after_round()
        if run.rolling_back is not None:
            self._coordinator.answer_roll_back(IllegalTransition(f"the run has ended: {run.ending.text}"))
        await self._upkeep.clear_away()

    async def _play(self) -> None:
        """Play the round in progress to its end."""
        coordinator, run = self._coordinator, self._run
        while True:
            while coordinator.effects:
                effect = coordinator.effects.popleft()
                if isinstance(effect, Select):
                    await self._upkeep.until_stored(partial(self._assigner.select, effect))
                elif isinstance(effect, Commit):
                    await self._upkeep.until_stored(partial(self._commit, effect))
                elif isinstance(effect, TellRoster | Ask):
                    await self._upkeep.until_stored(coordinator.secure_sums.store)
                elif isinstance(effect, Finished):
                    await self._upkeep.until_stored(partial(self._finish, effect))
                    return
            waits = bool(self._holders) or run.phase is RunPhase.PAUSED
            if waits and run.current.state.phase is RoundPhase.SELECTING:
                await self._upkeep.until(None)
                continue
            # Before the look: what comes while it is looked at is news for the wait that follows.
            coordinator.wake.clear()
            looked_at = coordinator.clock()
            if wants_workers(run.current.state):
                coordinator.apply(coordinator.workers_available())
            if coordinator.effects:
                continue
            due = run.wake_at
            rest_s = _REST * (coordinator.clock() - looked_at)
            await self._upkeep.until(due, clear=False)
            due = run.wake_at
            if due is not None and coordinator.clock() >= due:
                coordinator.apply(Tick())
            if not coordinator.effects:
                # To look costs as much as the fleet is large, and each poll of a large fleet is news.
                await asyncio.sleep(rest_s)

    async def _commit(self, commit: Commit) -> None:
        """Compute and record the new version. An update that turns out unusable is left out: the round then has
        another commit to do, or has ended. A fault of no update in particular ends it.
        """
        round_, begun = self._run.current, time.monotonic()
        try:
            merge = await self._updates.merge(round_, commit.tokens, self._coordinator.weighing, self._run.layout)
            version, layout = await self._source.write(round_, merge)
            self._merge = merge
            merged = UpdatesMerged(version, layout, merge, time.monotonic() - begun)
            await self._coordinator.apply_after(merged, partial(self._store_end, version=version))
        except UnusableUpdate as error:
            if round_.secure is not None:
                # The masks of all others count on it.
                self._coordinator.apply(Abort(str(error), AbandonCause.UNUSABLE))
            else:
                self._leave_out(error)
        except (CodecError, UpdateRefused) as error:
            self._coordinator.apply(Abort(str(error), AbandonCause.UNUSABLE))

    async def _store_end(self, after: RunMachine, version: Version | None = None) -> None:
        """Make durable how a round has ended."""
        self._record = await self._coordinator.records.end(after.current, self._coordinator.clock(), version)

    def _leave_out(self, error: UnusableUpdate) -> None:
        """Reject an accepted update that cannot be averaged. The round continues without it."""
        round_ = self._run.round_of(error.token)
        worker, reason = round_.worker_of(error.token), claims.REASON.cleaned(str(error))
        # An exception that is none of ours is a fault of this program, too.
        surprise = None if isinstance(error.__cause__, FedgrpcError | None) else error.__cause__
        self._log.warning("update left out", round=round_.number, worker=worker, reason=reason, exc_info=surprise)
        self._coordinator.apply(Rejected(error.token, reason))

    def _tell(self, round_: RoundInProgress) -> None:
        """Log what a committed round has made."""
        number, version = round_.number, self._run.version
        if round_.kind is TaskKind.INITIALIZE:
            giver = next((round_.worker_of(token) for token in self._merge.weights), "")
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
        self._log.info("round committed", round=number, version=version, updates=len(self._merge.weights))

    async def _finish(self, finished: Finished) -> None:
        """Record an abandoned round (a committed one is recorded with its version), and let go of what is over."""
        coordinator, run, round_ = self._coordinator, self._run, self._run.current
        if finished.committed:
            coordinator.local_models.observe(self._record, run.layout)
            await coordinator.scores.by_workers(round_.base_version, self._merge.scores)
            self._tell(round_)
        else:
            await self._store_end(run)
            self._log.warning("round abandoned", round=round_.number, reason=finished.reason)
        fleet, now = coordinator.fleet, coordinator.clock()
        if doubted := fleet.judge(round_.state, now):
            self._log.warning("workers held up rounds again and again", count=len(doubted), workers=doubted[:8])
        self._upkeep.over(token for token in round_.state.tasks if token not in round_.state.carried)
        coordinator.metrics.observe_round(self._record)
        tracing.round_ended(run.id, self._record)
        coordinator.metrics.model_version.set(run.version)
        coordinator.metrics.live_workers.set(sum(fleet.alive(worker, now) for worker in fleet))

    async def _after_round(self) -> None:
        coordinator, ended = self._coordinator, self._run.current
        # Effects of a round that is over: an operator may have ended it between a `Select` and its answer.
        coordinator.effects.clear()
        coordinator.apply(RoundEnded(time.time()))
        dropped = [effect.dropped for effect in coordinator.effects if isinstance(effect, Drop)]
        coordinator.effects.clear()
        coordinator.fleet.wake_evaluators_and(self._run.leases)
        if dropped:
            await self._upkeep.until_stored(partial(self._drop, dropped))
        await self._source.ended(ended)

    async def _drop(self, dropped: list[DroppedTask]) -> None:
        coordinator = self._coordinator
        histories = histories_of(dropped, coordinator.workers)
        rows = [
            (each.token, each.round, each.task.phase, each.task.reason, each.task.loss_cause) for each in dropped
        ]
        await coordinator.in_database(coordinator.store.drop_tasks, rows, histories)
        coordinator.workers.remember(histories)
        for each in dropped:
            worker, reason = each.task.worker, each.task.reason
            self._log.info("carried-over task dropped", round=each.round, worker=worker, reason=reason)
        self._upkeep.over(each.token for each in dropped)
