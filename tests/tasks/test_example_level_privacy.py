"""The example of DP-SGD on a device, with Opacus."""

import sys

import pytest

from fedgrpc.errors import TaskError
from fedgrpc.trainer import TrainJob
from tests.support.command_line import EXAMPLES

pytestmark = pytest.mark.extras
pytest.importorskip("opacus", reason="needs opacus: pip install 'fedgrpc[opacus]'")


def test_a_device_adds_up_what_its_examples_have_cost_and_stops_in_time(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    from example_level_privacy import PrivateDigits

    trainer = PrivateDigits(epsilon=1.5)
    weights, told = trainer.initial_weights(), []
    for _ in range(2):
        result = trainer.train(weights, TrainJob(learning_rate=0.5, batch_size=64))
        weights = result.weights
        told.append(result.metrics["epsilon"])
    assert 0 < told[0] < 1.5 <= told[1]
    assert trainer.evaluate(weights).metrics["accuracy"] > 0.4
    with pytest.raises(TaskError, match="allows no more"):
        trainer.train(weights, TrainJob())
