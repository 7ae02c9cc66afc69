"""How one run goes on and ends: evaluators, targets, pauses, rollbacks."""

import pytest

from fedgrpc.errors import IllegalTransition, NotFound
from fedgrpc.rounds.events import (
    Abort,
    Failed,
    Finished,
    Tick,
)
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.version import Version
from fedgrpc.runs.events import (
    Ended,
    Ending,
    EndReason,
    EndRun,
    Evaluated,
    EvaluatorPolled,
    OpenRound,
    ParentLeads,
    Paused,
    Resumed,
    RollBack,
    RollBackAsked,
    RollBackFailed,
    RolledBack,
    RoundEnded,
    RoundOpened,
    RoundsRestored,
    RunPhase,
    Stay,
    TargetMet,
    TaskClosed,
    VersionsPruned,
    WorkerTold,
)
from tests.support.run_scenario import LAYOUT, RunScenario


def closed(effects):
    return {effect.token for effect in effects if isinstance(effect, TaskClosed)}


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


@pytest.mark.parametrize(("due", "expected"), [(True, OpenRound), (False, EndRun)])
def test_a_restart_goes_on_with_the_closing_evaluation_that_was_due_and_repeats_none(due, expected):
    run = RunScenario("a", rounds=1, evaluate=True)
    run(RoundsRestored(2, closing_evaluation=due))
    assert isinstance(run.model(2).machine.next_step(0.0, 0.0), expected)


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
