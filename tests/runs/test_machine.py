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
from fedgrpc.runs.machine import check_ended_task
from tests.runs.story import LAYOUT, REPORT, Story

CARRY = {"late": "carry", "quorum": 1, "over_selection": 1.0}


def closed(effects):
    return {effect.token for effect in effects if isinstance(effect, TaskClosed)}


def kinds(effects):
    return [type(effect) for effect in effects]


# Rounds.


def test_a_run_without_a_model_asks_one_worker_for_it_in_round_0():
    it = Story()
    step = it.run.next_step(0.0, 0.0)
    assert (step.round.number, step.round.kind, step.round.state.policy.max_participants) == (
        0,
        TaskKind.INITIALIZE,
        1,
    )
    it.run.rules = it.run.rules.__class__(it.run.rules.policy, 10, initialises=lambda name: name == "b")
    it(RoundOpened(step.round))
    assert it.run.workers_available(it.fleet, 0.0).idle == ("b",)


def test_a_round_is_opened_given_out_accepted_and_committed():
    it = Story("ab").model().open()
    assert it.run.leases == {"a": "a1", "b": "b1"}
    assert it.run.current.context("a1").device_class == "class of a"
    assert Commit(("a1", "b1")) in it.accept("a1", "b1")
    assert it.run.leases == {}
    it.commit()
    assert (it.run.round, it.run.version, it.run.trained, it.run.last_number) == (None, 2, 1, 1)
    assert it.run.next_step(0.0, 0.0).round.number == 2


def test_one_record_holds_all_that_is_known_of_a_task():
    it = Story("ab").model().open()
    it.accept("a1", "b1")
    it(it.merged())
    context = it.run.current.context("a1")
    assert (context.report, context.weight, context.scale, context.device_class) == (
        REPORT,
        10.0,
        1.0,
        "class of a",
    )
    assert it.run.current.weights == {"a1": 10.0, "b1": 10.0}
    assert (it.run.current.commit_s, it.run.current.training_metrics) == (0.25, {"loss": 0.5})


def test_what_is_foreseen_is_what_an_event_does_and_nothing_has_happened_yet():
    it = Story("ab").model().open()
    it.accept("a1", "b1")
    merged = it.merged()
    after = it.run.foresee(merged, 0.0)
    assert (it.run.version, it.run.current.state.phase, 2 in it.run.versions) == (1, RoundPhase.COMMITTING, False)
    it(merged)
    for each in (after, it.run):
        assert (each.version, each.current.state.phase, 2 in each.versions) == (2, RoundPhase.COMMITTED, True)


def test_an_event_that_is_not_allowed_raises_and_nothing_has_happened():
    it = Story("ab").model().open()
    before = it.run.round
    for event, error in (
        (RoundEnded(0.0), IllegalTransition),
        (RoundOpened(before), IllegalTransition),
        (it.merged(), IllegalTransition),
    ):
        with pytest.raises(error):
            it(event)
    assert (it.run.round, it.run.version, it.run.leases) == (before, 1, {"a": "a1", "b": "b1"})


def test_an_update_of_a_round_that_has_ended_is_not_accepted():
    it = Story("ab").model().open()
    it(Abort("enough"))
    it(RoundEnded(0.0))
    with pytest.raises(RoundClosed, match="the round of this task has ended"):
        it.accept("a1")


def test_a_lost_lease_frees_the_slot_and_not_the_worker():
    it = Story("ab", max_participants=1).model().open("a")
    it.now = 10.0
    assert kinds(it(Tick())) == [Cancel]
    assert it.run.current.state.tasks["a1"].phase is TaskPhase.EXPIRED
    # It may come back, so it is not given another task; its place goes to another worker.
    assert it.run.leases == {"a": "a1"}
    assert it.run.idle_trainers(it.fleet, it.now) == ("b",)
    it(Progress("a1", TaskPhase.TRAINING))
    assert it.run.task_of("a") == "a1"


def test_a_worker_whose_task_has_ended_is_free_again():
    for event in (Rejected("a1", "bad"), Failed("a1", "broken")):
        it = Story("ab").model().open()
        assert closed(it(event)) == {"a1"}
        assert it.run.leases == {"b": "b1"}


