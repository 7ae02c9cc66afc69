"""What a run knows of the workers of its fleet."""

import pytest

from fedgrpc.aggregator.histories import RunWorkers
from fedgrpc.aggregator.registry import WorkerRegistry
from fedgrpc.protocol.descriptions import ModelDescription
from fedgrpc.rounds.history import WorkerHistory
from fedgrpc.v1.aggregator_pb2 import RegisterRequest
from fedgrpc.v1.device_pb2 import WORKER_ROLE_EVALUATOR


@pytest.fixture
def fleet():
    fleet = WorkerRegistry(max_workers=10, away_after_s=10.0)
    for name in "ab":
        fleet.register(RegisterRequest(worker=name), 0.0)
    fleet.register(RegisterRequest(worker="scorer", role=WORKER_ROLE_EVALUATOR), 0.0)
    return fleet


def test_two_runs_of_one_fleet_know_nothing_of_each_others_tasks(fleet):
    one, other = RunWorkers(fleet), RunWorkers(fleet)
    one.remember({"a": WorkerHistory(selected=3, accepted=2)})
    one.describe("a", ModelDescription(model_bytes=7))
    assert (one.history("a").accepted, one.description("a").model_bytes) == (2, 7)
    assert (other.history("a"), other.description("a")) == (WorkerHistory(), ModelDescription())


def test_a_worker_whose_update_any_run_has_accepted_has_delivered(fleet):
    one, other = RunWorkers(fleet), RunWorkers(fleet)
    one.remember({"a": WorkerHistory(selected=1, accepted=1), "b": WorkerHistory(selected=1)})
    other.remember({"a": WorkerHistory(selected=1)})
    assert (fleet.get("a").delivered, fleet.get("b").delivered) == (True, False)


def test_the_past_is_told_of_trainers_that_have_had_a_task(fleet):
    workers = RunWorkers(fleet)
    workers.remember({"a": WorkerHistory(selected=1), "b": WorkerHistory(), "scorer": WorkerHistory(selected=1)})
    assert set(workers.trainers()) == {"a"}


def test_a_worker_that_the_fleet_does_not_know_has_no_history(fleet):
    workers = RunWorkers(fleet)
    workers.remember({"a": WorkerHistory(selected=1), "gone": WorkerHistory(selected=1)})
    workers.forget(["a"])
    assert (workers.history("a"), workers.history("gone")) == (WorkerHistory(), WorkerHistory())
