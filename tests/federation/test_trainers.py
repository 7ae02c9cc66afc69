"""Trainers as people write them, with a real aggregator: in place, without effect, one of each example."""

import numpy as np
import pytest
from structlog.testing import capture_logs

from fedgrpc.cli.view import rounds_table
from fedgrpc.worker.trainer import EvalResult, TrainResult
from tests.federation.federation import MODEL, Shifter, aggregating, working

ONE = {"min_workers": 1}


class InPlace(Shifter):
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
    async with aggregating(tmp_path, policy=ONE, rounds=3, download_recipe=recipe, evaluate=True) as running:
        worker = working(running, tmp_path, "pi-1", InPlace())
        run = await running.until_finished()
        assert await worker == 0
        trained = running.weights(run.model_version)
        assert np.allclose(trained["w"], MODEL["w"] + 3, atol=0.01)
        assert trained["n"] == MODEL["n"] + 3
        assert not any(task.unchanged for round_ in await running.rounds() for task in round_.tasks)


class Idle(Shifter):
    """Trains a copy, and returns what it was given."""

    def train(self, weights, job):
        _ = {name: array + 1 for name, array in weights.items()}
        return TrainResult(weights, self.examples, 1)


async def test_training_that_changed_nothing_is_told_by_the_worker_the_aggregator_and_the_rounds_table(tmp_path):
    with capture_logs() as lines:
        async with aggregating(tmp_path, rounds=2) as running:
            workers = [working(running, tmp_path, "pi-1", Idle()), working(running, tmp_path, "pi-2", Shifter())]
            await running.until_finished()
            rounds = await running.rounds()
            assert [await worker for worker in workers] == [0, 0]
    for round_ in rounds:
        assert {task.worker: task.unchanged for task in round_.tasks} == {"pi-1": True, "pi-2": False}
    assert len([line for line in lines if line["event"] == "training changed nothing"]) == 4
    notes = list(rounds_table(rounds).columns[-1].cells)
    assert all("pi-1: training changed nothing" in note for note in notes)
