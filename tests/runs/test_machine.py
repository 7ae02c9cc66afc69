"""One run: what it knows after each event, and what it then asks for."""

import pytest

from fedgrpc.errors import IllegalTransition, NotFound, RoundClosed, WrongIdentity
from fedgrpc.rounds.events import (
    Abort,
    Cancel,
    CarryOver,
    Commit,
    Failed,
    Finished,
    Progress,
    Rejected,
    TaskPhase,
    Tick,
)
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.round import RoundPhase
from fedgrpc.rounds.version import Version
from fedgrpc.runs.events import (
    DeviceReplaced,
    Drop,
    Ended,
    Ending,
    EndReason,
    EndRun,
    Evaluated,
    EvaluatorPolled,
    OpenRound,
    ParentLeads,
    ParentWaits,
    Paused,
    Resumed,
    RollBack,
    RollBackAsked,
    RollBackFailed,
    RolledBack,
    RoundEnded,
    RoundOpened,
    RunPhase,
    Stay,
    TargetMet,
    TaskClosed,
    VersionsPruned,
    WorkerLeft,
    WorkerPolled,
    WorkerTold,
)
from fedgrpc.runs.round_in_progress import check_ended_task
from tests.support.run_scenario import LAYOUT, REPORT, RunScenario

CARRY = {"late": "carry", "quorum": 1, "over_selection": 1.0}


def closed(effects):
    return {effect.token for effect in effects if isinstance(effect, TaskClosed)}


def kinds(effects):
    return [type(effect) for effect in effects]


# Rounds.


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


# Tasks that outlive their round.


def carried(names="abc"):
    """Round 1 has committed without b, which had begun: its task is one of round 2."""
    run = RunScenario(names, **CARRY).model().open()
    run(Progress("b1", TaskPhase.TRAINING))
    run.accept(*(f"{name}1" for name in names if name != "b"))
    run.now = 100.0
    effects = run(Tick())
    return run, effects


def test_a_carried_over_task_stays_open_and_opens_the_next_round_at_once():
    run, effects = carried()
    assert CarryOver in kinds(effects)
    assert closed(effects) == set()
    run.commit()
    assert (run.machine.current.number, list(run.machine.current.state.tasks)) == (2, ["b1"])
    assert (run.machine.leases, run.machine.takes_update("b1")) == ({"b": "b1"}, True)
    assert run.machine.current.version_of("b1") == 1
    assert run.machine.current.context("b1").device_class == "class of b"


def test_an_update_that_arrives_while_its_round_is_committing_counts_in_the_next():
    run, _ = carried()
    run.accept("b1")
    assert run.machine.leases == {}
    run.commit()
    assert run.machine.current.state.accepted == ("b1",)
    assert run.machine.current.report("b1") == REPORT


def test_a_carried_over_task_whose_worker_has_lost_it_is_not_begun_again():
    run, _ = carried()
    run.commit()
    assert closed(run(WorkerPolled("b", None))) == {"b1"}
    assert (run.machine.leases, run.machine.task_of("b")) == ({}, None)


def test_a_task_of_this_round_is_given_again_to_a_worker_that_polls():
    run = RunScenario("ab").model().open()
    assert run(WorkerPolled("a", (1, b"digest"))) == ()
    assert (run.machine.task_of("a"), run.machine.held) == ("a1", {"a": (1, b"digest")})


def test_carried_over_tasks_are_dropped_when_no_round_of_their_kind_follows():
    run, _ = carried()
    run(RollBackAsked(RollBack(1, "")))
    run(run.merged())
    effects = run(RoundEnded(0.0))
    (drop,) = [effect.dropped for effect in effects if isinstance(effect, Drop)]
    assert (drop.token, drop.round, drop.task.phase) == ("b1", 1, TaskPhase.LATE)
    assert closed(effects) == {"b1"}
    assert (run.machine.round, run.machine.leases) == (None, {})


# Which tasks are known.


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


# Evaluators.


