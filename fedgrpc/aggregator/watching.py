"""Answers that many ask for, or that are long: made once for all, or piece by piece, so that no other call waits.

The rule: what operators look at never takes more than half of the event loop's time.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Final, TypeVar

from google.protobuf.message import Message

from fedgrpc.errors import Exhausted

T = TypeVar("T")

_PIECE: Final = 50
# Half of the time between the messages of the fastest watcher.
_SHARED_S: Final = 0.025
_MAX_WATCHERS: Final = 200
_MAX_OF_ONE_PEER: Final = 20
_RETRY_S: Final = 5.0
_RATE_HZ: Final = 4.0
_MIN_RATE_HZ: Final = 0.1
_MAX_RATE_HZ: Final = 20.0


class Watching:
    """The state of a run as watchers see it. `make` gives the message, `revision` changes with every change."""

    def __init__(self, make: Callable[[], Message], revision: Callable[[], int]) -> None:
        self._make = make
        self._revision = revision
        self._made: tuple[int, bytes] = (-1, b"")
        self._made_at = -_SHARED_S
        self._watchers: Counter[str] = Counter()

    @contextmanager
    def watcher(self, peer: str) -> Iterator[None]:
        """Count `peer` as a watcher while the block runs. Raises `Exhausted` when there are too many."""
        if self._watchers[peer] >= _MAX_OF_ONE_PEER or self._watchers.total() >= _MAX_WATCHERS:
            raise Exhausted(f"too many watch this run; try again in {_RETRY_S:g} s", retry_after_s=_RETRY_S)
        self._watchers[peer] += 1
        try:
            yield
        finally:
            self._watchers -= Counter({peer: 1})

    def latest(self, fresh: bool = False) -> tuple[int, bytes]:
        """A revision and its message, serialized; maybe the one that others just got, unless `fresh`."""
        now = time.monotonic()
        if fresh or (self._made[0] != self._revision() and now - self._made_at >= _SHARED_S):
            self._made = self._revision(), self._make().SerializeToString()
            self._made_at = now
        return self._made


class Pieces:
    """Makes long lists on the event loop: one list at a time, with a rest as long as each piece took."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def list_of(self, items: Iterator[T]) -> list[T]:
        """All of `items`, each made when it is asked for."""
        made: list[T] = []
        async with self._turn:
            while True:
                begun = time.perf_counter()
                piece = list(islice(items, _PIECE))
                made += piece
                if len(piece) < _PIECE:
                    return made
                await asyncio.sleep(time.perf_counter() - begun)


def watch_interval_s(max_rate_hz: float) -> float:
    """Return the seconds between two answers of a watch. A rate that is not above 0, or NaN, is the default."""
    rate_hz = max_rate_hz if max_rate_hz > 0 else _RATE_HZ
    # A slower watcher would sleep through the end of the run.
    return 1.0 / min(max(rate_hz, _MIN_RATE_HZ), _MAX_RATE_HZ)
