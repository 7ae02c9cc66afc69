"""Tasks and reports of updates, to messages and back: each is what it was."""

import time
from dataclasses import replace

import pytest

from fedgrpc.aggregation.admission import AdmissionPolicy
from fedgrpc.codec.recipe import Recipe
from fedgrpc.protocol.rounds import agreed_from_proto
from fedgrpc.protocol.tasks import Task, task_from_proto, task_to_proto
from fedgrpc.protocol.updates import report_from_proto, report_to_proto
from fedgrpc.rounds.history import Timings
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.runs.task_context import Agreed, Downlink, Report
from fedgrpc.submodels.channels import SubModel
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import round_pb2

TASK = Task(
    token="t1",
    run="mnist",
    round=7,
    kind=TaskKind.TRAIN,
    model_version=6,
    plan=TrainingPlan(epochs=2),
    upload_recipe="int8:block=256,rounding=stochastic+zstd:1",
    run_id="abc",
    uplink_bytes_per_second=1000.0,
    seed=3,
    evaluate=True,
)
REPORT = Report(
    example_count=10,
    steps=4,
    metrics={"loss": 0.5},
    evaluation_metrics={"accuracy": 0.9},
    evaluation_example_count=5,
    timings=Timings(download_s=1.0, local_s=2.0),
    peak_memory_bytes=1 << 20,
    tensor_bytes=1 << 10,
    unchanged=True,
    scores_not_finite=frozenset({"f1"}),
)


@pytest.mark.parametrize(
    "local",
    [{}, {"local_model": LocalModelPlan(personal_layers=("head.*",))}, {"sub_model": SubModel(0.5, "rolling", 7)}],
    ids=["whole", "personal layers", "sub-model"],
)
@pytest.mark.parametrize("kind", list(TaskKind))
def test_a_worker_is_told_the_task_that_was_given(kind, local):
    task = replace(TASK, kind=kind, **local)
    assert task_from_proto(task_to_proto(task, 0.0)) == task


def test_a_deadline_travels_as_the_time_that_is_left():
    message = task_to_proto(replace(TASK, deadline_s=130.0), 100.0)
    before = time.monotonic()
    told = task_from_proto(message).deadline_s
    assert before + 30 <= told <= time.monotonic() + 30
    assert not task_to_proto(replace(TASK, deadline_s=90.0), 100.0).time_left.ToNanoseconds()
    assert not task_to_proto(TASK, 100.0).HasField("time_left")


@pytest.mark.parametrize(
    "mean", [{}, {"merged_updates": 3, "weight": 12.5, "accumulated_steps": 2.0, "scores_of_sub_models": True}]
)
def test_the_header_of_an_update_reports_what_its_worker_said(mean):
    report = replace(REPORT, **mean)
    header = report_to_proto(report, "t1", "pi")
    assert (header.token, header.worker) == ("t1", "pi")
    assert report_from_proto(header, AdmissionPolicy()) == report


@pytest.mark.parametrize("difference", ["entropy:c=1+zstd", ""])
def test_what_was_agreed_is_read_back_from_the_record_of_a_task(difference):
    record = round_pb2.TaskRecord(
        download_recipe="int8+zstd", difference_recipe=difference, upload_recipe="entropy:c=8+zstd"
    )
    downlink = Downlink(Recipe.parse("int8+zstd"), Recipe.parse(difference) if difference else None)
    assert agreed_from_proto(record) == Agreed(downlink, Recipe.parse("entropy:c=8+zstd"))


@pytest.mark.parametrize("text", ["", "telepathy", "int8;"])
def test_a_record_without_recipes_that_are_known_says_nothing(text):
    assert agreed_from_proto(round_pb2.TaskRecord(download_recipe=text, upload_recipe="raw")) is None
