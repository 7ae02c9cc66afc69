"""Who is there, who is alive, who is idle."""

import asyncio
from contextlib import ExitStack

import pytest

from fedgrpc.aggregator.registry import Allowance, WorkerRegistry
from fedgrpc.errors import Exhausted, UnknownWorker, UsageError
from fedgrpc.v1.aggregator_pb2 import RegisterRequest
from fedgrpc.v1.device_pb2 import WORKER_ROLE_EVALUATOR, WORKER_ROLE_TRAINER


def request(name, role=WORKER_ROLE_TRAINER, cores=1):
    return RegisterRequest(worker=name, role=role, device={"cpu_cores": cores})


@pytest.fixture
def fleet():
    return WorkerRegistry(max_workers=3, away_after_s=10.0)


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
        assert not fleet.any_alive_but((), 0.0)
    assert fleet.alive(fleet.register(request("a"), 1.0), 1.0)
    worker.left = True
    worker.heard(2.0)
    assert fleet.alive(worker, 11.9)


def test_registering_again_renews_what_it_says_and_keeps_what_it_did(fleet):
    fleet.register(request("a"), 0.0).delivered = True
    again = fleet.register(request("a", cores=4), 50.0)
    assert (again.registration.device.cpu_cores, again.delivered, again.last_seen) == (4, True, 50.0)
    assert len(list(fleet)) == 1


def test_a_registration_is_known_until_it_says_something_else(fleet):
    assert not fleet.knows(request("a"))
    fleet.register(request("a"), 0.0)
    assert fleet.knows(request("a"))
    assert not fleet.knows(request("a", cores=4))
    fleet.restore(request("b"), 0.0)
    assert fleet.knows(request("b"))


def test_only_trainers_that_poll_without_a_task_are_idle(fleet):
    a, b = fleet.register(request("a"), 0.0), fleet.register(request("b"), 0.0)
    scorer = fleet.register(request("c", WORKER_ROLE_EVALUATOR), 0.0)
    assert fleet.idle_trainers() == ()
    with (
        fleet.polling(a),
        fleet.polling(a),
        fleet.polling(b),
        fleet.polling(scorer),
    ):
        assert fleet.idle_trainers() == ("a", "b")
        assert fleet.idle_trainers(busy=("b",)) == ("a",)
    assert fleet.idle_trainers() == ()
    assert fleet.live_trainers(5.0) == 2
    assert fleet.live_evaluators(5.0) == [scorer]
    assert (fleet.live_trainers(20.0), fleet.live_evaluators(20.0)) == (0, [])


def test_a_worker_from_before_a_restart_is_known_but_away(fleet):
    fleet.restore(request("a"), now=1000.0)
    assert not fleet.alive(fleet.get("a"), 1000.0)


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
    fleet.register(request("a"), 0.0)
    fleet.register(request("b"), 0.0)
    assert fleet.any_alive_but((), 5.0)
    assert not fleet.any_alive_but(("a", "b"), 5.0)
    assert fleet.any_alive_but(("a",), 5.0)
    assert not fleet.any_alive_but(("a",), 20.0)


def full(fleet):
    """Three workers: one that has delivered, one that holds a task (and so is kept), one that polls."""
    known, _, polling = (fleet.register(request(name), 0.0) for name in "abc")
    known.delivered = True
    return polling


def test_workers_that_never_delivered_make_room_for_new_ones_the_longest_silent_first():
    fleet = WorkerRegistry(max_workers=4, away_after_s=10.0)
    full(fleet)
    fleet.register(request("d"), 5.0)
    assert fleet.make_room("a", ("b",), 20.0) == []
    assert fleet.make_room("new", ("b", "c"), 20.0) == ["d"]
    assert fleet.make_room("new", ("b",), 20.0) == []
    fleet.register(request("new"), 20.0)
    assert fleet.make_room("other", ("b",), 21.0) == ["c"]
    fleet.register(request("other"), 21.0)
    assert fleet.make_room("c", ("b",), 22.0) == ["new"]
    assert {worker.name for worker in fleet} == {"a", "b", "other"}


def test_who_is_about_to_be_given_a_task_is_not_forgotten_for_as_long_as_any_run_reserves_it():
    fleet = WorkerRegistry(max_workers=3, away_after_s=10.0)
    full(fleet)
    with fleet.reserving(("b",)):
        with fleet.reserving(("b", "c")):
            assert fleet.reserved == {"b", "c"}
            with pytest.raises(Exhausted):
                fleet.make_room("d", (), 20.0)
        assert fleet.make_room("d", (), 20.0) == ["c"]
    assert fleet.reserved == frozenset()


def test_those_who_deliver_or_work_are_never_forgotten_and_those_who_poll_only_now_and_then(fleet):
    polling = full(fleet)
    with fleet.polling(polling):
        assert fleet.make_room("d", ("b",), 100.0) == ["c"]
        fleet.register(request("d"), 100.0)
        with fleet.polling(fleet.get("d")):
            for now in (100.0, 109.9):
                with pytest.raises(Exhausted, match="the limit of 3 workers is reached") as caught:
                    fleet.make_room("e", ("b",), now)
                assert caught.value.retry_after_s == 10.0
            assert fleet.make_room("e", ("b",), 110.0) == ["d"]
    fleet.register(request("e"), 110.0)
    with pytest.raises(Exhausted):
        fleet.make_room("f", ("b", "e"), 110.0)
    with pytest.raises(Exhausted):
        fleet.register(request("f"), 110.0)


def test_of_many_workers_more_than_one_is_forgotten_at_a_time():
    fleet = WorkerRegistry(max_workers=1000, away_after_s=10.0)
    for number in range(1000):
        fleet.register(request(f"w{number}"), float(number))
    assert fleet.make_room("new", (), 2000.0) == [f"w{number}" for number in range(10)]


async def test_the_oldest_of_too_many_polls_of_one_worker_end(fleet):
    worker = fleet.register(request("a"), 0.0)
    limits = [asyncio.timeout(None) for _ in range(6)]
    with ExitStack() as stack:
        for limit in limits:
            await limit.__aenter__()
            stack.enter_context(fleet.polling(worker, limit))
        assert [limit.when() is None for limit in limits] == [False, False, True, True, True, True]
        assert worker.polls == 6
        for limit in limits:
            limit.reschedule(None)
    for limit in limits:
        await limit.__aexit__(None, None, None)
    assert (worker.polls, len(worker.open_polls)) == (0, 0)


def test_a_worker_that_changes_what_it_says_all_the_time_is_told_to_wait():
    allowance = Allowance()
    for _ in range(10):
        allowance.take(5.0)
    with pytest.raises(Exhausted, match="registers too often") as caught:
        allowance.take(5.0)
    assert 0 < caught.value.retry_after_s <= 2.0
    allowance.take(5.0 + caught.value.retry_after_s)
    with pytest.raises(Exhausted):
        allowance.take(5.0 + caught.value.retry_after_s)