def test_uploads_hear_of_each_task_that_is_closed_once():
    it = Story("abc", max_participants=2, over_selection=1.5).model().open()
    assert closed(it.accept("a1")) == set()
    effects = it.accept("b1")
    assert closed(effects) == {"c1"}
    assert "late" in next(effect.reason for effect in effects if isinstance(effect, TaskClosed))
    assert closed(it(it.merged())) == closed(it(RoundEnded(0.0))) == set()


def test_an_aborted_round_closes_all_tasks_but_those_accepted():
    it = Story("abc").model().open()
    it.accept("a1")
    assert closed(it(Abort("stopped"))) == {"b1", "c1"}


def test_workers_that_hold_up_rounds_are_left_out_while_the_others_are_enough():
    it = Story("abc", min_workers=2).model()
    it.fleet.slow = frozenset("c")
    assert it.run.workers_available(it.fleet, 0.0).idle == ("a", "b")
    assert it.run.workers_available(it.fleet, 0.0).live_count == 2
    it.fleet.away = {"b"}
    assert it.run.workers_available(it.fleet, 0.0).idle == ("a", "c")


def test_a_parent_that_ends_its_round_earlier_shortens_this_one():
    it = Story().model().open()
    it(ParentWaits(200.0))
    assert it.run.current.state.deadline_at == 100.0
    it(ParentWaits(50.0))
    assert (it.run.current.state.deadline_at, it.run.current.due_at) == (50.0, 50.0)


# Tasks that outlive their round.


def carried(names="abc"):
    """Round 1 has committed without b, which had begun: its task is one of round 2."""
    it = Story(names, **CARRY).model().open()
    it(Progress("b1", TaskPhase.TRAINING))
    it.accept(*(f"{name}1" for name in names if name != "b"))
    it.now = 100.0
    effects = it(Tick())
    return it, effects


def test_a_carried_over_task_stays_open_and_opens_the_next_round_at_once():
    it, effects = carried()
    assert CarryOver in kinds(effects)
    assert closed(effects) == set()
    it.commit()
    assert (it.run.current.number, list(it.run.current.state.tasks)) == (2, ["b1"])
    assert (it.run.leases, it.run.takes_update("b1")) == ({"b": "b1"}, True)
    assert it.run.current.version_of("b1") == 1
    assert it.run.current.context("b1").device_class == "class of b"


def test_an_update_that_arrives_while_its_round_is_committing_counts_in_the_next():
    it, _ = carried()
    it.accept("b1")
    assert it.run.leases == {}
    it.commit()
    assert it.run.current.state.accepted == ("b1",)
    assert it.run.current.report("b1") == REPORT


def test_a_carried_over_task_whose_worker_has_lost_it_is_not_begun_again():
    it, _ = carried()
    it.commit()
    assert closed(it(WorkerPolled("b", None))) == {"b1"}
    assert (it.run.leases, it.run.task_of("b")) == ({}, None)


def test_a_task_of_this_round_is_given_again_to_a_worker_that_polls():
    it = Story("ab").model().open()
    assert it(WorkerPolled("a", (1, b"digest"))) == ()
    assert (it.run.task_of("a"), it.run.held) == ("a1", {"a": (1, b"digest")})


def test_carried_over_tasks_are_dropped_when_no_round_of_their_kind_follows():
    it, _ = carried()
    it(RollBackAsked(RollBack(1, "")))
    it(it.merged())
    effects = it(RoundEnded(0.0))
    (drop,) = [effect.dropped for effect in effects if isinstance(effect, Drop)]
    assert (drop.token, drop.round, drop.task.phase) == ("b1", 1, TaskPhase.LATE)
    assert closed(effects) == {"b1"}
    assert (it.run.round, it.run.leases) == (None, {})


# Which tasks are known.


def test_a_task_is_its_own_workers_alone():
    it = Story("ab").model().open()
    assert it.run.check_task("a", "a1") is TaskPhase.OFFERED
    with pytest.raises(WrongIdentity):
        it.run.check_task("b", "a1")
    assert it.run.check_task("a", "unknown") is None
    it(Rejected("a1", "bad"))
    with pytest.raises(RoundClosed, match="rejected: bad"):
        it.run.check_task("a", "a1")


def test_a_task_that_was_accepted_stays_so_after_its_round():
    assert check_ended_task("a", "a", TaskPhase.ACCEPTED, "") is TaskPhase.ACCEPTED
    for phase in (TaskPhase.TRAINING, TaskPhase.LATE, TaskPhase.FAILED):
        with pytest.raises(RoundClosed, match="its round has ended"):
            check_ended_task("a", "a", phase, "")
    with pytest.raises(WrongIdentity):
        check_ended_task("b", "a", TaskPhase.ACCEPTED, "")


