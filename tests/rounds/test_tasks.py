from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rounds.task import Task, Tasks

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
