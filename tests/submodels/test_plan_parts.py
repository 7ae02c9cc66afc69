"""A device is given only plans whose every part it knows."""

from __future__ import annotations

from fedgrpc.protocol.plans import local_model_to_proto
from fedgrpc.submodels.plan import (
    TASK_PARTS,
    WORKER_PARTS,
    Arithmetic,
    Clustering,
    CompressionPlan,
    PlanTable,
    Pruning,
    Quantization,
)
from fedgrpc.v1 import round_pb2

FULL = CompressionPlan(0.5, personal_layers=("head",), pruning=Pruning(), clustering=Clustering())
ALL = WORKER_PARTS | TASK_PARTS


def test_the_parts_of_a_plan_are_the_fields_of_its_message() -> None:
    assert {field.name for field in round_pb2.LocalModel.DESCRIPTOR.fields} == ALL
    for plan in (FULL, CompressionPlan(arithmetic=Arithmetic()), CompressionPlan(nested=(0.5,))):
        message = local_model_to_proto(plan, plan.sub_model(0))
        assert {field.name for field, _ in message.ListFields()} == plan.parts


def test_half_a_plan_is_no_plan() -> None:
    assert FULL.known_to(ALL) == FULL
    assert FULL.known_to(ALL - {"pruning"}) == CompressionPlan()
    assert CompressionPlan().known_to(()) == CompressionPlan()


def test_of_automatic_plans_a_device_keeps_those_it_knows() -> None:
    half, coarse = CompressionPlan(0.5), CompressionPlan(0.5, quantization=Quantization())
    table = PlanTable(automatic=(CompressionPlan(), coarse, half), classes={"pi": FULL})
    assert table.known_to(ALL) is table
    known = table.known_to({"sub_model", "something new"})
    assert known.automatic == (CompressionPlan(), half)
    assert known.plan_of("pi") == CompressionPlan()
