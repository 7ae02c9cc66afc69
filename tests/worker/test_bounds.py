"""What the device bounds of what its aggregator says: the size of models, the plans, the numbers of a task."""

import pytest

from fedgrpc.submodels.cost import FIRST_TASK_BYTES
from fedgrpc.v1 import round_pb2
from fedgrpc.worker.task_choice import is_allowed
from tests.support.fake_aggregator import FakeAggregator, model, train_task
from tests.support.running_worker import AddOneTrainer, run_against


async def test_a_model_over_the_limit_is_given_back_and_not_taken(tmp_path):
    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task("t1")]
    assert await run_against(peer, tmp_path, AddOneTrainer(), max_model_bytes=8) == 0
    assert "t1" in peer.failures
    assert not peer.uploads


@pytest.mark.parametrize(
    ("kind", "copies", "taken"),
    [
        (round_pb2.TASK_KIND_TRAIN, 3, True),
        (round_pb2.TASK_KIND_TRAIN, 2, False),
        (round_pb2.TASK_KIND_EVALUATE, 1, True),
        (round_pb2.TASK_KIND_EVALUATE, 0, False),
    ],
)
async def test_a_model_is_taken_where_the_copies_that_its_task_keeps_fit_beside_the_process(
    tmp_path, monkeypatch, kind, copies, taken
):
    model_bytes = sum(array.nbytes for array in model(1).values())
    usable = 100_000 + FIRST_TASK_BYTES + copies * model_bytes
    monkeypatch.setattr("fedgrpc.worker.training.usable_memory_bytes", lambda: usable)
    monkeypatch.setattr("fedgrpc.worker.training.resident_bytes", lambda: 100_000)
    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task("t1", kind=kind)]
    assert await run_against(peer, tmp_path, AddOneTrainer()) == 0
    assert ("t1" in peer.uploads) is taken
    assert taken or "decoded bytes" in peer.failures["t1"]


async def test_a_model_that_was_taken_to_be_scored_is_not_trained_in_memory_for_one_copy(tmp_path, monkeypatch):
    model_bytes = sum(array.nbytes for array in model(1).values())
    monkeypatch.setattr("fedgrpc.worker.training.usable_memory_bytes", lambda: FIRST_TASK_BYTES + 2 * model_bytes)
    monkeypatch.setattr("fedgrpc.worker.training.resident_bytes", lambda: 0)
    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task("t1", kind=round_pb2.TASK_KIND_EVALUATE), train_task("t2")]
    assert await run_against(peer, tmp_path, AddOneTrainer()) == 0
    assert "t1" in peer.uploads
    assert "decoded bytes" in peer.failures["t2"]


async def test_batches_under_the_floor_of_the_device_are_refused(tmp_path):
    peer = FakeAggregator({1: model(1)})
    small, usual = train_task("t1"), train_task("t2")
    small.plan.batch_size, usual.plan.batch_size = 1, 8
    peer.tasks = [small, usual]
    assert await run_against(peer, tmp_path, AddOneTrainer(), min_batch_size=8) == 0
    assert "--min-batch-size is 8" in peer.failures["t1"]
    assert peer.uploads["t2"].complete


def test_only_tasks_of_fedgrpc_may_be_named_unless_others_are_allowed():
    assert is_allowed("fedgrpc.tasks.digits", ["fedgrpc.tasks.*"])
    assert is_allowed("fedgrpc.tasks.digits:Digits", ["fedgrpc.tasks.*"])
    assert is_allowed("mine:Task", ["fedgrpc.tasks.*", "mine"])
    for task in ("unittest.__main__", "fedgrpc.errors", "fedgrpc.tasksy", "xfedgrpc.tasks.digits", ""):
        assert not is_allowed(task, ["fedgrpc.tasks.*"])
