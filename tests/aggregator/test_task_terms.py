"""A leaf asks its workers for what its parent would ask them for."""

import math

import pytest

from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.task_terms import TrainingInstructions
from fedgrpc.errors import LayoutError
from fedgrpc.protocol.plans import training_plan_to_proto
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import aggregator_pb2


def settings(tmp_path, **changes):
    return AggregatorSettings(tmp_path, **changes)


def task_of(instructions):
    return aggregator_pb2.Task(
        plan=training_plan_to_proto(instructions.plan),
        evaluate=instructions.evaluate,
        leaf=instructions.for_leaf(None, None),
    )


@pytest.mark.parametrize(
    "changes", [{}, {"plan": TrainingPlan(algorithm="fednova")}, {"clip_norm": 2.5, "max_examples": 7}]
)
def test_a_leaf_passes_on_what_its_parent_asks_for(tmp_path, changes):
    plan = TrainingPlan(epochs=0.5, momentum=0.0, upload_reserve_s=3.0)
    about = {"plan": plan, "evaluate": True, "seed": 5, "worker_weights": {"a": 2.0}, "rounds": 12, **changes}
    parents = TrainingInstructions.from_settings(settings(tmp_path, **about))
    own = settings(tmp_path, plan=TrainingPlan(epochs=9), seed=8, rounds=3)
    assert TrainingInstructions.from_parent(task_of(parents), own) == parents


def test_of_limits_the_lower_one_holds_and_of_weights_the_leafs_own(tmp_path):
    parents = TrainingInstructions.from_settings(
        settings(tmp_path, clip_norm=2.0, max_examples=10, worker_weights={"a": 1.0, "b": 1.0})
    )
    own = settings(tmp_path, clip_norm=3.0, max_examples=4, worker_weights={"b": 5.0})
    held = TrainingInstructions.from_parent(task_of(parents), own)
    assert (held.clip_norm, held.max_examples) == (2.0, 4)
    assert held.worker_weights == {"a": 1.0, "b": 5.0}


def test_a_weight_out_of_its_range_is_refused(tmp_path):
    task = task_of(TrainingInstructions.from_settings(settings(tmp_path)))
    task.leaf.worker_weights["a"] = -1.0
    with pytest.raises(LayoutError, match="weight"):
        TrainingInstructions.from_parent(task, settings(tmp_path))


@pytest.mark.parametrize("clip_norm", [-1.0, math.nan, math.inf, 5e-324])
def test_a_clip_norm_out_of_its_range_is_refused(tmp_path, clip_norm):
    task = task_of(TrainingInstructions.from_settings(settings(tmp_path)))
    task.leaf.clip_norm = clip_norm
    with pytest.raises(LayoutError, match="clip norm"):
        TrainingInstructions.from_parent(task, settings(tmp_path, clip_norm=1.0))
