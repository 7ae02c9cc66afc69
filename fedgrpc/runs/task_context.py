"""One record per task: what its worker was given, and what it reported.

`fedgrpc.rounds` knows of a task what decides about its round. Everything else that belongs to the task is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fedgrpc.aggregation import partial_update
from fedgrpc.aggregation.admission import TensorLike
from fedgrpc.codec.layout import Layout
from fedgrpc.codec.recipe import Recipe
from fedgrpc.rounds.fields import with_fields
from fedgrpc.rounds.history import Timings
from fedgrpc.submodels.channels import KeptChannels, SubModel
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_choice import PlanChoice


@dataclass(frozen=True)
class LocalTask:
    """Local model of one worker in one round."""

    plan: LocalModelPlan = field(default_factory=LocalModelPlan)
    sub_model: SubModel = field(default_factory=SubModel)

    @cached_property
    def plain(self) -> bool:
        """True if it trains the whole model as it is."""
        return self.plan.plain and self.sub_model.whole

    def check_layout(
        self, model: Sequence[TensorLike], update: Layout, kept_channels: KeptChannels | None
    ) -> None:
        """Raise `UpdateRefused` unless these are the tensors of an update from this task."""
        partial_update.check_layout(
            model,
            update,
            kept_channels,
            masked=self.plan.pruning is not None,
            clustered=self.plan.clustering is not None,
            kept_back=self.plan.is_kept_back,
        )


@dataclass(frozen=True)
class Report:
    """One worker's account of its task; counts of examples, scores by name, sizes in bytes.

    `merged_updates`: of how many updates this is the mean, with the summed `weight`, and what the steps of one
    amount to in the mean (`accumulated_steps`, 0: not reported); 0: it is a worker's own. `unchanged`: the worker
    says that training left the model as it was. `noise_ratio` is that of `fedgrpc.aggregation.noise`. `clipped`:
    the difference was longer than the clip norm.
    """

    example_count: int
    steps: int
    metrics: Mapping[str, float]
    evaluation_metrics: Mapping[str, float]
    evaluation_example_count: int
    timings: Timings = field(default_factory=Timings)
    upload_bytes: int = 0
    peak_memory_bytes: int = 0
    merged_updates: int = 0
    weight: float = 0.0
    tensor_bytes: int = 0
    accumulated_steps: float = 0.0
    unchanged: bool = False
    scores_of_sub_models: bool = False
    scores_not_finite: frozenset[str] = frozenset()
    noise_ratio: float = 0.0
    clipped: bool = False

    def uploaded_in(self, seconds: float) -> Report:
        """Return this report with T_upload as the aggregator saw it: from the first byte to the last."""
        return with_fields(self, timings=with_fields(self.timings, upload_s=seconds))


_PLAIN = LocalTask()


@dataclass(frozen=True)
class Downlink:
    """Form in which models travel to a worker: whole, or as a difference to what it holds (None: always whole)."""

    whole: Recipe
    difference: Recipe | None = None

    @classmethod
    def of(cls, whole: Recipe, difference: Recipe) -> Downlink:
        """Return the downlink of two recipes. A difference that loses nothing is no smaller than the model."""
        return cls(whole, None if difference.lossless or not difference.contractive else difference)


@dataclass(frozen=True)
class Agreed:
    """The recipes of one worker's models and updates."""

    downlink: Downlink
    upload: Recipe


@dataclass(frozen=True)
class TaskContext:
    """Everything known of one task beside its phase.

    `agreed` None: it is not on record. `choice`: why the worker got this plan, and its predicted cost.
    `download_bytes`: what its worker is to pull. `report`: what came with the accepted update. `weight` and
    `scale` in the mean, `distance` to the others where a rule has looked: None before the round has committed.
    """

    local: LocalTask = _PLAIN
    agreed: Agreed | None = None
    choice: PlanChoice | None = None
    download_bytes: int = 0
    device_class: str = ""
    report: Report | None = None
    weight: float | None = None
    scale: float | None = None
    distance: float | None = None

    def carried_over(self) -> TaskContext:
        """Return what of it holds in a later round: the rest was of the round that gave the task."""
        return TaskContext(self.local, self.agreed, device_class=self.device_class, report=self.report)


NOTHING_KNOWN = TaskContext()