def test_an_evaluator_scores_each_version_once():
    run = RunScenario().model()
    run(EvaluatorPolled("e", "t1"))
    task = run.machine.evaluation_of("e")
    assert (task.token, task.version) == ("t1", 1)
    run(EvaluatorPolled("e", "t2"))
    assert run.machine.evaluation_of("e") is task
    run(Evaluated(task, {"loss": 0.5}, 10))
    assert (run.machine.evaluation_of("e"), run.machine.evaluations.scores_of(1)) == (None, (10, {"loss": 0.5}))
    run.model(2)
    run(EvaluatorPolled("e", "t3"))
    run(Evaluated(run.machine.evaluation_of("e"), None))
    run(EvaluatorPolled("e", "t4"))
    assert run.machine.evaluation_of("e") is None


def test_there_is_nothing_to_score_before_there_is_a_model():
    run = RunScenario()
    run(EvaluatorPolled("e", "t1"))
    assert run.machine.evaluation_of("e") is None


# How a run goes on, and how it ends.


def test_a_run_ends_after_its_last_round_and_waits_for_its_evaluators():
    run = RunScenario("a", rounds=1).model().open()
    run.accept("a1")
    run.commit()
    step = run.machine.next_step(0.0, 0.0)
    assert isinstance(step, EndRun)
    assert (step.ending.reason, step.after_evaluators) == (EndReason.ROUNDS_DONE, True)
    run(Ended(RunPhase.FINISHED, step.ending))
    assert (run.machine.ended, run.machine.ending.reason) == (True, EndReason.ROUNDS_DONE)


def test_workers_that_score_are_asked_once_more_after_the_last_round():
    for scored, expected in ((True, OpenRound), (False, EndRun)):
        run = RunScenario("a", rounds=1, evaluate=True).model().open()
        run.accept("a1")
        run.commit(scored)
        assert isinstance(step := run.machine.next_step(0.0, 0.0), expected)
    run = RunScenario("a", rounds=1, evaluate=True).model().open()
    run.accept("a1")
    run.commit(scored=True)
    step = run.machine.next_step(0.0, 0.0)
    assert step.round.kind is TaskKind.EVALUATE
    run(RoundOpened(step.round))
    run(Abort("nobody came"))
    run(RoundEnded(0.0))
    assert isinstance(run.machine.next_step(0.0, 0.0), EndRun)


def test_a_target_that_is_met_ends_the_run_with_its_round():
    run = RunScenario("ab").model().open()
    run(TargetMet("version 1 has accuracy >= 0.9"))
    assert not run.machine.ended
    run.accept("a1", "b1")
    run.commit()
    assert run.machine.next_step(0.0, 0.0) == EndRun(Ending(EndReason.TARGET_MET, "version 1 has accuracy >= 0.9"))


def test_the_first_end_is_the_one_and_a_round_that_is_open_is_abandoned():
    run = RunScenario("ab").model().open()
    effects = run(Ended(RunPhase.STOPPED, Ending(EndReason.STOPPED, "by hand")))
    assert closed(effects) == {"a1", "b1"}
    assert Finished(committed=False, reason="by hand") in effects
    assert run(Ended(RunPhase.FINISHED, Ending(EndReason.ROUNDS_DONE, "done"))) == ()
    assert (run.machine.phase, run.machine.ending.reason) == (RunPhase.STOPPED, EndReason.STOPPED)
    for event in (Paused(), Resumed(), RollBackAsked(RollBack(1, ""))):
        with pytest.raises(IllegalTransition, match="by hand"):
            run(event)


def test_a_round_that_is_committing_goes_on_to_its_version_when_the_run_is_stopped():
    run = RunScenario("ab").model().open()
    run.accept("a1", "b1")
    assert run(Ended(RunPhase.STOPPED, Ending(EndReason.STOPPED, "by hand"))) == ()
    run.commit()
    assert (run.machine.version, run.machine.round) == (2, None)


def test_workers_that_were_told_of_the_end_are_known():
    run = RunScenario().model()
    run(WorkerTold("a"))
    assert run.machine.told == set()
    run(Ended(RunPhase.FINISHED, Ending(EndReason.ROUNDS_DONE, "done")))
    run(WorkerTold("a"))
    assert run.machine.told == {"a"}


