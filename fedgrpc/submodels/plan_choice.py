"""Choice of a device's plan: the most capable one whose predicted cost fits it.

The rule: the first plan that fits is taken, and the reason says what kept a larger one out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedgrpc.submodels.cost import DeviceLimits, Observation, Prediction, predict
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_size import PlanSize
from fedgrpc.submodels.plan_table import PlanTable

# An update with more noise than this, as `noise_ratio`, has less than a tenth of its weight: it adds nothing.
USELESS_RATIO = 9.0
# So many tasks show it. A history forgets them after its length of other tasks; then the plan is tried again.
_USELESS_TASKS = 3


@dataclass(frozen=True)
class PlanChoice:
    """Plan that a device gets, its predicted cost, and the reason for the choice."""

    plan: LocalModelPlan
    prediction: Prediction
    reason: str


def choose(
    plans: Sequence[LocalModelPlan],
    size_of: Callable[[LocalModelPlan], PlanSize],
    device: DeviceLimits,
    history: Sequence[Observation],
    deadline_s: float,
    peers: Sequence[Observation] = (),
) -> PlanChoice:
    """Choose the first of `plans`, most capable first, that fits memory and deadline; else the last one."""
    if not plans:
        raise ValueError("there is no plan to choose from")
    why = ""
    for plan in plans:
        prediction = predict(device, history, size_of(plan), peers)
        unfit = misfit(device, prediction, deadline_s)
        if not unfit:
            return PlanChoice(plan, prediction, why or "the most capable plan fits")
        why = f"a larger one {unfit}"
    return PlanChoice(plans[-1], prediction, f"none fits: the smallest {unfit}")


def choose_of(
    table: PlanTable,
    device_class: str,
    size_of: Callable[[LocalModelPlan], PlanSize],
    device: DeviceLimits,
    history: Sequence[Observation],
    deadline_s: float,
    peers: Sequence[Observation] = (),
) -> PlanChoice:
    """Choose from the table: the plan of the device's class, else the best automatic plan, else the default.

    A plan whose number format has added nothing is left out of the automatic ones. In place of a device's only
    plan comes the same one in float32, which takes no more memory than an emulated format does.
    """
    if table.automatic and device_class not in table.classes:
        ladder = [plan for plan in table.automatic if not adds_nothing(plan, history)]
        if len(ladder) == len(table.automatic):
            return choose(ladder, size_of, device, history, deadline_s, peers)
        choice = choose(ladder or [_exact(table.automatic[-1])], size_of, device, history, deadline_s, peers)
        return replace(choice, reason=f"{choice.reason}; another plan's number format adds nothing")
    plan = table.plan_of(device_class)
    pinned = device_class in table.classes
    reason = f"the plan of {device_class}" if pinned else "the plan of every device without one of its own"
    if plan.arithmetic is not None and adds_nothing(plan, history):
        reason = f"{reason}, in float32: its {plan.arithmetic.format} adds nothing"
        plan = _exact(plan)
    return PlanChoice(plan, predict(device, history, size_of(plan), peers), reason)


def adds_nothing(plan: LocalModelPlan, history: Sequence[Observation]) -> bool:
    """Return whether the tasks of this plan show that its number format leaves nothing of the update."""
    ratios = [seen.noise_ratio for seen in history if seen.plan == plan]
    return len(ratios) >= _USELESS_TASKS and statistics.median(ratios) > USELESS_RATIO


def _exact(plan: LocalModelPlan) -> LocalModelPlan:
    return replace(plan, arithmetic=None)


def misfit(device: DeviceLimits, prediction: Prediction, deadline_s: float) -> str:
    """Say why the plan's cost exceeds the device's memory or the deadline; "" if it fits."""
    if prediction.too_large:
        return "is no smaller than one that was killed on this device"
    if device.memory_bytes and prediction.peak_memory_bytes > device.memory_bytes:
        return f"takes {prediction.peak_memory_bytes >> 20} MiB of {device.memory_bytes >> 20}"
    if prediction.total_s > deadline_s:
        return f"takes {prediction.total_s:.1f} s of {deadline_s:g}"
    return ""
