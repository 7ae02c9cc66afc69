"""Where a task from above meets the round below that carries it out. One at a time, on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedgrpc.codec.layout import Array, Layout
from fedgrpc.errors import TaskError
from fedgrpc.hierarchy.partial_aggregate import StoredMean
from fedgrpc.v1 import aggregator_pb2


@dataclass(frozen=True)
class Order:
    """A task, the model to start from (none for initial weights), and until when its round may take (`due_at`).

    `given` are its tensors, each read when it is asked for, in the order of `layout`. `due_at` is of the monotonic
    clock, seconds; None: for as long as this aggregator's own deadline says.
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
class Shown:
    """A version that evaluators here are to score, whether or not there is a round of it."""

    version: int
    layout: Layout
    given: Mapping[str, Array]


class Desk:
    """Holds the order in hand. The link gives it, the driver answers; `crew` is set while enough work here, and
    `evaluators` while there is one.

    `resuming`: there is a task from before a restart, which the one above is to be asked for whoever works here.
    """

    def __init__(self) -> None:
        self.order: Order | None = None
        self.crew = asyncio.Event()
        self.evaluators = asyncio.Event()
        self.resuming = False
        self.shown: tuple[Shown, asyncio.Future[None]] | None = None
        self.ordered: Callable[[Order], None] = lambda order: None
        self.withdrawn: Callable[[Order, str], None] = lambda order, reason: None
        self.showing: Callable[[], None] = lambda: None
        self._answer: asyncio.Future[StoredMean] | None = None

    async def carry_out(self, order: Order) -> StoredMean:
        """Have a round make a mean of the order. Raises `TaskError` when the round came to nothing."""
        self._answer = asyncio.get_running_loop().create_future()
        self.order = order
        self.ordered(order)
        try:
            return await self._answer
        finally:
            self.order = None

    def withdraw(self, order: Order, reason: str) -> None:
        """Nothing of the order is wanted any more."""
        self.withdrawn(order, reason)

    async def show(self, shown: Shown) -> None:
        """Have the version be that of this aggregator, once no round is open. Raises `CodecError`."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.shown = (shown, done)
        self.showing()
        await done

    def done(self, token: str, mean: StoredMean) -> None:
        """The order of that token is carried out; any other is none of this mean's."""
        if (answer := self._waiting(token)) is not None:
            answer.set_result(mean)

    def failed(self, token: str, reason: str) -> None:
        """The order of that token cannot be carried out."""
        if (answer := self._waiting(token)) is not None:
            answer.set_exception(TaskError(reason))

    def next(self) -> Order | None:
        """The order that is still to be answered."""
        return self.order if self.order is not None and self._waiting(self.order.token) is not None else None

    def _waiting(self, token: str) -> asyncio.Future[StoredMean] | None:
        if self.order is None or self.order.token != token or self._answer is None or self._answer.done():
            return None
        return self._answer
