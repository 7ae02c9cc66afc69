"""One task of one client: training or scoring, and the encoded update, by the code that a worker runs.

The rule: everything that decides about a byte is an argument. So the same work gives the same bytes in whatever
process, after whatever other work. Times that the worker would measure here are virtual, and set by who asked.
"""

from __future__ import annotations

import io
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedgrpc.codec.feedback import Residual
from fedgrpc.codec.layout import Array, Layout
from fedgrpc.codec.payload import LazyTensors, PayloadReader, buffer_reader
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import FedgrpcError, TaskError, UsageError
from fedgrpc.protocol.descriptions import ModelDescription
from fedgrpc.protocol.tasks import Task
from fedgrpc.rounds.fields import with_fields
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.simulation.learning.client_files import ClientFiles
from fedgrpc.simulation.learning.experiment import Learning
from fedgrpc.storage.residual_file import ResidualWriter
from fedgrpc.trainer import EvalResult, Trainer, Weights, for_part, local_examples
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.worker.algorithm_work import algorithm_for
from fedgrpc.worker.held_model import HeldModel
from fedgrpc.worker.task_loader import load_trainer
from fedgrpc.worker.throttle import Throttle
from fedgrpc.worker.trainer_calls import (
    Hooks,
    described,
    evaluate,
    fitting,
    initialize,
    parts_of,
    reads_on_access,
    train,
)
from fedgrpc.worker.update import (
    Began,
    Outcome,
    kept_writer,
    load_personal_layers,
    personal_layers_writer,
    update_of,
)

# Of parts of the data, which most learning tasks share: then a trainer is a few kilobytes.
_TRAINERS: Final = 1024
_MODELS: Final = 4
# Updates of smaller models are handed over in memory, and such models decoded once for all clients.
_SMALL_MODEL_BYTES: Final = 1 << 20
_LEFT_OUT: Final = ("timings", "peak_memory_bytes")


@dataclass(frozen=True)
class ClientWork:
    """Work of one client, small enough to be sent anywhere: files are named, not contained.

    `client` is its part of the data, from 0; None: all of it, of an evaluator.
    `held` is the folder of the model to start from. At most `most_steps` steps are taken before the deadline, and
    `left_s` virtual seconds are then left to it.
    """

    client: int | None
    name: str
    task: Task
    run_id: str
    folder: Path
    held: Path | None
    most_steps: int | None = None
    left_s: float | None = None


@dataclass(frozen=True)
class ClientResult:
    """The header of the update, serialized, with its payload; or why there is none.

    `payload` None: it is in the client's files.
    """

    header: bytes = b""
    payload: bytes | None = None
    error: str = ""
    steps: int = 0
    cpu_s: float = 0.0


@dataclass(frozen=True)
class TaskFacts:
    """Facts of a learning task: its model, the local models that it can do, its examples."""

    description: ModelDescription
    parts: frozenset[str]
    batch_size: int
    examples: tuple[int, ...]
    held_out: tuple[int, ...]


class _Decoded(dict[str, Array]):
    """Tensors that know their layout."""

    def __init__(self, layout: Layout, tensors: Iterable[tuple[str, Array]]) -> None:
        super().__init__(tensors)
        self.layout = layout


class _Model:
    """A model as devices hold it. The tensors of a small one are decoded once for all clients."""

    def __init__(self, folder: Path) -> None:
        self._held = HeldModel.load(folder)
        self.layout = self._held.manifest.layout
        self._tensors: Mapping[str, Array] | None = None

    def given(self, on_access: bool) -> Weights:
        """Return the weights to train from: to be read alone, or writable and not shared."""
        if not on_access:
            return self._held.weights()
        if not is_small(self.layout):
            return self._held.tensors()
        if self._tensors is None:
            content = buffer_reader(self._held.mapped().data)
            lazy = LazyTensors(PayloadReader(self._held.manifest, content, valid=True))
            self._tensors = _Decoded(self.layout, ((name, _read_only(array)) for name, array in lazy.items()))
        return self._tensors


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


def is_small(layout: Layout) -> bool:
    """Return whether a model of this layout may be in memory more than once."""
    return sum(spec.nbytes for spec in layout) <= _SMALL_MODEL_BYTES


