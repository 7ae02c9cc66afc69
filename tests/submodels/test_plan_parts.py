"""A device is given only plans whose every part it knows."""

from __future__ import annotations

from fedgrpc.protocol.plans import local_model_to_proto
from fedgrpc.submodels.plan import (
    TASK_PARTS,
    WORKER_PARTS,
    Arithmetic,
    Clustering,
    LocalModelPlan,
    Pruning,
    Quantization,
)
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.v1 import round_pb2

FULL = LocalModelPlan(0.5, personal_layers=("head",), pruning=Pruning(), clustering=Clustering())
ALL = WORKER_PARTS | TASK_PARTS


def test_the_parts_of_a_plan_are_the_fields_of_its_message() -> None:
    # Depth and rank are told in the text of the sub-model.
    assert {field.name for field in round_pb2.LocalModel.DESCRIPTOR.fields} == ALL - {"depth", "rank"}
    for plan in (
        FULL,
        LocalModelPlan(arithmetic=Arithmetic()),
        LocalModelPlan(nested=(0.5,)),
        LocalModelPlan(distillation=0.5),
    ):
        message = local_model_to_proto(plan, plan.sub_model(0))
        assert {field.name for field, _ in message.ListFields()} == plan.parts


def test_half_a_plan_is_no_plan() -> None:
    assert FULL.known_to(ALL) == FULL
    assert FULL.known_to(ALL - {"pruning"}) == LocalModelPlan()
    assert LocalModelPlan().known_to(()) == LocalModelPlan()


def test_of_automatic_plans_a_device_keeps_those_it_knows() -> None:
    half, coarse = LocalModelPlan(0.5), LocalModelPlan(0.5, quantization=Quantization())
    table = PlanTable(automatic=(LocalModelPlan(), coarse, half), classes={"pi": FULL})
    assert table.known_to(ALL) is table
    known = table.known_to({"sub_model", "something new"})
    assert known.automatic == (LocalModelPlan(), half)
    assert known.plan_of("pi") == LocalModelPlan()
