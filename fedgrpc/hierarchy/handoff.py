"""The hand-over of a parent's task to the round that carries it out. One task at a time, on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fedgrpc.codec.layout import Array, Layout
from fedgrpc.errors import TaskError
from fedgrpc.hierarchy.partial_aggregate import StoredAggregate
from fedgrpc.v1 import aggregator_pb2


@dataclass(frozen=True)
class ParentTask:
    """A task of the parent, and the model to start from (none for initial weights).

    `given` are its tensors, each read when it is asked for, in the order of `layout`. `due_at` is when the round
    must end, seconds of the monotonic clock. None: this aggregator's own deadline decides alone.
    """

    task: aggregator_pb2.Task
    layout: Layout
    given: Mapping[str, Array]
    due_at: float | None

    @property
    def token(self) -> str:
        """The lease of the task."""
        return self.task.token


@dataclass(frozen=True)
class VersionToScore:
    """A version for the leaf's evaluators to score, whether or not there is a round of it."""

    version: int
    layout: Layout
    given: Mapping[str, Array]


class TaskReceiver(Protocol):
    """The driver's side of a hand-over: called at once, on the event loop."""

    def on_task(self, task: ParentTask) -> None:
        """A task came."""

    def on_withdrawn(self, task: ParentTask, reason: str) -> None:
        """The parent no longer wants the task."""

    def on_version(self) -> None:
        """A version to score came: `TaskHandoff.take_version` gives it."""


class TaskHandoff:
    """Holds the parent's present task, from the link that hands it over to the driver that answers it.

    `enough_workers` is set while this leaf can start a round, `evaluators` while it has an evaluator. `resuming`:
    a task from before a restart is on the disk, and the parent is to be asked for it however many workers there
    are.
    """

    def __init__(self) -> None:
        self.enough_workers = asyncio.Event()
        self.evaluators = asyncio.Event()
        self.resuming = False
        self.receiver: TaskReceiver | None = None
        self._task: ParentTask | None = None
        self._answer: asyncio.Future[StoredAggregate] | None = None
        self._version: tuple[VersionToScore, asyncio.Future[None]] | None = None

    # The link's side.

    async def carry_out(self, task: ParentTask) -> StoredAggregate:
        """Let a round carry the task out. Raises `TaskError` when the round makes no mean."""
        self._answer = asyncio.get_running_loop().create_future()
        self._task = task
        if self.receiver is not None:
            self.receiver.on_task(task)
        try:
            return await self._answer
        finally:
            self._task = None

    def withdraw(self, task: ParentTask, reason: str) -> None:
        """End the task's round: the parent no longer wants it."""
        if self.receiver is not None:
            self.receiver.on_withdrawn(task, reason)

    async def show(self, version: VersionToScore) -> None:
        """Make the version this aggregator's own, once no round is open. Raises `CodecError`."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._version = (version, done)
        if self.receiver is not None:
            self.receiver.on_version()
        await done

    # The driver's side.

    def next_task(self) -> ParentTask | None:
        """Return the task that has no answer yet."""
        return self._task if self._task is not None and self._pending(self._task.token) is not None else None

    def take_version(self) -> tuple[VersionToScore, asyncio.Future[None]] | None:
        """Return the version to show, once, and the future to settle when it is shown."""
        version, self._version = self._version, None
        return version

    def done(self, token: str, aggregate: StoredAggregate) -> None:
        """Answer the task of that token. An answer to any other task is ignored."""
        if (answer := self._pending(token)) is not None:
            answer.set_result(aggregate)

    def failed(self, token: str, reason: str) -> None:
        """Say that the task of that token cannot be carried out."""
        if (answer := self._pending(token)) is not None:
            answer.set_exception(TaskError(reason))

    def _pending(self, token: str) -> asyncio.Future[StoredAggregate] | None:
        if self._task is None or self._task.token != token or self._answer is None or self._answer.done():
            return None
        return self._answer
