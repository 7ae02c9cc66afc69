"""Whom a round can count on."""

from dataclasses import replace

import pytest

from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rounds.history import Punctuality
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.round import Round, RoundPhase
from fedgrpc.rounds.task import Task

POLICY = RoundPolicy(deadline_s=100.0)


def ended(*phases, aim=2):
    """A round that ended with a task in each of these phases, and the last of them."""
    tasks = {str(slot): replace(Task(f"w{slot}", slot, 0.0), phase=phase) for slot, phase in enumerate(phases)}
    return replace(Round(1, POLICY, 0.0), aim=aim).with_tasks(tasks), tasks[str(len(phases) - 1)]


SHORT = ended(TaskPhase.ACCEPTED, TaskPhase.LATE)
ENOUGH = ended(TaskPhase.ACCEPTED, TaskPhase.ACCEPTED, TaskPhase.LATE)
DELIVERED = ended(TaskPhase.ACCEPTED)


def after(*rounds, now=1000.0):
    trust = Punctuality()
    for round_, task in rounds:
        trust = trust.after(round_, task, now)
    return trust


def test_a_worker_that_holds_up_one_round_is_trusted_and_one_that_holds_up_two_is_not():
    assert not after(SHORT).doubted(1000.0)
    assert after(SHORT, SHORT).doubted(1000.0)


@pytest.mark.parametrize(("times", "deadlines"), [(2, 2), (3, 4), (4, 8), (9, 256), (50, 256)])
def test_the_doubt_doubles_with_each_further_round_and_passes(times, deadlines):
    trust = after(*[SHORT] * times)
    assert trust.doubted(1000.0 + deadlines * POLICY.deadline_s - 1)
    assert not trust.doubted(1000.0 + deadlines * POLICY.deadline_s)


def test_one_delivery_makes_up_for_all_rounds_that_were_held_up():
    assert after(SHORT, SHORT, SHORT, DELIVERED) == Punctuality()
    assert not after(SHORT, DELIVERED, SHORT).doubted(1000.0)


def test_who_is_late_in_a_round_that_had_enough_held_up_nobody():
    assert after(*[ENOUGH] * 5) == Punctuality()


@pytest.mark.parametrize("phase", [TaskPhase.FAILED, TaskPhase.REJECTED])
def test_who_gave_its_task_back_or_was_refused_held_up_nobody(phase):
    assert after(*[ended(TaskPhase.ACCEPTED, phase)] * 5) == Punctuality()


@pytest.mark.parametrize("phase", [TaskPhase.FAILED, TaskPhase.REJECTED])
def test_who_gave_its_task_back_or_was_refused_held_up_a_round_that_was_abandoned(phase):
    round_, task = ended(TaskPhase.ACCEPTED, phase)
    abandoned = replace(round_, phase=RoundPhase.ABANDONED), task
    assert after(abandoned, abandoned).doubted(1000.0)


def test_who_got_its_task_late_in_a_round_held_up_nobody():
    round_, task = SHORT
    given = replace(task, entered={TaskPhase.OFFERED: POLICY.deadline_s * 0.6})
    assert after(*[(round_, given)] * 5) == Punctuality()


def test_who_vanished_held_up_the_round():
    gone = ended(TaskPhase.ACCEPTED, TaskPhase.EXPIRED)
    assert after(gone, gone).doubted(1000.0)
