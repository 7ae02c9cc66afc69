"""Engine of processes on this machine, each with the learning task and its data once.

The rule: what goes between the processes is small and local: names of files, no tensors. They end with this
process, whatever ends it, and Ctrl-C is this process's business alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from fedgrpc.errors import FedgrpcError
from fedgrpc.logging import configure
from fedgrpc.simulation.learning.client_work import ClientResult, ClientWork, ClientWorker, TaskFacts
from fedgrpc.simulation.learning.engine import Pending
from fedgrpc.simulation.learning.experiment import Learning

# Of a process of the pool: how to build the learning task, and what was built.
_build: Callable[[], ClientWorker] | None = None
_worker: ClientWorker | None = None


def leave_to_parent() -> None:
    """Let this process end with its parent, and Ctrl-C be the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure("error")
    parent = multiprocessing.parent_process()
    assert parent is not None
    join = parent.join

    def follow() -> None:
        join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _prepare(learning: Learning, clients: int) -> None:
    """Begin a process of the pool; it builds the learning task when it is first needed."""
    global _build
    leave_to_parent()
    _build = partial(ClientWorker, learning, clients)


def _own() -> ClientWorker:
    global _worker
    assert _build is not None, "the process was not prepared"
    # Not in `_prepare`: what a learning task raises there would only break the pool.
    _worker = _worker or _build()
    return _worker


def _facts(channels: bool) -> TaskFacts:
    return _own().facts(channels)


def _perform(work: ClientWork) -> ClientResult:
    return _own().perform(work)


class _Waited:
    """Work in a process of the pool."""

    def __init__(self, future: Future[ClientResult]) -> None:
        self._future = future

    def result(self) -> ClientResult:
        """See `Pending.result`."""
        try:
            return self._future.result()
        except BrokenProcessPool as error:
            raise FedgrpcError("a process that trains has ended; was it killed for its memory?") from error

    def drop(self) -> None:
        """See `Pending.drop`."""
        if not self._future.cancel():
            self.result()


class ProcessPool:
    """Trains in `processes` processes. An `Engine`."""

    def __init__(self, learning: Learning, clients: int, processes: int) -> None:
        # Spawned: a fork of a process with threads, as torch has them, may hang.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(processes, context, _prepare, (learning, clients))

    def facts(self, channels: bool) -> TaskFacts:
        """See `Engine.facts`."""
        try:
            return self._pool.submit(_facts, channels).result()
        except BrokenProcessPool as error:
            raise FedgrpcError("a process that trains has ended before it began") from error

    def begin(self, work: ClientWork) -> Pending:
        """See `Engine.begin`."""
        return _Waited(self._pool.submit(_perform, work))

    def close(self) -> None:
        """See `Engine.close`."""
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
