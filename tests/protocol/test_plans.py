"""A hyper-parameter is a field of the plan, a flag and a field on the wire, all of one name."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fedgrpc.cli import aggregator
from fedgrpc.errors import LayoutError
from fedgrpc.protocol.plans import training_plan_from_proto, training_plan_to_proto
from fedgrpc.trainer import TrainJob
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import round_pb2

FIELDS = {field.name for field in dataclasses.fields(TrainingPlan)}
ON_THE_WIRE = {
    f"{field.name}_s" if field.message_type else field.name: field
    for field in round_pb2.TrainingPlan.DESCRIPTOR.fields
}
FULL = TrainingPlan(**dict.fromkeys(FIELDS, 0.5) | {"max_steps": 7, "batch_size": 5, "algorithm": "fedavg"})


def test_every_field_of_the_plan_is_on_the_wire_and_none_else():
    assert ON_THE_WIRE.keys() == FIELDS


def test_every_field_of_the_plan_has_a_flag_and_no_other_flag_stands_under_its_heading():
    settings = aggregator.COMMAND.settings()
    heading = next(setting.heading for setting in settings if setting.name == "epochs")
    flags = {setting.name for setting in settings if setting.heading == heading}
    assert flags == FIELDS | {"local_models"}


def test_every_field_of_the_plan_reaches_the_job_of_a_trainer():
    assert {field.name for field in dataclasses.fields(TrainJob)} >= FIELDS


@pytest.mark.parametrize("field", dataclasses.fields(TrainingPlan), ids=lambda field: field.name)
def test_what_is_absent_on_the_wire_is_the_default(field):
    on_the_wire = ON_THE_WIRE[field.name]
    if field.default is None:
        assert on_the_wire.has_presence
    else:
        assert not on_the_wire.has_presence
        assert on_the_wire.default_value == field.default


@pytest.mark.parametrize("plan", [TrainingPlan(), FULL, TrainingPlan(momentum=0.0, upload_reserve_s=0.0)], ids=str)
def test_a_plan_comes_back_equal(plan):
    text = training_plan_to_proto(plan).SerializeToString()
    assert training_plan_from_proto(round_pb2.TrainingPlan.FromString(text)) == plan


def test_a_plan_that_no_worker_could_keep_is_refused():
    with pytest.raises(LayoutError, match="momentum"):
        training_plan_from_proto(round_pb2.TrainingPlan(momentum=1.0))


@pytest.mark.parametrize("name", ["epochs", "learning_rate", "momentum", "label_adjustment"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e300])
def test_numbers_of_a_plan_that_no_training_can_mean_are_refused(name, value):
    with pytest.raises(LayoutError, match=name):
        training_plan_from_proto(round_pb2.TrainingPlan(**{name: value}))
