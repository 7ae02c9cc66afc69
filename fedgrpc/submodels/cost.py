"""Cost of a local-model plan on a device, predicted from measurements, and the most capable plan that fits.

    T_local    = seconds per unit of work  *  work(plan)  *  factor of its techniques (`technique_cost`)
    T_upload   = bytes(plan) / rate up,  T_download = bytes(plan) / rate down
    memory     = memory of the process without a model  +  what its first task loads  +  bytes of weights,
                 gradients, optimizer state and activations; weights scale with the square of the width,
                 activations with the width

The rule: a number is what this plan was measured to cost on this device, else on devices of its class. Only
without such measurements is it computed as above from those of other plans, or from the device's profile. The work
of a plan is its share of the whole model's weights, plus a part that no smaller width saves. Each prediction is
later compared with what was measured (`errors_of`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedgrpc import claims
from fedgrpc.submodels.channels import ChannelMap, SubModel, sub_shapes
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.submodels.reduction import Reduction
from fedgrpc.submodels.technique_cost import PLAIN, TechniqueCost, technique_cost

# Share of a batch's time that does not shrink with the model: data, Python, kernel launches. It is fitted once a
# device's history has two different plans.
UNSHRINKABLE_SHARE = 0.2
# A process with PyTorch, where the device does not tell its own.
PROCESS_BYTES = 260 << 20
# Libraries and buffers of the first step, of the transfers and of encoding, as measured with a small model.
FIRST_TASK_BYTES = 32 << 20
# Building the untrained model and sending it: the model, and what is checked and encoded of it at a time.
FIRST_MODEL_COPIES = 2.0
_ELEMENT_BYTES = 4
# A smaller share of the model would make the ratio of two shares overflow.
_LEAST_SHARE = 1e-12
# An update with more noise than this, as `noise_ratio`, has less than a tenth of its weight: it adds nothing.
USELESS_RATIO = 9.0
# So many tasks show it. A history forgets them after its length of other tasks; then the plan is tried again.
_USELESS_TASKS = 3


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
class PlanSize:
    """Size of a plan: share of the model (0 to 1), bytes of weights in memory and of payloads, elements sent."""

    share: float
    weights_bytes: int
    download_bytes: int
    upload_bytes: int
    sent_elements: int = 0
    plan: LocalModelPlan | None = None
    technique: TechniqueCost = PLAIN

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and optimizer state in training, and of the weights before it where kept."""
        return _state_bytes(self.weights_bytes, self.plan, self.technique)


@dataclass(frozen=True)
class Observation:
    """Measured cost of one task. `share` is that of the trained model, `tensor_bytes` are within the peak memory.

    `upload_bits` are bits per element of the update, pruned and clustered ones aside; 0 is unknown.
    `noise_ratio` is what the plan's number format did to the update (`fedgrpc.aggregation.noise`).
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

    @property
    def state_bytes(self) -> int:
        """See `PlanSize.state_bytes`."""
        return _state_bytes(self.weights_bytes, self.plan, self.technique)

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations among the tensors; 0 is unknown."""
        return max(0, self.tensor_bytes - round(self.weights_bytes / _ELEMENT_BYTES * self.technique.state_bytes))

    def is_of(self, size: PlanSize) -> bool:
        """Return whether this is the cost of the plan that `size` is of."""
        same = (self.plan or LocalModelPlan()) == (size.plan or LocalModelPlan())
        return same and math.isclose(self.share, size.share, rel_tol=1e-9)


@dataclass(frozen=True)
class Prediction:
    """Predicted cost of a plan; None is unknown."""

    download_s: float | None
    local_s: float | None
    upload_s: float | None
    peak_memory_bytes: int

    @property
    def total_s(self) -> float:
        """Sum of the known seconds."""
        return sum(part or 0.0 for part in (self.download_s, self.local_s, self.upload_s))


