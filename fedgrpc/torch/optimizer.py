"""SGD with momentum, step for step `torch.optim.SGD`, without the cost of importing its class.

Constructing any `torch.optim.Optimizer` imports torch._dynamo: a second and 70 MB on a fast machine, which a
small device would pay for nothing. The functional form beneath the class does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

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
            lr=self._learning_rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        for place, velocity in zip(places, velocities, strict=True):
            self._velocities[place] = velocity
