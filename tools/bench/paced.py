"""Learning tasks on a device that trains a given number of examples in a second, whatever else its processor does.

For comparisons of real processes with a simulation: a described speed is then the truth, on a loaded machine too.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

from fedgrpc.tasks.digits import Digits
from fedgrpc.tasks.fashion_mnist import FashionMnist
from fedgrpc.torch.task import TorchTask

SCORED_FASTER: Final = 3.0


class Paced(TorchTask):
    """A task of which a batch does not end before it and those before it have taken their time.

    `pace`: examples that it trains on in a second; three times as many are scored.
    """

    pace: float

    def data_version(self, path: Path | None) -> object:
        """Begin a task: what was due before counts no more."""
        self._due_at = time.monotonic()
        return super().data_version(path)

    def forward(self, model: Any, inputs: Any) -> Any:
        """Return the outputs once the batch has taken its time."""
        pace = self.pace * (1.0 if model.training else SCORED_FASTER)
        self._due_at += len(inputs) / pace
        outputs = super().forward(model, inputs)
        time.sleep(max(0.0, self._due_at - time.monotonic()))
        return outputs


class PacedDigits(Paced, Digits):
    """Digits at a pace."""

    def __init__(self, model: str = "mlp", pace: float = 100.0) -> None:
        super().__init__(model)
        self.pace = pace


class PacedFashionMnist(Paced, FashionMnist):
    """Fashion-MNIST at a pace."""

    def __init__(self, model: str = "mlp", pace: float = 100.0) -> None:
        super().__init__(model)
        self.pace = pace
