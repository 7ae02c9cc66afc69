"""Processes seen from outside: CPU time and resident memory of a group of them, children among them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import psutil

_EVERY_S = 0.1
# A shell becomes another program within that time.
_SETTLED_S = 5.0
_MB = 1e6


@dataclass(frozen=True)
class Sample:
    """`cpu_s` counts children that have ended, too, once their parents have waited for them."""

    at: float
    cpu_s: float
    rss_mb: float


class Watch(threading.Thread):
    """Samples the processes that `find` names, until it is stopped."""

    def __init__(self, find: Callable[[], Iterable[psutil.Process]]) -> None:
        super().__init__(daemon=True)
        self._find = find
        self._ending = threading.Event()
        self.samples: list[Sample] = []

    def run(self) -> None:
        while not self._ending.wait(_EVERY_S):
            self.samples.append(_sample(time.time(), self._find()))

    def stop(self) -> None:
        """No more samples."""
        self._ending.set()
        self.join()

    def cpu_s(self, begin: float, end: float) -> float:
        """CPU time between two moments."""
        within = [sample.cpu_s for sample in self.samples if begin <= sample.at <= end]
        return max(within) - min(within) if within else 0.0

    def peak_mb(self) -> float:
        """The most memory that all of them had at once."""
        return max((sample.rss_mb for sample in self.samples), default=0.0)


def _sample(at: float, processes: Iterable[psutil.Process]) -> Sample:
    cpu_s = rss_mb = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
            rss_mb += process.memory_info().rss / _MB
        except psutil.Error:
            continue
        cpu_s += times.user + times.system + times.children_user + times.children_system
    return Sample(at, cpu_s, rss_mb)


class Group:
    """The processes whose command line `belongs` knows, and all that they start.

    A process that has run for a while under another name is not asked again.
    """

    def __init__(self, belongs: Callable[[str], bool]) -> None:
        self._belongs = belongs
        self._ours: dict[int, psutil.Process] = {}
        self._others: set[int] = set()

    def __call__(self) -> list[psutil.Process]:
        pids = psutil.pids()
        self._ours = {pid: process for pid, process in self._ours.items() if process.is_running()}
        self._others.intersection_update(pids)
        for pid in pids:
            if pid not in self._ours and pid not in self._others:
                self._look_at(pid)
        return list(self._ours.values())

    def _look_at(self, pid: int) -> None:
        try:
            process = psutil.Process(pid)
            if process.ppid() in self._ours or self._belongs(" ".join(process.cmdline())):
                self._ours[pid] = process
            elif time.time() - process.create_time() > _SETTLED_S:
                self._others.add(pid)
        except psutil.Error:
            pass