def test_a_task_that_its_worker_has_not_begun_goes_to_another_when_it_leaves():
    it = Story("ab").model().open()
    it(Progress("b1", TaskPhase.DOWNLOADING))
    assert it(WorkerLeft("b")) == ()
    assert closed(it(WorkerLeft("a"))) == {"a1"}
    assert it.run.leases == {"b": "b1"}


def test_another_device_of_the_same_name_has_none_of_its_tasks():
    it = Story("ab").model().open()
    it(WorkerPolled("a", (1, b"digest")))
    assert closed(it(DeviceReplaced("a"))) == {"a1"}
    assert (it.run.leases, it.run.held) == ({"b": "b1"}, {})


# Evaluators.


def test_an_evaluator_scores_each_version_once():
    it = Story().model()
    it(EvaluatorPolled("e", "t1"))
    task = it.run.evaluation_of("e")
    assert (task.token, task.version) == ("t1", 1)
    it(EvaluatorPolled("e", "t2"))
    assert it.run.evaluation_of("e") is task
    it(Evaluated(task, {"loss": 0.5}, 10))
    assert (it.run.evaluation_of("e"), it.run.evaluations.scores_of(1)) == (None, (10, {"loss": 0.5}))
    it.model(2)
    it(EvaluatorPolled("e", "t3"))
    it(Evaluated(it.run.evaluation_of("e"), None))
    it(EvaluatorPolled("e", "t4"))
    assert it.run.evaluation_of("e") is None


def test_there_is_nothing_to_score_before_there_is_a_model():
    it = Story()
    it(EvaluatorPolled("e", "t1"))
    assert it.run.evaluation_of("e") is None


# How a run goes on, and how it ends.


def test_a_run_ends_after_its_last_round_and_waits_for_its_evaluators():
    it = Story("a", rounds=1).model().open()
    it.accept("a1")
    it.commit()
    step = it.run.next_step(0.0, 0.0)
    assert isinstance(step, EndRun)
    assert (step.ending.reason, step.after_evaluators) == (EndReason.ROUNDS_DONE, True)
    it(Ended(RunPhase.FINISHED, step.ending))
    assert (it.run.ended, it.run.ending.reason) == (True, EndReason.ROUNDS_DONE)


def test_workers_that_score_are_asked_once_more_after_the_last_round():
    for scored, expected in ((True, OpenRound), (False, EndRun)):
        it = Story("a", rounds=1, evaluate=True).model().open()
        it.accept("a1")
        it.commit(scored)
        assert isinstance(step := it.run.next_step(0.0, 0.0), expected)
    it = Story("a", rounds=1, evaluate=True).model().open()
    it.accept("a1")
    it.commit(scored=True)
    step = it.run.next_step(0.0, 0.0)
    assert step.round.kind is TaskKind.EVALUATE
    it(RoundOpened(step.round))
    it(Abort("nobody came"))
    it(RoundEnded(0.0))
    assert isinstance(it.run.next_step(0.0, 0.0), EndRun)


def test_a_target_that_is_met_ends_the_run_with_its_round():
    it = Story("ab").model().open()
    it(TargetMet("version 1 has accuracy >= 0.9"))
    assert not it.run.ended
    it.accept("a1", "b1")
    it.commit()
    assert it.run.next_step(0.0, 0.0) == EndRun(Ending(EndReason.TARGET_MET, "version 1 has accuracy >= 0.9"))


def test_the_first_end_is_the_one_and_a_round_that_is_open_is_abandoned():
    it = Story("ab").model().open()
    effects = it(Ended(RunPhase.STOPPED, Ending(EndReason.STOPPED, "by hand")))
    assert closed(effects) == {"a1", "b1"}
    assert Finished(committed=False, reason="by hand") in effects
    assert it(Ended(RunPhase.FINISHED, Ending(EndReason.ROUNDS_DONE, "done"))) == ()
    assert (it.run.phase, it.run.ending.reason) == (RunPhase.STOPPED, EndReason.STOPPED)
    for event in (Paused(), Resumed(), RollBackAsked(RollBack(1, ""))):
        with pytest.raises(IllegalTransition, match="by hand"):
            it(event)


