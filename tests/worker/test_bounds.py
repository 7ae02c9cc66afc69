"""What the device bounds of what its aggregator says: the size of models, the plans, the numbers of a task."""

from fedgrpc.cli.worker import is_allowed
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


def test_only_tasks_of_fedgrpc_may_be_named_unless_others_are_allowed():
    assert is_allowed("fedgrpc.tasks.digits", ["fedgrpc.tasks.*"])
    assert is_allowed("fedgrpc.tasks.digits:Digits", ["fedgrpc.tasks.*"])
    assert is_allowed("mine:Task", ["fedgrpc.tasks.*", "mine"])
    for task in ("unittest.__main__", "fedgrpc.errors", "fedgrpc.tasksy", "xfedgrpc.tasks.digits", ""):
        assert not is_allowed(task, ["fedgrpc.tasks.*"])
