"""The learning task as an algorithm's device half sees it: it trains in passes, and scores weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from fedgrpc.algorithms.algorithm import Algorithm, Pass, Received, Term
from fedgrpc.algorithms.companions import received
from fedgrpc.algorithms.registry import algorithm_of, own_class
from fedgrpc.errors import TaskError, UsageError
from fedgrpc.protocol.tasks import Task
from fedgrpc.trainer import Trainer, TrainJob, TrainResult, Weights

NOTHING_KEPT: Final[Mapping[str, Any]] = MappingProxyType({})


def check_allowed(task: Task, allowed: Collection[str]) -> None:
    """Raise `TaskError` for a class that an aggregator names and that this device's owner has not allowed.

    Importing a module runs it, so that an aggregator may not name any there is.
    """
    name = own_class(task.plan.algorithm)
    if name and not any(fnmatchcase(name, pattern) for pattern in allowed):
        raise TaskError(f"this device takes no algorithm {name}: its owner can allow it with --allow-algorithm")


def algorithm_for(task: Task) -> Algorithm:
    """Return the algorithm of a task's plan. Raises `TaskError` for one that cannot be had here."""
    try:
        return algorithm_of(task.plan.algorithm)
    except UsageError as error:
        raise TaskError(str(error)) from error


def received_for(algorithm: Algorithm, weights: Weights, kept: Weights) -> Received:
    """Take a version apart. Raises `TaskError` for one that the algorithm did not begin."""
    try:
        return received(algorithm, weights, kept)
    except UsageError as error:
        raise TaskError(str(error)) from error


class AlgorithmWork:
    """Carries out passes and scores of one task. `copies`: the trainer may change the arrays that it is given."""

    def __init__(self, trainer: Trainer, job: TrainJob, copies: bool) -> None:
        self._trainer = trainer
        self._job = job
        self._copies = copies

    def train(self, wanted: Pass) -> TrainResult:
        """Train once. Raises `TaskError` when the learning task does not apply the algorithm's term."""
        asked = False

        def term() -> Term:
            nonlocal asked
            asked = True
            return wanted.term

        start = {name: np.array(array) for name, array in wanted.start.items()} if self._copies else wanted.start
        result = self._trainer.train(start, self._job_of(wanted, term))
        if not (asked or wanted.term.is_nothing):
            raise TaskError(
                "the run's algorithm adds a term to the gradient, and this learning task never asked for it: "
                "train() is to add job.term().gradient(...)"
            )
        return result

    def score(self, weights: Weights) -> Mapping[str, float]:
        """Return the scores of these weights; empty without held-out examples."""
        result = self._trainer.evaluate(weights)
        return {} if result is None else result.metrics

    def _job_of(self, wanted: Pass, term: Any) -> TrainJob:
        steps, share = self._job.max_steps, wanted.share
        most = None if steps is None else max(1, round(steps * share))
        return replace(self._job, term=term, epochs=self._job.epochs * share, max_steps=most)
