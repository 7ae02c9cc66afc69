"""Where a run stands, and what its workers are told: values."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field

from fedgrpc.aggregator.local_models import LocalTask
from fedgrpc.codec.layout import Layout
from fedgrpc.rounds.version import Version
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


@dataclass(frozen=True)
class RollBack:
    """What an operator has asked for; `done` once it is durable, or with the reason why it is not."""

    version: int
    reason: str
    done: asyncio.Future[None]

    @property
    def text(self) -> str:
        """For the record and for workers."""
        what = f"rolled back to version {self.version}" if self.version else "begun anew"
        return f"the run is {what}" + (f": {self.reason}" if self.reason else "")


@dataclass
class RunState:
    """Where the run stands; version 0: no model yet. `trained` rounds have been committed to the model.

    `paused_reason`: why the run has paused itself.
    """

    phase: RunPhase
    started_at: float
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    reason: str = ""
    paused_reason: str = ""
    version: int = 0
    layout: Layout = ()
    trained: int = 0

    def take(self, version: Version, layout: Layout) -> None:
        """Go on from this version; it may have no layout, and then a first model is to be asked for."""
        self.version, self.layout, self.trained = version.version, layout, version.trained

    @property
    def began(self) -> bool:
        """Whether there is a model."""
        return bool(self.layout)

    @property
    def ended(self) -> bool:
        return self.phase in (RUN_PHASE_FINISHED, RUN_PHASE_STOPPED)
