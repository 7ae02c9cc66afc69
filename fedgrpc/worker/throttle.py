"""A slower device or link, simulated by waits in proportion to the work that is really done.

No work is skipped: training pauses after each batch, and streams wait as long as their bytes would take on the
link.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from fedgrpc.errors import UsageError

_PACED_CHUNK_S = 0.25
_MIN_CHUNK_BYTES = 4096


@dataclass(frozen=True)
class Throttle:
    """Slowdown of a worker. 1.0 and None change nothing.

    `slowdown` 3.0 makes work take three times as long. `link_bits_per_second` limits pull and push, each on its
    own, as on a full-duplex link.
    """

    slowdown: float = 1.0
    link_bits_per_second: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.slowdown) and self.slowdown >= 1):
            raise UsageError(f"a slowdown must be a number of at least 1, not {self.slowdown}")
        if self.link_bits_per_second is not None and not self.link_bits_per_second > 0:
            raise UsageError(f"a link needs more than {self.link_bits_per_second} bits per second")

    def chunk_bytes(self, usual_bytes: int) -> int:
        """Return a chunk size with which a limited link still moves a few times a second."""
        if self.link_bits_per_second is None:
            return usual_bytes
        return min(usual_bytes, max(_MIN_CHUNK_BYTES, int(self.link_bits_per_second / 8 * _PACED_CHUNK_S)))

    def pause_s(self, work_s: float) -> float:
        """Return the rest that is due after `work_s` seconds of work."""
        return work_s * (self.slowdown - 1)

    def rest(self, work_s: float, stop: threading.Event) -> None:
        """Rest after work, in the thread that did it. End at once when `stop` is set."""
        if self.slowdown > 1:
            stop.wait(self.pause_s(work_s))


class Pacer:
    """Delays a stream so that n bytes take n * 8 / rate seconds since it began; without a rate, not at all.

    No burst follows a pause in the stream.
    """

    def __init__(self, bits_per_second: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_per_second = None if bits_per_second is None else bits_per_second / 8
        self._clock = clock
        self._free_at_s = clock()

    def delay_s(self, size_bytes: int) -> float:
        """Book `size_bytes` on the link and return the seconds until they are through."""
        if self._bytes_per_second is None:
            return 0.0
        now_s = self._clock()
        self._free_at_s = max(now_s, self._free_at_s) + size_bytes / self._bytes_per_second
        return self._free_at_s - now_s

    async def wait(self, size_bytes: int, announce: Callable[[float], None]) -> None:
        """Wait until `size_bytes` more are through. First call `announce` with the seconds that this takes."""
        delay_s = self.delay_s(size_bytes)
        announce(delay_s)
        if delay_s > 0:
            await asyncio.sleep(delay_s)
