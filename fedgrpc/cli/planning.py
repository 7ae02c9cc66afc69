"""What `fedgrpc plan` plans for: a task's model, devices, and what training has cost them."""

from __future__ import annotations

import io
import itertools
import resource
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedgrpc.client import Client
from fedgrpc.codec.budget import expected_bits
from fedgrpc.codec.layout import Layout, spec_of
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import UsageError
from fedgrpc.metrics import prediction_errors
from fedgrpc.protocol.plans import local_model_plan_from_proto, plan_table_from_proto
from fedgrpc.protocol.policies import policy_from_proto
from fedgrpc.protocol.records import counts, device_of, observation_of
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.submodels.cost import Device, Observation, PlanSize, elements_of, shown_upload_bits
from fedgrpc.submodels.coverage import Coverage
from fedgrpc.submodels.plan import CompressionPlan, PlanTable
from fedgrpc.trainer import SliceableTrainer, Trainer, TrainJob, Weights
from fedgrpc.v1.aggregator_pb2 import WorkerRecord
from fedgrpc.v1.device_pb2 import WORKER_ROLE_TRAINER
from fedgrpc.v1.round_pb2 import TaskRecord

# As many as the aggregator itself goes by.
_KEPT = 16


@dataclass(frozen=True)
class Model:
    """What plans are sized by: the task's model, and bits on the wire for each of its elements, down and up."""

    layout: Layout
    channels: ChannelMap | None
    download_bits: float
    upload_bits: float

    @classmethod
    def of(cls, trainer: Trainer, encoding: str, upload_encoding: str = "") -> Model:
        """A task's model; its payload is made once to see what the encoding does.

        Updates are in the same encoding, or in another. Raises UsageError.
        """
        weights = trainer.initial_weights()
        layout = tuple(spec_of(name, array) for name, array in weights.items())
        payload = write_payload(weights, Recipe.parse(encoding), io.BytesIO(), np.random.default_rng(0))
        elements = max(1, sum(array.size for array in weights.values()))
        channels = trainer.channels() if isinstance(trainer, SliceableTrainer) else None
        upload_bits = expected_bits(Recipe.parse(upload_encoding or encoding), elements)
        return cls(layout, channels, 8 * payload.size_bytes / elements, upload_bits)

    def size_of(self, plan: CompressionPlan, history: Sequence[Observation] = ()) -> PlanSize:
        """The plan's share of this model; updates take the bits that those in the history took."""
        upload_bits = shown_upload_bits(history) or self.upload_bits
        shapes = {tensor.name: tensor.shape for tensor in self.layout}
        return elements_of(plan, shapes, self.channels).size(self.download_bits, upload_bits)


@dataclass(frozen=True)
class Subject:
    """A device, what its tasks have cost, and by how much each prediction of them was off, by part.

    `encodings` are those of models and of its updates; ("", "") where it has not been told any.
    """

    name: str
    device: Device
    history: tuple[Observation, ...] = ()
    errors: tuple[Mapping[str, float], ...] = ()
    device_class: str = ""
    encodings: tuple[str, str] = ("", "")


def measured(
    trainer: Trainer, model: Model, widths: Sequence[float], steps: int, epochs: float
) -> list[Observation]:
    """What a round's training of each width takes on this machine, told from `steps` of it; smallest first."""
    weights, found = trainer.initial_weights(), []
    for width in sorted(set(widths)):
        its = model.size_of(CompressionPlan(width))
        given = _sliced(weights, model.channels, CompressionPlan(width))
        _train(trainer, given, 1, epochs)  # loads and allocates what all later steps find
        local_s, tensor_bytes = _train(trainer, given, steps, epochs)
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found.append(Observation(its.share, its.weights_bytes, 0, local_s, 0, 0, 0, peak_bytes, tensor_bytes))
    return found


def _train(trainer: Trainer, weights: Weights, steps: int, epochs: float) -> tuple[float, int]:
    """Seconds that all steps of the epochs would take, and bytes of tensors."""
    done = itertools.count(1)
    totals: list[int] = []
    job = TrainJob(
        epochs=epochs,
        time_left_s=lambda: float(steps - next(done)),
        report=lambda _, total: totals.append(total),
    )
    begun = time.perf_counter()
    result = trainer.train(weights, job)
    return (time.perf_counter() - begun) * totals[-1] / max(1, result.steps), result.tensor_bytes


def _sliced(weights: Weights, channels: ChannelMap | None, plan: CompressionPlan) -> Weights:
    if channels is None or plan.width == 1:
        return weights
    selection = channels.select(plan.sub_model(0), weights)
    coverages: dict[str, Coverage] = {name: selection.coverage(name, its.shape) for name, its in weights.items()}
    return {name: coverages[name].take(array).copy() for name, array in weights.items()}


@dataclass(frozen=True)
class Asked:
    """What a running aggregator gives out, and its devices with what their tasks have cost."""

    plans: PlanTable
    deadline_s: float
    workers: tuple[WorkerRecord, ...]
    tasks: Mapping[str, Sequence[TaskRecord]]

    def subjects(self, model: Model) -> list[Subject]:
        """Its devices, as the plans of that model are chosen for them."""
        return [_subject(record, self.tasks[record.worker], model) for record in self.workers]


async def ask(aggregator: Client, name: str | None) -> Asked:
    """All that an aggregator knows of its workers' costs, or of one's. Raises UsageError, LinkError."""
    records = [each for each in await aggregator.workers() if name in (None, each.worker)]
    if not records:
        raise UsageError("the aggregator knows no worker" + (f" {name!r}" if name else ""))
    trainers = tuple(each for each in records if name or each.role == WORKER_ROLE_TRAINER)
    tasks: dict[str, deque[TaskRecord]] = {each.worker: deque(maxlen=_KEPT) for each in trainers}
    async for record in aggregator.rounds_back():
        for task in filter(counts, record.tasks):
            if task.worker in tasks and len(tasks[task.worker]) < _KEPT:
                tasks[task.worker].appendleft(task)
        if all(len(each) == _KEPT for each in tasks.values()):
            break
    run = await aggregator.run()
    plans = plan_table_from_proto(run.local_models) if run.HasField("local_models") else PlanTable()
    deadline_s = policy_from_proto(run.policy).deadline_s
    return Asked(plans, deadline_s, trainers, tasks)


def _subject(record: WorkerRecord, tasks: Sequence[TaskRecord], model: Model) -> Subject:
    history = tuple(
        observation_of(task, model.size_of(local_model_plan_from_proto(task.local_model))) for task in tasks
    )
    errors = tuple(prediction_errors(task) for task in tasks if task.HasField("prediction"))
    encodings = record.download_recipe, record.upload_recipe
    return Subject(record.worker, device_of(record.device), history, errors, record.device.device_class, encodings)
