"""Tasks that outlive their round."""

from fedgrpc.rounds.events import (
    CarryOver,
    Progress,
    TaskPhase,
    Tick,
)
from fedgrpc.runs.events import (
    Drop,
    RollBack,
    RollBackAsked,
    RoundEnded,
    TaskClosed,
    WorkerPolled,
)
from tests.support.run_scenario import REPORT, RunScenario

CARRY = {"late": "carry", "quorum": 1, "over_selection": 1.0}


def closed(effects):
    return {effect.token for effect in effects if isinstance(effect, TaskClosed)}


def kinds(effects):
    return [type(effect) for effect in effects]


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
