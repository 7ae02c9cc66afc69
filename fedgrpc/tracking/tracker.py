"""A tracker takes the figures of a run, one step (a round) at a time, and puts them somewhere.

    jsonl:FILE             one JSON object a line                       (nothing to install)
    tensorboard:FOLDER     event files                                  (extra fedgrpc[tensorboard])
    mlflow:FOLDER or URI   a run of MLflow                              (extra fedgrpc[mlflow])
    wandb:PROJECT          a run of Weights & Biases, offline           (extra fedgrpc[wandb])
    package.module:Class:TARGET      a class of one's own, made with the text TARGET
    NAME:TARGET                      likewise, a class that an installed package has under that name

The rule: a tracker is told what happened and decides nothing. What it raises costs its figures, never the run
(`Tracking`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from fedgrpc.errors import UsageError
from fedgrpc.plugins import class_of


class Tracker(Protocol):
    """Destination of figures. One thread calls it. `begin` comes first, and again after a restart of the run."""

    def begin(self, run: str, settings: Mapping[str, str]) -> None:
        """Take the name of a run and its settings, as texts."""
        ...

    def log(self, step: int, values: Mapping[str, float], at_s: float) -> None:
        """Take the figures of a step; `at_s` is wall time, of a simulated run its virtual time.

        A step may come more than once, with figures that were not known before, such as scores.
        """
        ...

    def end(self) -> None:
        """Write what is still to be written."""
        ...


def _jsonl(target: str) -> Tracker:
    from fedgrpc.tracking.jsonl import JsonLines

    return JsonLines(target)


def _tensorboard(target: str) -> Tracker:
    from fedgrpc.tracking.tensorboard import TensorBoard

    return TensorBoard(target)


def _mlflow(target: str) -> Tracker:
    from fedgrpc.tracking.mlflow import MLflow

    return MLflow(target)


def _wandb(target: str) -> Tracker:
    from fedgrpc.tracking.wandb import WeightsAndBiases

    return WeightsAndBiases(target)


TRACKERS: Final[dict[str, Callable[[str], Tracker]]] = {
    "jsonl": _jsonl,
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}


def tracker_of(text: str) -> Tracker:
    """Return the tracker of a text such as `jsonl:rounds.jsonl`. Raises `UsageError`."""
    if text.partition(":")[0] in TRACKERS:
        name, _, target = text.partition(":")
        if not target:
            raise UsageError(f"the tracker {name} needs to know where to, as in {name}:TARGET")
        return TRACKERS[name](target)
    name, found, target = class_of("tracker", text, {})
    if not callable(getattr(found, "log", None)):
        raise UsageError(f"tracker {name}: the class has no method log()")
    tracker: Tracker = found(target)
    return tracker
