"""Cost of a plan's techniques beside its width: factors on time and activations, and bytes of each weight.

The rule: a factor stands in only until the plan itself was measured on the device, or on one of its class. Factors
are medians of `python -m tools.bench.techniques` over LeNet, ResNet-18 and MobileNetV2 on an x86 CPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedgrpc.submodels.plan import SHORT_FORMATS, LocalModelPlan

# Time of a step against the same step without the technique.
_PRUNED, _CLUSTERED, _QUANTIZED, _EMULATED = 1.05, 1.15, 1.5, 12.0
# Of an emulated step, where it rounds every partial sum: `python -m tools.bench.accumulate`.
_IN_FORMAT = 50.0
_SHORT, _SHORT_STEP, _CHECKPOINTED = 1.2, 1.2, 1.3
# Of each further part of a batch.
_MICRO_BATCH = 0.1
# Activations against those of float32. Quantized weights are kept three more times.
_QUANTIZED_ACTIVATIONS, _CHECKPOINTED_ACTIVATIONS, _QUANTIZED_COPIES = 1.1, 0.25, 3
_SIZES = re.compile(r"e(\d+)s(\d+)|fixed(\d+)\.-?\d+")
_LONG_CARRIERS = ("float64", "float32", "float24")


@dataclass(frozen=True)
class TechniqueCost:
    """Factor on the time of a step, bytes of weights and training state per weight, and factor on activations.

    The state is gradients, and what the optimizer keeps.
    """

    time: float = 1.0
    state_bytes: float = 12.0
    activations: float = 1.0


PLAIN = TechniqueCost()


def technique_cost(plan: LocalModelPlan, trained: float = 1.0) -> TechniqueCost:
    """Return the cost of a plan that trains the share `trained` of its weights."""
    element = _element_bytes(plan)
    momentum = plan.memory is None or plan.memory.momentum
    time, activations = 1.0, element / 4
    optimizer = element * momentum
    if plan.pruning is not None:
        time *= _PRUNED
    if plan.clustering is not None:
        time *= _CLUSTERED
    if plan.quantization is not None:
        time *= _QUANTIZED
        activations *= _QUANTIZED_ACTIVATIONS
    if plan.emulated:
        time *= _EMULATED
        if plan.arithmetic is not None and plan.arithmetic.accumulate == "format":
            time *= _IN_FORMAT
    elif element == 2:
        time *= _SHORT
        asked = plan.arithmetic
        if asked is not None and (asked.float32_copy or asked.rounding == "stochastic"):
            time *= _SHORT_STEP
            optimizer = 4 * momentum + 4 * asked.float32_copy
    if plan.memory is not None and plan.memory.checkpoint:
        time *= _CHECKPOINTED
        activations *= _CHECKPOINTED_ACTIVATIONS
    if plan.memory is not None and plan.memory.micro_batches > 1:
        time *= 1 + _MICRO_BATCH * (plan.memory.micro_batches - 1)
        activations /= plan.memory.micro_batches
    copies = 0
    if plan.quantization is not None and plan.quantization.weight_bits:
        copies = _QUANTIZED_COPIES * element
    return TechniqueCost(time, element + copies + trained * (element + optimizer), activations)


def carrier_bytes(name: str) -> int:
    """Return the bytes of a number of an emulated format: 4 where float32 holds its products, else 8."""
    if found := _SIZES.fullmatch(name):
        exponent, significand, fixed = (None if each is None else int(each) for each in found.groups())
        if fixed is not None:
            return 4 if fixed <= 12 else 8
        assert exponent is not None
        assert significand is not None
        return 4 if 2 * significand + 2 <= 24 and exponent <= 8 else 8
    return 8 if name in _LONG_CARRIERS else 4


def _element_bytes(plan: LocalModelPlan) -> int:
    if plan.arithmetic is None:
        return 4
    name = plan.arithmetic.format
    if plan.emulated:
        return carrier_bytes(name)
    return 2 if name in SHORT_FORMATS else 8 if name == "float64" else 4


def saves_nothing(plan: LocalModelPlan) -> str:
    """Say which of a plan's techniques save neither memory nor time on a device; "" if none."""
    used = {
        "an emulated number format": plan.emulated,
        "pruning of single weights": plan.pruning is not None,
        "clustering": plan.clustering is not None,
        "quantization": plan.quantization is not None,
    }
    named = [name for name, present in used.items() if present]
    if not named:
        return ""
    bytes_too = (plan.emulated and len(named) == 1) or named == ["quantization"]
    what = "memory, time nor bytes" if bytes_too else "memory nor time"
    return f"{' and '.join(named)} {'saves' if len(named) == 1 else 'save'} neither {what} on a device"
