"""Steps of training: an algorithm's term, loss scaling, and SGD with momentum as `torch.optim.SGD`.

Constructing any `torch.optim.Optimizer` imports torch._dynamo: a second and 70 MB on a fast machine, which a
small device would pay for nothing. The functional form beneath the class does not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from fedgrpc.algorithms.algorithm import Term
from fedgrpc.errors import UsageError
from fedgrpc.torch.local_model.loss_scale import LossScale
from fedgrpc.torch.weights import tensor_like

_FUSED = (torch.float32, torch.float64)


class Optimizer(Protocol):
    """Optimizer as training uses it. Every `torch.optim.Optimizer` is one."""

    def step(self) -> Any:
        """Change the parameters according to their `grad`."""
        ...


class MomentumSgd:
    """v = momentum v + (grad + weight_decay w), w = w - learning_rate v; v starts as the first gradient."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], learning_rate: float, momentum: float, weight_decay: float
    ) -> None:
        self._parameters = list(parameters)
        self._velocities: list[Tensor | None] = [None] * len(self._parameters)
        self._learning_rate = learning_rate
        self._momentum = momentum
        self._weight_decay = weight_decay
        self.rate_factor = 1.0

    @property
    def state(self) -> list[Tensor]:
        """The velocities, which are kept between steps."""
        return [velocity for velocity in self._velocities if velocity is not None]

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Expect gradients that are `factor` times as large from now on, for the same steps."""
        self._learning_rate /= factor
        self._weight_decay *= factor
        for velocity in self._velocities:
            if velocity is not None:
                velocity.mul_(factor)

    @torch.no_grad()
    def step(self) -> None:
        """Take a step. A parameter without a gradient stays as it is."""
        places = [place for place, parameter in enumerate(self._parameters) if parameter.grad is not None]
        parameters = [self._parameters[place] for place in places]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        velocities = [self._velocities[place] for place in places]
        sparse = any(gradient.is_sparse for gradient in gradients)
        # On a CPU, torch's fused step silently skips the first step of 16-bit parameters.
        fused = not sparse and all(parameter.dtype in _FUSED for parameter in parameters)
        sgd(
            list(parameters),
            gradients,
            velocities,
            has_sparse_grad=sparse,
            foreach=False,
            fused=fused,
            weight_decay=self._weight_decay,
            momentum=self._momentum,
            lr=self._learning_rate * self.rate_factor,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        for place, velocity in zip(places, velocities, strict=True):
            self._velocities[place] = velocity


def set_rate_factor(optimizer: Any, factor: float) -> None:
    """Set the learning rate to `factor` times what the optimizer was made with.

    Raises:
        UsageError: the optimizer is neither `MomentumSgd` nor one of `torch.optim`.
    """
    if isinstance(optimizer, MomentumSgd):
        optimizer.rate_factor = factor
        return
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        raise UsageError(f"schedule() needs an optimizer of torch.optim, not {type(optimizer).__name__}")
    for group in groups:
        group["lr"] = group.setdefault("given_lr", group["lr"]) * factor


def in_round(optimizer: Any, scheduler: Any, round: int) -> Any:
    """Return `optimizer` with the rate that a scheduler of `torch.optim.lr_scheduler` has in a round, from 1.

    The scheduler counts rounds. Nothing of it is kept, so devices that missed rounds have the same rate.
    """
    with warnings.catch_warnings():
        # No step of the optimizer comes before those of the scheduler.
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(1, round):
            scheduler.step()
    return optimizer


class AddedTerm:
    """A term in the gradients of named parameters: g + offset + mu (w - anchor) (`fedgrpc.algorithms`).

    Anchors and offsets are copied to the parameters' device once. Raises `LayoutError` for one of another shape,
    as with a narrower model.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], term: Term) -> None:
        self._mu = term.mu
        self._parts = [
            (
                parameter,
                _like(name, term.offset.get(name), parameter),
                self._anchor(name, parameter, term) if term.mu else None,
            )
            for name, parameter in parameters.items()
            if term.is_trained(name)
        ]
        self._left_out = [each for name, each in parameters.items() if not term.is_trained(name)]

    @staticmethod
    def _anchor(name: str, parameter: nn.Parameter, term: Term) -> Tensor:
        found = None if term.anchor is None else _like(name, term.anchor[name], parameter)
        return parameter.detach().clone() if found is None else found

    def add(self, scale: float = 1.0) -> None:
        """Add the term to gradients that are `scale` times their size. What is not trained loses its gradient."""
        for parameter, offset, anchor in self._parts:
            if parameter.grad is None:
                continue
            if offset is not None:
                parameter.grad.add_(offset, alpha=scale)
            if anchor is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=self._mu * scale)
        for parameter in self._left_out:
            parameter.grad = None


def _like(name: str, array: np.ndarray | None, parameter: nn.Parameter) -> Tensor | None:
    if array is None:
        return None
    return tensor_like(name, np.array(array), parameter, tuple(parameter.shape)).to(parameter)


class TrainingStep:
    """Backward passes and step of one batch, with an algorithm's term and a scaled loss.

    Raises:
        UsageError: the optimizer cannot be rescaled for `scaling`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: Optimizer,
        term: AddedTerm | None,
        scaling: LossScale | None,
    ) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._term = term
        self._scaling = scaling
        self._scaled = None if scaling is None else scaling.prepare(optimizer)

    def clear(self) -> None:
        """Drop the gradients of the last step, before a forward pass needs their memory."""
        for parameter in self._parameters:
            parameter.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to those of the batch's other parts."""
        if self._scaling is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._scaling.backward(loss)

    def take(self) -> None:
        """Take the step."""
        if self._scaling is None or self._scaled is None:
            if self._term is not None:
                self._term.add()
            self._optimizer.step()
        else:
            # Gradients are scaled by now, so the term has to be, too.
            if self._term is not None:
                self._term.add(self._scaling.scale)
            self._scaling.step(self._scaled, self._parameters)
