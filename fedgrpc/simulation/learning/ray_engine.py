"""Engine of actors in a Ray cluster (`fedgrpc[ray]`), each with the learning task and its data once.

The rule: as in a pool of processes, messages name files. So all machines of the cluster need to see the folder of
the simulation under the same path.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from fedgrpc.errors import ExtraMissing, FedgrpcError
from fedgrpc.simulation.learning.client_work import ClientResult, ClientWork, ClientWorker, TaskFacts
from fedgrpc.simulation.learning.engine import Pending
from fedgrpc.simulation.learning.experiment import Learning


class _Actor:
    """State of one actor. What its learning task raises comes back as a value."""

    def __init__(self, learning: Learning, clients: int) -> None:
        self._learning = learning
        self._clients = clients
        self._worker: ClientWorker | None = None

    def _own(self) -> ClientWorker:
        self._worker = self._worker or ClientWorker(self._learning, self._clients)
        return self._worker

    def facts(self, channels: bool) -> TaskFacts | FedgrpcError:
        try:
            return self._own().facts(channels)
        except FedgrpcError as error:
            return error

    def perform(self, work: ClientWork) -> ClientResult | FedgrpcError:
        try:
            return self._own().perform(work)
        except FedgrpcError as error:
            return error


class _Remote:
    """Work in an actor."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray = ray
        self._reference = reference

    def result(self) -> ClientResult:
        """See `Pending.result`."""
        result: ClientResult = _value(self._ray, self._reference)
        return result

    def drop(self) -> None:
        """See `Pending.drop`. An actor cannot be stopped in the middle of its work."""
        self.result()


def _value(ray: Any, reference: Any) -> Any:
    try:
        value = ray.get(reference)
    except ray.exceptions.RayError as error:
        raise FedgrpcError(f"an actor that trains has ended: {' '.join(str(error).split())[:200]}") from error
    if isinstance(value, FedgrpcError):
        raise value
    return value


class RayEngine:
    """Trains in actors of the cluster that RAY_ADDRESS names, else of one on this machine. An `Engine`."""

    def __init__(self, learning: Learning, clients: int, actors: int) -> None:
        """Raises `UsageError` where Ray is not installed."""
        try:
            import ray
        except ImportError as error:
            raise ExtraMissing.of("the engine ray", "ray", error) from error
        self._ray = ray
        self._begun_here = not ray.is_initialized()
        if self._begun_here:
            ray.init(num_cpus=actors, include_dashboard=False, log_to_driver=False, configure_logging=False)
        actor = ray.remote(num_cpus=1)(_Actor)
        self._actors = deque(actor.remote(learning, clients) for _ in range(actors))

    def facts(self, channels: bool) -> TaskFacts:
        """See `Engine.facts`."""
        facts: TaskFacts = _value(self._ray, self._actors[0].facts.remote(channels))
        return facts

    def begin(self, work: ClientWork) -> Pending:
        """See `Engine.begin`. Actors take turns."""
        self._actors.rotate(-1)
        return _Remote(self._ray, self._actors[0].perform.remote(work))

    def close(self) -> None:
        """See `Engine.close`."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._begun_here:
            self._ray.shutdown()
