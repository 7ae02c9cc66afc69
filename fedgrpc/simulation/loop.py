"""A virtual clock, and processes that live by it: generators that yield what they wait for.

The rule: one seed, one run. What is due at the same instant happens in the order in which it was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import Any, TypeVar

T = TypeVar("T")


class Timeout(Exception):
    """End of a wait whose event did not come in time."""


class Future:
    """A value to come; the first `set` counts."""

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self.waiting: Callable[[], None] | None = None

    def set(self, value: Any = None) -> None:
        """Give the value to the processes that wait."""
        if not self.done:
            self.done, self.value = True, value
            if self.waiting is not None:
                self.waiting()


@dataclass(frozen=True)
class Wait:
    """Wait of a process, which it yields: until a time, or for the value of `future` if that comes before."""

    until: float
    future: Future | None = None


Process = Generator[Wait, Any, T]


class Life:
    """One incarnation of a machine. Once it has ended, none of its processes continues."""

    def __init__(self) -> None:
        self.alive = True


class VirtualLoop:
    """The agenda of the world; `now` in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = count()

    def call_at(self, time: float, action: Callable[[], None]) -> None:
        """Do it then, or now if that is past."""
        if time < math.inf:
            heappush(self._agenda, (max(time, self.now), next(self._serial), action))

    def sleep(self, seconds: float) -> Wait:
        """Return a wait for a process to yield."""
        return Wait(self.now + seconds)

    def wait(self, future: Future, timeout_s: float = math.inf) -> Process[Any]:
        """The value of `future`. Raises `Timeout`."""
        yield Wait(self.now + timeout_s, future)
        if not future.done:
            raise Timeout
        return future.value

    def spawn(self, process: Process[Any], life: Life, then: Callable[[Any], None] | None = None) -> None:
        """Run a process while `life` lasts; `then` gets what it returns."""

        def resume() -> None:
            if not life.alive:
                return
            try:
                wait = next(process)
            except StopIteration as stop:
                if then is not None:
                    then(stop.value)
                return
            self._resume_after(wait, resume)

        resume()

    def _resume_after(self, wait: Wait, resume: Callable[[], None]) -> None:
        future = wait.future
        if future is None:
            self.call_at(wait.until, resume)
            return
        pending = [resume]

        def once() -> None:
            if pending:
                pending.pop()()

        if future.done:
            self.call_at(self.now, once)
        else:
            future.waiting = lambda: self.call_at(self.now, once)
            self.call_at(wait.until, once)

    def run(self, until: float, after_each: Callable[[], bool]) -> None:
        """Play the agenda up to `until`, or while `after_each` returns True."""
        while self._agenda and self._agenda[0][0] <= until:
            self.now, _, action = heappop(self._agenda)
            action()
            if not after_each():
                return
