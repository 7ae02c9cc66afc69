"""A run without a last round: its rounds wait until enough devices tell of new examples."""

import pytest

from fedgrpc.errors import UsageError
from fedgrpc.rounds.policy import RoundPolicy, TaskKind
from fedgrpc.runs.events import DeviceReplaced, EndReason, EndRun, OpenRound, RoundOpened, TargetMet, WorkerPolled
from tests.support.run_scenario import RunScenario


def polled(run, **new_examples):
    for worker, count in new_examples.items():
        run(WorkerPolled(worker, None, count))


def there(run):
    """Open the next round, if none is open, and say who could take part."""
    if run.machine.round is None:
        run(RoundOpened(run.machine.next_step(0.0, run.now).round))
    available = run.machine.workers_available(run.fleet, run.now)
    return set(available.idle), available.live_count


def test_a_run_without_a_last_round_ends_by_no_count():
    run = RunScenario("a", rounds=None).model()
    for _ in range(12):
        polled(run, a=1)
        run.open("a").accept(run.token("a"))
        run.commit()
    assert run.machine.trained == 12
    assert run.machine.next_kind is TaskKind.TRAIN
    run(TargetMet("accuracy>=0.9"))
    step = run.machine.next_step(0.0, run.now)
    assert isinstance(step, EndRun)
    assert step.ending.reason is EndReason.TARGET_MET


def test_only_workers_with_new_examples_count_and_those_that_cannot_tell():
    run = RunScenario("abc", rounds=None).model()
    polled(run, a=0, b=3, c=None)
    assert there(run) == ({"b", "c"}, 2)


def test_a_round_opens_once_enough_workers_have_enough_new_examples():
    run = RunScenario("abc", rounds=None, min_workers=2, min_new_examples=50).model()
    polled(run, a=49, b=50, c=0)
    assert there(run) == ({"b"}, 1)
    assert not run(run.machine.workers_available(run.fleet, run.now))
    polled(run, a=51)
    run.open()
    assert set(run.machine.leases) == {"a", "b"}


def test_what_an_accepted_update_was_trained_on_is_new_no_more():
    run = RunScenario("ab", rounds=None).model()
    polled(run, a=10, b=10)
    run.open("a").accept(run.token("a"))
    run.commit()
    assert there(run) == ({"b"}, 1)
    polled(run, a=2)
    assert there(run) == ({"a", "b"}, 2)


def test_a_run_of_so_many_rounds_waits_for_new_examples_only_where_it_is_told_to():
    run = RunScenario("ab", rounds=3).model()
    polled(run, a=0, b=0)
    assert there(run) == ({"a", "b"}, 2)
    told = RunScenario("ab", rounds=3, min_new_examples=1).model()
    polled(told, a=0, b=1)
    assert there(told) == ({"b"}, 1)


def test_the_initial_model_may_come_from_a_worker_without_examples():
    run = RunScenario("a", rounds=None)
    polled(run, a=0)
    assert there(run) == ({"a"}, 1)
    assert run.machine.current.kind is TaskKind.INITIALIZE


def test_another_device_of_a_name_is_not_held_to_what_the_one_before_said():
    run = RunScenario("a", rounds=None).model()
    polled(run, a=0)
    run(DeviceReplaced("a"))
    assert there(run) == ({"a"}, 1)


def test_a_run_as_an_event_would_leave_it_shares_no_counts_with_this_one():
    run = RunScenario("a", rounds=None).model()
    run.machine.foresee(WorkerPolled("a", None, 0), run.now)
    assert run.machine.new_examples == {}


@pytest.mark.parametrize("count", [-1, (1 << 40) + 1])
def test_a_policy_has_a_count_that_can_be_told(count):
    with pytest.raises(UsageError, match="min_new_examples"):
        RoundPolicy(min_new_examples=count)


def test_an_open_round_of_another_kind_needs_no_new_examples():
    assert RoundPolicy(min_new_examples=5).for_kind(TaskKind.EVALUATE).min_new_examples is None
    assert isinstance(RunScenario("a", rounds=None).machine.next_step(0.0, 0.0), OpenRound)
