"""Values that the page has read from the aggregator, and keeps for a moment or for good.

The rule: whatever is kept is bounded, and is read again no more often than it changes. Who may see it was decided
before: each request makes a call of its own for its visitor, and all readers see the same.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from fedgrpc.calls import Calls
from fedgrpc.errors import CorruptError
from fedgrpc.identity.audit import Position, check_line
from fedgrpc.web.rounds import PastTask, RoundSummary, past_task, summary_of

T = TypeVar("T")

KEPT_ROUNDS: Final = 1000
_PAGE: Final = 50
# Scores of a version come with the updates of the rounds after it.
_STILL_CHANGE: Final = 5
_LOOKED_BACK: Final = 300
_PAST_TASKS: Final = 40
_KEPT_LINES: Final = 5000
_MAX_LINE: Final = 64 << 10


class Fresh(Generic[T]):
    """A value that is read again when it is asked for and too old. Those who ask at once share one reading."""

    def __init__(self, max_age_s: float, read: Callable[[Calls], Awaitable[T]]) -> None:
        self._max_age_s = max_age_s
        self._read = read
        self._reading = asyncio.Lock()
        self._value: T | None = None
        self._read_at = -max_age_s

    async def get(self, client: Calls) -> T:
        """Return the value. Raises what reading it raises."""
        async with self._reading:
            if self._value is None or time.monotonic() - self._read_at >= self._max_age_s:
                self._value = await self._read(client)
                self._read_at = time.monotonic()
            return self._value


class RoundHistory:
    """Summaries of the last rounds of one run."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._rounds: dict[int, RoundSummary] = {}
        self._reading = asyncio.Lock()

    async def rounds(self, client: Calls) -> Sequence[RoundSummary]:
        """Return the summaries, oldest first, with what has come since the last call."""
        async with self._reading:
            newest = max(self._rounds, default=-1)
            async with aclosing(client.rounds_back(page_size=_PAGE)) as records:  # type: ignore[type-var]
                count = 0
                async for record in records:
                    count += 1
                    self._rounds[record.number] = summary_of(record)
                    if record.number <= newest - _STILL_CHANGE or count >= KEPT_ROUNDS:
                        break
                    # Each took a while: others come first.
                    await asyncio.sleep(0)
            for number in sorted(self._rounds)[:-KEPT_ROUNDS]:
                del self._rounds[number]
            return [self._rounds[number] for number in sorted(self._rounds)]


async def past_tasks(client: Calls, worker: str) -> list[PastTask]:
    """Return the last tasks of a worker in the last rounds of the client's run, newest first."""
    found: list[PastTask] = []
    async with aclosing(client.rounds_back(page_size=_PAGE)) as records:  # type: ignore[type-var]
        looked_at = 0
        async for record in records:
            looked_at += 1
            found += [past_task(record, task) for task in record.tasks if task.worker == worker]
            if looked_at >= _LOOKED_BACK or len(found) >= _PAST_TASKS:
                break
            await asyncio.sleep(0)
    return found[:_PAST_TASKS]


@dataclass(frozen=True)
class AuditRecord:
    """One line of the audit log."""

    number: int
    at: str
    who: str
    peer: str
    what: str
    about: str
    result: str

    @classmethod
    def of(cls, record: dict[str, Any]) -> AuditRecord:
        """Return the record of a line that `check_line` has returned."""
        about = "  ".join(f"{name}={value}" for name, value in record["about"].items())
        at, who, peer, what, result = (str(record[name]) for name in ("at", "who", "from", "what", "result"))
        return cls(int(record["n"]), at, who, peer, what, about, result)

    def has(self, words: Sequence[str]) -> bool:
        """Return whether the line has all of these words, which are in lower case."""
        text = " ".join((self.who, self.peer, self.what, self.about, self.result)).lower()
        return all(word in text for word in words)


class AuditTail:
    """The last lines of the audit log, whose seals have been checked from the first line on."""

    def __init__(self) -> None:
        self._lines: deque[AuditRecord] = deque(maxlen=_KEPT_LINES)
        self._offset = 0
        self._reading = asyncio.Lock()
        self.end = Position()
        # Why the log is not trusted from some line on.
        self.damage = ""

    async def lines(self, client: Calls) -> Sequence[AuditRecord]:
        """Return the lines, newest first, with what has come since the last call."""
        async with self._reading:
            if not self.damage:
                async for line in client.identities.audit_lines(self._offset):
                    try:
                        record, self.end = check_line(line[:_MAX_LINE], self.end)
                    except CorruptError as error:
                        self.damage = str(error)
                        break
                    self._offset += len(line)
                    self._lines.append(AuditRecord.of(record))
            return list(self._lines)[::-1]