@dataclass(frozen=True)
class PlanChoice:
    """Plan that a device gets, its predicted cost, and the reason for the choice."""

    plan: LocalModelPlan
    prediction: Prediction
    reason: str


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
    )


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
    if device.memory_bytes and prediction.peak_memory_bytes > device.memory_bytes:
        return f"takes {prediction.peak_memory_bytes >> 20} MiB of {device.memory_bytes >> 20}"
    if prediction.total_s > deadline_s:
        return f"takes {prediction.total_s:.1f} s of {deadline_s:g}"
    return ""


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
    same = (one.plan or LocalModelPlan()) == (other.plan or LocalModelPlan())
    return same and one.local_s > 0 and math.isclose(one.share, other.share, rel_tol=1e-9)


def _on_line(history: Sequence[Observation], size: PlanSize) -> float | None:
    """Predict on the line through measurements at different shares; with one share, by the usual slope.

    Times are those of plans without techniques or, if there are none, what the factors make of the others.
    """
    timed = [seen for seen in history if seen.local_s > 0]
    plain = [seen for seen in timed if seen.technique.time == 1]
    by_share: dict[float, list[float]] = {}
    for seen in plain or timed:
        by_share.setdefault(seen.share, []).append(seen.local_s / seen.technique.time)
    points = sorted((at, statistics.median(times)) for at, times in by_share.items())
    if not points:
        return None
    (low, low_s), (high, high_s) = points[0], points[-1]
    if high > low and high_s > low_s:
        slope = (high_s - low_s) / (high - low)
        # Below the smallest share that was measured, the line may fall below what no width saves.
        plain_s = max(low_s * UNSHRINKABLE_SHARE, low_s + slope * (size.share - low))
    else:
        plain_s = high_s / _work(high) * _work(size.share)
    return float(plain_s * size.technique.time)


def relative_work(size: PlanSize) -> float:
    """Return how long a step with the plan takes, as a multiple of one with the whole model as it is."""
    return _work(size.share) * size.technique.time


def _work(share: float) -> float:
    return UNSHRINKABLE_SHARE + (1 - UNSHRINKABLE_SHARE) * share


def _state_bytes(weights_bytes: int, plan: LocalModelPlan | None, technique: TechniqueCost) -> int:
    """Return the bytes of weights and training state.

    A plan that changes the weights it is given also keeps them as they were, since the update is a difference.
    """
    techniques = () if plan is None else (plan.pruning, plan.clustering, plan.quantization, plan.arithmetic)
    start_bytes = weights_bytes if any(part is not None for part in techniques) else 0
    return start_bytes + round(weights_bytes / _ELEMENT_BYTES * technique.state_bytes)


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
    activations = device.activation_bytes * math.sqrt(size.share) * size.technique.activations
    if seen:
        peak = max(each.peak_memory_bytes for each in seen)
        largest = max(seen, key=lambda each: (each.weights_bytes, each.tensor_bytes))
        base = max(0, peak - largest.activation_bytes - largest.state_bytes)
        shrunk = math.sqrt(size.share / max(largest.share or 1.0, _LEAST_SHARE))
        activations = (
            largest.activation_bytes * shrunk * size.technique.activations / largest.technique.activations
        )
    return base + size.state_bytes + round(activations)


