"""What workers are told to do: by this run's operator or, below another aggregator, by the one above.

The rule: an aggregator below tells its workers what they would be told directly below the one above it: the same
plan, the same seeds, the same weights, the same local models by device class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from fedgrpc import claims
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.v1 import round_pb2, tensor_pb2

T = TypeVar("T", int, float)


@dataclass(frozen=True)
class Orders:
    """`plan` is what every worker's begins with; `rounds` are to come; the rest is as in the settings."""

    plan: round_pb2.Plan
    seed: int
    worker_weights: Mapping[str, float]
    rounds: int
    normalize_steps: bool = False
    max_examples: int | None = None
    clip_norm: float | None = None

    @classmethod
    def of(cls, settings: AggregatorSettings) -> Orders:
        """Those of the operator."""
        plan = settings.plan
        message = round_pb2.Plan(
            epochs=plan.epochs or 0,
            max_steps=plan.max_steps or 0,
            batch_size=plan.batch_size or 0,
            learning_rate=plan.learning_rate or 0,
            momentum=plan.momentum or 0,
            proximal_mu=plan.proximal_mu,
            label_adjustment=plan.label_adjustment,
            evaluate=settings.evaluate,
        )
        if plan.upload_reserve_s is not None:
            message.upload_reserve.CopyFrom(duration_to_proto(plan.upload_reserve_s))
        return cls(
            message,
            settings.seed,
            settings.worker_weights,
            settings.rounds,
            settings.normalize_steps,
            settings.max_examples,
            settings.clip_norm,
        )

    @classmethod
    def from_above(cls, plan: round_pb2.Plan, settings: AggregatorSettings) -> Orders:
        """Those of a task; weights that this aggregator's operator gives to workers come first.

        Raises `LayoutError` for weights that cannot be.
        """
        message = round_pb2.Plan()
        message.CopyFrom(plan)
        for own in ("seed", "local_model", "tell_channels", "lead"):
            message.ClearField(own)
        lead = plan.lead
        told = {worker: claims.WEIGHT.checked(weight) for worker, weight in lead.worker_weights.items()}
        weights = {**told, **settings.worker_weights}
        return cls(
            message,
            lead.seed,
            weights,
            lead.total_rounds,
            lead.normalize_steps,
            _lower(lead.max_examples, settings.max_examples),
            _lower(lead.clip_norm, settings.clip_norm),
        )

    def lead(
        self, local_models: round_pb2.LocalModels | None, channels: tensor_pb2.ChannelMap | None
    ) -> round_pb2.Lead:
        """What an aggregator below is told for its workers."""
        return round_pb2.Lead(
            seed=self.seed,
            worker_weights=self.worker_weights,
            local_models=local_models,
            channels=channels,
            total_rounds=self.rounds,
            normalize_steps=self.normalize_steps,
            max_examples=self.max_examples or 0,
            clip_norm=self.clip_norm or 0.0,
        )


def _lower(above: T, own: T | None) -> T | None:
    """The lower of two limits; 0 and None are none."""
    return min(filter(None, (above, own)), default=None)