class ClientWorker:
    """Does the work of all clients, one at a time, in one process. Memory is O(model), and the data once."""

    def __init__(self, learning: Learning, clients: int) -> None:
        """Build the learning task. Raises `UsageError` and `TaskError`."""
        self._learning = learning
        self._clients = clients
        self._whole = self._load(None)
        self._trainers: OrderedDict[int, Trainer] = OrderedDict()
        self._models: OrderedDict[Path, _Model] = OrderedDict()

    def _load(self, part: str | None) -> Trainer:
        learning = self._learning
        return load_trainer(
            learning.task,
            model=learning.model,
            data=None if learning.data is None else Path(learning.data),
            device=learning.device,
            partition=None if part is None else learning.partition,
            part=part,
            seed=learning.seed,
            options=learning.options,
            threads=learning.threads,
        )

    def _trainer(self, client: int | None) -> Trainer:
        """Return the trainer of a client, with its part of the data."""
        partition = self._learning.partition
        if client is None or partition is None:
            return self._whole
        if client not in self._trainers:
            part = f"{client + 1}/{self._clients}"
            self._trainers[client] = for_part(self._whole, partition, part) or self._load(part)
            if len(self._trainers) > _TRAINERS:
                self._trainers.popitem(last=False)
        self._trainers.move_to_end(client)
        return self._trainers[client]

    def facts(self, channels: bool) -> TaskFacts:
        """Describe the learning task and its parts, with the model's channels where they are asked for."""
        counts = [local_examples(self._trainer(client)) for client in range(self._clients)]
        return TaskFacts(
            described(self._whole, 0, channels),
            parts_of(self._whole),
            int(getattr(self._whole, "batch_size", 0) or 32),
            tuple(0 if each is None else each.count for each in counts),
            tuple(0 if each is None else each.held_out for each in counts),
        )

    def perform(self, work: ClientWork) -> ClientResult:
        """Train or score, and write the update. What a learning task cannot do is told in the result."""
        began_s = time.process_time()
        try:
            header, payload, steps = self._perform(work)
        except UsageError:
            raise
        except FedgrpcError as error:
            return ClientResult(error=str(error) or type(error).__name__, cpu_s=time.process_time() - began_s)
        return ClientResult(header.SerializeToString(), payload, "", steps, time.process_time() - began_s)

    def _perform(self, work: ClientWork) -> tuple[aggregator_pb2.UpdateHeader, bytes | None, int]:
        task = work.task
        steps = task.plan.max_steps if work.most_steps is None else work.most_steps
        plan = with_fields(task.plan, upload_reserve_s=None, max_steps=steps)
        task = with_fields(task, plan=plan, deadline_s=None)
        trainer, files = self._trainer(work.client), ClientFiles(work.folder)
        personal = files.personal if files.exist else None
        held = None if work.held is None else self._held(work.held)

        def given(on_access: bool) -> Weights:
            weights = {} if held is None else held.given(on_access)
            if personal is None:
                return weights
            return load_personal_layers(weights, personal, work.run_id, task.is_personal)

        with fitting(task):
            kept = files.kept(work.run_id).tensors if algorithm_for(task).keeps else {}
            outcome = _local_work(trainer, task, given, kept)
        layout = () if held is None else held.layout
        if work.left_s is not None and Recipe.parse(task.upload_recipe or "raw").budget:
            # A budget of bytes by the link asks how much time is left, by the clock of this process.
            task = with_fields(task, deadline_s=time.monotonic() + work.left_s)
        header, payload = self._write(work, task, outcome, given, layout, files)
        return header, payload, outcome.steps

    def _held(self, folder: Path) -> _Model:
        if folder not in self._models:
            self._models[folder] = _Model(folder)
            if len(self._models) > _MODELS:
                self._models.popitem(last=False)
        self._models.move_to_end(folder)
        return self._models[folder]

    def _write(
        self,
        work: ClientWork,
        task: Task,
        outcome: Outcome,
        given: Callable[[bool], Weights],
        layout: Layout,
        files: ClientFiles,
    ) -> tuple[aggregator_pb2.UpdateHeader, bytes | None]:
        pulled = {} if outcome.weights is None else given(True)
        kept_some = files.exist
        residual = files.residual(work.run_id) if kept_some else Residual()
        began = Began(0.0, time.monotonic())
        fill = update_of(task, work.name, pulled, outcome, residual, began, layout, peak_bytes=int)
        left = ResidualWriter(files.next_residual, work.run_id)

        def keep(name: str, part: Array) -> None:
            if not left.begun:
                files.make_folder()
            left.add(name, part)

        try:
            with io.BytesIO() if layout and is_small(layout) else files.open_payload() as payload:
                header, kept = fill(payload, keep)
                written = payload.getvalue() if isinstance(payload, io.BytesIO) else None
            if kept is not None and (left.begun or (kept_some and files.has_residual)):
                left.finish(kept)
        finally:
            left.close()
        if keep_personal := personal_layers_writer(outcome.weights or {}, work.run_id, task.is_personal):
            files.make_folder()
            keep_personal(files.next_personal)
        if keep_state := kept_writer(outcome.kept, work.run_id):
            files.make_folder()
            keep_state(files.next_kept)
        for name in _LEFT_OUT:
            header.ClearField(name)
        return header, written


def _local_work(trainer: Trainer, task: Task, given: Callable[[bool], Weights], kept: Weights) -> Outcome:
    """Do the local work of a task as `TrainerWork` does, in this thread."""
    hooks = Hooks(threading.Event(), _unheard, Throttle())
    if task.kind is TaskKind.INITIALIZE:
        return initialize(trainer, task)
    scores: EvalResult | None = None
    on_access = reads_on_access(trainer)
    if task.kind is TaskKind.EVALUATE or task.evaluate:
        scores = evaluate(trainer, given(on_access), hooks, task, kept)
    if task.kind is TaskKind.EVALUATE:
        if scores is None:
            raise TaskError("there is no held-out data on this device to score the model on")
        return Outcome(None, scores.example_count, scores=scores)
    return train(trainer, given(on_access), task, hooks, scores, kept)


def _unheard(progress: float) -> None:
    """Report nothing: progress is virtual."""
