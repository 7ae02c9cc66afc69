"""The rounds of one run: what it knows after each event, and what it then asks for."""

import pytest

from fedgrpc.errors import IllegalTransition, RoundClosed, WrongIdentity
from fedgrpc.rounds.events import (
    Abort,
    Cancel,
    Commit,
    Failed,
    Progress,
    Rejected,
    TaskPhase,
    Tick,
)
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.round import RoundPhase
from fedgrpc.runs.events import (
    DeviceReplaced,
    ParentWaits,
    RoundEnded,
    RoundOpened,
    TaskClosed,
    WorkerLeft,
    WorkerPolled,
)
from fedgrpc.runs.round_in_progress import check_ended_task
from tests.support.run_scenario import REPORT, RunScenario


def closed(effects):
    return {effect.token for effect in effects if isinstance(effect, TaskClosed)}


def kinds(effects):
    return [type(effect) for effect in effects]


def test_a_run_without_a_model_asks_one_worker_for_it_in_round_0():
    run = RunScenario()
    step = run.machine.next_step(0.0, 0.0)
    assert (step.round.number, step.round.kind, step.round.state.policy.max_participants) == (
        0,
        TaskKind.INITIALIZE,
        1,
    )
    run.machine.rules = run.machine.rules.__class__(
        run.machine.rules.policy, 10, initialises=lambda name: name == "b"
    )
    run(RoundOpened(step.round))
    assert run.machine.workers_available(run.fleet, 0.0).idle == ("b",)


def test_a_round_is_opened_given_out_accepted_and_committed():
    run = RunScenario("ab").model().open()
    assert run.machine.leases == {"a": "a1", "b": "b1"}
    assert run.machine.current.context("a1").device_class == "class of a"
    assert Commit(("a1", "b1")) in run.accept("a1", "b1")
    assert run.machine.leases == {}
    run.commit()
    assert (run.machine.round, run.machine.version, run.machine.trained, run.machine.last_number) == (
        None,
        2,
        1,
        1,
    )
    assert run.machine.next_step(0.0, 0.0).round.number == 2


def test_one_record_holds_all_that_is_known_of_a_task():
    run = RunScenario("ab").model().open()
    run.accept("a1", "b1")
    run(run.merged())
    context = run.machine.current.context("a1")
    assert (context.report, context.weight, context.scale, context.device_class) == (
        REPORT,
        10.0,
        1.0,
        "class of a",
    )
    assert run.machine.current.weights == {"a1": 10.0, "b1": 10.0}
    assert (run.machine.current.commit_s, run.machine.current.training_metrics) == (0.25, {"loss": 0.5})


def test_what_is_foreseen_is_what_an_event_does_and_nothing_has_happened_yet():
    run = RunScenario("ab").model().open()
    run.accept("a1", "b1")
    merged = run.merged()
    after = run.machine.foresee(merged, 0.0)
    assert (run.machine.version, run.machine.current.state.phase, 2 in run.machine.versions) == (
        1,
        RoundPhase.COMMITTING,
        False,
    )
    run(merged)
    for each in (after, run.machine):
        assert (each.version, each.current.state.phase, 2 in each.versions) == (2, RoundPhase.COMMITTED, True)


def test_an_event_that_is_not_allowed_raises_and_nothing_has_happened():
    run = RunScenario("ab").model().open()
    before = run.machine.round
    for event, error in (
        (RoundEnded(0.0), IllegalTransition),
        (RoundOpened(before), IllegalTransition),
        (run.merged(), IllegalTransition),
    ):
        with pytest.raises(error):
            run(event)
    assert (run.machine.round, run.machine.version, run.machine.leases) == (before, 1, {"a": "a1", "b": "b1"})


def test_an_update_of_a_round_that_has_ended_is_not_accepted():
    run = RunScenario("ab").model().open()
    run(Abort("enough"))
    run(RoundEnded(0.0))
    with pytest.raises(RoundClosed, match="the round of this task has ended"):
        run.accept("a1")


