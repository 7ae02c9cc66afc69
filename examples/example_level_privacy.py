"""Example-level privacy on a device with Opacus: its update protects its single examples, from the aggregator too.

fedgrpc worker --aggregator HOST:PORT --name pi-1 --task example_level_privacy --task-option epsilon=4
pip install opacus

DP-SGD (arXiv 1607.00133): the gradient of each example is clipped, noise is added to their sum, and batches
are Poisson samples. What all rounds have cost is kept in memory and told as the metric `epsilon`. A device that
restarts counts from zero again, so keep it in a file where that matters. This is beside `--privacy` of the
aggregator, which protects whole devices from whoever sees versions.
"""

from __future__ import annotations

import torch
from opacus import PrivacyEngine
from opacus.accountants import RDPAccountant
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fedgrpc.datasets.digits import load_digits
from fedgrpc.errors import TaskError
from fedgrpc.trainer import EvalResult, TrainJob, TrainResult, Weights


class PrivateDigits:
    def __init__(
        self, epsilon: float = 4.0, delta: float = 1e-3, noise: float = 1.0, longest: float = 1.0
    ) -> None:
        self._epsilon, self._delta, self._noise, self._longest = epsilon, delta, noise, longest
        digits = load_digits()
        self._train = TensorDataset(*_tensors(digits.train))
        self._held_out = _tensors(digits.held_out)
        self._spent = RDPAccountant()

    def initial_weights(self) -> Weights:
        return {name: array.numpy() for name, array in _model().state_dict().items()}

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        spent = self._told()
        if spent >= self._epsilon:
            raise TaskError(f"this device's examples have cost an epsilon of {spent:.3g}, and it allows no more")
        model = _model()
        model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
        engine = PrivacyEngine()
        # One accountant for all rounds: they add up.
        engine.accountant = self._spent
        private, optimizer, batches = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), job.learning_rate or 0.1),
            data_loader=DataLoader(self._train, batch_size=job.batch_size or 32),
            noise_multiplier=self._noise,
            max_grad_norm=self._longest,
        )
        steps = 0
        for inputs, labels in batches:
            # Poisson samples may be empty: such a step is noise alone.
            optimizer.zero_grad()
            functional.cross_entropy(private(inputs), labels, reduction="sum").div(max(1, len(labels))).backward()
            optimizer.step()
            steps += 1
        trained = {name: array.numpy() for name, array in model.state_dict().items()}
        return TrainResult(trained, len(self._train), steps, {"epsilon": self._told()})

    def evaluate(self, weights: Weights) -> EvalResult:
        model, (inputs, labels) = _model(), self._held_out
        model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
        with torch.no_grad():
            accuracy = float((model(inputs).argmax(1) == labels).float().mean())
        return EvalResult(len(labels), {"accuracy": accuracy})

    def _told(self) -> float:
        return self._spent.get_epsilon(self._delta) if self._spent.history else 0.0


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def _tensors(examples):
    inputs = torch.tensor(examples.inputs.reshape(-1, 64) / 16.0, dtype=torch.float32)
    return inputs, torch.tensor(examples.labels)