def test_a_paused_run_opens_no_round_until_it_is_resumed():
    run = RunScenario().model()
    run(Paused("it fails"))
    assert (run.machine.next_step(0.0, 0.0), run.machine.paused_reason) == (Stay(), "it fails")
    run(Resumed())
    assert isinstance(run.machine.next_step(0.0, 0.0), OpenRound)
    assert run.machine.paused_reason == ""


def failed_round(run):
    run.open()
    for name in "ab":
        run(Failed(run.token(name), "out of memory"))
    run(run.machine.workers_available(run.fleet, 0.0))
    ended = run.machine.current
    run(RoundEnded(0.0))
    return run.machine.hopeless(ended, run.fleet, run.now)


def test_three_rounds_in_a_row_that_fail_for_one_reason_are_hopeless():
    run = RunScenario("ab").model()
    assert [failed_round(run), failed_round(run)] == ["", ""]
    reason = failed_round(run)
    assert "3 rounds in a row" in reason
    assert "a: out of memory" in reason
    run(Paused(reason))
    run(Resumed())
    # Whoever resumes it sees three more.
    assert [failed_round(run), failed_round(run), bool(failed_round(run))] == ["", "", True]


def test_a_few_bad_workers_pause_no_run_that_others_can_do():
    run = RunScenario("abcdef", quorum=3).model()
    for _ in range(4):
        run.open()
        run.accept(run.token("c"), run.token("d"))
        for name in "ab":
            run(Failed(run.token(name), "out of memory"))
        run.now += 100.0
        run(Tick())
        ended = run.machine.current
        run(RoundEnded(0.0))
        assert run.machine.hopeless(ended, run.fleet, run.now) == ""
    run.fleet.away = {"e", "f"}
    assert "4 rounds in a row" in run.machine.hopeless(ended, run.fleet, run.now)


def test_a_version_ends_a_streak_of_abandoned_rounds():
    run = RunScenario("ab").model()
    failed_round(run), failed_round(run)
    run.open()
    run.accept(*map(run.token, "ab"))
    run.commit()
    assert [failed_round(run), failed_round(run)] == ["", ""]


# Versions.


def test_a_rollback_abandons_the_round_and_comes_before_the_next():
    run = RunScenario("ab").model(1).model(2).open()
    effects = run(RollBackAsked(RollBack(1, "worse")))
    assert closed(effects) == {"a1", "b1"}
    run(RoundEnded(0.0))
    assert run.machine.next_step(0.0, 0.0) == RollBack(1, "worse")
    run(RolledBack(Version(3, 2, b"digest", rolled_back_to=1), LAYOUT, 2))
    assert (run.machine.version, run.machine.trained, run.machine.rolling_back, run.machine.last_number) == (
        3,
        0,
        None,
        2,
    )


def test_a_rollback_that_fails_leaves_the_run_as_it_is():
    run = RunScenario().model(1).model(2)
    run(RollBackAsked(RollBack(1, "")))
    with pytest.raises(IllegalTransition, match="rolled back to version 1 already"):
        run(RollBackAsked(RollBack(2, "")))
    run(RollBackFailed())
    assert (run.machine.version, run.machine.rolling_back) == (2, None)
    assert isinstance(run.machine.next_step(0.0, 0.0), OpenRound)


def test_only_a_kept_version_can_be_gone_back_to_and_only_where_versions_are_made():
    with pytest.raises(NotFound, match="no model version yet"):
        RunScenario()(RollBackAsked(RollBack(0, "")))
    run = RunScenario().model(1).model(2)
    run(VersionsPruned({2}))
    with pytest.raises(NotFound, match="kept are 2"):
        run(RollBackAsked(RollBack(1, "")))
    run(ParentLeads("parent"))
    with pytest.raises(IllegalTransition, match="made by the parent"):
        run(RollBackAsked(RollBack(2, "")))
    assert run.machine.id == "parent"
