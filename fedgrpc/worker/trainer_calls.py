"""Calls of a trainer for one task, which may take long: train, score, give the first weights, describe the model.

The rule: whatever users' code raises or returns costs its task, never the worker (fedgrpc.worker.guarded_trainer).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import structlog

from fedgrpc.algorithms.carrying_out import carry_out
from fedgrpc.algorithms.companions import joined, with_companions
from fedgrpc.errors import FedgrpcError, LayoutError, TaskError, TaskUnfit, UsageError
from fedgrpc.protocol.descriptions import ModelDescription
from fedgrpc.protocol.tasks import Task
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.submodels.plan import TASK_PARTS, WHOLE_MODEL, WORKER_PARTS
from fedgrpc.trainer import (
    Epoch,
    EvalResult,
    Trainer,
    TrainJob,
    TrainResult,
    Weights,
    activation_bytes,
    full_width_tensors,
    model_layout,
)
from fedgrpc.worker.algorithm_work import NOTHING_KEPT, AlgorithmWork, algorithm_for, received_for
from fedgrpc.worker.guarded_trainer import first_weights, is_sliceable, users_code
from fedgrpc.worker.throttle import Throttle
from fedgrpc.worker.update import Outcome

log = structlog.get_logger()

_LOCAL: Final = "local_"
_LONG_EPOCH_S: Final = 1.0
ALL_PARTS: Final = WORKER_PARTS | TASK_PARTS


@dataclass(frozen=True)
class Hooks:
    """Connection of a training thread to the loop: `stop` is set to cancel, `report` takes 0 to 1."""

    stop: threading.Event
    report: Callable[[float], None]
    throttle: Throttle


def parts_of(trainer: Trainer) -> frozenset[str]:
    """Return the parts of a local-model plan that a worker with this trainer can do."""
    return ALL_PARTS if is_sliceable(trainer) else WORKER_PARTS


def reads_on_access(trainer: Trainer) -> bool:
    """Return whether the trainer takes weights read one at a time, since its device may have no room for more."""
    return is_sliceable(trainer)


def evaluate(
    trainer: Trainer, weights: Weights, hooks: Hooks, task: Task | None = None, kept: Weights = NOTHING_KEPT
) -> EvalResult | None:
    """Score `weights` on local held-out data, as the task's algorithm personalizes them. Raises TaskError.

    Returns None if there is no such data.
    """
    started_s = time.monotonic()
    if task is not None:
        algorithm = algorithm_for(task)
        weights = algorithm.personal(received_for(algorithm, weights, kept))
    result = trainer.evaluate(weights)
    hooks.throttle.rest(time.monotonic() - started_s, hooks.stop)
    return result


def described(trainer: Trainer, process_bytes: int, tell_channels: bool) -> ModelDescription:
    """Describe the trainer's model in a process of that size. What the trainer cannot tell is left out."""
    model_bytes = activations = 0
    try:
        with users_code():
            model_bytes = sum(spec.nbytes for spec in model_layout(trainer))
            activations = activation_bytes(trainer)
    except FedgrpcError as error:
        log.debug("sizes of the model unknown", reason=str(error))
    channels = _channels(trainer, wanted=True) if tell_channels else None
    return ModelDescription(model_bytes, process_bytes, activations, channels)


def initialize(trainer: Trainer, task: Task) -> Outcome:
    """Return the untrained weights of the task's model, with its algorithm's companions. Raises TaskError."""
    weights, layout = with_companions(algorithm_for(task), *first_weights(trainer))
    return Outcome(weights, 0, channels=_channels(trainer, wanted=False), layout=layout)


