"""Any sequence of events, legal or not, keeps what a round promises."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedgrpc.errors import IllegalTransition, RoundClosed, UnknownTask
from fedgrpc.rounds.events import (
    Abort,
    Accepted,
    Cancel,
    CarryOver,
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
    Selected,
    TaskPhase,
    Tick,
    WorkersAvailable,
)
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.round import Round, RoundPhase, StoredTask, follow, restore, wake_at, wants_workers
from fedgrpc.rounds.transitions import step

WORKERS = tuple("abcdefgh")


@st.composite
def policies(draw: st.DrawFn) -> RoundPolicy:
    quorum = draw(st.integers(1, 4))
    buffer_size = draw(st.none() | st.integers(quorum, 5))
    return RoundPolicy(
        buffer_size=buffer_size,
        late="carry" if buffer_size else draw(st.sampled_from(["discard", "carry"])),
        max_staleness=draw(st.integers(1, 3)),
        weight_aim=draw(st.none() | st.floats(1, 10)),
        min_workers=draw(st.integers(1, 5)),
        min_sample_size=draw(st.integers(1, 4)),
        max_participants=draw(st.none() | st.integers(4, 8)),
        fraction=draw(st.sampled_from([0.1, 0.5, 1.0])),
        over_selection=1.0 if buffer_size else draw(st.sampled_from([1.0, 1.3, 2.0])),
        quorum=quorum,
        deadline_s=draw(st.sampled_from([5.0, 50.0])),
        lease_s=draw(st.sampled_from([2.0, 20.0])),
        selection_window_s=draw(st.sampled_from([0.0, 1.0])),
        selection_timeout_s=draw(st.none() | st.just(10.0)),
    )


class AnyRound(RuleBasedStateMachine):
    """Sends any event at any time, and remembers what the round has asked for."""

    @initialize(policy=policies())
    def open(self, policy: RoundPolicy) -> None:
        self.now = 0.0
        self.round = Round(1, policy, self.now)
        self.all: list[Effect] = []
        self.select: Select | None = None
        self.was_accepted: set[str] = set()
        self.brought: list[str] = []

    def token(self, data: st.DataObject) -> str:
        """Of a task at work as often as not, else of any, or of none."""
        tasks = {**self.round.tasks, **self.round.carried}
        at_work = [token for token, task in tasks.items() if task.phase.open]
        often: bool = data.draw(st.booleans())
        if at_work and often:
            return data.draw(st.sampled_from(at_work))
        return data.draw(st.sampled_from([*tasks, "unknown"]))

    @precondition(lambda self: self.round.phase.final)
    @rule()
    def next_round(self) -> None:
        carried = self.round.carried
        self.round, effects = follow(self.round, self.round.number + 1, self.round.policy, self.now)
        self.brought = list(self.round.tasks)
        assert {token for token, task in carried.items() if task.phase is TaskPhase.ACCEPTED} <= set(self.brought)
        assert all(task.staleness <= self.round.policy.max_staleness for task in self.round.tasks.values())
        assert all(isinstance(effect, Cancel) for effect in effects)
        self.all, self.select, self.was_accepted = [], None, set(self.round.accepted)

    def send(self, event: Event) -> None:
        before = self.round
        try:
            self.round, effects = step(before, event, self.now)
        except (IllegalTransition, RoundClosed, UnknownTask):
            assert self.round is before
            return
        if isinstance(event, WorkersAvailable) and not wants_workers(before):
            assert (self.round, effects) == (before, ())
        if before.phase.final:
            assert replace(self.round, carried=before.carried) == before
            assert not effects
        self.all += effects
        if isinstance(event, Rejected) and before.phase is RoundPhase.COMMITTING:
            self.was_accepted.discard(event.token)
        self.select = next((effect for effect in effects if isinstance(effect, Select)), self.select)
        self.was_accepted |= set(self.round.accepted)

    @rule(idle=st.sets(st.sampled_from(WORKERS)), others=st.integers(0, 3))
    def pool(self, idle: set[str], others: int) -> None:
        self.send(WorkersAvailable(tuple(sorted(idle)), len(idle) + others))

    @precondition(lambda self: self.select is not None)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        assert self.select is not None
        free = [worker for worker in WORKERS if worker not in self.select.exclude]
        workers = data.draw(
            st.lists(st.sampled_from(free), unique=True, max_size=self.select.count) if free else st.just([])
        )
        self.select = None
        self.send(Selected(tuple((f"{worker}{self.round.number}", worker) for worker in workers)))

    @rule(workers=st.lists(st.sampled_from(WORKERS), max_size=3))
    def answer_unasked(self, workers: list[str]) -> None:
        if self.select is None:
            self.send(Selected(tuple((f"{worker}{self.round.number}", worker) for worker in workers)))

    @rule(data=st.data(), phase=st.sampled_from(TaskPhase), held=st.none() | st.integers(0, 100))
    def progress(self, data: st.DataObject, phase: TaskPhase, held: int | None) -> None:
        self.send(Progress(self.token(data), phase, 0.5, held, 100))

    @rule(data=st.data(), weight=st.floats(0, 10))
    def accept(self, data: st.DataObject, weight: float) -> None:
        self.send(Accepted(self.token(data), weight))

    @rule(data=st.data())
    def reject(self, data: st.DataObject) -> None:
        self.send(Rejected(self.token(data), "NaN"))

    @precondition(lambda self: self.round.phase is RoundPhase.COMMITTING)
    @rule(data=st.data())
    def leave_out(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.round.accepted)))
        self.send(Rejected(token, "the mean would not be finite"))
        assert self.round.find(token).phase is TaskPhase.REJECTED

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.send(Failed(self.token(data), "out of memory"))

    @rule(seconds=st.floats(0, 30))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.send(Tick())

    @rule()
    def tick_when_due(self) -> None:
        due = wake_at(self.round)
        if due is not None:
            self.now = max(self.now, due)
            self.send(Tick())

    @rule(version=st.integers(2, 5))
    def committed(self, version: int) -> None:
        self.send(Committed(version))

    @rule(dice=st.integers(0, 9))
    def abort(self, dice: int) -> None:
        if dice == 9:
            self.send(Abort("stopped"))

    @precondition(lambda self: self.round.phase is RoundPhase.SELECTING and not self.round.asked)
    @rule()
    def everybody_comes(self) -> None:
        idle = tuple(worker for worker in WORKERS if worker not in self.round.workers)
        self.send(WorkersAvailable(idle, len(WORKERS)))
        if self.select is not None and self.round.asked:
            workers = [worker for worker in idle if worker not in self.select.exclude][: self.select.count]
            self.select = None
            self.send(Selected(tuple((f"{worker}{self.round.number}", worker) for worker in workers)))

    @precondition(lambda self: self.round.phase in (RoundPhase.SELECTING, RoundPhase.REPORTING))
    @rule()
    def restart(self) -> None:
        """As after `kill -9`: what was stored is there, what was being asked is not."""
        it = self.round
        left_s = None if it.deadline_at is None else it.deadline_at - self.now
        rows = [
            StoredTask(token, task.worker, task.phase, task.reason, task.staleness, task.weight)
            for token, task in it.tasks.items()
        ]
        self.round = restore(it.number, it.policy, rows, it.aim, left_s, self.now)
        self.select = None

    @invariant()
    def an_accepted_update_stays_accepted_unless_the_commit_leaves_it_out(self) -> None:
        assert set(self.round.accepted) == self.was_accepted

    @invariant()
    def slots_count_up_in_the_order_of_the_tasks(self) -> None:
        assert [task.slot for task in self.round.tasks.values()] == list(range(len(self.round.tasks)))

    @invariant()
    def a_worker_has_one_task_of_the_round_and_one_open_task(self) -> None:
        tasks = [task for token, task in self.round.tasks.items() if token not in self.brought]
        assert len({task.worker for task in tasks}) == len(tasks)
        at_work = [task.worker for task in self.round.tasks.values() if task.phase.open]
        assert len(set(at_work)) == len(at_work)

    @invariant()
    def offers_and_tasks_are_the_same(self) -> None:
        offered = [effect.token for effect in self.all if isinstance(effect, Offer)]
        assert self.brought + offered == list(self.round.tasks)

    @invariant()
    def a_commit_has_its_quorum_and_exactly_the_accepted_updates_in_slot_order(self) -> None:
        commits = [effect for effect in self.all if isinstance(effect, Commit)]
        assert [len(commit.tokens) for commit in commits] == sorted(
            {len(commit.tokens) for commit in commits}, reverse=True
        )
        # What an earlier one could not average is left out of the next.
        for commit in commits[-1:] if self.round.phase in (RoundPhase.COMMITTING, RoundPhase.COMMITTED) else []:
            assert commit.tokens == self.round.accepted
            counted = [
                t for t in commit.tokens if self.round.policy.buffer_size or not self.round.tasks[t].staleness
            ]
            assert len(counted) >= self.round.policy.quorum
        assert bool(commits) >= (self.round.phase in (RoundPhase.COMMITTING, RoundPhase.COMMITTED))

    @invariant()
    def it_finishes_once_and_says_how(self) -> None:
        ends = [effect for effect in self.all if isinstance(effect, Finished)]
        assert len(ends) == self.round.phase.final
        for end in ends:
            assert end.committed == (self.round.phase is RoundPhase.COMMITTED) == (self.round.version is not None)
            assert end.reason

    @invariant()
    def no_task_stays_open_once_it_takes_no_more_updates(self) -> None:
        if self.round.phase not in (RoundPhase.SELECTING, RoundPhase.REPORTING):
            assert self.round.open_count == 0

    @invariant()
    def what_is_carried_is_late_or_accepted_in_vain_and_said_to_be_carried(self) -> None:
        carried = {effect.token for effect in self.all if isinstance(effect, CarryOver)}
        assert set(self.round.carried) in (carried, set())
        assert not self.round.carried or self.round.policy.late == "carry"
        for token in self.round.carried:
            assert self.round.tasks[token].phase in (TaskPhase.LATE, TaskPhase.ACCEPTED)

    @invariant()
    def every_lost_task_has_its_reason(self) -> None:
        for task in self.round.tasks.values():
            assert bool(task.reason) == (not task.phase.open and task.phase is not TaskPhase.ACCEPTED)

    @invariant()
    def it_never_waits_for_ever_while_it_takes_updates(self) -> None:
        due = wake_at(self.round)
        if self.round.phase is RoundPhase.REPORTING:
            assert self.round.deadline_at is not None
            assert due is not None
            assert due <= self.round.deadline_at
        elif self.round.phase is not RoundPhase.SELECTING:
            assert due is None

    @invariant()
    def it_ends_by_its_deadline_when_told_the_time(self) -> None:
        deadline_at = self.round.deadline_at
        if self.round.phase is RoundPhase.REPORTING and deadline_at is not None:
            after, _ = step(self.round, Tick(), max(self.now, deadline_at))
            assert after.phase in (RoundPhase.COMMITTING, RoundPhase.ABANDONED)

    @invariant()
    def a_tick_when_due_makes_progress(self) -> None:
        due = wake_at(self.round)
        if due is not None and self.round.phase is RoundPhase.REPORTING:
            after, _ = step(self.round, Tick(), max(due, self.now))
            assert wake_at(after) != due

    @invariant()
    def only_tasks_that_are_lost_or_late_were_cancelled(self) -> None:
        for effect in self.all:
            if isinstance(effect, Cancel):
                assert effect.token in self.round.tasks


TestAnyRound = AnyRound.TestCase
TestAnyRound.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
