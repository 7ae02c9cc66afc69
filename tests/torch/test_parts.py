"""Trainers of parts of data that is read once."""

from __future__ import annotations

import numpy as np
import pytest

from fedgrpc.errors import UsageError
from fedgrpc.trainer import TrainJob, for_part
from fedgrpc.worker.task_loader import load_trainer

TASK = "fedgrpc.tasks.digits"


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.5"])
def test_a_part_trains_and_scores_as_a_worker_with_that_part(partition: str) -> None:
    whole = load_trainer(TASK, device="cpu")
    own = load_trainer(TASK, device="cpu", partition=partition, part="2/5")
    part = for_part(whole, partition, "2/5")
    assert part is not None
    weights = whole.initial_weights()
    trained = [each.train({n: a.copy() for n, a in weights.items()}, TrainJob(seed=3)) for each in (own, part)]
    assert trained[0].example_count == trained[1].example_count < 1442
    assert all(np.array_equal(a, trained[1].weights[name]) for name, a in trained[0].weights.items())
    assert own.evaluate(weights) == part.evaluate(weights)
    # The trainer of all data is what it was.
    assert whole.train(weights, TrainJob(max_steps=1)).example_count == 1442


def test_a_part_that_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="part"):
        for_part(load_trainer(TASK, device="cpu"), "iid", "6/5")