def test_a_lost_lease_frees_the_slot_and_not_the_worker():
    run = RunScenario("ab", max_participants=1).model().open("a")
    run.now = 10.0
    assert kinds(run(Tick())) == [Cancel]
    assert run.machine.current.state.tasks["a1"].phase is TaskPhase.EXPIRED
    # It may come back, so it is not given another task; its place goes to another worker.
    assert run.machine.leases == {"a": "a1"}
    assert run.machine.idle_trainers(run.fleet, run.now) == ("b",)
    run(Progress("a1", TaskPhase.TRAINING))
    assert run.machine.task_of("a") == "a1"


def test_a_worker_whose_task_has_ended_is_free_again():
    for event in (Rejected("a1", "bad"), Failed("a1", "broken")):
        run = RunScenario("ab").model().open()
        assert closed(run(event)) == {"a1"}
        assert run.machine.leases == {"b": "b1"}


def test_uploads_hear_of_each_task_that_is_closed_once():
    run = RunScenario("abc", max_participants=2, over_selection=1.5).model().open()
    assert closed(run.accept("a1")) == set()
    effects = run.accept("b1")
    assert closed(effects) == {"c1"}
    assert "late" in next(effect.reason for effect in effects if isinstance(effect, TaskClosed))
    assert closed(run(run.merged())) == closed(run(RoundEnded(0.0))) == set()


def test_an_aborted_round_closes_all_tasks_but_those_accepted():
    run = RunScenario("abc").model().open()
    run.accept("a1")
    assert closed(run(Abort("stopped"))) == {"b1", "c1"}


def test_workers_that_hold_up_rounds_are_left_out_while_the_others_are_enough():
    run = RunScenario("abc", min_workers=2).model()
    run.fleet.slow = frozenset("c")
    assert run.machine.workers_available(run.fleet, 0.0).idle == ("a", "b")
    assert run.machine.workers_available(run.fleet, 0.0).live_count == 2
    run.fleet.away = {"b"}
    assert run.machine.workers_available(run.fleet, 0.0).idle == ("a", "c")


def test_a_parent_that_ends_its_round_earlier_shortens_this_one():
    run = RunScenario().model().open()
    run(ParentWaits(200.0))
    assert run.machine.current.state.deadline_at == 100.0
    run(ParentWaits(50.0))
    assert (run.machine.current.state.deadline_at, run.machine.current.due_at) == (50.0, 50.0)


def test_a_task_is_its_own_workers_alone():
    run = RunScenario("ab").model().open()
    assert run.machine.current.check_task("a", "a1") is TaskPhase.OFFERED
    with pytest.raises(WrongIdentity):
        run.machine.current.check_task("b", "a1")
    assert "unknown" not in run.machine.current
    run(Rejected("a1", "bad"))
    with pytest.raises(RoundClosed, match="rejected: bad"):
        run.machine.current.check_task("a", "a1")


def test_a_task_that_was_accepted_stays_so_after_its_round():
    assert check_ended_task("a", "a", TaskPhase.ACCEPTED, "") is TaskPhase.ACCEPTED
    for phase in (TaskPhase.TRAINING, TaskPhase.LATE, TaskPhase.FAILED):
        with pytest.raises(RoundClosed, match="its round has ended"):
            check_ended_task("a", "a", phase, "")
    with pytest.raises(WrongIdentity):
        check_ended_task("b", "a", TaskPhase.ACCEPTED, "")


def test_a_task_that_its_worker_has_not_begun_goes_to_another_when_it_leaves():
    run = RunScenario("ab").model().open()
    run(Progress("b1", TaskPhase.DOWNLOADING))
    assert run(WorkerLeft("b")) == ()
    assert closed(run(WorkerLeft("a"))) == {"a1"}
    assert run.machine.leases == {"b": "b1"}


def test_another_device_of_the_same_name_has_none_of_its_tasks():
    run = RunScenario("ab").model().open()
    run(WorkerPolled("a", (1, b"digest")))
    assert closed(run(DeviceReplaced("a"))) == {"a1"}
    assert (run.machine.leases, run.machine.held) == ({"b": "b1"}, {})
