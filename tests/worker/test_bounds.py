"""What the device bounds of what its aggregator says: the size of models, the plans, the numbers of a task."""

import pytest

from fedgrpc.cli.worker import is_allowed
from fedgrpc.errors import LayoutError
from fedgrpc.protocol.tasks import task_from_proto
from fedgrpc.v1 import aggregator_pb2, round_pb2
from tests.support.fake_aggregator import FakeAggregator, model, train_task
from tests.support.running_worker import AddOneTrainer, run_against


async def test_a_model_over_the_limit_is_given_back_and_not_taken(tmp_path):
    peer = FakeAggregator({1: model(1)})
    peer.tasks = [train_task("t1")]
    assert await run_against(peer, tmp_path, AddOneTrainer(), max_model_bytes=8) == 0
    assert "t1" in peer.failures
    assert not peer.uploads


async def test_batches_under_the_floor_of_the_device_are_refused(tmp_path):
    peer = FakeAggregator({1: model(1)})
    small, usual = train_task("t1"), train_task("t2")
    small.plan.batch_size, usual.plan.batch_size = 1, 8
    peer.tasks = [small, usual]
    assert await run_against(peer, tmp_path, AddOneTrainer(), min_batch_size=8) == 0
    assert "--min-batch-size is 8" in peer.failures["t1"]
    assert peer.uploads["t2"].complete


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 2**64 - 1},
        {"model_version": 2**63},
        {"plan": round_pb2.TrainingPlan(epochs=float("inf"))},
        {"plan": round_pb2.TrainingPlan(learning_rate=float("nan"))},
        {"plan": round_pb2.TrainingPlan(proximal_mu=-1.0)},
    ],
)
def test_a_task_of_numbers_that_no_run_comes_to_is_refused(changes):
    with pytest.raises(LayoutError):
        task_from_proto(aggregator_pb2.Task(token="t", kind=round_pb2.TASK_KIND_TRAIN, **changes))


def test_only_tasks_of_fedgrpc_may_be_named_unless_others_are_allowed():
    assert is_allowed("fedgrpc.tasks.digits", ["fedgrpc.tasks.*"])
    assert is_allowed("fedgrpc.tasks.digits:Digits", ["fedgrpc.tasks.*"])
    assert is_allowed("mine:Task", ["fedgrpc.tasks.*", "mine"])
    for task in ("unittest.__main__", "fedgrpc.errors", "fedgrpc.tasksy", "xfedgrpc.tasks.digits", ""):
        assert not is_allowed(task, ["fedgrpc.tasks.*"])
