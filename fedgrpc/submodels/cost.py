"""Cost of a local-model plan on a device, predicted from measurements.

    T_local    = seconds of the whole model's step  *  the plan's share of it  *  factor of its techniques
    T_upload   = bytes(plan) / rate up,  T_download = bytes(plan) / rate down
    memory     = memory of the process without a model  +  what its first task loads  +  bytes of weights,
                 gradients, optimizer state and activations

The rule: a number is what this plan was measured to cost on this device, else on devices of its class. Only
without such measurements is it computed as above from those of other plans, or from the device's profile: by the
costs of the model's layers (`layer_cost`), where a worker has told them. A plan that its system has killed takes
more than the device's memory. Each prediction is later compared with what was measured (`errors_of`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedgrpc import claims
from fedgrpc.submodels.layer_cost import UNSHRINKABLE_SHARE, StepShares
from fedgrpc.submodels.plan import WHOLE_MODEL, LocalModelPlan
from fedgrpc.submodels.plan_size import ELEMENT_BYTES, PlanSize, state_bytes
from fedgrpc.submodels.technique_cost import PLAIN, TechniqueCost, technique_cost

# A process with PyTorch, where the device does not tell its own.
PROCESS_BYTES = 260 << 20
# Libraries and buffers of the first step, of the transfers and of encoding, as measured with a small model.
FIRST_TASK_BYTES = 32 << 20
# Building the untrained model and sending it: the model, and what is checked and encoded of it at a time.
FIRST_MODEL_COPIES = 2.0


@dataclass(frozen=True)
class DeviceLimits:
    """Memory and rates that a device's profile claims; 0 is unknown.

    `process_bytes` is what its worker takes without a model. `activation_bytes` are those of the whole model.
    """

    memory_bytes: int = 0
    uplink_bits_per_second: float = 0.0
    downlink_bits_per_second: float = 0.0
    process_bytes: int = 0
    activation_bytes: int = 0


@dataclass(frozen=True)
class Observation:
    """Measured cost of one task. `share` is that of the trained model, `tensor_bytes` are within the peak memory.

    `upload_bits` are bits per element of the update, pruned and clustered ones aside; 0 is unknown.
    `noise_ratio` is what the plan's number format did to the update (`fedgrpc.aggregation.noise`). `killed`: the
    system ended the device's process in this task, and nothing else was measured.
    """

    share: float
    weights_bytes: int
    download_s: float
    local_s: float
    upload_s: float
    download_bytes: int
    upload_bytes: int
    peak_memory_bytes: int = 0
    tensor_bytes: int = 0
    upload_bits: float = 0.0
    plan: LocalModelPlan | None = None
    technique: TechniqueCost = PLAIN
    noise_ratio: float = 0.0
    step: StepShares | None = None
    killed: bool = False

    @property
    def step_shares(self) -> StepShares:
        """See `PlanSize.step_shares`."""
        return self.step or StepShares.of_weights(max(self.share, 1e-12))

    @property
    def state_bytes(self) -> int:
        """See `PlanSize.state_bytes`."""
        return state_bytes(self.weights_bytes, self.plan, self.technique)

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations among the tensors; 0 is unknown."""
        return max(0, self.tensor_bytes - round(self.weights_bytes / ELEMENT_BYTES * self.technique.state_bytes))

    def is_of(self, size: PlanSize) -> bool:
        """Return whether this is the cost of the plan that `size` is of."""
        # Asked of each observation for each task: the usual case takes no call.
        alike = self.share == size.share or math.isclose(self.share, size.share, rel_tol=1e-9)
        return alike and (self.plan is size.plan or _same(self.plan, size.plan))


@dataclass(frozen=True)
class Prediction:
    """Predicted cost of a plan; None is unknown. `too_large`: it takes no less than one that was killed there."""

    download_s: float | None
    local_s: float | None
    upload_s: float | None
    peak_memory_bytes: int
    too_large: bool = False

    @property
    def total_s(self) -> float:
        """Sum of the known seconds."""
        return sum(part or 0.0 for part in (self.download_s, self.local_s, self.upload_s))


def predict(
    device: DeviceLimits, history: Sequence[Observation], size: PlanSize, peers: Sequence[Observation] = ()
) -> Prediction:
    """Predict the cost of a plan of that size on the device. `peers` were measured on devices of its class."""
    down = _rate(history, "download", device.downlink_bits_per_second)
    up = _rate(history, "upload", device.uplink_bits_per_second)
    return Prediction(
        None if down is None else size.download_bytes / down,
        _local_s(history, size, peers),
        None if up is None else size.upload_bytes / up,
        _memory_bytes(device, history, size, peers),
        # Until the device's tasks have made the history forget it.
        any(_kept_bytes(device, size) >= _kept_bytes(device, each) for each in history if each.killed),
    )


def relative_error(predicted: float | None, measured: float | None) -> float | None:
    """Return (predicted - measured) / measured; None where there is nothing to compare."""
    return None if predicted is None or not measured else (predicted - measured) / measured


def errors_of(prediction: Prediction, seen: Prediction | Observation) -> Mapping[str, float]:
    """Compare a prediction with what was measured: the relative error of each part that both have."""
    pairs = {
        "download": relative_error(prediction.download_s, seen.download_s),
        "local": relative_error(prediction.local_s, seen.local_s),
        "upload": relative_error(prediction.upload_s, seen.upload_s),
        "memory": relative_error(prediction.peak_memory_bytes or None, seen.peak_memory_bytes),
    }
    return {name: error for name, error in pairs.items() if error is not None}


