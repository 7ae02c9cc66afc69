"""Interface of a federated algorithm: what a device trains and keeps, and what the aggregator makes of updates.

The device's half is a generator, which reads like the paper. It yields what has to be done with the learning task
and gets back what came of it:

    Pass     train from these weights, with a term in the gradient     ->  TrainResult, or what is like it
    Score    score these weights on the device's own data              ->  metrics by name

and it returns `Sent`: what travels, and what stays on the device for the next time.

The aggregator's half is two things: a factor on each update (`scales`), and optimizers that step along the mean
(`optimizers`). Both are pure, so a commit done again gives the same bits.

An algorithm may give each trained tensor companions: tensors of its shape that are part of the run's model. A
companion `NAME#control` travels, is encoded, owes its error, is averaged and stored as NAME itself.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Final, Protocol

import numpy as np

from fedgrpc.aggregation.server_optimizer import ServerOptimizer
from fedgrpc.training_plan import TrainingPlan

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Term:
    """A term that an algorithm adds to the gradient of every step:

        g + offset + mu (w - anchor)

    `anchor` None is the start of the training. Tensors without an offset have none. `trains` are globs of the
    tensors that are stepped on; the others stay as they are.
    """

    mu: float = 0.0
    offset: Weights = field(default_factory=dict)
    anchor: Weights | None = None
    trains: tuple[str, ...] = ("*",)

    @property
    def is_nothing(self) -> bool:
        """True if training with it is training without it."""
        return not self.mu and not self.offset and self.trains == ("*",)

    def is_trained(self, name: str) -> bool:
        """Return whether the tensor of this name is stepped on."""
        return any(fnmatchcase(name, pattern) for pattern in self.trains)

    def gradient(self, name: str, gradient: np.ndarray, weights: np.ndarray, start: Weights) -> np.ndarray:
        """Return the gradient to step along, for trainers in NumPy; `start` is where the training began."""
        if not self.is_trained(name):
            return np.zeros_like(gradient)
        if name in self.offset:
            gradient = gradient + self.offset[name]
        if self.mu:
            gradient = gradient + self.mu * (weights - (start if self.anchor is None else self.anchor)[name])
        return gradient


NO_TERM: Final = Term()


@dataclass(frozen=True)
class Pass:
    """One training of the learning task from `start`, for a share of the plan's epochs and steps."""

    start: Weights
    term: Term = NO_TERM
    share: float = 1.0


@dataclass(frozen=True)
class Score:
    """Scores of these weights on the device's own held-out examples; empty without any."""

    weights: Weights


class Trained(Protocol):
    """The result of a `Pass` as algorithms see it; `fedgrpc.trainer.TrainResult` is one."""

    @property
    def weights(self) -> Weights: ...
    @property
    def steps(self) -> int: ...


@dataclass(frozen=True)
class Received:
    """Tensors that a device starts from: the version's weights, its companions by suffix, and those that it kept.

    All may be read on access, each time anew. None of them is changed.
    """

    model: Weights
    companions: Mapping[str, Weights] = field(default_factory=dict)
    kept: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class Sent:
    """Result of a device's half.

    `result` is the training that the update stands for: its examples, steps and metrics. `weights` and
    `companions` (by suffix) are the new values, of which the difference to those received travels; companions that
    are left out stay. `kept` replaces what the device kept once the update has been acknowledged; None: it stays.
    """

    result: Any
    weights: Weights
    companions: Mapping[str, Weights] = field(default_factory=dict)
    kept: Weights | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Counted:
    """An accepted update as the aggregator's half sees it: its weight, norm, and the loss its device reported.

    `norm` and `loss` are None where the algorithm asked for none, or the device reported none.
    """

    weight: float
    norm: float | None = None
    loss: float | None = None


Local = Generator[Pass | Score, Any, Sent]


class Algorithm(Protocol):
    """A federated algorithm: a frozen dataclass, whose fields are its options on the command line.

    `companions` are the suffixes of companion tensors. `uses_norms` and `uses_losses`: `scales` needs these of
    every update. `keeps`: the device keeps something between its tasks. `normalizes`: updates count by their
    steps (FedNova). `mu`: proximal coefficient of every step.
    """

    uses_norms: ClassVar[bool]
    uses_losses: ClassVar[bool]
    keeps: ClassVar[bool]
    normalizes: ClassVar[bool]

    @property
    def companions(self) -> tuple[str, ...]: ...
    @property
    def mu(self) -> float: ...

    def check(self, plan: TrainingPlan) -> None:
        """Raise `UsageError` for a training plan that the algorithm cannot work with."""
        ...

    def first_companion(self, suffix: str, name: str, weights: np.ndarray) -> np.ndarray:
        """Return what a companion of the tensor `name` starts as."""
        ...

    def local(self, received: Received, plan: TrainingPlan) -> Local:
        """Carry out a device's half of a round."""
        ...

    def personal(self, received: Received) -> Weights:
        """Return the weights that the device would use for itself, which scores are of."""
        ...

    def scales(self, updates: Sequence[Counted], plan: TrainingPlan) -> list[float]:
        """Return a factor on the differences of each update, before the weighted mean is taken."""
        ...

    def mixing(self, staleness: int) -> float | None:
        """Return the share of a worker's model in the new version, where models are mixed as FedAsync does.

        None: differences are added to the version. `staleness` counts the versions since the worker got its model.
        """
        ...

    def optimizers(self, inner: ServerOptimizer, workers: int) -> Mapping[str, ServerOptimizer]:
        """Return the optimizer of the model's tensors, by "", and those of companions, by suffix.

        `inner` is the operator's, and `workers` counts the devices whose updates are in the mean.
        """
        ...
