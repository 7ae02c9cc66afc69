"""Local models of the workers: plans by device class, and the model's channels.

The rule: a worker's local model is in the round's record before the task is offered, so that its update is checked
against that even after a restart. The channels are a claim of a worker, checked against the model and stored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import structlog
from google.protobuf.message import DecodeError

from fedgrpc.aggregator.model_store import ModelStore
from fedgrpc.aggregator.negotiation import reduced_bits
from fedgrpc.aggregator.registry import Worker
from fedgrpc.codec.budget import expected_bits
from fedgrpc.codec.layout import Layout, TensorRole
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import LayoutError, NotFound, StorageError, UnusableUpdate, blaming
from fedgrpc.protocol.descriptions import ModelDescription
from fedgrpc.protocol.devices import device_from_proto
from fedgrpc.protocol.plans import (
    local_model_plan_from_proto,
    plan_table_to_proto,
)
from fedgrpc.protocol.records import observation_from_proto, prediction_errors, tells_cost
from fedgrpc.protocol.tensors import channels_from_proto, channels_to_proto
from fedgrpc.rounds.fields import with_fields
from fedgrpc.runs.task_context import LocalTask
from fedgrpc.storage.files import storage_errors, write_file
from fedgrpc.submodels.channels import ChannelMap, KeptChannels, SubModel
from fedgrpc.submodels.cost import Observation, killed_observation, shown_upload_bits
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_choice import PlanChoice, choose_of
from fedgrpc.submodels.plan_size import PlanElements, PlanSize, elements_of
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.v1 import round_pb2, tensor_pb2

log = structlog.get_logger()

_UNDESCRIBED = ModelDescription()
_MOST_SUB_MODELS = 64
_KEPT = 16
_KEPT_OF_CLASS = 64


@dataclass(frozen=True)
class Sizing:
    """Inputs to the size of a plan: layout, bytes of the payload, seconds of a round, recipes both ways.

    `download_recipe` None: the worker cannot read reduced models, and pulls them whole. `told`: what the worker
    says of the model.
    """

    layout: Layout
    download_bytes: int
    deadline_s: float
    upload_recipe: Recipe | None = None
    download_recipe: Recipe | None = None
    told: ModelDescription = _UNDESCRIBED

    @property
    def download_bits(self) -> float:
        """Bits on the wire for each element of the model."""
        return 8 * self.download_bytes / max(1, sum(spec.size for spec in self.layout))

    @property
    def upload_bits(self) -> float:
        """Bits to expect for each element of an update until one has come."""
        if self.upload_recipe is None:
            return self.download_bits
        return expected_bits(self.upload_recipe, sum(spec.size for spec in self.layout))


class LocalModels:
    """The plans of a run, and its model's channels in one file. Reading and `learn` block."""

    def __init__(self, plans: PlanTable, models: ModelStore, path: Path) -> None:
        self._plans = plans
        self._models = models
        self._path = path
        self._histories: dict[str, deque[Observation]] = {}
        self._of_class: dict[str, deque[Observation]] = {}
        self._kept_channels = lru_cache(_MOST_SUB_MODELS)(self._select)
        self._elements: dict[LocalModelPlan, PlanElements] = {}
        self._channels = self._read()
        # Channels that a worker has told, and that no layout could be checked against yet.
        self.told: ChannelMap | None = None

    def use(self, plans: PlanTable) -> None:
        """Use these plans from now on."""
        self._plans = plans

    def to_proto(self) -> round_pb2.LocalModels | None:
        """Return the plans for a leaf; None if every device trains the model as it is."""
        return None if self._plans.trivial else plan_table_to_proto(self._plans)

    @property
    def channels(self) -> tensor_pb2.ChannelMap | None:
        """Message of the model's channels; None until a worker has sent them."""
        return None if self._channels is None else channels_to_proto(self._channels)

    @property
    def channel_map(self) -> ChannelMap | None:
        """The model's channels as far as a worker has told them, checked or not."""
        return self._channels or self.told

    @property
    def wants_channels(self) -> bool:
        """True if some plan needs the channels or the costs of layers, and no worker has sent them yet."""
        return self._channels is None and any(plan.is_of_layers for plan in self._plans.plans)

    def task_of(self, worker: Worker, sizing: Sizing, round_number: int) -> tuple[LocalTask, PlanChoice]:
        """Choose a worker's local model and predict its cost. Without known channels it has the whole width."""
        choice = self._choice(worker, sizing)
        sub_model = SubModel() if self._channels is None else choice.plan.sub_model(round_number)
        return LocalTask(choice.plan, sub_model), choice

    def _choice(self, worker: Worker, sizing: Sizing) -> PlanChoice:
        told = sizing.told
        about = with_fields(
            device_from_proto(worker.registration.device),
            process_bytes=told.process_bytes,
            activation_bytes=told.activation_bytes,
        )
        device_class = worker.registration.device.device_class
        history = list(self._histories.get(worker.name, ()))
        upload_bits = shown_upload_bits(history) or sizing.upload_bits
        download_bits = sizing.download_bits

        reduced = None if sizing.download_recipe is None else reduced_bits(sizing.download_recipe)

        def size(plan: LocalModelPlan) -> PlanSize:
            return self._elements_of(plan, sizing.layout).size(download_bits, upload_bits, reduced)

        plans = self._plans.known_to(worker.registration.local_model_parts)
        peers = list(self._of_class.get(device_class, ()))
        choice = choose_of(plans, device_class, size, about, history, sizing.deadline_s, peers)
        lacking = self._plans.plan_of(device_class).parts.difference(worker.registration.local_model_parts)
        if lacking and not self._plans.automatic:
            return replace(choice, reason=f"the worker knows no {', '.join(sorted(lacking))}: the model as it is")
        if not self._plans.automatic or device_class in self._plans.classes:
            return choice
        log.info(
            "plan chosen",
            worker=worker.name,
            plan=choice.plan.to_toml(),
            reason=choice.reason,
            predicted_s=round(choice.prediction.total_s, 3),
        )
        return choice

    def _elements_of(self, plan: LocalModelPlan, layout: Layout) -> PlanElements:
        """Count a plan's elements once for all workers with the plan."""
        if plan not in self._elements:
            if len(self._elements) >= _MOST_SUB_MODELS:
                self._elements.clear()
            shapes = {spec.name: spec.shape for spec in layout}
            frozen = {spec.name for spec in layout if spec.role is TensorRole.CONSTANT}
            self._elements[plan] = elements_of(plan, shapes, self._channels, frozen)
        return self._elements[plan]

    def observe(self, record: round_pb2.Round, layout: Layout) -> None:
        """Learn from a committed round what its tasks cost, and log the errors of the predictions."""
        for task in filter(tells_cost, record.tasks):
            if (seen := self._observation(task, layout)) is None:
                continue
            self._histories.setdefault(task.worker, deque(maxlen=_KEPT)).append(seen)
            self._peers(task).append(seen)
            if task.HasField("prediction"):
                shown = {part: round(error, 3) for part, error in prediction_errors(task).items()}
                tell = log.info if self._plans.automatic else log.debug
                tell("prediction checked", round=record.number, worker=task.worker, relative_errors=shown)

    def recall(self, records: Iterable[round_pb2.Round], layout: Layout, workers: Iterable[str]) -> None:
        """Learn from the rounds of a former process, newest first, until these workers' histories are full."""
        lacking = set(workers)
        for record in records:
            for task in filter(tells_cost, record.tasks):
                history = self._histories.setdefault(task.worker, deque(maxlen=_KEPT))
                if len(history) < _KEPT and (seen := self._observation(task, layout)) is not None:
                    history.appendleft(seen)
                    if len(peers := self._peers(task)) < _KEPT_OF_CLASS:
                        peers.appendleft(seen)
                if len(history) == _KEPT:
                    lacking.discard(task.worker)
            if not lacking:
                return

    def was_killed(self, worker: str, plan: LocalModelPlan, layout: Layout) -> None:
        """Learn that a worker's process was killed in the training of this plan: it takes more than there is."""
        log.warning("a device has killed its training", worker=worker, plan=plan.to_line())
        size = self._elements_of(plan, layout).size(0.0, 0.0)
        self._histories.setdefault(worker, deque(maxlen=_KEPT)).append(killed_observation(size))

    def _peers(self, task: round_pb2.TaskRecord) -> deque[Observation]:
        """Return what the last tasks of the device's class cost. A device without a class has no peers."""
        if not task.device_class:
            return deque()
        return self._of_class.setdefault(task.device_class, deque(maxlen=_KEPT_OF_CLASS))

    def _observation(self, task: round_pb2.TaskRecord, layout: Layout) -> Observation | None:
        """Return what the task cost; None if its record cannot be true."""
        try:
            with blaming(task.worker):
                plan = local_model_plan_from_proto(task.local_model)
                return observation_from_proto(task, self._elements_of(plan, layout).size(0.0, 0.0))
        except UnusableUpdate as error:
            log.warning("nothing learned of a task", worker=task.worker, reason=str(error))
            return None

    def kept_channels(self, sub_model: SubModel, version: int) -> KeptChannels | None:
        """Return the channels of a sub-model; None for the whole model. May take long.

        Raises `NotFound` while the channels are not known, and for a version that is not there.
        """
        if sub_model.whole:
            return None
        if self._channels is None:
            raise NotFound("the channels of this model are not known, so it has no sub-models")
        by_weights = sub_model.rule == "magnitude"
        return self._kept_channels(sub_model, version if by_weights else None)

    def _select(self, sub_model: SubModel, version: int | None) -> KeptChannels:
        assert self._channels is not None
        return self._channels.select(sub_model, None if version is None else self._models.tensors(version))

    def learn(self, channel_map: ChannelMap, layout: Layout) -> None:
        """Store the channels of the model if they fit it and none are known. Raises `StorageError`.

        Before the model itself is known, they are kept for `learn_told`.
        """
        if self._channels is not None:
            return
        if not layout:
            self.told = self.told or channel_map
            return
        self.told = None
        try:
            channel_map.validate({spec.name: spec.shape for spec in layout})
        except LayoutError as error:
            log.warning("channels refused", reason=str(error))
            return
        self._write(channel_map)
        if self.wants_channels and (useless := self._plans.useless_for(channel_map)):
            log.warning("a part of the plans changes nothing for this model", parts=sorted(useless))
        self._channels = channel_map
        self._elements.clear()

    def learn_told(self, layout: Layout) -> None:
        """Store channels that were told before the model was known. Raises `StorageError`."""
        if self.told is not None:
            self.learn(self.told, layout)

    def forget(self) -> None:
        """Forget the channels, because the run has a new model. Raises `StorageError`."""
        with storage_errors("the model's channels", "remove"):
            self._path.unlink(missing_ok=True)
        self._channels = self.told = None
        self._elements.clear()
        self._kept_channels.cache_clear()

    def _write(self, channel_map: ChannelMap) -> None:
        with storage_errors("the model's channels", "store"):
            write_file(self._path, channels_to_proto(channel_map).SerializeToString(deterministic=True))

    def _read(self) -> ChannelMap | None:
        try:
            return channels_from_proto(tensor_pb2.ChannelMap.FromString(self._path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, DecodeError, LayoutError) as error:
            raise StorageError(f"cannot read the model's channels, {self._path}: {error}") from error
