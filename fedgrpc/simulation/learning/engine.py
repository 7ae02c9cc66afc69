"""Engines, which do the real work of simulated clients.

    Engine       protocol: the interface between a simulation and whatever trains for it
    InProcess    here, when the result is asked for
    fedgrpc.simulation.learning.pool.ProcessPool          in processes of this machine
    fedgrpc.simulation.learning.ray_engine.RayEngine      in actors of a Ray cluster

The rule: an engine decides nothing. The same work gives the same bytes by any of them, so that a simulation's
versions do not depend on where its clients train.
"""

from __future__ import annotations

from typing import Protocol

from fedgrpc.simulation.learning.client_work import ClientResult, ClientWork, ClientWorker, TaskFacts
from fedgrpc.simulation.learning.experiment import Learning


class Pending(Protocol):
    """Work that was begun."""

    def result(self) -> ClientResult:
        """Wait for the result. Raises `UsageError`, and `FedgrpcError` where a process has died."""

    def drop(self) -> None:
        """Return once the work writes no files any more; nobody wants its result."""


class Engine(Protocol):
    """Does the work of clients."""

    def facts(self, channels: bool) -> TaskFacts:
        """Describe the learning task, with the model's channels where they are asked for."""

    def begin(self, work: ClientWork) -> Pending:
        """Begin work, whose files are on disks that all processes share."""

    def close(self) -> None:
        """End at once; work that was begun is dropped."""


class _Later:
    """Work that is done when its result is asked for."""

    def __init__(self, worker: ClientWorker, work: ClientWork) -> None:
        self._worker = worker
        self._work = work

    def result(self) -> ClientResult:
        """See `Pending.result`."""
        return self._worker.perform(self._work)

    def drop(self) -> None:
        """See `Pending.drop`."""


class InProcess:
    """Trains in this process. An `Engine`."""

    def __init__(self, learning: Learning, clients: int) -> None:
        """Build the learning task. Raises `UsageError` and `TaskError`."""
        self._worker = ClientWorker(learning, clients)

    def facts(self, channels: bool) -> TaskFacts:
        """See `Engine.facts`."""
        return self._worker.facts(channels)

    def begin(self, work: ClientWork) -> Pending:
        """See `Engine.begin`."""
        return _Later(self._worker, work)

    def close(self) -> None:
        """See `Engine.close`."""
