"""Histories of the workers of a run, over rounds and restarts: the times of their tasks, and how they ended.

The rule: a task is remembered once, when it has ended, in the transaction that ends its round.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from fedgrpc.aggregator.registry import WorkerRegistry
from fedgrpc.protocol.descriptions import ModelDescription
from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rounds.history import (
    Histories,
    Timing,
    WorkerHistory,
    cut_download,
    cut_upload,
    expected_parts,
    timing_of,
    timing_of_accepted,
)
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.task import Task
from fedgrpc.runs.round_in_progress import DroppedTask, RoundInProgress
from fedgrpc.runs.task_context import Report
from fedgrpc.v1 import aggregator_pb2, device_pb2

_SHARE = 0.9
_MARGIN = 1.2
# Without a loss, the number of examples stands for the worth of an update.
_UNTOLD_LOSS = 1.0
_NO_HISTORY = WorkerHistory()
_UNDESCRIBED = ModelDescription()


class RunWorkers:
    """Knowledge of one run about the workers of a fleet: how their tasks went, and what they say of its model.

    A worker that the fleet does not know has no place here.
    """

    def __init__(self, fleet: WorkerRegistry) -> None:
        self._fleet = fleet
        self._histories: dict[str, WorkerHistory] = {}
        self._descriptions: dict[str, ModelDescription] = {}

    def history(self, name: str) -> WorkerHistory:
        """Return the history of a worker; an empty one for a worker without any."""
        return self._histories.get(name, _NO_HISTORY)

    def trainers(self) -> Histories:
        """Return the history of each trainer that has had a task."""
        return {
            name: history
            for name, history in self._histories.items()
            if history.selected and (worker := self._fleet.find(name)) is not None and not worker.evaluator
        }

    def remember(self, histories: Histories) -> None:
        """Replace the histories of these workers; some may have been forgotten since."""
        for name, history in histories.items():
            if (worker := self._fleet.find(name)) is not None:
                self._histories[name] = history
                worker.delivered = worker.delivered or history.accepted > 0

    def description(self, name: str) -> ModelDescription:
        """Return what a worker says of the model, without channels."""
        return self._descriptions.get(name, _UNDESCRIBED)

    def describe(self, name: str, description: ModelDescription) -> None:
        """Keep what a worker says of the model."""
        self._descriptions[name] = description

    def forget(self, names: Iterable[str]) -> None:
        """Forget workers that the fleet has forgotten."""
        for name in names:
            self._histories.pop(name, None)
            self._descriptions.pop(name, None)


def histories_after(round_: RoundInProgress, workers: RunWorkers) -> dict[str, WorkerHistory]:
    """Return the histories of those who had a task in a round that has ended, with what it showed of them.

    A task that is carried on has not ended. Scores and initial weights take other times than training does: of
    those only what was accepted is counted.
    """
    state = round_.state
    committed = state.version is not None
    changed: dict[str, WorkerHistory] = {}
    for token, task in state.tasks.items():
        if token in state.carried:
            continue
        history = changed.get(task.worker) or workers.history(task.worker)
        context = round_.context(token)
        if round_.kind is TaskKind.TRAIN:
            history = remember(history, task, context.report, state.policy.deadline_s)
            history = with_rates(history, task, context.report, context.download_bytes)
        accepted = committed and task.phase is TaskPhase.ACCEPTED
        changed[task.worker] = replace(history, accepted=history.accepted + 1) if accepted else history
    return changed


def histories_of(dropped: Iterable[DroppedTask], workers: RunWorkers) -> dict[str, WorkerHistory]:
    """Return the histories of workers whose carried-over tasks were dropped. Accepted ones tell nothing."""
    changed: dict[str, WorkerHistory] = {}
    for each in dropped:
        task = each.task
        if task.phase is not TaskPhase.ACCEPTED:
            history = changed.get(task.worker) or workers.history(task.worker)
            changed[task.worker] = with_rates(remember(history, task, None, 0.0), task, None, 0)
    return changed


def remember(history: WorkerHistory, task: Task, report: Report | None, most_s: float) -> WorkerHistory:
    """Return the history with a task of training that has ended."""
    history = history.ended(task.loss_cause)
    if task.phase is TaskPhase.ACCEPTED and report is not None:
        timings = report.timings
        said = Timing(timings.download_s, timings.local_s, timings.upload_s)
        loss = report.metrics.get("train_loss", report.metrics.get("loss", _UNTOLD_LOSS))
        history = history.timed(timing_of_accepted(task, said, most_s))
        return replace(history, loss=loss, example_count=report.example_count)
    timing = timing_of(task)
    return history if timing is None else history.timed(timing)


def with_rates(history: WorkerHistory, task: Task, report: Report | None, pulled_bytes: int) -> WorkerHistory:
    """Return the history with what an ended task shows of its worker's link."""
    up, down = cut_upload(task), cut_download(task, pulled_bytes)
    if task.phase is TaskPhase.ACCEPTED and report is not None:
        up = float(report.upload_bytes), report.timings.upload_s
        down = float(pulled_bytes), report.timings.download_s
    # A carried task was pulled in a round before.
    downlink = history.downlink if task.carried else history.downlink.after(*down)
    return replace(history, uplink=history.uplink.after(*up), downlink=downlink)


def upload_reserve_s(history: WorkerHistory, least_s: float) -> float:
    """Return the time to reserve for a worker's upload: at least this, and as its uploads have taken."""
    return max(least_s, _MARGIN * (expected_parts(history, _SHARE)[2] or 0.0))


def tell_history(history: WorkerHistory, record: aggregator_pb2.WorkerRecord) -> None:
    """Fill in what operators see of it."""
    record.rounds_selected, record.rounds_accepted = history.selected, history.accepted
    download_s, local_s, upload_s = (part or 0.0 for part in expected_parts(history, _SHARE))
    if history.timings:
        expected = device_pb2.Timings(download_seconds=download_s, local_seconds=local_s, upload_seconds=upload_s)
        record.expected_timings.CopyFrom(expected)
    record.endings.update(Counter(cause.label for cause in history.endings))
