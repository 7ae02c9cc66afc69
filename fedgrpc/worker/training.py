"""The local part of a task: score, train, and turn the outcome into a spooled update. Runs in threads.

TRAIN         payload: what training changed (fedgrpc.worker.delta), plus the residual where it is lossy
INITIALIZE    payload: the initial weights themselves
EVALUATE      no payload: scores of the given weights
"""

from __future__ import annotations

import resource
import sys
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO, Final

import numpy as np
import structlog

from fedgrpc.codec.feedback import Corrected, Keep, Residual, write_with_feedback
from fedgrpc.codec.layout import Layout, TensorRole, layout_of
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import FedgrpcError, LayoutError, TaskError, TaskUnfit, UsageError
from fedgrpc.protocol.records import Timings, timings_to_proto
from fedgrpc.protocol.tensors import channels_to_proto, manifest_to_proto
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.submodels.plan import TASK_PARTS, WORKER_PARTS, CompressionPlan
from fedgrpc.trainer import (
    Cancelled,
    EvalResult,
    SliceableTrainer,
    Trainer,
    TrainJob,
    TrainResult,
    Weights,
    kept_whole,
    roles,
    tied_names,
)
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.worker import returned
from fedgrpc.worker.budget import fitted
from fedgrpc.worker.delta import Delta
from fedgrpc.worker.part import Covered
from fedgrpc.worker.spool import Fill
from fedgrpc.worker.task import Plan, Task, TaskKind
from fedgrpc.worker.throttle import Throttle

log = structlog.get_logger()

_LOCAL: Final = "local_"
ALL_PARTS: Final = WORKER_PARTS | TASK_PARTS


@dataclass(frozen=True)
class Hooks:
    """How training talks to the loop from its thread: `stop` is set to cancel, `report` takes 0 to 1."""

    stop: threading.Event
    report: Callable[[float], None]
    throttle: Throttle


@dataclass(frozen=True)
class Outcome:
    """What the local work gave. `weights` are trained, initial, or None for scores alone.

    `start`, `masks`, `clustered` and `tensor_bytes` are those of `TrainResult`; `layout` is that of
    initial weights.
    """

    weights: Weights | None
    example_count: int
    steps: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    scores: EvalResult | None = None
    start: Weights | None = None
    masks: Weights = field(default_factory=dict)
    clustered: Collection[str] = ()
    channels: ChannelMap | None = None
    tensor_bytes: int = 0
    layout: Layout = ()


def parts_of(trainer: Trainer) -> frozenset[str]:
    """The parts of a local-model plan that a worker with this trainer can do."""
    return WORKER_PARTS | (TASK_PARTS if isinstance(trainer, SliceableTrainer) else frozenset())


def evaluate(trainer: Trainer, weights: Weights, hooks: Hooks) -> EvalResult | None:
    """Score `weights` on local held-out data; None where there is none. Raises TaskError."""
    started_s = time.monotonic()
    with users_code():
        result = returned.eval_result(trainer.evaluate(weights))
    hooks.throttle.rest(time.monotonic() - started_s, hooks.stop)
    return result


def initialize(trainer: Trainer, plan: Plan) -> Outcome:
    """The untrained weights of the task's model. Raises TaskError."""
    weights, layout = first_weights(trainer)
    with users_code():
        return Outcome(weights, 0, channels=_channels(trainer, plan.tell_channels), layout=layout)


def first_weights(trainer: Trainer) -> tuple[Weights, Layout]:
    """The untrained weights and their layout. Raises TaskError, and TaskUnfit for what no run can begin with."""
    with users_code():
        weights = returned.initial_weights(trainer.initial_weights())
        return weights, returned.layout(roles(trainer), tied_names(trainer), weights)