def most_weights_bytes(memory_bytes: int, process_bytes: int, plan: LocalModelPlan | None) -> int:
    """Return the largest weights that `predict` finds room for in that memory; of any more, it finds none.

    Activations are left out, so a model of fewer bytes may still not fit. `plan` None: nothing is trained.
    """
    room_bytes = memory_bytes - process_bytes - FIRST_TASK_BYTES
    each_bytes = _ELEMENT_BYTES
    if plan is not None:
        # Before the layout is known, a plan that trains some layers may train hardly any of the weights.
        trained = float(plan.is_trained_whole)
        each_bytes = _state_bytes(_ELEMENT_BYTES, plan, technique_cost(plan, trained, trained))
    return max(0, room_bytes * _ELEMENT_BYTES // each_bytes)


def shown_upload_bits(history: Sequence[Observation]) -> float | None:
    """Return the median bits per element of this device's updates; None without any."""
    shown = [seen.upload_bits for seen in history if seen.upload_bits > 0]
    return float(statistics.median(shown)) if shown else None


def bits_per_element(upload_bytes: int, elements: int, plan: LocalModelPlan) -> float:
    """Invert `payload_bytes`: return bits per element; 0.0 where codes of clusters hide them."""
    if not elements or (plan.clustering is not None and plan.clustering.layers == ("*",)):
        return 0.0
    bits = 8 * upload_bytes / elements
    if plan.pruning is not None and plan.pruning.layers == ("*",):
        bits = (bits - 1) / (1 - plan.pruning.ratio)
    return max(0.0, bits)


def payload_bytes(elements: int, bits_per_element: float, plan: LocalModelPlan) -> int:
    """Return bytes of an update. Pruned tensors send kept values and a bit per element, clustered ones codes."""
    bits = bits_per_element
    if plan.clustering is not None and plan.clustering.layers == ("*",):
        bits = min(bits, max(1, (plan.clustering.clusters - 1).bit_length()))
    if plan.pruning is not None and plan.pruning.layers == ("*",):
        bits = 1 + (1 - plan.pruning.ratio) * bits
    return math.ceil(elements * bits / 8)


@dataclass(frozen=True)
class PlanElements:
    """Number of elements in a plan's sub-model, in its updates, and in the whole model.

    `reduced` has those of each tensor that is pruned or clustered before the model is sent, and how.
    `trained` and `reached` are the shares that `technique_cost` takes.
    """

    plan: LocalModelPlan
    own: int
    sent: int
    whole: int
    trained: float = 1.0
    reached: float = 1.0
    reduced: tuple[tuple[int, Reduction], ...] = ()

    def size(
        self,
        download_bits: float,
        upload_bits: float,
        reduced_bits: Callable[[int, Reduction], float] | None = None,
    ) -> PlanSize:
        """Convert to bytes, at so many bits per element on the wire, before pruning and clustering.

        `reduced_bits` gives those of each element in a reduced tensor; None: models are sent whole.
        """
        reduced = () if reduced_bits is None else self.reduced
        down = download_bits * (self.own - sum(count for count, _ in reduced))
        if reduced_bits is not None:
            down += sum(count * reduced_bits(count, how) for count, how in reduced)
        return PlanSize(
            self.own / max(1, self.whole),
            _ELEMENT_BYTES * self.own,
            math.ceil(down / 8),
            payload_bytes(self.sent, upload_bits, self.plan),
            self.sent,
            self.plan,
            technique_cost(self.plan, self.trained, self.reached),
        )


def elements_of(
    plan: LocalModelPlan, model: Mapping[str, tuple[int, ...]], channels: ChannelMap | None
) -> PlanElements:
    """Count the elements of a plan for a model whose tensors have these shapes.

    Without a channel map, the sub-model is the whole model. All rules keep equally many channels.
    """
    shapes = model
    sub_model = SubModel(plan.width, depth=plan.depth, rank=plan.rank)
    if channels is not None and not sub_model.whole:
        shapes = sub_shapes(channels.select(sub_model), model)
    trained = [plan.is_trained(name) for name in shapes]
    counts = [math.prod(shape) for shape in shapes.values()]
    reductions = [Reduction.of(plan).of_tensor(name, len(shape)) for name, shape in shapes.items()]
    return PlanElements(
        plan,
        sum(counts),
        sum(math.prod(shape) for name, shape in shapes.items() if not plan.is_kept_back(name)),
        sum(math.prod(shape) for shape in model.values()),
        sum(count for count, used in zip(counts, trained, strict=True) if used) / max(1, sum(counts)),
        (len(trained) - trained.index(True)) / len(trained) if any(trained) else 0.0,
        tuple((count, how) for count, how in zip(counts, reductions, strict=True) if count and not how.nothing),
    )
