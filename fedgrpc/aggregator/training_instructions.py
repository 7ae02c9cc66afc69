"""Training instructions: what this aggregator's workers are asked to do, by its operator or by its parent.

The rule: a leaf asks its workers for what its parent would ask them for: the same plan, seeds and weights, and the
same local models by device class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

from fedgrpc import claims
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.protocol.plans import training_plan_from_proto
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import aggregator_pb2, round_pb2, tensor_pb2

T = TypeVar("T", int, float)


@dataclass(frozen=True)
class TrainingInstructions:
    """Fields of `AggregatorSettings` that a parent decides for its leaves."""

    plan: TrainingPlan
    evaluate: bool
    seed: int
    worker_weights: Mapping[str, float]
    rounds: int | None
    normalize_steps: bool
    max_examples: int | None
    clip_norm: float | None
    noise_weights: bool

    @classmethod
    def from_settings(cls, settings: AggregatorSettings) -> TrainingInstructions:
        """Return the instructions of the operator."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    @classmethod
    def from_parent(cls, task: aggregator_pb2.Task, settings: AggregatorSettings) -> TrainingInstructions:
        """Return those of a leaf's task. Weights that the leaf's own operator gives to workers come first.

        Raises `LayoutError` for a plan or weights out of their ranges.
        """
        leaf = task.leaf
        weights = {worker: claims.WEIGHT.checked(weight) for worker, weight in leaf.worker_weights.items()}
        return cls(
            training_plan_from_proto(task.plan),
            task.evaluate,
            leaf.seed,
            {**weights, **settings.worker_weights},
            leaf.total_rounds or None,
            leaf.normalize_steps,
            _lower(leaf.max_examples, settings.max_examples),
            _lower(leaf.clip_norm, settings.clip_norm),
            not leaf.plain_weights,
        )

    def for_leaf(
        self, local_models: round_pb2.LocalModels | None, channels: tensor_pb2.ChannelMap | None
    ) -> round_pb2.LeafInstructions:
        """Return what a leaf needs besides its task."""
        return round_pb2.LeafInstructions(
            seed=self.seed,
            worker_weights=self.worker_weights,
            local_models=local_models,
            channels=channels,
            total_rounds=self.rounds or 0,
            normalize_steps=self.normalize_steps,
            max_examples=self.max_examples or 0,
            clip_norm=self.clip_norm or 0.0,
            plain_weights=not self.noise_weights,
        )


def _lower(parents: T, own: T | None) -> T | None:
    """The lower of two limits; 0 and None are none."""
    return min(filter(None, (parents, own)), default=None)
