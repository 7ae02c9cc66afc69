"""A simulated aggregator: the production `step` in the shell of `fedgrpc.aggregator`, written for virtual time.

The rule is that of the real one: what the world is told is on the disk first. It can be killed between any two
lines that yield.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedgrpc.errors import FedgrpcError, LinkError, RoundClosed, UnknownTask, UpdateRefused, WrongOffset
from fedgrpc.rounds.events import (
    Accepted,
    Cancel,
    Commit,
    Committed,
    Effect,
    Event,
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
from fedgrpc.rounds.round import Round, RoundPhase
from fedgrpc.rounds.state import follow, restore, step, time_left, wake_at, wants_workers
from fedgrpc.simulation.loop import Future, Life, Process, Timeout, Wait
from tests.simulator.choosing import Chooser
from tests.simulator.disk import Disk, Version
from tests.simulator.messages import Assignment, GiveBack, Heartbeat, Held, Poll, Push, Query, Request

if TYPE_CHECKING:
    from tests.simulator.world import World

POLL_S = 8.0


class Aggregator:
    """One incarnation after the other on one `disk`. Tests break it on purpose by overriding a method."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.disk = Disk()
        self.life = Life()
        self.life.alive = False
        self.round: Round | None = None
        self.version = 1

    # One incarnation.

    def start(self) -> None:
        """Come up from the disk."""
        self.life = Life()
        self.round = None
        self.effects: list[Select | Commit | Finished] = []
        self.wake = Future()
        self.polling: dict[str, Future] = {}
        self.busy: dict[str, str] = {}
        self.streams: dict[str, object] = {}
        self.chooser = Chooser(self.world)
        self.last_seen: dict[str, float] = {}
        self.recover()
        self.world.loop.spawn(self._drive(), self.life)

    def crash(self) -> None:
        """Lose everything but the disk."""
        self.life.alive = False

    def recover(self) -> None:
        """Go on in the round that was open, with the updates that were accepted."""
        disk, policy, now = self.disk, self.world.policy, self.world.loop.now
        self.version = disk.version
        number = disk.open.number if disk.open else disk.last_number + 1
        tasks = [
            (row.token, row.worker, self._stored_phase(row.token, row.phase), row.reason, row.staleness)
            for row in disk.rows_of(number)
        ]
        if disk.open is not None:
            left_s = disk.open.deadline_at - self.world.wall_now
            self.round = restore(number, policy, tasks, disk.open.aim, left_s, now, disk.open.granted_s)
            self.world.watch.restored(self.round)
            assert self.round.deadline_at is not None
            if self.round.granted_s > disk.open.granted_s:
                wall_deadline_at = self.world.wall_now + self.round.deadline_at - now
                disk.open = replace(disk.open, deadline_at=wall_deadline_at, granted_s=self.round.granted_s)
        elif tasks:
            self.round = restore(number, policy, tasks, 0, None, now)
        for token, task in self.round.tasks.items() if self.round else ():
            if not task.phase.final:
                self.busy[task.worker] = token
        disk.keep_only(self.round.tasks if self.round else ())

    def _stored_phase(self, token: str, phase: TaskPhase) -> TaskPhase:
        upload = self.disk.uploads.get(token)
        return TaskPhase.ACCEPTED if upload is not None and upload.sealed else phase

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
        self._drop_lost(poll.worker)
        if poll.worker not in self.busy:
            self.polling[poll.worker] = woken = Future()
            self._wake_driver()
            with suppress(Timeout):
                yield from self.world.loop.wait(woken, POLL_S)
            if self.polling.get(poll.worker) is woken:
                del self.polling[poll.worker]
        token = self.busy.get(poll.worker)
        if token is None or not self._takes_news(token):
            return None
        assert self.round is not None
        task = self.round.find(token)
        self.dispatch(Progress(token, TaskPhase.OFFERED if task.phase is TaskPhase.EXPIRED else task.phase))
        time_left_s = time_left(self.round, self.world.loop.now)
        return Assignment(token, self.round.number, self.version - task.staleness, time_left_s)

    def _drop_lost(self, worker: str) -> None:
        """Who asks for a task has nothing to deliver; a task of a round before is not worth beginning again."""
        token = self.busy.get(worker)
        if token is not None and self._takes_news(token):
            assert self.round is not None
            if self.round.find(token).staleness:
                self.dispatch(Failed(token, "its worker has lost it"))

    def _takes_news(self, token: str) -> bool:
        """Whether the round, as it stands, has a use for news of this task."""
        round_ = self.round
        if round_ is None or token in round_.carried:
            return round_ is not None
        return token in round_.tasks and round_.phase in (RoundPhase.SELECTING, RoundPhase.REPORTING)

    def _heartbeat(self, beat: Heartbeat) -> bool:
        try:
            self._dispatch_if_open(Progress(beat.token, beat.phase))
        except RoundClosed:
            return True
        return False

    def _give_back(self, request: GiveBack) -> None:
        self._dispatch_if_open(Failed(request.token, "training failed"))

    def _dispatch_if_open(self, event: Progress | Failed) -> None:
        if self._check_open(event.token) is TaskPhase.ACCEPTED:
            raise RoundClosed("the update of this task is accepted")
        self.dispatch(event)

    def _query(self, query: Query) -> Held:
        if self._check_open(query.token) is TaskPhase.ACCEPTED:
            return self._acknowledge(query.token, 0)
        upload = self.disk.uploads.get(query.token)
        return Held(upload.held if upload else 0, complete=False)

    def _push(self, push: Push) -> Process[Held]:
        token = push.token
        if self._check_open(token) is TaskPhase.ACCEPTED:
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
            self._dispatch_if_of_this_round(token, Accepted(token))
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

    def _check_open(self, token: str) -> TaskPhase:
        """The phase of a task that may still send or has sent its update. Raises `UnknownTask`, `RoundClosed`."""
        row = self.disk.rows.get(token)
        if row is None:
            raise UnknownTask("no task has this token")
        if self.round is not None and (token in self.round.carried or token in self.round.tasks):
            phase = self.round.find(token).phase
            open_ = self._takes_news(token) and not phase.final
        else:
            phase, open_ = row.phase, False
        if not open_ and phase is not TaskPhase.ACCEPTED:
            raise RoundClosed(f"the task is {phase.name.lower()}")
        return phase

    def _dispatch_if_of_this_round(self, token: str, event: Event) -> None:
        if self.round is None or not (token in self.round.carried or token in self.round.tasks):
            raise RoundClosed("the round of this task has ended")
        self.dispatch(event)

    # What happens to the round.

    def step(self, round_: Round, event: Event, now: float) -> tuple[Round, tuple[Effect, ...]]:
        """The production transition."""
        return step(round_, event, now)

    def dispatch(self, event: Event) -> None:
        """Apply one event. Raises as `rounds.step` does; nothing has then happened."""
        assert self.round is not None
        before = self.round
        self.round, effects = self.step(before, event, self.world.loop.now)
        self.world.watch.stepped(before, event, self.round, effects)
        for effect in effects:
            self._carry_out(effect)
        if isinstance(event, Accepted | Rejected | Failed):
            self._release(event.token)
        if effects or isinstance(event, Accepted | Rejected | Failed):
            self._wake_driver()

    def _carry_out(self, effect: Effect) -> None:
        assert self.round is not None
        if isinstance(effect, Offer):
            self.busy[effect.worker] = effect.token
            if effect.worker in self.polling:
                self.polling[effect.worker].set()
        elif isinstance(effect, Cancel):
            if self.round.find(effect.token).phase.final:
                self._release(effect.token)
        elif isinstance(effect, Select | Commit | Finished):
            self.effects.append(effect)

    def _release(self, token: str) -> None:
        for worker, held in list(self.busy.items()):
            if held == token:
                del self.busy[worker]

    def pool(self) -> WorkersAvailable:
        """Who could take a task now."""
        since = self.world.loop.now - self.world.policy.lease_s
        idle = tuple(worker for worker in self.polling if worker not in self.busy)
        return WorkersAvailable(
            idle, sum(seen > since or worker in self.polling for worker, seen in self.last_seen.items())
        )

    # The one task that opens rounds, selects and commits.

    def _drive(self) -> Process[None]:
        while True:
            if self.round is None:
                self.round = Round(self.disk.last_number + 1, self.world.policy, self.world.loop.now)
            yield from self._play()
            self.effects.clear()
            yield self.world.loop.sleep(self.world.rng.uniform(0, 0.5))
            self._follow()

    def _follow(self) -> None:
        assert self.round is not None
        self.round, effects = follow(self.round, self.disk.last_number + 1, self.world.policy, self.world.loop.now)
        for effect in effects:
            if isinstance(effect, Cancel):
                self._release(effect.token)
        self.disk.keep_only(self.round.tasks)

    def _play(self) -> Process[None]:
        assert self.round is not None
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
            if wants_workers(self.round):
                self.dispatch(self.pool())
            if self.effects:
                continue
            due = self.wake_at(self.round)
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
        assert self.round is not None
        idle = (worker for worker in self.pool().idle if worker not in select.exclude)
        selected = self.chooser.choose(self.round, idle, select.count)
        chosen = [worker for _, worker in selected.tasks]
        after, _ = step(self.round, selected, self.world.loop.now)
        if after.phase is RoundPhase.REPORTING and chosen:
            assert after.deadline_at is not None
            wall_deadline_at = self.world.wall_now + after.deadline_at - self.world.loop.now
            yield self._disk_time()
            self.disk.save_open(after, wall_deadline_at)
            yield self._disk_time()
        self.dispatch(selected)

    def _commit(self, commit: Commit) -> Process[None]:
        assert self.round is not None
        yield self._disk_time()
        updates = tuple(self.disk.uploads[token].update for token in commit.tokens)
        version = Version(self.version + 1, self.round.number, commit.tokens, updates)
        after, _ = step(self.round, Committed(version.version), self.world.loop.now)
        yield from self.finish_round(after, version)
        self.version = version.version
        yield self._disk_time()
        self.dispatch(Committed(version.version))

    def finish_round(self, after: Round, version: Version | None) -> Process[None]:
        """Make the end of the round durable, with its version, in one transaction."""
        yield self._disk_time()
        self.disk.finish(after, version)
        if version is not None:
            self.world.watch.committed(version, after)

    def _finish(self, finished: Finished) -> Process[None]:
        assert self.round is not None
        self.chooser.remember(self.round)
        if not finished.committed:
            yield from self.finish_round(self.round, None)
        for worker, token in list(self.busy.items()):
            if token in self.round.tasks and token not in self.round.carried:
                del self.busy[worker]
        yield self._disk_time()
        self.disk.discard([token for token in self.round.tasks if token not in self.round.carried])

    def _disk_time(self) -> Wait:
        """The disk takes its time, and any of these moments may be the last."""
        seconds = self.world.rng.exponential(self.world.network.faults.write_s)
        self.world.may_kill_aggregator(within_s=seconds)
        return self.world.loop.sleep(seconds)
