"""Cost of a training step by the layers of a model, and the share of it that a plan takes.

A step of a layer takes

    t = MACs + 6 * kept bytes + 2.5 million        in multiply-adds (MACs)

of which a third is its forward pass, a third goes back through it, and a third is the gradient of its weights. The
other two terms are what memory and Python take: fitted to whole, half and quarter LeNet, MobileNetV2 and ResNet-18
on an x86 CPU, and rounded (docs/measurements/heterogeneity.md). MACs go with the layer's weights, and activations
with its outputs. Layers count as if they ran one after the other: gradients go back to the first trained one.

The rule: only ratios of costs count, so a worker that tells all of them too large changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedgrpc.errors import LayoutError

# Share of a step's time that does not shrink with the model, where its layers are not known.
UNSHRINKABLE_SHARE = 0.2
_PASS = 1 / 3
_WORK_OF_A_BYTE, _WORK_OF_A_LAYER = 6.0, 2.5e6
_LEAST = 1e-12
_MOST = 2.0**80

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LayerCost:
    """Cost of the layer with the weight `name` for a batch: multiply-adds forward, and bytes that it keeps.

    `kept_bytes` are of what is computed from its outputs before the next layer, `input_bytes` of its inputs, and
    `shared_bytes` of inputs that earlier layers keep, too.
    """

    name: str
    work: float
    kept_bytes: float
    input_bytes: float = 0.0
    shared_bytes: float = 0.0


@dataclass(frozen=True)
class StepShares:
    """Shares of the whole model's training step: of its time, and of the activations that it keeps."""

    time: float
    kept: float

    @classmethod
    def of_weights(cls, share: float, trained: float = 1.0, reached: float = 1.0) -> StepShares:
        """Estimate them where layers are not known, for a plan with this share of the weights.

        It trains the share `trained` of its own weights, and gradients go back through the share `reached`.
        """
        time = (UNSHRINKABLE_SHARE + (1 - UNSHRINKABLE_SHARE) * share) * _PASS * (1 + reached + trained)
        return cls(time, max(math.sqrt(share) * reached, _LEAST))


def check_costs(costs: Sequence[LayerCost], shapes: Shapes) -> None:
    """Check costs from the wire against a model of these shapes. Raises LayoutError."""
    if len({cost.name for cost in costs}) < len(costs):
        raise LayoutError("a layer's cost is told twice")
    for cost in costs:
        told = (cost.work, cost.kept_bytes, cost.input_bytes, cost.shared_bytes)
        if cost.name not in shapes or not all(0 <= each <= _MOST for each in told):
            raise LayoutError(f"the model has no tensor {cost.name!r} of such cost")


def step_shares(
    costs: Sequence[LayerCost], whole: Shapes, shapes: Shapes, is_trained: Callable[[str], bool]
) -> StepShares:
    """Return the shares of a sub-model with these `shapes`; `costs` are the whole model's, as its layers run."""
    time = kept = 0.0
    # Whether gradients come to this layer, and whether they came to an earlier one, biases aside.
    reached = passed = False
    for cost in costs:
        if cost.name not in shapes:
            continue
        own, full = shapes[cost.name], whole[cost.name]
        share, outputs = _ratio(own, full), _ratio(own[:1], full[:1])
        trained = is_trained(cost.name)
        # A depthwise convolution has as many inputs as outputs.
        inputs = share / outputs if len(full) > 1 and full[1] > 1 else outputs
        inputs_bytes, outputs_bytes = cost.input_bytes * inputs, cost.kept_bytes * outputs
        reached = reached or trained
        if reached and not passed:
            kept += cost.shared_bytes * inputs
        passed = passed or (reached and cost.kept_bytes + cost.work > 0)
        time += _step(cost.work * share, inputs_bytes + outputs_bytes) * _PASS * (1 + reached + trained)
        kept += (inputs_bytes + outputs_bytes) * reached
    whole_time = sum(_step(cost.work, cost.kept_bytes + cost.input_bytes) for cost in costs)
    whole_kept = sum(cost.kept_bytes + cost.input_bytes for cost in costs)
    return StepShares(max(time / whole_time, _LEAST), max(kept / max(whole_kept, _LEAST), _LEAST))


def _ratio(own: tuple[int, ...], full: tuple[int, ...]) -> float:
    return max(1, math.prod(own)) / max(1, math.prod(full))


def _step(work: float, kept_bytes: float) -> float:
    return work + _WORK_OF_A_BYTE * kept_bytes + _WORK_OF_A_LAYER
