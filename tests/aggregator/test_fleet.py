"""Who is there, who is alive, who is idle."""

import pytest

from fedgrpc.aggregator.fleet import Fleet
from fedgrpc.errors import Exhausted, UnknownWorker, UsageError
from fedgrpc.rounds.history import WorkerHistory
from fedgrpc.v1.aggregator_pb2 import RegisterRequest
from fedgrpc.v1.device_pb2 import WORKER_ROLE_EVALUATOR, WORKER_ROLE_TRAINER


def request(name, role=WORKER_ROLE_TRAINER, cores=1):
    return RegisterRequest(worker=name, role=role, device={"cpu_cores": cores})


@pytest.fixture
def fleet():
    return Fleet(max_workers=3, away_after_s=10.0)


def test_a_worker_is_alive_for_a_while_after_it_was_heard_of_and_as_long_as_it_polls(fleet):
    worker = fleet.register(request("a"), 0.0)
    assert fleet.alive(worker, 9.9)
    assert not fleet.alive(worker, 10.0)
    with fleet.polling(worker):
        assert fleet.alive(worker, 1e6)
    assert not fleet.alive(worker, 1e6)


def test_a_worker_that_has_left_is_away_until_it_is_heard_of_again(fleet):
    worker = fleet.register(request("a"), 0.0)
    with fleet.polling(worker):
        # Its last poll may be seen to end after it said that it leaves.
        worker.left = True
        assert (fleet.alive(worker, 0.0), fleet.live_trainers(0.0), fleet.idle_trainers()) == (False, 0, ())
        assert not fleet.still_unaware(0.0)
    assert fleet.alive(fleet.register(request("a"), 1.0), 1.0)
    worker.left = True
    worker.heard(2.0)
    assert fleet.alive(worker, 11.9)


def test_registering_again_renews_what_it_says_and_keeps_what_it_did(fleet):
    fleet.register(request("a"), 0.0).history = WorkerHistory(accepted=7)
    again = fleet.register(request("a", cores=4), 50.0)
    assert (again.registration.device.cpu_cores, again.history.accepted, again.last_seen) == (4, 7, 50.0)
    assert len(list(fleet)) == 1


def test_a_registration_is_known_until_it_says_something_else(fleet):
    assert not fleet.knows(request("a"))
    fleet.register(request("a"), 0.0)
    assert fleet.knows(request("a"))
    assert not fleet.knows(request("a", cores=4))
    fleet.restore(request("b"), WorkerHistory(), 0.0)
    assert fleet.knows(request("b"))


def test_only_trainers_that_poll_without_a_task_are_idle(fleet):
    a, b = fleet.register(request("a"), 0.0), fleet.register(request("b"), 0.0)
    scorer = fleet.register(request("c", WORKER_ROLE_EVALUATOR), 0.0)
    assert fleet.idle_trainers() == ()
    with fleet.polling(a), fleet.polling(a), fleet.polling(b), fleet.polling(scorer):
        assert fleet.idle_trainers() == ("a", "b")
        b.token = "task"
        assert fleet.idle_trainers() == ("a",)
    assert fleet.idle_trainers() == ()
    assert fleet.live_trainers(5.0) == 2
    assert fleet.live_evaluators(5.0) == [scorer]
    assert (fleet.live_trainers(20.0), fleet.live_evaluators(20.0)) == (0, [])


def test_a_worker_from_before_a_restart_is_known_but_away(fleet):
    fleet.restore(request("a"), WorkerHistory(selected=5, accepted=3), now=1000.0)
    worker = fleet.get("a")
    assert (worker.history.selected, worker.history.accepted, fleet.alive(worker, 1000.0)) == (5, 3, False)


def test_there_is_an_end_of_room_but_not_for_those_who_are_there(fleet):
    for name in "abc":
        fleet.register(request(name), 0.0)
    with pytest.raises(Exhausted, match="the limit of 3 workers is reached"):
        fleet.register(request("d"), 0.0)
    fleet.register(request("a"), 0.0)


def test_a_worker_that_nobody_knows_is_unknown(fleet):
    with pytest.raises(UnknownWorker, match="worker 'x' has not registered here"):
        fleet.get("x")


@pytest.mark.parametrize("name", ["", "x" * 65, "a b", "a/b", "a\n", "é", "-" * 65])
def test_a_name_is_plain_and_short(fleet, name):
    with pytest.raises(UsageError, match="a worker's name is 1 to 64"):
        fleet.register(request(name), 0.0)
    assert list(fleet) == []


def test_the_end_of_a_run_concerns_those_who_are_alive_and_not_told(fleet):
    a, b = fleet.register(request("a"), 0.0), fleet.register(request("b"), 0.0)
    assert fleet.still_unaware(5.0)
    a.told_of_end = b.told_of_end = True
    assert not fleet.still_unaware(5.0)
    b.told_of_end = False
    assert not fleet.still_unaware(20.0)