def _rate(history: Sequence[Observation], way: str, bits_per_second: float) -> float | None:
    """Return bytes per second as measured, else as the device claims."""
    rates = [
        getattr(seen, f"{way}_bytes") / getattr(seen, f"{way}_s")
        for seen in history
        if getattr(seen, f"{way}_s") > 0 and getattr(seen, f"{way}_bytes") > 0
    ]
    if rates:
        return claims.BYTES_PER_SECOND.clamped(float(statistics.median(rates)))
    return bits_per_second / 8 if bits_per_second > 0 else None


def _local_s(history: Sequence[Observation], size: PlanSize, peers: Sequence[Observation]) -> float | None:
    """Predict by the plan's own measurements, else by those of its class, else by other plans."""
    if own := [seen.local_s for seen in history if seen.is_of(size) and seen.local_s > 0]:
        return float(statistics.median(own))
    alike = [seen.local_s for seen in peers if seen.is_of(size) and seen.local_s > 0]
    if not alike:
        line = _on_line(history, size)
        return _on_line(peers, size) if line is None else line
    # Devices of a class differ in their data, so only ratios of plans carry over to one that has a history.
    ratios = [
        seen.local_s / statistics.median(others)
        for seen in history
        if seen.local_s > 0 and (others := [each.local_s for each in peers if _same_plan(each, seen)])
    ]
    return float(statistics.median(alike)) * (float(statistics.median(ratios)) if ratios else 1.0)


def _same_plan(one: Observation, other: Observation) -> bool:
    alike = one.local_s > 0 and math.isclose(one.share, other.share, rel_tol=1e-9)
    return alike and _same(one.plan, other.plan)


def _same(one: LocalModelPlan | None, other: LocalModelPlan | None) -> bool:
    return one is other or (one or WHOLE_MODEL) == (other or WHOLE_MODEL)


def _on_line(history: Sequence[Observation], size: PlanSize) -> float | None:
    """Predict on the line through measurements at different shares of a step; with one share, in proportion.

    Times are those of plans without techniques or, if there are none, what the factors make of the others.
    """
    timed = [seen for seen in history if seen.local_s > 0]
    plain = [seen for seen in timed if seen.technique.time == 1]
    by_share: dict[float, list[float]] = {}
    for seen in plain or timed:
        by_share.setdefault(seen.step_shares.time, []).append(seen.local_s / seen.technique.time)
    points = sorted((at, statistics.median(times)) for at, times in by_share.items())
    if not points:
        return None
    (low, low_s), (high, high_s), wanted = points[0], points[-1], size.step_shares.time
    if high > low and high_s > low_s:
        slope = (high_s - low_s) / (high - low)
        # Below the smallest share that was measured, the line may fall below what no width saves.
        plain_s = max(low_s * UNSHRINKABLE_SHARE, low_s + slope * (wanted - low))
    else:
        plain_s = high_s / high * wanted
    return float(plain_s * size.technique.time)


def killed_observation(size: PlanSize) -> Observation:
    """Return what is known of a task with this plan in which the device's process was killed."""
    seen = Observation(size.share, size.weights_bytes, 0.0, 0.0, 0.0, 0, 0)
    return replace(seen, plan=size.plan, technique=size.technique, step=size.step, killed=True)


def _kept_bytes(device: DeviceLimits, of: PlanSize | Observation) -> float:
    """Return the bytes of weights, training state and activations, as far as the formula tells."""
    return of.state_bytes + device.activation_bytes * of.step_shares.kept * of.technique.activations


def _memory_bytes(
    device: DeviceLimits, history: Sequence[Observation], size: PlanSize, peers: Sequence[Observation]
) -> int:
    """Predict by the plan's own measurements, else by those of its class, else by the largest model measured.

    A peak is of one task, but where the system cannot forget a peak it never falls. So the least of the device's
    own is nearest to the plan's, and the largest model explains it. Of the class it is the median, which one
    device's claim does not move far.
    """
    if own := [seen.peak_memory_bytes for seen in history if seen.peak_memory_bytes and seen.is_of(size)]:
        return min(own)
    if alike := [seen.peak_memory_bytes for seen in peers if seen.peak_memory_bytes and seen.is_of(size)]:
        return round(statistics.median(alike))
    seen = [each for each in (history or peers) if each.peak_memory_bytes]
    base = (device.process_bytes or PROCESS_BYTES) + FIRST_TASK_BYTES
    kept = size.step_shares.kept * size.technique.activations
    activations = device.activation_bytes * kept
    if seen:
        peak = max(each.peak_memory_bytes for each in seen)
        largest = max(seen, key=lambda each: (each.weights_bytes, each.tensor_bytes))
        base = max(0, peak - largest.activation_bytes - largest.state_bytes)
        activations = largest.activation_bytes * kept / (largest.step_shares.kept * largest.technique.activations)
    return base + size.state_bytes + round(activations)


def most_weights_bytes(memory_bytes: int, process_bytes: int, plan: LocalModelPlan | None) -> int:
    """Return the largest weights that `predict` finds room for in that memory; of any more, it finds none.

    Activations are left out, so a model of fewer bytes may still not fit. `plan` None: nothing is trained.
    """
    room_bytes = memory_bytes - process_bytes - FIRST_TASK_BYTES
    each_bytes = ELEMENT_BYTES
    if plan is not None:
        # Before the layout is known, a plan that trains some layers may train hardly any of the weights.
        trained = float(plan.is_trained_whole)
        each_bytes = state_bytes(ELEMENT_BYTES, plan, technique_cost(plan, trained))
    return max(0, room_bytes * ELEMENT_BYTES // each_bytes)


def shown_upload_bits(history: Sequence[Observation]) -> float | None:
    """Return the median bits per element of this device's updates; None without any."""
    shown = [seen.upload_bits for seen in history if seen.upload_bits > 0]
    return float(statistics.median(shown)) if shown else None