def train(
    trainer: Trainer,
    weights: Weights,
    task: Task,
    hooks: Hooks,
    scores: EvalResult | None = None,
    kept: Weights = NOTHING_KEPT,
) -> Outcome:
    """Train from `weights` as the plan and its algorithm say. Raises TaskError, or Cancelled when told to stop.

    `kept` is what the algorithm has kept on this device.
    """
    needed = (task.local_model or WHOLE_MODEL).parts | (set() if task.sub_model.whole else {"sub_model"})
    if lacking := needed - parts_of(trainer):
        raise TaskError(f"this learning task cannot do the local model's {', '.join(sorted(lacking))}")
    algorithm = algorithm_for(task)
    if needed and (algorithm.keeps or algorithm.companions):
        raise TaskError(f"the algorithm {task.plan.algorithm} needs the whole model, and this task is of a part")
    work = AlgorithmWork(trainer, job_of(task, hooks), copies=algorithm.keeps and not reads_on_access(trainer))
    sent = carry_out(algorithm, received_for(algorithm, weights, kept), task.plan, work.train, work.score)
    result: TrainResult = sent.result
    metrics = {**result.metrics, **sent.metrics, **_local_scores(trainer, result, task, hooks, scores)}
    return Outcome(
        joined(algorithm, weights, sent),
        result.example_count,
        result.steps,
        metrics,
        scores,
        result.start,
        result.masks,
        result.clustered,
        tensor_bytes=result.tensor_bytes,
        noise_ratio=result.noise_ratio,
        kept=sent.kept,
    )


def _local_scores(
    trainer: Trainer, result: TrainResult, task: Task, hooks: Hooks, scores: EvalResult | None
) -> dict[str, float]:
    """Score the trained model if the given one was scored, and time is left for more than the upload."""
    ends_s = task.training_ends_s
    known = any(name.startswith(_LOCAL) for name in result.metrics)
    if scores is None or known or (ends_s is not None and time.monotonic() >= ends_s):
        return {}
    weights = result.weights
    if not reads_on_access(trainer):
        # A learning task that scores in place must not change the weights that are sent. There is memory for
        # copies, since the optimizer's state is free by now.
        weights = {name: np.array(array) for name, array in weights.items()}
    local = evaluate(trainer, weights, hooks)
    return {} if local is None else {f"{_LOCAL}{name}": value for name, value in local.metrics.items()}


def _channels(trainer: Trainer, wanted: bool) -> ChannelMap | None:
    """Return the channels of the trainer's model; None if it has none.

    `wanted`: some device is to train a narrower model, so log what stands in the way as a warning.
    """
    tell = log.warning if wanted else log.debug
    if not is_sliceable(trainer):
        return None
    try:
        channels = trainer.channels()
        for names, reason in full_width_tensors(trainer):
            tell("kept whole at every width", tensors=names, reason=reason)
        return channels
    except (UsageError, TaskError) as error:
        tell("channels unknown", reason=str(error))
        return None


def job_of(task: Task, hooks: Hooks) -> TrainJob:
    """The task as a trainer sees it, wired to the hooks. What the plan leaves open is as in `TrainJob`."""
    asked = {name: value for name, value in vars(task.plan).items() if value is not None}
    ends_s = task.training_ends_s
    return TrainJob(
        **asked,
        seed=task.seed,
        round=task.round,
        local_model=task.local_model,
        stop=hooks.stop.is_set,
        time_left_s=None if ends_s is None else lambda: ends_s - time.monotonic(),
        report=lambda done, total: hooks.report(done / total),
        report_epoch=lambda epoch: _tell_epoch(epoch, task),
        pause=lambda batch_s: hooks.throttle.rest(batch_s, hooks.stop),
    )


def _tell_epoch(epoch: Epoch, task: Task) -> None:
    """Log an epoch. Where many short ones follow each other, only a log of level debug has them."""
    tell = log.info if epoch.seconds >= _LONG_EPOCH_S else log.debug
    tell(
        "epoch trained",
        run=task.run,
        round=task.round,
        epoch=epoch.number,
        of=epoch.of,
        batches=epoch.batches,
        seconds=round(epoch.seconds, 2),
    )


@contextmanager
def fitting(task: Task) -> Iterator[None]:
    """Raise TaskUnfit for a model that is not the run's: it would not fit in any other round either."""
    try:
        yield
    except LayoutError as error:
        if not task.sub_model.whole:
            raise
        raise TaskUnfit(str(error)) from error