def train(
    trainer: Trainer, weights: Weights, task: Task, hooks: Hooks, scores: EvalResult | None = None
) -> Outcome:
    """Train from `weights` as the plan says. Raises TaskError, or Cancelled when told to stop."""
    plan = task.plan
    needed = (plan.compression or CompressionPlan()).parts | (set() if plan.sub_model.whole else {"sub_model"})
    if lacking := needed - parts_of(trainer):
        raise TaskError(f"this learning task cannot do the plan's {', '.join(sorted(lacking))}")
    job = job_of(plan, task.round, hooks, task.training_ends_s)
    with users_code():
        result = returned.train_result(trainer.train(weights, job))
        metrics = {**result.metrics, **_local_scores(trainer, result, task, hooks, scores)}
        channels = _channels(trainer, True) if plan.tell_channels else None
    return Outcome(
        result.weights,
        result.example_count,
        result.steps,
        metrics,
        scores,
        result.start,
        result.masks,
        result.clustered,
        channels,
        result.tensor_bytes,
    )


def _local_scores(
    trainer: Trainer, result: TrainResult, task: Task, hooks: Hooks, scores: EvalResult | None
) -> dict[str, float]:
    """Of the trained model, where the model that was given was scored, and there is time for more than to send."""
    ends_s = task.training_ends_s
    known = any(name.startswith(_LOCAL) for name in result.metrics)
    if scores is None or known or (ends_s is not None and time.monotonic() >= ends_s):
        return {}
    # A copy: what is sent must not change should the learning task score in place. The optimizer's state is free.
    local = evaluate(trainer, {name: np.array(array) for name, array in result.weights.items()}, hooks)
    return {} if local is None else {f"{_LOCAL}{name}": value for name, value in local.metrics.items()}


def _channels(trainer: Trainer, wanted: bool) -> ChannelMap | None:
    """The channels of its model; None where it has none to tell.

    `wanted`: some device is to train a narrower model, and what stands in the way is worth a warning.
    """
    tell = log.warning if wanted else log.debug
    if not isinstance(trainer, SliceableTrainer):
        return None
    try:
        channels = trainer.channels()
        for names, reason in kept_whole(trainer):
            tell("kept whole at every width", tensors=names, reason=reason)
        return channels
    except (UsageError, TaskError) as error:
        tell("channels unknown", reason=str(error))
        return None


def job_of(plan: Plan, number: int, hooks: Hooks, ends_s: float | None = None) -> TrainJob:
    """The plan as a trainer sees it, wired to the hooks; `ends_s` is of the monotonic clock."""
    return TrainJob(
        epochs=1.0 if plan.epochs is None else plan.epochs,
        max_steps=plan.max_steps,
        batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        momentum=plan.momentum,
        proximal_mu=plan.proximal_mu,
        label_adjustment=plan.label_adjustment,
        seed=plan.seed,
        round=number,
        compression=plan.compression,
        stop=hooks.stop.is_set,
        time_left_s=None if ends_s is None else lambda: ends_s - time.monotonic(),
        report=lambda done, total: hooks.report(done / total),
        pause=lambda batch_s: hooks.throttle.rest(batch_s, hooks.stop),
    )


@contextmanager
def users_code() -> Iterator[None]:
    """Around calls of the trainer: whatever it raises is a TaskError of one line."""
    try:
        yield
    except (Cancelled, FedgrpcError):
        raise
    except Exception as error:
        log.debug("the learning task raised", exc_info=True)
        text = " ".join(str(error).split())
        raise TaskError(f"the learning task raised {type(error).__name__}: {text}") from error


@contextmanager
def fitting(task: Task) -> Iterator[None]:
    """Around local work: a model that is not the run's will not be in any other round. Raises TaskUnfit."""
    try:
        yield
    except LayoutError as error:
        if not task.plan.sub_model.whole:
            raise
        raise TaskUnfit(str(error)) from error


