"""Loss scaling: keeps gradients that a small number format would round to zero (arXiv 1710.03740).

The backward pass starts from the scale instead of from 1. So every gradient and velocity is that many times as
large, and the learning rate is that many times as small. A power of two changes no significand. There is no copy
of the weights in a wider format, so a step too small for a weight is still lost.

A dynamic scale halves when a gradient overflows, and that step is left out. It doubles after `GROWTH_STEPS` steps
without an overflow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fedgrpc.errors import UsageError
from fedgrpc.submodels.plan import Arithmetic
from fedgrpc.torch.local_model.formats import FixedFormat, NumberFormat

GROWTH_STEPS: Final = 2000
_FIRST: Final = 2.0**16


@runtime_checkable
class Rescalable(Protocol):
    """Optimizer that can take its steps from scaled gradients."""

    def step(self) -> Any:
        """Change the parameters according to their `grad`."""
        ...

    def rescale(self, factor: float) -> None:
        """Expect gradients that are `factor` times as large from now on, for the same steps."""
        ...


class LossScale:
    """Loss scale of one task's training, whose gradients are in `number_format`.

    Raises:
        UsageError: the format cannot hold the scale.
    """

    def __init__(self, arithmetic: Arithmetic, number_format: NumberFormat) -> None:
        self._most = 2.0 ** math.floor(math.log2(number_format.largest))
        self._dynamic = arithmetic.dynamic_loss_scale
        self._saturates_at = number_format.largest if isinstance(number_format, FixedFormat) else math.inf
        self._fitting = 0
        self.scale = arithmetic.loss_scale
        if self._dynamic and self.scale == 1:
            self.scale = max(1.0, min(_FIRST, self._most))
        if self.scale > max(1.0, self._most):
            raise UsageError(
                f"a loss scale of {self.scale:g} is more than {number_format} holds: {number_format.largest:g}"
            )

    def prepare(self, optimizer: object) -> Rescalable:
        """Rescale `optimizer`. Raises `UsageError` for one that cannot be rescaled."""
        if not isinstance(optimizer, Rescalable):
            raise UsageError(
                f"a loss scale goes with SGD, as TorchTask has it, not with {type(optimizer).__name__}"
            )
        optimizer.rescale(self.scale)
        return optimizer

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of the loss times the scale."""
        loss.backward(torch.full_like(loss, self.scale))  # type: ignore[no-untyped-call]

    def step(self, optimizer: Rescalable, parameters: Sequence[nn.Parameter]) -> None:
        """Take a step, or halve a dynamic scale that made a gradient overflow.

        With a scale of 1, an overflow is the training's own, and the step is taken.
        """
        if self._dynamic and self.scale > 1 and not self._fits(parameters):
            self._move(optimizer, 0.5)
            return
        optimizer.step()
        self._fitting += 1
        if self._dynamic and self._fitting >= GROWTH_STEPS and 2 * self.scale <= self._most:
            self._move(optimizer, 2.0)

    def _move(self, optimizer: Rescalable, factor: float) -> None:
        self.scale *= factor
        self._fitting = 0
        optimizer.rescale(factor)

    def _fits(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Return whether no gradient has overflowed or, in a format that saturates, reached the largest number."""
        with _disable_current_modes():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            return all(bool((gradient.abs() < self._saturates_at).all()) for gradient in gradients)
