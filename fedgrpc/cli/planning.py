"""Inputs of `fedgrpc plan`: a task's model, devices, and the measured cost of their tasks."""

from __future__ import annotations

import io
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fedgrpc.aggregator.negotiation import reduced_bits
from fedgrpc.calls import Calls
from fedgrpc.codec.budget import expected_bits
from fedgrpc.codec.layout import Layout, TensorRole, spec_of
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import FedgrpcError, UsageError
from fedgrpc.process import forget_peak_memory, peak_memory_bytes
from fedgrpc.protocol.devices import device_from_proto
from fedgrpc.protocol.plans import local_model_plan_from_proto, plan_table_from_proto, policy_from_proto
from fedgrpc.protocol.records import observation_from_proto, prediction_errors, tells_cost
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.submodels.cost import DeviceLimits, Observation, shown_upload_bits
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_choice import PlanChoice, choose_of
from fedgrpc.submodels.plan_size import PlanSize, elements_of
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.trainer import SliceableTrainer, Trainer, TrainJob, Weights, model_layout
from fedgrpc.v1.aggregator_pb2 import WorkerRecord
from fedgrpc.v1.device_pb2 import WORKER_ROLE_TRAINER
from fedgrpc.v1.round_pb2 import TaskRecord

# The aggregator itself predicts from as many.
_KEPT = 16


@dataclass(frozen=True)
class PlannedModel:
    """A task's model, and the bits that each of its elements takes on the wire, down and up."""

    layout: Layout
    channels: ChannelMap | None
    download_bits: float
    upload_bits: float
    recipe: Recipe

    @classmethod
    def of(cls, trainer: Trainer, encoding: str, upload_encoding: str = "") -> PlannedModel:
        """Take the layout that the trainer tells, else encode its model once to measure its bits per element.

        Updates travel in `upload_encoding`, or like models without one. Raises `UsageError`.
        """
        if layout := model_layout(trainer):
            # A device may have no room for the whole model.
            elements = sum(spec.size for spec in layout)
            channels = trainer.channels() if isinstance(trainer, SliceableTrainer) else None
            down, up = map(Recipe.parse, (encoding, upload_encoding or encoding))
            return cls(layout, channels, expected_bits(down, elements), expected_bits(up, elements), down)
        weights = trainer.initial_weights()
        layout = tuple(spec_of(name, array) for name, array in weights.items())
        payload = write_payload(weights, Recipe.parse(encoding), io.BytesIO(), np.random.default_rng(0))
        elements = max(1, sum(array.size for array in weights.values()))
        channels = trainer.channels() if isinstance(trainer, SliceableTrainer) else None
        upload_bits = expected_bits(Recipe.parse(upload_encoding or encoding), elements)
        return cls(layout, channels, 8 * payload.size_bytes / elements, upload_bits, Recipe.parse(encoding))

    def size_of(self, plan: LocalModelPlan, history: Sequence[Observation] = ()) -> PlanSize:
        """Return the size of a plan for this model; updates take as many bits as those in the history."""
        upload_bits = shown_upload_bits(history) or self.upload_bits
        shapes = {tensor.name: tensor.shape for tensor in self.layout}
        frozen = {tensor.name for tensor in self.layout if tensor.role is TensorRole.CONSTANT}
        elements = elements_of(plan, shapes, self.channels, frozen)
        return elements.size(self.download_bits, upload_bits, reduced_bits(self.recipe))


@dataclass(frozen=True)
class PlannedDevice:
    """A device, the cost of its past tasks, and by how much each prediction of them was off, by part.

    `encodings` are the recipes of its models and of its updates; ("", "") where the run has agreed on none. The
    `peers` are past tasks of devices of its class.
    """

    name: str
    device: DeviceLimits
    history: tuple[Observation, ...] = ()
    errors: tuple[Mapping[str, float], ...] = ()
    device_class: str = ""
    encodings: tuple[str, str] = ("", "")
    peers: tuple[Observation, ...] = ()


@dataclass(frozen=True)
class PlanRequest:
    """The choice to make for each device: one of these plans, for this model, within that deadline."""

    model: PlannedModel
    table: PlanTable
    deadline_s: float

    @property
    def plans(self) -> tuple[LocalModelPlan, ...]:
        """Return every plan that some device may get, once."""
        own = self.table.classes.values()
        return tuple(dict.fromkeys((*self.table.automatic, *own) if self.table.automatic else self.table.plans))

    def choice_for(self, planned: PlannedDevice) -> PlanChoice:
        """Return the choice that the aggregator would make."""
        size_of = partial(self.model.size_of, history=planned.history)
        about = planned.device, planned.history, self.deadline_s
        return choose_of(self.table, planned.device_class, size_of, *about, planned.peers)


