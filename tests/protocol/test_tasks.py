"""Tasks in messages."""

import pytest

from fedgrpc.errors import LayoutError
from fedgrpc.protocol.tasks import task_from_proto
from fedgrpc.v1 import aggregator_pb2, round_pb2
from tests.support.fake_aggregator import train_task


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 2**64 - 1},
        {"model_version": 2**63},
        {"plan": round_pb2.TrainingPlan(epochs=float("inf"))},
        {"plan": round_pb2.TrainingPlan(learning_rate=float("nan"))},
        {"plan": round_pb2.TrainingPlan(algorithm="")},
    ],
)
def test_a_task_of_numbers_that_no_run_comes_to_is_refused(changes):
    with pytest.raises(LayoutError):
        task_from_proto(aggregator_pb2.Task(token="t", kind=round_pb2.TASK_KIND_TRAIN, **changes))


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_not_known(rate):
    assert task_from_proto(train_task(uplink_bytes_per_second=rate)).uplink_bytes_per_second == 0
