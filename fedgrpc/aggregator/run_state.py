"""Where a run stands, and what its workers are told: values, and the bell for those who watch."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field

from fedgrpc.aggregator.local_models import LocalTask
from fedgrpc.codec.layout import Layout
from fedgrpc.v1.aggregator_pb2 import RUN_PHASE_FINISHED, RUN_PHASE_STOPPED, RunPhase
from fedgrpc.v1.round_pb2 import TaskKind


@dataclass(frozen=True)
class Assignment:
    """A task as its worker is told of it; `time_left_s` None: no deadline."""

    token: str
    worker: str
    round: int
    kind: TaskKind
    version: int
    seed: int
    time_left_s: float | None
    local: LocalTask = field(default_factory=LocalTask)
    tell_channels: bool = False


@dataclass(frozen=True)
class Beat:
    """The answer to a heartbeat."""

    cancel: bool
    reason: str = ""
    time_left_s: float | None = None


@dataclass
class RunState:
    """Where the run stands; version 0: no model yet."""

    phase: RunPhase
    started_at: float
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    reason: str = ""
    version: int = 0
    layout: Layout = ()

    @property
    def trained(self) -> int:
        """How many rounds have been committed to the model."""
        return max(0, self.version - 1)

    @property
    def ended(self) -> bool:
        return self.phase in (RUN_PHASE_FINISHED, RUN_PHASE_STOPPED)


class Changes:
    """Tells any number of watchers that something has changed; `revision` counts the changes."""

    def __init__(self) -> None:
        self.revision = 0
        self._next = asyncio.Event()

    def notify(self) -> None:
        """Wake every watcher."""
        self.revision += 1
        changed, self._next = self._next, asyncio.Event()
        changed.set()

    async def wait(self, seen: int) -> int:
        """Return the present revision once it is not `seen`."""
        if self.revision == seen:
            await self._next.wait()
        return self.revision
