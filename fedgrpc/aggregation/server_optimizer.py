"""Server optimizers, which step along the mean update: FedAvg and the adaptive ones of FedOpt (arXiv 2003.00295).

An optimizer sees one tensor at a time, or a piece of one, since every coordinate is independent. Its state for a
tensor is a tuple of arrays of that tensor's shape. The caller stores it with the model version, so a restart loses
nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Protocol

import numpy as np

from fedgrpc.errors import UsageError
from fedgrpc.plugins import make

OptimizerState = tuple[np.ndarray, ...]


class ServerOptimizer(Protocol):
    """`step(w, delta, state) -> (new w, new state)`; `state` starts as `state_count` arrays of zeros.

    Every optimizer is a dataclass with a field `learning_rate`, which scales its steps.
    """

    state_count: ClassVar[int]

    def step(
        self, weights: np.ndarray, delta: np.ndarray, state: OptimizerState
    ) -> tuple[np.ndarray, OptimizerState]:
        """Step along the mean update `delta` (float64, of the shape of `weights`). Inputs stay unchanged."""
        ...


@dataclass(frozen=True)
class PlainStep:
    """FedAvg: w + lr * delta (arXiv 1602.05629 with lr = 1)."""

    learning_rate: float = 1.0
    state_count: ClassVar[int] = 0

    def step(
        self, weights: np.ndarray, delta: np.ndarray, state: OptimizerState
    ) -> tuple[np.ndarray, OptimizerState]:
        return weights + self.learning_rate * delta, ()


@dataclass(frozen=True)
class FedAvgM:
    """v = beta * v + delta;  w + lr * v (arXiv 1909.06335)."""

    learning_rate: float = 1.0
    momentum: float = 0.9
    state_count: ClassVar[int] = 1

    def step(
        self, weights: np.ndarray, delta: np.ndarray, state: OptimizerState
    ) -> tuple[np.ndarray, OptimizerState]:
        velocity = self.momentum * state[0] + delta
        return weights + self.learning_rate * velocity, (velocity,)


@dataclass(frozen=True)
class _Adaptive:
    """m = b1 * m + (1 - b1) * delta;  w + lr * m / (sqrt(v) + tau); each subclass defines v."""

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    # The paper's degree of adaptivity: bounds the step of coordinates that hardly move.
    tau: float = 1e-3
    state_count: ClassVar[int] = 2

    def _second(self, v: np.ndarray, square: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def step(
        self, weights: np.ndarray, delta: np.ndarray, state: OptimizerState
    ) -> tuple[np.ndarray, OptimizerState]:
        m = self.beta1 * state[0] + (1 - self.beta1) * delta
        v = self._second(state[1], np.square(delta))
        return weights + self.learning_rate * m / (np.sqrt(v) + self.tau), (m, v)


@dataclass(frozen=True)
class FedAdagrad(_Adaptive):
    """v = v + delta^2, without momentum by default (arXiv 2003.00295, algorithm 2)."""

    beta1: float = 0.0

    def _second(self, v: np.ndarray, square: np.ndarray) -> np.ndarray:
        return np.asarray(v + square)


@dataclass(frozen=True)
class FedYogi(_Adaptive):
    """v = v - (1 - b2) * delta^2 * sign(v - delta^2) (arXiv 2003.00295, algorithm 2)."""

    def _second(self, v: np.ndarray, square: np.ndarray) -> np.ndarray:
        return np.asarray(v - (1 - self.beta2) * square * np.sign(v - square))


@dataclass(frozen=True)
class FedAdam(_Adaptive):
    """v = b2 * v + (1 - b2) * delta^2 (arXiv 2003.00295, algorithm 2)."""

    def _second(self, v: np.ndarray, square: np.ndarray) -> np.ndarray:
        return np.asarray(self.beta2 * v + (1 - self.beta2) * square)


OPTIMIZERS: Final[dict[str, type]] = {
    "fedavg": PlainStep,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedyogi": FedYogi,
    "fedadam": FedAdam,
}


def server_optimizer(text: str, learning_rate: float | None = None) -> ServerOptimizer:
    """Return the optimizer of a text such as `fedadam:beta1=0.8`, with this learning rate if there is one.

    Raises `UsageError` for an unknown name, a class that is no optimizer, or a learning rate <= 0.
    """
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise UsageError(f"the server's learning rate must be positive and finite, not {learning_rate:g}")
    made = make("server optimizer", text, OPTIMIZERS)
    if not callable(getattr(made, "step", None)) or not isinstance(getattr(made, "state_count", None), int):
        raise UsageError(f"server optimizer {text}: the class has no step() or no state_count")
    if not hasattr(made, "learning_rate"):
        raise UsageError(f"server optimizer {text}: the class has no field learning_rate")
    optimizer: ServerOptimizer = made if learning_rate is None else replace(made, learning_rate=learning_rate)
    return optimizer
