"""Bounds on requests: size, rate, time of the first message, and number of late first messages.

The rule: gRPC collects a message before this process sees any of it, so a call whose first message is late holds
memory that nobody has checked. Only a few calls may do so. One more, and the connection with the most late calls
loses its oldest one.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import grpc.aio
from google.protobuf.message import DecodeError

from fedgrpc.errors import LayoutError, LinkError, TooLargeError
from fedgrpc.rpc.admission import quota_key

# A registration takes at most 16 KiB, and every other small request less.
SMALL_REQUEST_BYTES: Final = 64 << 10
# A message that comes sooner is no larger than what the caller's link carries in that time.
_LATE_S: Final = 0.5
# Callers whose rate is kept.
_KNOWN_PEERS: Final = 20_000

Deserialize = Callable[[bytes], Any]


def bounded(deserialize: Deserialize | None, max_bytes: int) -> Deserialize:
    """Return a deserializer that refuses a message by its size before it parses anything.

    It raises `TooLargeError`, and `LayoutError` for bytes that are not such a message.
    """

    def from_wire(data: bytes) -> Any:
        if (size_bytes := len(data)) > max_bytes:
            # The error's traceback would keep the bytes alive while the error lives.
            del data
            raise TooLargeError(f"a request of {size_bytes} bytes; allowed are {max_bytes}")
        return data if deserialize is None else parsed(deserialize, data)

    return from_wire


def parsed(deserialize: Deserialize, data: bytes) -> Any:
    """Return the message in `data`. Raises `LayoutError` for bytes that are not such a message."""
    try:
        return deserialize(data)
    except DecodeError:
        raise LayoutError(f"the request of {len(data)} bytes is not a message of this call") from None


class CallRates:
    """Slows down connections that make calls faster than any fleet needs: each call too many waits for `delay_s`.

    A connection has `burst` calls at once and `per_second` more. It may have only so many calls open, so the wait
    bounds its share of the event loop's time. Lives on one event loop.
    """

    def __init__(self, per_second: float = 500.0, burst: float = 2000.0, delay_s: float = 0.5) -> None:
        self._per_second, self._burst, self._delay_s = per_second, burst, delay_s
        self._left: dict[str, tuple[float, float]] = {}

    def wait_s(self, peer: str, now: float) -> float:
        """Return how long a call that `peer` makes now has to wait, in seconds."""
        left, at = self._left.pop(peer, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._per_second)
        # In the order of the last calls, so that connections long gone are dropped first.
        self._left[peer] = (max(0.0, left - 1), now)
        if len(self._left) > _KNOWN_PEERS:
            del self._left[next(iter(self._left))]
        return 0.0 if left >= 1 else self._delay_s


@dataclass(eq=False)
class _Waiting:
    """A call whose first message has not come."""

    peer: str
    limit: asyncio.Timeout = field(default_factory=lambda: asyncio.timeout(None))
    crowded: bool = False


class FirstMessages:
    """Reads the first message of each call: within `within_s`, and with at most `max_late` late ones at a time.

    Lives on one event loop.
    """

    def __init__(self, within_s: float = 60.0, max_late: int = 32, rates: CallRates | None = None) -> None:
        self._rates = rates or CallRates()
        self._within_s = within_s
        self._max_late = max_late
        self._late: list[_Waiting] = []

    @property
    def late_count(self) -> int:
        """Number of calls whose first message is late now."""
        return len(self._late)

    async def read(self, context: Any) -> Any:
        """Return the first message, or `grpc.aio.EOF`.

        Raises `LinkError` if it does not come, and what the call's deserializer raises.
        """
        await self.pace(context)
        waiting = _Waiting(quota_key(context))
        timer = asyncio.get_running_loop().call_later(_LATE_S, self._is_late, waiting)
        try:
            async with waiting.limit:
                return await context.read()
        except TimeoutError:
            why = "too many calls wait for theirs" if waiting.crowded else f"none came for {self._within_s:g} s"
            raise LinkError(f"the first message of the call is missing: {why}; try again") from None
        finally:
            timer.cancel()
            if waiting in self._late:
                self._late.remove(waiting)

    async def pace(self, context: Any) -> None:
        """Wait where the caller makes too many calls."""
        if wait_s := self._rates.wait_s(quota_key(context), time.monotonic()):
            await asyncio.sleep(wait_s)

    async def request(self, context: Any) -> Any:
        """Return the only message of a call. Raises as `read`, and `LayoutError` if there is none."""
        message = await self.read(context)
        if message is grpc.aio.EOF:
            raise LayoutError("the call ended without a request")
        return message

    def _is_late(self, waiting: _Waiting) -> None:
        self._late.append(waiting)
        loop = asyncio.get_running_loop()
        waiting.limit.reschedule(loop.time() + max(0.0, self._within_s - _LATE_S))
        if len(self._late) > self._max_late:
            most = Counter(each.peer for each in self._late if not each.crowded).most_common(1)[0][0]
            oldest = next(each for each in self._late if each.peer == most and not each.crowded)
            oldest.crowded = True
            oldest.limit.reschedule(loop.time())
