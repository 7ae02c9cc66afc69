"""What a process uses: wall and CPU time, loopback bytes between two marks, and its peak memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

MB = 1e6


@dataclass(frozen=True)
class Mark:
    """The clocks of this process, and the machine's loopback counter, at one moment."""

    wall_s: float
    cpu_s: float
    loopback_bytes: int
    ingest_cpu_s: float = 0.0

    @staticmethod
    def now(ingest_cpu_s: float = 0.0) -> Mark:
        """`ingest_cpu_s`: what its ingest processes have taken so far, which counts, too."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = usage.ru_utime + usage.ru_stime + ingest_cpu_s
        return Mark(time.perf_counter(), cpu_s, loopback_bytes(), ingest_cpu_s)


@dataclass(frozen=True)
class Usage:
    """Medians over the rounds of one process, and its peak resident memory.

    `own_rss_mb`, of a worker: what its imports, its trainer and one model take without any transport.
    """

    wall_s: float
    cpu_s: float
    loopback_mb: float
    peak_rss_mb: float
    walls_s: tuple[float, ...] = ()
    own_rss_mb: float = 0.0
    ingest_cpu_s: float = 0.0

    @staticmethod
    def of(marks: Sequence[Mark], dropped: int = 1) -> Usage:
        """From marks at the rounds' boundaries; the first `dropped` rounds do not count."""
        rounds = list(pairwise(marks))[dropped:]
        walls = [after.wall_s - before.wall_s for before, after in rounds]
        return Usage(
            median(walls),
            median(after.cpu_s - before.cpu_s for before, after in rounds),
            median(after.loopback_bytes - before.loopback_bytes for before, after in rounds) / MB,
            peak_rss_mb(),
            tuple(walls),
            ingest_cpu_s=median(after.ingest_cpu_s - before.ingest_cpu_s for before, after in rounds),
        )


def loopback_bytes() -> int:
    """Bytes that the loopback interface has carried, headers of TCP and IP among them."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    return 0


def peak_rss_mb() -> float:
    """Largest resident memory of this process since it was executed (getrusage would tell its parent's)."""
    return _status_mb("VmHWM")


def rss_mb() -> float:
    """Resident memory of this process now."""
    return _status_mb("VmRSS")


def _status_mb(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024 / MB
    raise RuntimeError(f"no {name} in /proc/self/status")