@dataclass(frozen=True)
class FleetSnapshot:
    """The plans of a running aggregator, and its workers with their last tasks."""

    plans: PlanTable
    deadline_s: float
    workers: tuple[WorkerRecord, ...]
    tasks: Mapping[str, Sequence[TaskRecord]]

    def devices(self, model: PlannedModel, name: str | None = None) -> list[PlannedDevice]:
        """Return the devices, or the one of that name, with a history in sizes of `model`. Raises `UsageError`."""
        named = [each for each in self.workers if name in (None, each.worker)]
        if not named:
            raise UsageError("the aggregator knows no worker" + (f" {name!r}" if name else ""))
        planned = [_planned_device(each, self.tasks[each.worker], model) for each in self.workers]
        wanted = {each.worker for each in named if name or each.role == WORKER_ROLE_TRAINER}
        return [replace(each, peers=_peers(each, planned)) for each in planned if each.name in wanted]


def _peers(device: PlannedDevice, planned: Sequence[PlannedDevice]) -> tuple[Observation, ...]:
    alike = [each for each in planned if device.device_class and each.device_class == device.device_class]
    return tuple(seen for each in alike for seen in each.history)


async def fleet_snapshot(aggregator: Calls) -> FleetSnapshot:
    """Ask an aggregator for the costs of its workers. Raises `LinkError`."""
    trainers = tuple(await aggregator.workers())
    tasks: dict[str, deque[TaskRecord]] = {each.worker: deque(maxlen=_KEPT) for each in trainers}
    async for record in aggregator.rounds_back():
        for task in filter(tells_cost, record.tasks):
            if task.worker in tasks and len(tasks[task.worker]) < _KEPT:
                tasks[task.worker].appendleft(task)
        if all(len(each) == _KEPT for each in tasks.values()):
            break
    run = await aggregator.run()
    plans = plan_table_from_proto(run.local_models) if run.HasField("local_models") else PlanTable()
    deadline_s = policy_from_proto(run.policy).deadline_s
    return FleetSnapshot(plans, deadline_s, trainers, tasks)


def _planned_device(record: WorkerRecord, tasks: Sequence[TaskRecord], model: PlannedModel) -> PlannedDevice:
    history = tuple(
        observation_from_proto(task, model.size_of(local_model_plan_from_proto(task.local_model)))
        for task in tasks
    )
    errors = tuple(prediction_errors(task) for task in tasks if task.HasField("prediction"))
    encodings = record.download_recipe, record.upload_recipe
    return PlannedDevice(
        record.worker, device_from_proto(record.device), history, errors, record.device.device_class, encodings
    )


def measured(
    trainer: Trainer,
    model: PlannedModel,
    plans: Sequence[LocalModelPlan],
    steps: int,
    epochs: float,
    tell: Callable[[str], None],
) -> list[Observation]:
    """Measure a round's training of each plan on this machine by `steps` steps of it, the smallest first.

    `tell` gets a line for each plan that cannot be trained here.
    """
    weights, found = trainer.initial_weights(), []
    for plan in sorted(plans, key=lambda plan: model.size_of(plan).share):
        size = model.size_of(plan)
        given = _sliced(weights, model.channels, plan)
        try:
            # The first step loads libraries and allocates buffers for all later ones.
            _train(trainer, given, plan, 1, epochs)
            forget_peak_memory()
            local_s, tensor_bytes = _train(trainer, given, plan, steps, epochs)
        except FedgrpcError as error:
            tell(f"{plan.to_line()} cannot be trained here: {error}")
            continue
        peak = peak_memory_bytes()
        seen = Observation(size.share, size.weights_bytes, 0, local_s, 0, 0, 0, peak, tensor_bytes)
        found.append(replace(seen, plan=plan, technique=size.technique, step=size.step))
    return found


def _train(
    trainer: Trainer, weights: Weights, plan: LocalModelPlan, steps: int, epochs: float
) -> tuple[float, int]:
    """Return the seconds that all steps of the epochs would take, and the bytes of tensors."""
    done = itertools.count(1)
    totals: list[int] = []
    job = TrainJob(
        epochs=epochs,
        local_model=None if plan.plain else plan,
        time_left_s=lambda: float(steps - next(done)),
        report=lambda _, total: totals.append(total),
    )
    begun = time.perf_counter()
    result = trainer.train(weights, job)
    return (time.perf_counter() - begun) * totals[-1] / max(1, result.steps), result.tensor_bytes


def _sliced(weights: Weights, channels: ChannelMap | None, plan: LocalModelPlan) -> Weights:
    if channels is None or plan.sub_model(0).whole:
        return {name: array.copy() for name, array in weights.items()}
    kept = channels.select(plan.sub_model(0), weights)
    return {
        name: kept.coverage(name, array.shape).take(array).copy()
        for name, array in weights.items()
        if kept.has(name)
    }
