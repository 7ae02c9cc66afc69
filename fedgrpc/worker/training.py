"""Calls of the learning task: initial weights, training, scores. Each runs in a thread.

The rule: whatever users' code raises or returns costs its task, never the worker.
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

from fedgrpc.codec.layout import Layout
from fedgrpc.errors import FedgrpcError, LayoutError, TaskError, TaskUnfit, UsageError
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
from fedgrpc.worker import validation
from fedgrpc.worker.task import Plan, Task
from fedgrpc.worker.throttle import Throttle
from fedgrpc.worker.update import Outcome

log = structlog.get_logger()

_LOCAL: Final = "local_"
ALL_PARTS: Final = WORKER_PARTS | TASK_PARTS


@dataclass(frozen=True)
class Hooks:
    """How training talks to the loop from its thread: `stop` is set to cancel, `report` takes 0 to 1."""

    stop: threading.Event
    report: Callable[[float], None]
    throttle: Throttle


def parts_of(trainer: Trainer) -> frozenset[str]:
    """The parts of a local-model plan that a worker with this trainer can do."""
    return WORKER_PARTS | (TASK_PARTS if isinstance(trainer, SliceableTrainer) else frozenset())


def evaluate(trainer: Trainer, weights: Weights, hooks: Hooks) -> EvalResult | None:
    """Score `weights` on local held-out data; None where there is none. Raises TaskError."""
    started_s = time.monotonic()
    with users_code():
        result = validation.eval_result(trainer.evaluate(weights))
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
        weights = validation.initial_weights(trainer.initial_weights())
        return weights, validation.initial_layout(roles(trainer), tied_names(trainer), weights)


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
        result = validation.train_result(trainer.train(weights, job))
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
