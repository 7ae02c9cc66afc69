"""The devices that may give the first model of a run.

The rule: the whole model is asked only of a device that can hold it, as far as is known: of the largest idle one.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from fedgrpc.aggregator.registry import Worker, WorkerRegistry
from fedgrpc.aggregator.roles import Roles
from fedgrpc.submodels.cost import FIRST_MODEL_COPIES

log = structlog.get_logger()


class FirstModelSource:
    """Judges workers by the memory of their devices and by the size that they tell of the model."""

    def __init__(self, fleet: WorkerRegistry, roles: Roles, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._roles = roles
        self._clock = clock
        self._told = ""

    def may_give(self, name: str) -> bool:
        """Return whether the worker may give the first model, and can hold it."""
        worker = self._fleet.find(name)
        return self._roles.initialises(name) and (worker is None or not misfit(worker))

    def largest(self, idle: tuple[str, ...]) -> tuple[str, ...]:
        """Return those with the most memory."""
        memory = {name: self._fleet.get(name).memory_bytes for name in idle}
        return tuple(name for name in idle if memory[name] == max(memory.values()))

    def lacking(self) -> str:
        """Say why no worker that is here can give the first model; "" where one can, or none is here."""
        now = self._clock()
        trainers = (worker for worker in self._fleet if not worker.evaluator and self._fleet.alive(worker, now))
        named = [worker for worker in trainers if self._roles.initialises(worker.name)]
        if not named or not all(map(misfit, named)):
            return ""
        largest = max(named, key=lambda worker: worker.memory_bytes)
        return (
            f"no device here can give the first model ({largest.name}: {misfit(largest)}): start a larger one, or "
            "the aggregator with --initial-model, for which `fedgrpc init` writes a file"
        )

    def tell_lacking(self) -> None:
        """Log that no worker can give the first model, once until that changes."""
        lacking = self.lacking()
        if lacking and not self._told:
            log.warning("the run waits for its first model", reason=lacking)
        self._told = lacking


def misfit(worker: Worker) -> str:
    """Say why a worker's device cannot build the whole model, in one line; "": it can, as far as is known."""
    told, memory_bytes = worker.description, worker.memory_bytes
    needed = told.process_bytes + round(FIRST_MODEL_COPIES * told.model_bytes)
    if not (memory_bytes and told.model_bytes) or needed <= memory_bytes:
        return ""
    return f"a model of {told.model_bytes >> 20} MiB takes {needed >> 20} MiB there, of {memory_bytes >> 20}"
