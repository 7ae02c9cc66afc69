"""Size of a local-model plan for a model: its elements, bytes in memory and on the wire, and shares of a step.

The rule: pure arithmetic on shapes. What a device makes of it is in `fedgrpc.submodels.cost`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from fedgrpc.submodels.channels import ChannelMap, SubModel, sub_shapes
from fedgrpc.submodels.layer_cost import StepShares, step_shares
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.reduction import Reduction
from fedgrpc.submodels.technique_cost import PLAIN, TechniqueCost, technique_cost

ELEMENT_BYTES = 4


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
    step: StepShares | None = None

    @property
    def step_shares(self) -> StepShares:
        """Shares of a training step, by the share of the weights where the layers are not known."""
        return self.step or StepShares.of_weights(self.share)

    @property
    def state_bytes(self) -> int:
        """Bytes of weights, gradients and optimizer state in training, and of the weights before it where kept."""
        return state_bytes(self.weights_bytes, self.plan, self.technique)


def relative_work(size: PlanSize) -> float:
    """Return how long a step with the plan takes, as a multiple of one with the whole model as it is."""
    return size.step_shares.time * size.technique.time


def state_bytes(weights_bytes: int, plan: LocalModelPlan | None, technique: TechniqueCost) -> int:
    """Return the bytes of weights and training state.

    A plan that changes the weights it is given also keeps them as they were, since the update is a difference.
    """
    techniques = () if plan is None else (plan.pruning, plan.clustering, plan.quantization, plan.arithmetic)
    start_bytes = weights_bytes if any(part is not None for part in techniques) else 0
    return start_bytes + round(weights_bytes / ELEMENT_BYTES * technique.state_bytes)


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
    `trained` is the share that `technique_cost` takes; `step` None: the model's layers are not known.
    """

    plan: LocalModelPlan
    own: int
    sent: int
    whole: int
    trained: float = 1.0
    step: StepShares | None = None
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
            ELEMENT_BYTES * self.own,
            math.ceil(down / 8),
            payload_bytes(self.sent, upload_bits, self.plan),
            self.sent,
            self.plan,
            technique_cost(self.plan, self.trained),
            self.step,
        )


def elements_of(
    plan: LocalModelPlan,
    model: Mapping[str, tuple[int, ...]],
    channels: ChannelMap | None,
    frozen: Collection[str] = (),
) -> PlanElements:
    """Count the elements of a plan for a model whose tensors have these shapes; `frozen` ones are never trained.

    Without a channel map, the sub-model is the whole model. All rules keep equally many channels.
    """
    shapes = model
    sub_model = SubModel(plan.width, depth=plan.depth, rank=plan.rank)
    if channels is not None and not sub_model.whole:
        shapes = sub_shapes(channels.select(sub_model), model)
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    trained = {name for name in shapes if plan.is_trained(name) and name not in frozen}
    own = sum(counts.values())
    whole = sum(math.prod(shape) for shape in model.values())
    share_trained = sum(counts[name] for name in trained) / max(1, own)
    if channels is not None and channels.costs:
        step = step_shares(channels.costs, model, shapes, trained.__contains__)
    else:
        named = [name in trained for name in shapes]
        reached = (len(named) - named.index(True)) / len(named) if any(named) else 0.0
        step = StepShares.of_weights(own / max(1, whole), share_trained, reached)
    reductions = {name: Reduction.of(plan).of_tensor(name, len(shape)) for name, shape in shapes.items()}
    return PlanElements(
        plan,
        own,
        sum(counts[name] for name in trained if not plan.is_personal(name)),
        whole,
        share_trained,
        step,
        tuple((counts[name], how) for name, how in reductions.items() if counts[name] and not how.nothing),
    )
