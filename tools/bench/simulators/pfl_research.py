"""The workload in pfl-research's `SimulatedBackend`. Run as a script: ROUNDS.

Its Python has pfl and torch.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch.nn import functional
from workload import BATCH, CLIENTS, COHORT, EXAMPLES, LEARNING_RATE, MOMENTUM, LeNet, tell, training_data


class Module(LeNet):
    """LeNet with what pfl wants of a module."""

    def loss(self, inputs: Any, targets: Any, eval: bool = False) -> Any:
        """Return the mean loss of a batch."""
        return functional.cross_entropy(self(inputs.float().div_(255)), targets)

    def metrics(self, inputs: Any, targets: Any, eval: bool = True) -> dict[str, Any]:
        """Return the loss with its weight."""
        return {"loss": Weighted(self.loss(inputs, targets).item() * len(targets), len(targets))}


class Told(TrainingProcessCallback):
    """Says when a round is over."""

    def after_central_iteration(
        self, aggregate_metrics: Any, model: Any, *, central_iteration: int
    ) -> tuple[bool, Any]:
        """See pfl. False: go on."""
        tell(COHORT)
        return False, Metrics()


def main(rounds: int) -> None:
    """Play that many rounds."""
    torch.set_num_threads(1)
    inputs, targets = training_data()

    def dataset_of(user: int) -> PyTorchTensorDataset:
        share = slice(user * EXAMPLES, (user + 1) * EXAMPLES)
        return PyTorchTensorDataset((inputs[share], targets[share]))

    sampler = get_user_sampler("random", list(range(CLIENTS)))
    module = Module()
    model = PyTorchModel(
        module,
        lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=MOMENTUM),
        torch.optim.SGD(module.parameters(), 1.0),
    )
    data = FederatedDataset(dataset_of, sampler)
    FederatedAveraging().run(
        # Metrics of the first round alone, which does not count.
        NNAlgorithmParams(rounds, rounds + 1, COHORT, 0),
        SimulatedBackend(data, data),
        model,
        NNTrainHyperParams(local_batch_size=BATCH, local_num_epochs=1, local_learning_rate=LEARNING_RATE),
        NNEvalHyperParams(local_batch_size=BATCH),
        [Told()],
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
