"""What is broken on the way, when, and how it is mended: each once, at the first moment at which it hurts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fedgrpc.v1.round_pb2 import Round, RoundPhase, TaskKind, TaskPhase
from tools.containers.network import Link, Network
from tools.containers.podman import Container

Tell = Callable[[str], None]
_PATIENCE_S: Final = 120.0

_UNFINISHED = frozenset(
    {
        TaskPhase.TASK_PHASE_OFFERED,
        TaskPhase.TASK_PHASE_DOWNLOADING,
        TaskPhase.TASK_PHASE_TRAINING,
        TaskPhase.TASK_PHASE_UPLOADING,
    }
)


@dataclass
class Breakage:
    """One thing that goes wrong in round `not_before` or a later one. `hurts` says whether it would now.

    `act` breaks and mends it, and says whether it has hurt: where a moment was missed, it is done again.
    """

    not_before: int
    hurts: Callable[[Round], bool]
    act: Callable[[], Awaitable[bool]]
    broken_in: int = 0
    mended: asyncio.Event = field(default_factory=asyncio.Event)
    _acting: asyncio.Task[bool] | None = None

    def follow(self, record: Round) -> None:
        """Called with every change of the current round. Raises what a finished `act` has raised."""
        if self._acting is not None:
            if self._acting.done() and not self._acting.result():
                self._acting = None
        elif _trains(record) and record.number >= self.not_before and self.hurts(record):
            self.broken_in = record.number
            self._acting = asyncio.create_task(self._run())

    async def _run(self) -> bool:
        if hurt := await self.act():
            self.mended.set()
        return hurt


def _trains(record: Round) -> bool:
    return record.phase == RoundPhase.ROUND_PHASE_REPORTING and record.kind == TaskKind.TASK_KIND_TRAIN


def device_killed(container: Container, worker: str, not_before: int, tell: Tell) -> Breakage:
    """SIGKILL to a device that trains; a new container with its volume."""

    def hurts(record: Round) -> bool:
        training = (TaskPhase.TASK_PHASE_TRAINING, TaskPhase.TASK_PHASE_UPLOADING)
        return any(task.worker == worker and task.phase in training for task in record.tasks)

    async def act() -> bool:
        tell(f"{worker} is killed at its work, and its container created again")
        await asyncio.to_thread(container.kill)
        await asyncio.to_thread(container.start)
        return True

    return Breakage(not_before, hurts, act)


def link_down(network: Network, link: Link, worker: str, not_before: int, down_s: float, tell: Tell) -> Breakage:
    """A device in mid-round loses its link for a while."""

    def hurts(record: Round) -> bool:
        return any(task.worker == worker and task.phase in _UNFINISHED for task in record.tasks)

    async def act() -> bool:
        tell(f"{worker} loses its link for {down_s:.0f} s")
        await asyncio.to_thread(network.set_up, link, False)
        await asyncio.sleep(down_s)
        await asyncio.to_thread(network.set_up, link, True)
        tell(f"{worker} has its link again")
        return True

    return Breakage(not_before, hurts, act)


def aggregator_killed(container: Container, not_before: int, tell: Tell) -> Breakage:
    """SIGKILL to the aggregator while it holds some of a round's updates; a new container with its volume.

    What is seen of a round is a moment old: it may be over when the signal comes, and nothing of it to go on with.
    """

    def hurts(record: Round) -> bool:
        accepted = sum(task.phase == TaskPhase.TASK_PHASE_ACCEPTED for task in record.tasks)
        return accepted >= 2 and any(task.phase in _UNFINISHED for task in record.tasks)

    async def act() -> bool:
        begun_s = time.monotonic()
        await asyncio.to_thread(container.kill)
        await asyncio.to_thread(container.start)
        tell(f"the aggregator was killed, and created again within {time.monotonic() - begun_s:.1f} s")
        hurt = bool(resumed_with_updates(await asyncio.to_thread(_of_this_life, container)))
        if not hurt:
            tell("its round had just ended: once more, in a later one")
        return hurt

    return Breakage(not_before, hurts, act)


def resumed_with_updates(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Where an aggregator says that it goes on with a round of which it holds updates."""
    return [event for event in events if event["event"] == "round resumed" and event["accepted"]]


def _of_this_life(container: Container) -> list[dict[str, Any]]:
    """What an aggregator has said since the container before was killed, once it serves, or after two minutes."""
    until_s = time.monotonic() + _PATIENCE_S
    while True:
        events = container.events()
        served = [number for number, event in enumerate(events) if event["event"] == "serving"]
        if len(served) >= container.lives or time.monotonic() > until_s:
            return events[served[-2] + 1 :] if len(served) > 1 else events
        time.sleep(0.2)
