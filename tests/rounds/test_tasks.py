from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.rounds.events import Failed, LossCause, Progress, Rejected, TaskPhase
from fedgrpc.rounds.task import Task, Tasks, apply_event

TOKENS = st.integers(0, 80).map(str)
TASKS = st.builds(
    Task,
    worker=TOKENS,
    slot=st.integers(0, 5),
    lease_until=st.just(0.0),
    phase=st.sampled_from(TaskPhase),
    staleness=st.integers(0, 2),
)
CHANGES = st.dictionaries(TOKENS, TASKS, max_size=70)


@given(first=CHANGES, changes=st.lists(CHANGES, max_size=5))
def test_tasks_are_what_a_dictionary_would_be(first: dict[str, Task], changes: list[dict[str, Task]]) -> None:
    plain, tasks = dict(first), Tasks(first)
    for changed in changes:
        before, copy = tasks, dict(tasks)
        plain, tasks = {**plain, **changed}, tasks.changed(changed)
        assert dict(before) == copy
    assert tasks == plain
    assert list(tasks) == list(plain)
    assert list(tasks.items()) == list(plain.items())
    assert list(tasks.values()) == list(plain.values())
    assert len(tasks) == len(plain)
    assert all(tasks[token] is plain[token] for token in plain)
    assert "none" not in tasks
    assert tasks.get("none") is None


@given(first=CHANGES, changed=CHANGES)
def test_counts_are_those_of_going_through_all(first: dict[str, Task], changed: dict[str, Task]) -> None:
    tasks = Tasks(first).changed(changed)
    for phase in TaskPhase:
        fresh = sum(task.phase is phase and not task.staleness for task in tasks.values())
        assert tasks.count([phase], stale=False) == fresh
        assert tasks.count([phase], stale=True) == sum(task.phase is phase for task in tasks.values())
    assert tasks.count(TaskPhase, stale=True) == len(tasks)


def test_a_worker_cannot_say_what_its_task_was_lost_for() -> None:
    task = Task.offered("a", 0, 30.0, "", 0.0)
    given_back = apply_event(task, Failed("token", "slow upload: of the parcel"), None, 30.0, 1.0)
    assert given_back.loss_cause is LossCause.GIVEN_BACK


def test_a_task_that_comes_back_is_lost_for_nothing_any_more() -> None:
    expired = Task.offered("a", 0, 30.0, "", 0.0).expired(30.0, 30.0)
    assert (expired.phase, expired.loss_cause) == (TaskPhase.EXPIRED, LossCause.NO_SHOW)
    back = apply_event(expired, Progress("token", TaskPhase.DOWNLOADING), None, 30.0, 31.0)
    assert (back.loss_cause, back.reason) == (LossCause.NONE, "")


def test_an_accepted_update_is_final_unless_it_is_withdrawn() -> None:
    task = Task("bad", 0, 10.0, phase=TaskPhase.ACCEPTED)
    assert apply_event(task, Rejected("t", "too late to refuse"), None, 10.0, 0.0) == task
    withdrawn = apply_event(task, Rejected("t", "its device was revoked", withdrawn=True), None, 10.0, 0.0)
    assert (withdrawn.phase, withdrawn.loss_cause) == (TaskPhase.REJECTED, LossCause.REFUSED)
    assert withdrawn.reason == "its device was revoked"
