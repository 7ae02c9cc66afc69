"""An event of a large round costs what one of a small round does: nobody goes through all tasks for it."""

import gc
import sys

import pytest

from fedgrpc.rounds.events import Accepted, Progress, TaskPhase
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.round import Round, RoundPhase, wake_at, wants_workers
from fedgrpc.rounds.task import Task, Tasks
from fedgrpc.rounds.transitions import step


def round_of(count):
    tasks = {f"t{slot}": Task.offered(f"w{slot}", slot, 120.0, "", 0.0) for slot in range(count)}
    policy = RoundPolicy(min_workers=count, max_participants=count, quorum=count)
    return Round(
        1,
        policy,
        0.0,
        tasks=Tasks(tasks),
        phase=RoundPhase.REPORTING,
        aim=count,
        deadline_at=600.0,
        deadline_s=600.0,
    )


def steps_of(work):
    """Number of functions that were entered and of generators that went on, which no clock blurs."""
    counted = [0]

    def note(frame, event, argument):
        counted[0] += event in ("call", "c_call")

    # A collection calls finalizers of others.
    gc.disable()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return counted[0]


EVENTS = {
    "progress": lambda round_: step(round_, Progress("t7", TaskPhase.TRAINING, 0.5), 1.0),
    "accepted": lambda round_: step(round_, Accepted("t7", 1.0), 1.0),
    "next tick": wake_at,
    "wants workers": wants_workers,
}


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_takes_as_many_steps_among_4096_tasks_as_among_64(event):
    few, many = round_of(64), round_of(4096)
    assert steps_of(lambda: EVENTS[event](many)) <= steps_of(lambda: EVENTS[event](few))
