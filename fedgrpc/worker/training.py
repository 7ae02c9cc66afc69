"""The local work of a worker: download, train or score with the user's learning task in threads, spool the update.

The rule: one task at a time uses the trainer, and whatever it comes to is on the disk before anything is sent.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

import structlog

from fedgrpc.aio import in_thread
from fedgrpc.codec.feedback import Residual
from fedgrpc.codec.layout import Layout
from fedgrpc.errors import FedgrpcError, TaskError
from fedgrpc.process import forget_peak_memory
from fedgrpc.protocol.descriptions import ModelDescription
from fedgrpc.protocol.devices import Activity
from fedgrpc.protocol.tasks import Registration, Task
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.runs.task_context import LocalTask
from fedgrpc.storage.files import storage_errors
from fedgrpc.submodels.cost import most_weights_bytes
from fedgrpc.submodels.plan import WHOLE_MODEL
from fedgrpc.submodels.plan_choice import USELESS_RATIO
from fedgrpc.trainer import EvalResult, LocalExamples, Trainer, Weights, local_examples
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.worker.algorithm_work import algorithm_for, check_allowed
from fedgrpc.worker.caller import Report
from fedgrpc.worker.device import resident_bytes, usable_memory_bytes
from fedgrpc.worker.guarded_trainer import guarded, users_code
from fedgrpc.worker.held_model import HeldModel
from fedgrpc.worker.local_work import TaskFiles
from fedgrpc.worker.secure_part import SecurePart, sharing
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.spool import Fill, SpooledUpdate
from fedgrpc.worker.status import StatusPublisher
from fedgrpc.worker.trainer_calls import (
    ALL_PARTS,
    Hooks,
    described,
    evaluate,
    fitting,
    initialize,
    parts_of,
    reads_on_access,
    train,
)
from fedgrpc.worker.training_mark import TrainingMark
from fedgrpc.worker.update import (
    Began,
    Outcome,
    kept_writer,
    load_personal_layers,
    personal_layers_writer,
    update_of,
)

log = structlog.get_logger()

_REPORT_INTERVAL_S: Final = 0.1

# Returns the pulled weights: each read on access, or all writable and not shared. Slow: call it in a thread.
Given = Callable[[bool], Weights]


class TrainerWork:
    """Trains and scores with the learning task, which is built at the first registration. A `LocalWork`."""

    gives_back = True

    def __init__(
        self,
        settings: WorkerSettings,
        files: TaskFiles,
        publisher: StatusPublisher,
        build_trainer: Callable[[Registration], Trainer],
    ) -> None:
        self._settings = settings
        self._files = files
        self._publisher = publisher
        self._build_trainer = build_trainer
        self._trainer: Trainer | None = None
        self._built_from: Registration | None = None
        self._built = asyncio.Event()
        # Trainers know no threads, and a device has memory for one training.
        self._trainer_in_use = asyncio.Lock()
        self._process_bytes = 0
        self._mark = TrainingMark(settings.state_dir / "training")
        self._descriptions: dict[bool, ModelDescription] = {}
        # Examples that the last update of a run was trained on. A restarted worker takes all of its own for new.
        self._trained: tuple[str, LocalExamples | None] = ("", None)

    @property
    def parts(self) -> frozenset[str]:
        """See `LocalWork.parts`. Before the trainer is built, what most trainers can do."""
        return ALL_PARTS if self._trainer is None else parts_of(self._trainer)

    async def prepare(self, registration: Registration) -> bool:
        """See `LocalWork.prepare`."""
        if self._trainer is not None:
            return False
        self._trainer = guarded(await asyncio.to_thread(self._build_trainer, registration))
        self._built_from = registration
        self._process_bytes = resident_bytes()
        self._built.set()
        return True

    async def release(self) -> None:
        """Let the learning task go, once it trains no more; `prepare` builds it again."""
        async with self._trainer_in_use:
            self._trainer = None
            self._built.clear()

    async def description(self, registration: Registration) -> ModelDescription:
        """See `LocalWork.description`."""
        assert self._trainer is not None
        asked = registration.tell_channels
        if asked not in self._descriptions:
            found = await asyncio.to_thread(described, self._trainer, self._process_bytes, asked)
            self._descriptions[asked] = replace(found, killed=self._mark.too_large)
        return self._descriptions[asked]

    @asynccontextmanager
    async def polling(self, registration: Registration) -> AsyncIterator[int | None]:
        """See `LocalWork.polling`: a worker can always take a task."""
        # A learning task that is not in memory is not built to count its examples.
        silent = registration.without_metrics or self._trainer is None
        examples = None if silent else await asyncio.to_thread(self._examples)
        run_id, trained = self._trained
        known = trained if run_id == registration.run_id else None
        yield None if examples is None else examples.new_since(known)

    def _examples(self) -> LocalExamples | None:
        """Return the trainer's examples; None where it cannot tell. Slow where they have changed."""
        assert self._trainer is not None
        try:
            with users_code():
                return local_examples(self._trainer)
        except FedgrpcError as error:
            log.debug("examples not counted", reason=str(error))
            return None

    async def perform(self, task: Task, message: aggregator_pb2.Task, report: Report) -> SpooledUpdate:
        """Download, train or score, and spool the update. Raises `TaskError` for a plan that is refused here."""
        _check_plan(task, self._settings.min_batch_size)
        check_allowed(task, self._settings.allow_algorithms)
        if self._settings.only_secure and task.kind is TaskKind.TRAIN and not message.HasField("secure"):
            raise TaskError("this device sends no update that is not masked for a secure sum: its --only-secure")
        self._mark.check(task.token)
        forget_peak_memory()
        part = None
        if message.HasField("secure"):
            assert self._built_from is not None
            part = await asyncio.to_thread(self._files.secure_part, task, message, self._built_from)
        async with sharing(part) as shared:
            return await self._performed(task, message, report, part, shared)

    async def _performed(
        self,
        task: Task,
        message: aggregator_pb2.Task,
        report: Report,
        part: SecurePart | None,
        shared: asyncio.Task[None] | None,
    ) -> SpooledUpdate:
        given, layout, download_s = await self._download(task, report, part)
        began = Began(download_s, time.monotonic())
        stop = threading.Event()
        hooks = Hooks(stop, self._reporter(stop), self._settings.throttle)
        assert self._trainer is not None
        # Before the training: data that changes meanwhile is new.
        examples = await asyncio.to_thread(self._examples)
        async with self._trainer_in_use:
            with fitting(task):
                outcome = await self._local_work(self._trainer, task, given, hooks)
        self._publisher.show(notice=_notice(task, outcome))
        if shared is not None:
            # Masks follow from who has shared.
            await shared

        def fill(residual: Residual) -> Fill:
            # Read the weights again: the learning task may have trained in the arrays that it was given.
            pulled = {} if outcome.weights is None else given(True)
            masked = None if part is None else part.masked
            return update_of(task, self._settings.name, pulled, outcome, residual, began, layout, masked)

        keep = personal_layers_writer(outcome.weights or {}, task.run_id, task.is_personal)
        update = await self._files.store(task, message, fill, keep, kept_writer(outcome.kept, task.run_id))
        if task.kind is TaskKind.TRAIN:
            self._trained = (task.run_id, examples)
        return update

    async def _download(self, task: Task, report: Report, part: SecurePart | None) -> tuple[Given, Layout, float]:
        """Return the weights to start from, their layout, and the seconds that their download took."""
        if task.kind is TaskKind.INITIALIZE:
            return lambda on_access: {}, (), 0.0
        held, download_s = await self._files.download(task, report, self._most_bytes(task))
        if part is not None:
            await asyncio.to_thread(part.check_model, held)
        spool = self._files.spool

        def given(on_access: bool) -> Weights:
            weights = held.tensors() if on_access else held.weights()
            with storage_errors(spool.personal):
                return load_personal_layers(weights, spool.personal, task.run_id, task.is_personal)

        return given, held.manifest.layout, download_s

    def _most_bytes(self, task: Task) -> int:
        """Return the bytes of the largest model that this device can train, or score, as the task says."""
        if self._settings.max_model_bytes is not None:
            return self._settings.max_model_bytes
        plan = (task.local_model or WHOLE_MODEL) if task.kind is TaskKind.TRAIN else None
        return most_weights_bytes(usable_memory_bytes(), self._process_bytes, plan)

    async def _local_work(self, trainer: Trainer, task: Task, given: Given, hooks: Hooks) -> Outcome:
        if task.kind is TaskKind.INITIALIZE:
            self._publisher.enter(Activity.TRAINING)
            return await in_thread(lambda: initialize(trainer, task), hooks.stop)
        scores, on_access = None, reads_on_access(trainer)
        # What the run's algorithm keeps on this device.
        kept: Weights = {}
        if algorithm_for(task).keeps:
            kept = (await asyncio.to_thread(self._files.spool.kept, task.run_id)).tensors
        if task.kind is TaskKind.EVALUATE or task.evaluate:
            self._publisher.enter(Activity.EVALUATING)
            scores = await in_thread(lambda: evaluate(trainer, given(on_access), hooks, task, kept), hooks.stop)
        if task.kind is TaskKind.EVALUATE:
            if scores is None:
                raise TaskError("there is no held-out data on this device to score the model on")
            return Outcome(None, scores.example_count, scores=scores)
        self._publisher.enter(Activity.TRAINING)
        with self._mark.during(task.token, LocalTask(task.local_model or WHOLE_MODEL, task.sub_model)):
            return await in_thread(lambda: train(trainer, given(on_access), task, hooks, scores, kept), hooks.stop)

    async def score(self, run_id: str, model: HeldModel) -> Mapping[str, float]:
        """Score a released model as applications get it, when no task uses the trainer; {} without local data.

        Raises `TaskError` for one that this device cannot use.
        """
        await self._built.wait()
        async with self._trainer_in_use:
            trainer, stop = self._trainer, threading.Event()
            assert trainer is not None
            size_bytes = sum(spec.nbytes for spec in model.manifest.layout)
            if size_bytes > (most := most_weights_bytes(usable_memory_bytes(), self._process_bytes, None)):
                raise TaskError(f"the model has {size_bytes} bytes, and this device has room for {most}")
            hooks, on_access = (
                Hooks(stop, lambda progress: None, self._settings.throttle),
                reads_on_access(trainer),
            )

            def scored() -> EvalResult | None:
                return evaluate(trainer, model.tensors() if on_access else model.weights(), hooks)

            result = await in_thread(scored, stop)
        if result is not None and result.not_finite:
            raise TaskError(f"its {result.not_finite[0]} is not finite")
        return {} if result is None else result.metrics

    def _reporter(self, stop: threading.Event) -> Callable[[float], None]:
        """Return a function for the training thread that shows progress, a few times a second."""
        loop = asyncio.get_running_loop()
        next_at_s = 0.0

        def report(progress: float) -> None:
            nonlocal next_at_s
            now_s = time.monotonic()
            if now_s >= next_at_s and not stop.is_set():
                next_at_s = now_s + _REPORT_INTERVAL_S
                loop.call_soon_threadsafe(lambda: self._publisher.show(progress=progress))

        return report


def _notice(task: Task, outcome: Outcome) -> str:
    """Tell the owner that the number format of the plan adds nothing; "" if it does."""
    if task.kind is not TaskKind.TRAIN or outcome.noise_ratio <= USELESS_RATIO:
        return ""
    arithmetic = None if task.local_model is None else task.local_model.arithmetic
    name = "its number format" if arithmetic is None else arithmetic.format
    log.warning("number format adds nothing", round=task.round, format=name, noise_ratio=outcome.noise_ratio)
    return (
        f"{name} adds nothing: the noise of its rounding is {outcome.noise_ratio:.3g} times the update, squared; "
        "the update hardly counts, and the aggregator is to give this device another plan"
    )


def _check_plan(task: Task, min_batch_size: int) -> None:
    """Refuse batches so small that the update tells of single examples. The device's owner sets the bound."""
    batch_size = task.plan.batch_size
    if task.kind is TaskKind.TRAIN and batch_size is not None and batch_size < min_batch_size:
        raise TaskError(
            f"this device trains on no batches of {batch_size}: its --min-batch-size is {min_batch_size}"
        )
