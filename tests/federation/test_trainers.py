"""Trainers as people write them, with a real aggregator: in place, without effect, one of each example."""

from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from fedgrpc.cli.tables import rounds_table
from fedgrpc.datasets.dataset import LabelledData
from fedgrpc.datasets.digits import load_digits
from fedgrpc.datasets.partition import parse_partition
from fedgrpc.datasets.shares import save_share, write_shares
from fedgrpc.trainer import EvalResult, TrainResult
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import round_pb2
from fedgrpc.worker.task_loader import load_trainer
from tests.support.hand_driven_device import MODEL
from tests.support.processes import aggregator_process, worker_process
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

ONE = {"min_workers": 1}


class InPlace(ShiftTrainer):
    """Trains in the arrays that it is given, and returns them; scores in them, too."""

    def train(self, weights, job):
        for array in weights.values():
            array += np.array(1, array.dtype)
        return TrainResult(weights, self.examples, 1)

    def evaluate(self, weights):
        for array in weights.values():
            array *= np.array(0, array.dtype)
        return EvalResult(self.examples, {"loss": 1.0})


@pytest.mark.parametrize("recipe", ["raw", "float16+zstd"])
async def test_a_trainer_that_trains_in_the_arrays_that_it_is_given_trains(tmp_path, recipe):
    async with running_aggregator(
        tmp_path, policy=ONE, rounds=3, download_recipe=recipe, evaluate=True
    ) as running:
        worker = start_worker(running, tmp_path, "pi-1", InPlace())
        run = await running.until_finished()
        assert await worker == 0
        trained = running.weights(run.model_version)
        assert np.allclose(trained["w"], MODEL["w"] + 3, atol=0.01)
        assert trained["n"] == MODEL["n"] + 3
        assert not any(task.unchanged for round_ in await running.rounds() for task in round_.tasks)


class Idle(ShiftTrainer):
    """Trains a copy, and returns what it was given."""

    def train(self, weights, job):
        _ = {name: array + 1 for name, array in weights.items()}
        return TrainResult(weights, self.examples, 1)


async def test_training_that_changed_nothing_is_told_by_the_worker_the_aggregator_and_the_rounds_table(tmp_path):
    with capture_logs() as lines:
        async with running_aggregator(tmp_path, rounds=2) as running:
            workers = [
                start_worker(running, tmp_path, "pi-1", Idle()),
                start_worker(running, tmp_path, "pi-2", ShiftTrainer()),
            ]
            await running.until_finished()
            rounds = await running.rounds()
            assert [await worker for worker in workers] == [0, 0]
    for round_ in rounds:
        assert {task.worker: task.unchanged for task in round_.tasks} == {"pi-1": True, "pi-2": False}
    assert len([line for line in lines if line["event"] == "training changed nothing"]) == 4
    notes = [
        str(line) for line in rounds_table(rounds).lines(None) if "pi-1: training changed nothing" in str(line)
    ]
    assert len(notes) == 2


async def test_training_that_only_measured_statistics_has_changed_nothing(tmp_path):
    """As PyTorch's with a learning rate of 0: batches are counted, and nothing is learned."""
    weights = {"w": np.ones(8, np.float32), "n.running_mean": np.zeros(8, np.float32)}

    class Measures(ShiftTrainer):
        def train(self, weights, job):
            return TrainResult({**weights, "n.running_mean": weights["n.running_mean"] + 1}, self.examples, 1)

        def evaluate(self, weights):
            return None

    async with running_aggregator(tmp_path, policy=ONE, rounds=1, initial_model=None) as running:
        worker = start_worker(running, tmp_path, "pi-1", Measures(weights=weights))
        await running.until_finished()
        trained = [round_ for round_ in await running.rounds() if round_.kind == round_pb2.TASK_KIND_TRAIN]
        assert await worker == 0
    assert [task.unchanged for round_ in trained for task in round_.tasks] == [True]


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.faults
@pytest.mark.parametrize("task", ["bring_your_own_torch", "bring_your_own_numpy", "bring_your_own_sklearn"])
async def test_the_examples_learn_with_a_real_aggregator_and_two_workers(tmp_path, monkeypatch, task):
    pytest.importorskip("torch").set_num_threads(1)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    shares = write_shares(tmp_path / "shares", load_digits(), parse_partition("iid"), 2, 0)
    data = [None, None] if task == "bring_your_own_torch" else shares
    plan = TrainingPlan(epochs=25)
    async with running_aggregator(
        tmp_path, rounds=2, initial_model=None, plan=plan, evaluate=True, upload_recipe="int8+zstd"
    ) as running:
        workers = [
            start_worker(running, tmp_path, f"pi-{number}", load_trainer(task, data=path))
            for number, path in enumerate(data, start=1)
        ]
        await running.until_finished()
        rounds = await running.rounds()
        assert [await worker for worker in workers] == [0, 0]
    scores = [round_.metrics["accuracy"] for round_ in rounds if "accuracy" in round_.metrics]
    assert scores[-1] > 0.8, scores
    ended = {task.phase for round_ in rounds for task in round_.tasks}
    assert ended == {round_pb2.TASK_PHASE_ACCEPTED}
    assert {round_.kind for round_ in rounds} >= {round_pb2.TASK_KIND_INITIALIZE, round_pb2.TASK_KIND_TRAIN}


async def test_a_device_that_gathers_examples_trains_on_them_from_the_next_round_on(tmp_path):
    pytest.importorskip("torch").set_num_threads(1)
    digits, path = load_digits(), tmp_path / "share.npz"

    def gathered(count):
        save_share(path, LabelledData(digits.train.take(np.arange(count)), digits.held_out))

    class Gathering:
        """The trainer of the digits, on a device that has more examples once it has trained twice."""

        def __init__(self):
            self._inner = load_trainer("fedgrpc.tasks.digits", data=path)
            self._trained = 0
            self.initial_weights, self.evaluate = self._inner.initial_weights, self._inner.evaluate

        def train(self, weights, job):
            result = self._inner.train(weights, job)
            self._trained += 1
            if self._trained == 2:
                gathered(600)
            return result

    gathered(100)
    async with running_aggregator(tmp_path, policy=ONE, rounds=4, initial_model=None) as running:
        worker = start_worker(running, tmp_path, "pi-1", Gathering())
        await running.until_finished()
        rounds = await running.rounds()
        assert await worker == 0
    trained = [round_ for round_ in rounds if round_.kind == round_pb2.TASK_KIND_TRAIN]
    assert [round_.tasks[0].example_count for round_ in trained] == [100, 100, 600, 600]
    assert [round_.tasks[0].weight for round_ in trained] == [100, 100, 600, 600]


async def test_the_traceback_of_a_learning_task_is_in_the_log_once(tmp_path):
    async with (
        aggregator_process(tmp_path, "--min-workers", 1) as (_, running),
        worker_process(running, tmp_path, "pi-1", tmp_path / "data", task="Raises") as worker,
    ):
        line = await worker.until("the learning task raised")
        assert line["level"] == "error"
        assert 'raise RuntimeError("no camera")' in line["exception"]
        assert "RuntimeError: no camera" in (await worker.until("task failed"))["reason"]
