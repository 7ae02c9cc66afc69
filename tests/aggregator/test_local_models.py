"""A device's first plan is chosen by what its class has shown."""

from __future__ import annotations

from pathlib import Path

from fedgrpc.aggregator.local_models import LocalModels, Sizing
from fedgrpc.aggregator.model_store import ModelStore
from fedgrpc.aggregator.registry import Worker
from fedgrpc.codec.layout import TensorSpec
from fedgrpc.protocol.plans import local_model_to_proto
from fedgrpc.submodels.channels import SubModel
from fedgrpc.submodels.plan import TASK_PARTS, Arithmetic, LocalModelPlan, Memory
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.v1 import aggregator_pb2, device_pb2, round_pb2

MIB = 1 << 20
LAYOUT = (TensorSpec("w", "float32", (1000, 1000)),)
WHOLE = LocalModelPlan()
SHORT = LocalModelPlan(arithmetic=Arithmetic("bfloat16"))
SAVING = LocalModelPlan(memory=Memory(8))
PLANS = PlanTable(automatic=(WHOLE, SHORT, SAVING))


def worker(name: str, device_class: str) -> Worker:
    device = device_pb2.DeviceProfile(device_class=device_class, memory_bytes=500 * MIB)
    parts = sorted(TASK_PARTS)
    return Worker(aggregator_pb2.RegisterRequest(worker=name, device=device, local_model_parts=parts), 0.0)


def task(name: str, plan: LocalModelPlan, peak_bytes: int) -> round_pb2.TaskRecord:
    record = round_pb2.TaskRecord(
        worker=name,
        kind=round_pb2.TASK_KIND_TRAIN,
        phase=round_pb2.TASK_PHASE_ACCEPTED,
        device_class="pi",
        peak_memory_bytes=peak_bytes,
        tensor_bytes=100 * MIB,
        local_model=local_model_to_proto(plan, SubModel()),
    )
    record.timings.local_seconds = 1.0
    return record


def chosen(local_models: LocalModels, name: str, device_class: str) -> LocalModelPlan:
    return local_models.task_of(worker(name, device_class), Sizing(LAYOUT, 4_000_000, 60.0), 1)[0].plan


def records() -> list[round_pb2.Round]:
    first = round_pb2.Round(number=1, tasks=[task("a", WHOLE, 900 * MIB), task("b", WHOLE, 910 * MIB)])
    second = round_pb2.Round(number=2, tasks=[task("a", SHORT, 600 * MIB), task("b", SAVING, 450 * MIB)])
    return [first, second]


def test_a_new_device_starts_with_the_plan_that_fitted_its_class(tmp_path: Path) -> None:
    local_models = LocalModels(PLANS, ModelStore(tmp_path), tmp_path / "channels.pb")
    assert chosen(local_models, "new", "pi") == WHOLE
    for record in records():
        local_models.observe(record, LAYOUT)
    assert chosen(local_models, "new", "pi") == SAVING
    assert chosen(local_models, "new", "jetson") == WHOLE
    assert chosen(local_models, "new", "") == WHOLE


def test_the_records_of_a_former_process_tell_what_a_class_has_shown(tmp_path: Path) -> None:
    local_models = LocalModels(PLANS, ModelStore(tmp_path), tmp_path / "channels.pb")
    local_models.recall(reversed(records()), LAYOUT, ["a", "b"])
    assert chosen(local_models, "new", "pi") == SAVING