def test_a_round_that_is_committing_goes_on_to_its_version_when_the_run_is_stopped():
    it = Story("ab").model().open()
    it.accept("a1", "b1")
    assert it(Ended(RunPhase.STOPPED, Ending(EndReason.STOPPED, "by hand"))) == ()
    it.commit()
    assert (it.run.version, it.run.round) == (2, None)


def test_workers_that_were_told_of_the_end_are_known():
    it = Story().model()
    it(WorkerTold("a"))
    assert it.run.told == set()
    it(Ended(RunPhase.FINISHED, Ending(EndReason.ROUNDS_DONE, "done")))
    it(WorkerTold("a"))
    assert it.run.told == {"a"}


def test_a_paused_run_opens_no_round_until_it_is_resumed():
    it = Story().model()
    it(Paused("it fails"))
    assert (it.run.next_step(0.0, 0.0), it.run.paused_reason) == (Stay(), "it fails")
    it(Resumed())
    assert isinstance(it.run.next_step(0.0, 0.0), OpenRound)
    assert it.run.paused_reason == ""


def failed_round(it):
    it.open()
    for name in "ab":
        it(Failed(it.token(name), "out of memory"))
    it(it.run.workers_available(it.fleet, 0.0))
    ended = it.run.current
    it(RoundEnded(0.0))
    return it.run.hopeless(ended, it.fleet, it.now)


def test_three_rounds_in_a_row_that_fail_for_one_reason_are_hopeless():
    it = Story("ab").model()
    assert [failed_round(it), failed_round(it)] == ["", ""]
    reason = failed_round(it)
    assert "3 rounds in a row" in reason
    assert "a: out of memory" in reason
    it(Paused(reason))
    it(Resumed())
    # Whoever resumes it sees three more.
    assert [failed_round(it), failed_round(it), bool(failed_round(it))] == ["", "", True]


def test_a_few_bad_workers_pause_no_run_that_others_can_do():
    it = Story("abcdef", quorum=3).model()
    for _ in range(4):
        it.open()
        it.accept(it.token("c"), it.token("d"))
        for name in "ab":
            it(Failed(it.token(name), "out of memory"))
        it.now += 100.0
        it(Tick())
        ended = it.run.current
        it(RoundEnded(0.0))
        assert it.run.hopeless(ended, it.fleet, it.now) == ""
    it.fleet.away = {"e", "f"}
    assert "4 rounds in a row" in it.run.hopeless(ended, it.fleet, it.now)


def test_a_version_ends_a_streak_of_abandoned_rounds():
    it = Story("ab").model()
    failed_round(it), failed_round(it)
    it.open()
    it.accept(*map(it.token, "ab"))
    it.commit()
    assert [failed_round(it), failed_round(it)] == ["", ""]


# Versions.


def test_a_rollback_abandons_the_round_and_comes_before_the_next():
    it = Story("ab").model(1).model(2).open()
    effects = it(RollBackAsked(RollBack(1, "worse")))
    assert closed(effects) == {"a1", "b1"}
    it(RoundEnded(0.0))
    assert it.run.next_step(0.0, 0.0) == RollBack(1, "worse")
    it(RolledBack(Version(3, 2, b"digest", rolled_back_to=1), LAYOUT, 2))
    assert (it.run.version, it.run.trained, it.run.rolling_back, it.run.last_number) == (3, 0, None, 2)


def test_a_rollback_that_fails_leaves_the_run_as_it_is():
    it = Story().model(1).model(2)
    it(RollBackAsked(RollBack(1, "")))
    with pytest.raises(IllegalTransition, match="rolled back to version 1 already"):
        it(RollBackAsked(RollBack(2, "")))
    it(RollBackFailed())
    assert (it.run.version, it.run.rolling_back) == (2, None)
    assert isinstance(it.run.next_step(0.0, 0.0), OpenRound)


def test_only_a_kept_version_can_be_gone_back_to_and_only_where_versions_are_made():
    with pytest.raises(NotFound, match="no model version yet"):
        Story()(RollBackAsked(RollBack(0, "")))
    it = Story().model(1).model(2)
    it(VersionsPruned({2}))
    with pytest.raises(NotFound, match="kept are 2"):
        it(RollBackAsked(RollBack(1, "")))
    it(ParentLeads("parent"))
    with pytest.raises(IllegalTransition, match="made by the parent"):
        it(RollBackAsked(RollBack(2, "")))
    assert it.run.id == "parent"