def update_of(
    task: Task,
    worker: str,
    given: Weights,
    outcome: Outcome,
    residual: Residual,
    began: Began,
    layout: Layout = (),
) -> Fill:
    """What the spool calls to write the update and the residual it leaves; `layout` is the run's, of `given`.

    `given` are the weights as they were pulled: the trainer may have changed those that it was handed.
    """

    def fill(payload: BinaryIO, keep: Keep) -> tuple[aggregator_pb2.UpdateHeader, Layout | None]:
        manifest, left = _write(task, worker, given, layout, outcome, residual, payload, keep)
        unchanged = task.kind is TaskKind.TRAIN and _left_as_it_was(outcome, given, layout)
        if unchanged:
            log.warning("training changed nothing", round=task.round, steps=outcome.steps)
        return _header(task, worker, outcome, manifest, began.timings(), unchanged), left

    return fill


def _left_as_it_was(outcome: Outcome, given: Weights, layout: Layout) -> bool:
    """Whether each parameter that training returned is the one that it began with."""
    start = given if outcome.start is None else outcome.start
    others = {spec.name for spec in layout if spec.role is not TensorRole.PARAMETER}
    trained = (outcome.weights or {}).items()
    return all(np.array_equal(array, start[name]) for name, array in trained if name not in others)


@dataclass(frozen=True)
class Began:
    """When the local work began, on the monotonic clock, after a download of `download_s`."""

    download_s: float
    local_at_s: float

    def timings(self) -> Timings:
        """Until now. The time of the upload is not known yet: the aggregator measures it."""
        return Timings(download_s=self.download_s, local_s=time.monotonic() - self.local_at_s)


def _write(
    task: Task,
    worker: str,
    given: Weights,
    known: Layout,
    outcome: Outcome,
    residual: Residual,
    payload: BinaryIO,
    keep: Keep,
) -> tuple[Manifest, Layout | None]:
    recipe = Recipe.parse(task.upload_recipe or "raw")
    draw = partial(np.random.default_rng, (task.plan.seed, task.round, zlib.crc32(worker.encode())))
    if outcome.weights is None:
        return write_payload({}, recipe, payload, draw()), None
    if task.kind is TaskKind.INITIALIZE:
        return write_payload(outcome.weights, recipe, payload, draw(), outcome.layout), None
    start = given if outcome.start is None else outcome.start
    delta = Delta(outcome.weights, start, known, given)
    if delta.changed_constants:
        log.warning("constants changed by training stay as they are", tensors=delta.changed_constants)
    recipe = recipe.for_layout(layout_of(start, known))
    part = Covered(delta, outcome.masks, outcome.clustered, is_personal(task.plan))
    if outcome.masks or task.plan.sub_model.moves:
        # The next update covers other coordinates: what this one lost is not owed to those.
        return write_payload(part, fitted(recipe, part, known, task, draw), payload, draw(), known), None
    names = set(part)
    kept = tuple(spec for spec in delta.layout if spec.name in names)
    layout = layout_of(part, known) if outcome.clustered else kept
    recipe = fitted(recipe, Corrected(part, residual, layout), known, task, draw)
    return write_with_feedback(part, residual, recipe, payload, draw(), layout, keep)[0], layout


def is_personal(plan: Plan) -> Callable[[str], bool]:
    """Whether the tensor of a name stays on the device."""
    compression = plan.compression or CompressionPlan()
    return compression.is_personal


def _header(
    task: Task, worker: str, outcome: Outcome, manifest: Manifest, timings: Timings, unchanged: bool
) -> aggregator_pb2.UpdateHeader:
    scores = outcome.scores or EvalResult(0, {})
    header = aggregator_pb2.UpdateHeader(
        worker=worker,
        token=task.token,
        manifest=manifest_to_proto(manifest),
        example_count=outcome.example_count,
        steps=outcome.steps,
        metrics=outcome.metrics,
        evaluation_metrics=scores.metrics,
        evaluation_example_count=scores.example_count,
        timings=timings_to_proto(timings),
        peak_memory_bytes=peak_memory_bytes(),
        tensor_bytes=outcome.tensor_bytes,
        unchanged=unchanged,
        scores_not_finite=scores.not_finite,
    )
    if outcome.channels is not None:
        header.channels.CopyFrom(channels_to_proto(outcome.channels))
    return header


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
