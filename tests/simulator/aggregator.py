"""A simulated aggregator: the production `RunMachine` in a shell written for virtual time.

The rule is that of the real one: what the world is told is on the disk first. It can be killed between any two
lines that yield.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedgrpc.codec.layout import TensorSpec
from fedgrpc.errors import FedgrpcError, LinkError, RoundClosed, UnknownTask, UpdateRefused, WrongOffset
from fedgrpc.privacy.ledger import Ledger, ledger_of
from fedgrpc.privacy.noise import RoundNoise
from fedgrpc.privacy.policy import PrivacyPolicy
from fedgrpc.rounds import events as rounds
from fedgrpc.rounds.events import (
    Commit,
    Failed,
    Finished,
    Offer,
    Progress,
    Rejected,
    Select,
    TaskPhase,
    Tick,
    WorkersAvailable,
)
from fedgrpc.rounds.history import Timings
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.round import Round, RoundPhase, Step, restore, time_left, wake_at, wants_workers
from fedgrpc.rounds.transitions import step
from fedgrpc.rounds.version import Version as ModelVersion
from fedgrpc.runs.events import (
    Effect,
    Event,
    LedgerOpened,
    OpenRound,
    ReleaseEntered,
    RoundEnded,
    RoundOpened,
    RoundsRestored,
    TaskClosed,
    TasksGiven,
    UpdateAccepted,
    UpdatesMerged,
    VersionTaken,
    WorkerPolled,
)
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.merge import Merge
from fedgrpc.runs.round_in_progress import RoundInProgress, check_ended_task
from fedgrpc.runs.rules import RunRules
from fedgrpc.runs.task_context import Report, TaskContext
from fedgrpc.simulation.loop import Future, Life, Process, Timeout, Wait
from tests.simulator.choosing import Chooser
from tests.simulator.disk import Disk, Version
from tests.simulator.messages import Assignment, GiveBack, Heartbeat, Held, Poll, Push, Query, Request

if TYPE_CHECKING:
    from tests.simulator.world import World

POLL_S = 8.0
_ENDLESS = 1 << 31
_PRIVACY = PrivacyPolicy("gaussian", noise_multiplier=1.0, cohort=10)
_NOISE_KEY = bytes(32)
_LAYOUT = (TensorSpec("weights", "float32", (1,)),)
_REPORT = Report(1, 1, {}, {}, 0, Timings(), 0, 0)


class Aggregator:
    """One incarnation after the other on one `disk`. Tests break it on purpose by overriding a method."""

    run_class: type[RunMachine] = RunMachine

    def __init__(self, world: World) -> None:
        self.world = world
        self.disk = Disk()
        self.life = Life()
        self.life.alive = False
        self.foreseeing = False
        self.run = self.new_run()

    @property
    def round(self) -> Round | None:
        """The round in progress."""
        return None if self.run.round is None else self.run.round.state

    # One incarnation.

    def start(self) -> None:
        """Come up from the disk."""
        self.life = Life()
        self.effects: list[Select | Commit | Finished] = []
        self.wake = Future()
        self.polling: dict[str, Future] = {}
        self.streams: dict[str, object] = {}
        self.chooser = Chooser(self.world)
        self.last_seen: dict[str, float] = {}
        self.run = self.new_run()
        self.recover()
        self.world.loop.spawn(self._drive(), self.life)

    def new_run(self) -> RunMachine:
        """The run as far as its last version."""
        rules = RunRules(self.world.policy, _ENDLESS)
        run = self.run_class(rules, "simulated", 0.0, self.watched_step)
        number = self.known_version()
        run.apply(VersionTaken(ModelVersion(number, 0, b"digest"), _LAYOUT), 0.0)
        if self.world.private:
            run.apply(LedgerOpened(self.opened_ledger()), 0.0)
        return run

    def opened_ledger(self) -> Ledger:
        """The ledger as far as its last entry."""
        return ledger_of(_PRIVACY, 1.0, None, None, self.disk.releases, clip_quantile=0.5)

    def known_version(self) -> int:
        """The last version on the disk."""
        return self.disk.version

    def crash(self) -> None:
        """Lose everything but the disk."""
        self.life.alive = False

    def recover(self) -> None:
        """Go on in the round that was open, with the updates that were accepted."""
        disk, policy, now = self.disk, self.world.policy, self.world.loop.now
        self.dispatch(RoundsRestored(disk.last_number))
        number = disk.open.number if disk.open else disk.last_number + 1
        tasks = [
            (row.token, row.worker, self._stored_phase(row.token, row.phase), row.reason, row.staleness)
            for row in disk.rows_of(number)
        ]
        if disk.open is not None:
            left_s = disk.open.deadline_at - self.world.wall_now
            state = restore(number, policy, tasks, disk.open.aim, left_s, now, disk.open.granted_s)
            self.world.watch.restored(state)
            assert state.deadline_at is not None
            if state.granted_s > disk.open.granted_s:
                wall_deadline_at = self.world.wall_now + state.deadline_at - now
                disk.open = replace(disk.open, deadline_at=wall_deadline_at, granted_s=state.granted_s)
            self._reopen(state)
        elif tasks:
            self._reopen(restore(number, policy, tasks, 0, None, now))
        self._keep_files()

    def _reopen(self, state: Round) -> None:
        contexts = {token: TaskContext(report=_REPORT) for token in state.accepted}
        round_ = RoundInProgress(state, TaskKind.TRAIN, self.run.version, self.world.wall_now, contexts)
        self.dispatch(RoundOpened(round_))

    def _stored_phase(self, token: str, phase: TaskPhase) -> TaskPhase:
        upload = self.disk.uploads.get(token)
        return TaskPhase.ACCEPTED if upload is not None and upload.sealed else phase

    def _keep_files(self) -> None:
        self.disk.keep_only(self.round.tasks if self.round is not None else ())

    # What workers ask.

    def serve(self, request: Request, answer: Callable[[Any], None]) -> None:
        """Handle one request that has arrived."""
        if self.life.alive:
            self.last_seen[request.worker] = self.world.loop.now
            self.world.loop.spawn(self._handle(request), self.life, answer)

    def _handle(self, request: Request) -> Process[Any]:
        try:
            if isinstance(request, Poll):
                return (yield from self._poll(request))
            if isinstance(request, Heartbeat):
                return self._heartbeat(request)
            if isinstance(request, GiveBack):
                return self._give_back(request)
            if isinstance(request, Query):
                return self._query(request)
            return (yield from self._push(request))
        except FedgrpcError as error:
            return error

    def _poll(self, poll: Poll) -> Process[Assignment | None]:
        self.dispatch(WorkerPolled(poll.worker, None))
        if poll.worker not in self.run.leases:
            self.polling[poll.worker] = woken = Future()
            self._wake_driver()
            with suppress(Timeout):
                yield from self.world.loop.wait(woken, POLL_S)
            if self.polling.get(poll.worker) is woken:
                del self.polling[poll.worker]
        token = self.run.task_of(poll.worker)
        if token is None:
            return None
        phase = self.run.current.state.find(token).phase
        self.dispatch(Progress(token, TaskPhase.OFFERED if phase is TaskPhase.EXPIRED else phase))
        round_ = self.run.current
        left_s = time_left(round_.state, self.world.loop.now)
        return Assignment(token, round_.number, round_.version_of(token), left_s)

    def _heartbeat(self, beat: Heartbeat) -> bool:
        try:
            if self._check_open(beat.worker, beat.token) is not TaskPhase.ACCEPTED:
                self.dispatch(Progress(beat.token, beat.phase))
        except RoundClosed:
            return True
        return False

    def _give_back(self, request: GiveBack) -> None:
        if self._check_open(request.worker, request.token) is not TaskPhase.ACCEPTED:
            self.dispatch(Failed(request.token, "training failed"))

    def _query(self, query: Query) -> Held:
        if self._check_open(query.worker, query.token) is TaskPhase.ACCEPTED:
            return self._acknowledge(query.token, 0)
        upload = self.disk.uploads.get(query.token)
        return Held(upload.held if upload else 0, complete=False)

    def _push(self, push: Push) -> Process[Held]:
        token = push.token
        if self._check_open(push.worker, token) is TaskPhase.ACCEPTED:
            return self._acknowledge(token, push.total)
        upload = self.disk.uploads.get(token)
        if push.offset != (upload.held if upload else 0):
            raise WrongOffset(f"chunk {push.offset}")
        if push.offset == push.total:
            return (yield from self._accept(push))
        self.streams.pop(token, None)
        held = self.disk.append(token, push.update, push.total)
        self._dispatch_if_of_this_round(
            token, Progress(token, TaskPhase.UPLOADING, held / push.total, held, push.total)
        )
        if held < push.total:
            return Held(held, complete=False)
        return (yield from self._accept(push))

    def _accept(self, push: Push) -> Process[Held]:
        """Verify, make durable, count, acknowledge."""
        token = push.token
        me = self.streams[token] = object()
        yield from self._disk_time_of(token, me)
        if push.bad:
            self.disk.discard([token])
            self._dispatch_if_of_this_round(token, Rejected(token, "values are not finite"))
            raise UpdateRefused("values are not finite")
        self.disk.seal(token)
        yield from self._disk_time_of(token, me)
        try:
            self.dispatch(UpdateAccepted(token, 1.0, _REPORT))
        except RoundClosed:
            self.disk.discard([token])
            raise
        return self._acknowledge(token, push.total)

    def _disk_time_of(self, token: str, stream: object) -> Process[None]:
        """As `_disk_time`; the newest stream of an upload takes over."""
        yield self._disk_time()
        if self.streams.get(token) is not stream or token not in self.disk.uploads:
            raise LinkError("another stream took over, or the round has ended and its files are gone")

    def _acknowledge(self, token: str, chunks: int) -> Held:
        self.world.watch.acknowledged(token)
        return Held(chunks, complete=True)

    def _check_open(self, worker: str, token: str) -> TaskPhase:
        """The phase of a task that may still send or has sent its update. Raises `UnknownTask`, `RoundClosed`."""
        if self.run.round is not None and token in self.run.round:
            return self.run.round.check_task(worker, token)
        row = self.disk.rows.get(token)
        if row is None:
            raise UnknownTask("no task has this token")
        return check_ended_task(worker, row.worker, row.phase, row.reason)

    def _dispatch_if_of_this_round(self, token: str, event: Event) -> None:
        self.run.round_of(token)
        self.dispatch(event)

    # What happens to the run.

    def step(self, round_: Round, event: rounds.Event, now: float) -> Step:
        """The production transition."""
        return step(round_, event, now)

    def watched_step(self, round_: Round, event: rounds.Event, now: float) -> Step:
        """As `step`. What really happens is watched, and not what is only foreseen."""
        after, effects = self.step(round_, event, now)
        if not self.foreseeing:
            self.world.watch.stepped(round_, event, after, effects)
        return after, effects

    def foresee(self, event: Event) -> Round:
        """The round as the event will leave it."""
        self.foreseeing = True
        try:
            return self.run.foresee(event, self.world.loop.now).current.state
        finally:
            self.foreseeing = False

    def dispatch(self, event: Event) -> None:
        """Apply one event. Raises as `RunMachine.apply` does; nothing has then happened."""
        effects = self.run.apply(event, self.world.loop.now)
        for effect in effects:
            self._carry_out(effect)
        if effects or isinstance(event, UpdateAccepted | Rejected | Failed):
            self._wake_driver()

    def dispatch_after(self, event: Event, store: Callable[[Round], None]) -> Process[None]:
        """Store the round as the event will leave it, and then apply the event."""
        after = self.foresee(event)
        yield self._disk_time()
        store(after)
        yield self._disk_time()
        self.dispatch(event)

    def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, Offer) and effect.worker in self.polling:
            self.polling[effect.worker].set()
        elif isinstance(effect, TaskClosed):
            self.streams.pop(effect.token, None)
        elif isinstance(effect, Select | Commit | Finished):
            self.effects.append(effect)

    # Who is there, for the run.

    def idle_trainers(self, busy: Collection[str]) -> tuple[str, ...]:
        return tuple(worker for worker in self.polling if worker not in busy)

    def live_trainers(self, now: float, but: Collection[str] = ()) -> int:
        since = now - self.world.policy.lease_s
        return sum(seen > since or worker in self.polling for worker, seen in self.last_seen.items())

    def doubted(self, now: float) -> frozenset[str]:
        return frozenset()

    def pool(self) -> WorkersAvailable:
        """Who could take a task now."""
        return self.run.workers_available(self, self.world.loop.now)

    # The one task that opens rounds, selects and commits.

    def _drive(self) -> Process[None]:
        while True:
            if self.run.round is None:
                opened = self.run.next_step(self.world.wall_now, self.world.loop.now)
                assert isinstance(opened, OpenRound)
                self.dispatch(RoundOpened(opened.round))
            yield from self._play()
            self.effects.clear()
            yield self.world.loop.sleep(self.world.rng.uniform(0, 0.5))
            self._follow()

    def _follow(self) -> None:
        self.dispatch(RoundEnded(self.world.wall_now))
        self._keep_files()

    def _play(self) -> Process[None]:
        while True:
            while self.effects:
                effect = self.effects.pop(0)
                if isinstance(effect, Select):
                    yield from self._select(effect)
                elif isinstance(effect, Commit):
                    yield from self._commit(effect)
                else:
                    yield from self._finish(effect)
                    return
            self.wake = Future()
            if wants_workers(self.run.current.state):
                self.dispatch(self.pool())
            if self.effects:
                continue
            due = self.wake_at(self.run.current.state)
            try:
                yield from self.world.loop.wait(self.wake, np.inf if due is None else due - self.world.loop.now)
            except Timeout:
                self.dispatch(Tick())

    def wake_at(self, round_: Round) -> float | None:
        """When the round wants to be told the time."""
        return wake_at(round_)

    def _wake_driver(self) -> None:
        self.wake.set()

    def _select(self, select: Select) -> Process[None]:
        state = self.run.current.state
        idle = (worker for worker in self.pool().idle if worker not in select.exclude)
        selected = self.chooser.choose(state, idle, select.count)
        given = TasksGiven(selected, {token: TaskContext() for token, _ in selected.tasks})
        opened = self.foresee(selected).phase is RoundPhase.REPORTING
        if opened and selected.tasks:
            yield from self.dispatch_after(given, self._save_open)
        else:
            self.dispatch(given)

    def _save_open(self, after: Round) -> None:
        assert after.deadline_at is not None
        self.disk.save_open(after, self.world.wall_now + after.deadline_at - self.world.loop.now)

    def _commit(self, commit: Commit) -> Process[None]:
        yield self._disk_time()
        merged, version = self.merge(commit)
        if self.run.ledger is not None:
            yield from self.release(self.run.ledger, version)
        after = self.foresee(merged)
        yield from self.finish_round(after, version)
        yield self._disk_time()
        self.dispatch(merged)

    def release(self, ledger: Ledger, version: Version) -> Process[None]:
        """Enter the release, and only then write the version with the noise of its step."""
        release = ledger.release_of(version.round, version.version, version.tokens)
        if release.step == ledger.next_step:
            # Every other update fits.
            release = release.adapted(len(version.tokens) // 2, RoundNoise(_NOISE_KEY, release.step))
            yield from self.dispatch_after(ReleaseEntered(release), lambda _: self.disk.enter(release))
        self.world.watch.written(version, release.step)

    def merge(self, commit: Commit) -> tuple[UpdatesMerged, Version]:
        """The version that a commit makes."""
        updates = tuple(self.disk.uploads[token].update for token in commit.tokens)
        number, round_number = self.run.version + 1, self.run.current.number
        version = ModelVersion(number, round_number, b"digest", trained=number - 1)
        weights = dict.fromkeys(commit.tokens, 1.0)
        merged = UpdatesMerged(version, _LAYOUT, Merge(weights), 0.0)
        return merged, Version(number, round_number, commit.tokens, updates)

    def finish_round(self, after: Round, version: Version | None) -> Process[None]:
        """Make the end of the round durable, with its version, in one transaction."""
        yield self._disk_time()
        self.disk.finish(after, version)
        if version is not None:
            self.world.watch.committed(version, after)

    def _finish(self, finished: Finished) -> Process[None]:
        state = self.run.current.state
        self.chooser.remember(state)
        if not finished.committed:
            yield from self.finish_round(state, None)
        yield self._disk_time()
        state = self.run.current.state
        self.disk.discard([token for token in state.tasks if token not in state.carried])

    def _disk_time(self) -> Wait:
        """The disk takes its time, and any of these moments may be the last."""
        seconds = self.world.rng.exponential(self.world.network.faults.write_s)
        self.world.may_kill_aggregator(within_s=seconds)
        return self.world.loop.sleep(seconds)
