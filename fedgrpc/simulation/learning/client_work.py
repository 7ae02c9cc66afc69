"""One task of one client: training or scoring, and the encoded update, by the code that a worker runs.

The rule: everything that decides about a byte is an argument. So the same work gives the same bytes in whatever
process, after whatever other work. Times that the worker would measure here are virtual, and set by who asked.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fedgrpc.codec.layout import Layout
from fedgrpc.errors import FedgrpcError, TaskError, UsageError
from fedgrpc.protocol.descriptions import ModelDescription
from fedgrpc.protocol.tasks import Task, task_from_proto
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
from fedgrpc.worker.training import (
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

_TRAINERS: Final = 64
_MODELS: Final = 4
_LEFT_OUT: Final = ("timings", "peak_memory_bytes")


@dataclass(frozen=True)
class ClientWork:
    """What is to be done, small enough to be sent anywhere: files are named, not contained.

    `client` is its part of the data, from 0; None: all of it, of an evaluator. `task` is the serialized message.
    `held` is the folder of the model to start from. At most `most_steps` steps are taken before the deadline, and
    `left_s` virtual seconds are then left to it.
    """

    client: int | None
    name: str
    task: bytes
    run_id: str
    folder: Path
    held: Path | None
    most_steps: int | None = None
    left_s: float | None = None


@dataclass(frozen=True)
class ClientResult:
    """The header of the update, serialized, whose payload is in the client's files; or why there is none."""

    header: bytes = b""
    error: str = ""
    steps: int = 0
    cpu_s: float = 0.0


@dataclass(frozen=True)
class TaskFacts:
    """What a learning task tells of itself: its model, the local models that it can do, its examples."""

    description: ModelDescription
    parts: frozenset[str]
    batch_size: int
    examples: tuple[int, ...]
    held_out: tuple[int, ...]


class ClientWorker:
    """Does the work of all clients, one at a time, in one process. Memory is O(model), and the data once."""

    def __init__(self, learning: Learning, clients: int) -> None:
        """Build the learning task. Raises `UsageError` and `TaskError`."""
        self._learning = learning
        self._clients = clients
        self._whole = self._load(None)
        self._trainers: OrderedDict[int, Trainer] = OrderedDict()
        self._models: OrderedDict[Path, HeldModel] = OrderedDict()

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
            header, steps = self._perform(work)
        except UsageError:
            raise
        except FedgrpcError as error:
            return ClientResult(error=str(error) or type(error).__name__, cpu_s=time.process_time() - began_s)
        return ClientResult(header.SerializeToString(), "", steps, time.process_time() - began_s)

    def _perform(self, work: ClientWork) -> tuple[aggregator_pb2.UpdateHeader, int]:
        message = aggregator_pb2.Task.FromString(work.task)
        task = task_from_proto(message)
        plan = replace(task.plan, upload_reserve_s=None)
        if work.most_steps is not None:
            plan = replace(plan, max_steps=work.most_steps)
        task = replace(task, plan=plan, deadline_s=None)
        trainer, files = self._trainer(work.client), ClientFiles(work.folder)
        held = None if work.held is None else self._held(work.held)

        def given(on_access: bool) -> Weights:
            if held is None:
                return {}
            weights = held.tensors() if on_access else held.weights()
            return load_personal_layers(weights, files.personal, work.run_id, task.is_personal)

        with fitting(task):
            kept = files.kept(work.run_id).tensors if algorithm_for(task).keeps else {}
            outcome = _local_work(trainer, task, given, kept)
        layout = () if held is None else held.manifest.layout
        if work.left_s is not None:
            # A budget of bytes by the link asks how much time is left, by the clock of this process.
            task = replace(task, deadline_s=time.monotonic() + work.left_s)
        header = self._write(work, task, outcome, given, layout, files)
        return header, outcome.steps

    def _held(self, folder: Path) -> HeldModel:
        if folder not in self._models:
            self._models[folder] = HeldModel.load(folder)
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
    ) -> aggregator_pb2.UpdateHeader:
        pulled = {} if outcome.weights is None else given(True)
        residual = files.residual(work.run_id)
        fill = update_of(task, work.name, pulled, outcome, residual, Began(0.0, time.monotonic()), layout)
        left = ResidualWriter(files.next_residual, work.run_id)
        try:
            with files.payload.open("wb") as payload:
                header, kept = fill(payload, left.add)
            if kept is not None and (left.begun or files.has_residual):
                left.finish(kept)
        finally:
            left.close()
        if keep := personal_layers_writer(outcome.weights or {}, work.run_id, task.is_personal):
            keep(files.next_personal)
        if keep_state := kept_writer(outcome.kept, work.run_id):
            keep_state(files.next_kept)
        for name in _LEFT_OUT:
            header.ClearField(name)
        return header


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
