"""What the worker shows of itself: one immutable status, replaced on every change, watched by any number."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Final

from fedgrpc.protocol.records import Timings, timings_to_proto
from fedgrpc.v1 import round_pb2, worker_pb2
from fedgrpc.worker.device import DeviceProfile
from fedgrpc.worker.task import Phase, TaskKind

_MIN_INTERVAL_S: Final = 0.25


class Activity(IntEnum):
    """What the worker's loop is doing; numbers as in `fedgrpc.v1.Activity`."""

    CONNECTING = worker_pb2.ACTIVITY_CONNECTING
    WAITING = worker_pb2.ACTIVITY_WAITING
    DOWNLOADING = worker_pb2.ACTIVITY_DOWNLOADING
    TRAINING = worker_pb2.ACTIVITY_TRAINING
    EVALUATING = worker_pb2.ACTIVITY_EVALUATING
    UPLOADING = worker_pb2.ACTIVITY_UPLOADING
    PAUSED = worker_pb2.ACTIVITY_PAUSED
    DRAINING = worker_pb2.ACTIVITY_DRAINING

    @property
    def phase(self) -> Phase:
        """The phase of a task that heartbeats carry during this activity."""
        if self is Activity.DOWNLOADING:
            return Phase.DOWNLOADING
        return Phase.UPLOADING if self is Activity.UPLOADING else Phase.TRAINING


@dataclass(frozen=True)
class Status:
    """Everything `GetStatus` tells."""

    worker: str
    aggregator: str
    activity: Activity = Activity.CONNECTING
    progress: float = 0.0
    run: str = ""
    round: int = 0
    model_version: int = 0
    device: DeviceProfile = field(default_factory=DeviceProfile)
    last_timings: Timings = field(default_factory=Timings)
    spooled_updates: int = 0
    last_error: str = ""
    task_kind: TaskKind | None = None

    def to_proto(self) -> worker_pb2.Status:
        """As it travels."""
        return worker_pb2.Status(
            worker=self.worker,
            aggregator=self.aggregator,
            activity=self.activity.value,
            progress=self.progress,
            run=self.run,
            round=self.round,
            model_version=self.model_version,
            device=self.device.to_proto(),
            last_timings=timings_to_proto(self.last_timings),
            spooled_updates=self.spooled_updates,
            last_error=self.last_error,
            task_kind=None if self.task_kind is None else round_pb2.TaskKind.Name(self.task_kind.value),
        )


class Board:
    """Holds the present status. Written by the worker's loop alone."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self._changed = asyncio.Event()
        self._entered = asyncio.Event()

    def show(self, **changes: Any) -> None:
        """Replace fields of the status; watchers wake."""
        if all(getattr(self.status, name) == value for name, value in changes.items()):
            return
        self.status = replace(self.status, **changes)
        self._changed.set()
        self._changed = asyncio.Event()

    def enter(self, activity: Activity) -> None:
        """Start an activity, with its progress at zero."""
        self.show(activity=activity, progress=0.0)
        self._entered.set()
        self._entered = asyncio.Event()

    async def next_activity(self, timeout_s: float) -> None:
        """Return when the next activity starts, or after `timeout_s`."""
        entered = self._entered
        try:
            async with asyncio.timeout(timeout_s):
                await entered.wait()
        except TimeoutError:
            return

    async def watch(self, min_interval_s: float = _MIN_INTERVAL_S) -> AsyncIterator[Status]:
        """The present status, then each one that follows; of those in quick succession only the last."""
        while True:
            changed = self._changed
            yield self.status
            await asyncio.sleep(min_interval_s)
            await changed.wait()
