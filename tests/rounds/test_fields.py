"""`with_fields` against `dataclasses.replace`, and sums of tasks against a look at all of them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rounds.fields import with_fields
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.round import Round
from fedgrpc.rounds.task import Task, Tasks

TASK = Task.offered("pi", 0, 10.0, "", 0.0)


@given(st.sampled_from(TaskPhase), st.floats(0, 1), st.integers(0, 9))
def test_a_changed_copy_is_what_replace_makes_and_leaves_the_value_alone(phase, fraction, aim):
    changes = {"phase": phase, "fraction": fraction}
    assert with_fields(TASK, **changes) == replace(TASK, **changes)
    assert Task.offered("pi", 0, 10.0, "", 0.0) == TASK
    round_ = Round(1, RoundPolicy(), 0.0)
    assert with_fields(round_, aim=aim) == replace(round_, aim=aim)


def test_a_field_that_there_is_not_is_refused():
    with pytest.raises(TypeError, match="fractoin"):
        with_fields(TASK, fractoin=0.5)


@given(
    st.integers(0, 80),
    st.lists(st.tuples(st.integers(0, 99), st.sampled_from(TaskPhase), st.floats(0, 100)), max_size=20),
)
def test_the_first_end_of_a_lease_is_that_of_a_look_at_all_tasks(count, changes):
    tasks = Tasks({f"t{n}": replace(TASK, slot=n, lease_until=50.0 + n) for n in range(count)})
    for number, phase, lease_until in changes:
        token = f"t{number}"
        tasks = tasks.changed({token: replace(TASK, phase=phase, lease_until=lease_until)})
        ends = [task.lease_until for task in tasks.values() if task.phase.open]
        assert tasks.first_lease_end == min(ends, default=None)
