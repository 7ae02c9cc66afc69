"""First model of a run: the devices that may give it, and the checks of it, whoever brings it.

The rule: the whole model is asked only of a device that can hold it, as far as is known: of the largest idle one.
Whatever is taken here every worker can pull, and every reader of files can read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog

from fedgrpc.aggregation.partial_aggregate import REST, WEIGHTS
from fedgrpc.aggregation.partial_update import CODES, MASK
from fedgrpc.aggregator.histories import RunWorkers
from fedgrpc.aggregator.registry import Worker, WorkerRegistry
from fedgrpc.aggregator.roles import Roles
from fedgrpc.codec.layout import Layout
from fedgrpc.codec.manifest import Limits
from fedgrpc.protocol.tensors import layout_to_proto
from fedgrpc.rpc.channel import MAX_MESSAGE_BYTES
from fedgrpc.storage.model_header import METADATA
from fedgrpc.submodels.cost import FIRST_MODEL_COPIES

log = structlog.get_logger()

# A manifest travels in one message, with each tensor's encoding beside its name and shape.
_MAX_LAYOUT_BYTES: Final = MAX_MESSAGE_BYTES // 2
_LONGEST_NAME: Final = 1000
# "w#mask" beside "w" would be taken for the mask of w.
_SUFFIXES: Final = (MASK, CODES, WEIGHTS, REST)


class FirstModelSource:
    """Judges workers by the memory of their devices and by the size that they tell of the model."""

    def __init__(
        self, fleet: WorkerRegistry, workers: RunWorkers, roles: Roles, clock: Callable[[], float]
    ) -> None:
        self._fleet = fleet
        self._workers = workers
        self._roles = roles
        self._clock = clock
        self._told = ""

    def may_give(self, name: str) -> bool:
        """Return whether the worker may give the first model, and can hold it."""
        worker = self._fleet.find(name)
        return self._roles.initialises(name) and (worker is None or not self._misfit(worker))

    def largest(self, idle: tuple[str, ...]) -> tuple[str, ...]:
        """Return those with the most memory."""
        memory = {name: self._fleet.get(name).memory_bytes for name in idle}
        return tuple(name for name in idle if memory[name] == max(memory.values()))

    def lacking(self) -> str:
        """Say why no worker that is here can give the first model; "" where one can, or none is here."""
        now = self._clock()
        trainers = (worker for worker in self._fleet if not worker.evaluator and self._fleet.alive(worker, now))
        named = [worker for worker in trainers if self._roles.initialises(worker.name)]
        if not named or not all(map(self._misfit, named)):
            return ""
        largest = max(named, key=lambda worker: worker.memory_bytes)
        return (
            f"no device here can give the first model ({largest.name}: {self._misfit(largest)}): "
            "start a larger one, or the aggregator with --initial-model, for which `fedgrpc init` writes a file"
        )

    def tell_lacking(self) -> None:
        """Log that no worker can give the first model, once until that changes."""
        lacking = self.lacking()
        if lacking and not self._told:
            log.warning("the run waits for its first model", reason=lacking)
        self._told = lacking

    def _misfit(self, worker: Worker) -> str:
        """Say why a worker's device cannot build the whole model, in one line; "": it can, as far as is known."""
        told, memory_bytes = self._workers.description(worker.name), worker.memory_bytes
        needed = told.process_bytes + round(FIRST_MODEL_COPIES * told.model_bytes)
        if not (memory_bytes and told.model_bytes) or needed <= memory_bytes:
            return ""
        return f"a model of {told.model_bytes >> 20} MiB takes {needed >> 20} MiB there, of {memory_bytes >> 20}"


def complaint(layout: Layout, max_bytes: int | None = None) -> str:
    """Return the fault of a first model of this layout in one line; "": none. It has up to `max_bytes`."""
    count, most = len(layout), Limits().max_tensors
    if not 1 <= count <= most:
        return f"it has {count} tensors; it may have 1 to {most}"
    for spec in layout:
        for name in (spec.name, *spec.tied_names):
            if wrong := _wrong_name(name):
                return f"no tensor may be called {name[:80]!r}: {wrong}"
    size_bytes = sum(spec.nbytes for spec in layout)
    if max_bytes is not None and size_bytes > max_bytes:
        return f"it has {size_bytes} bytes, and --max-model allows {max_bytes}"
    told_bytes = sum(spec.ByteSize() for spec in layout_to_proto(layout))
    if told_bytes > _MAX_LAYOUT_BYTES:
        return f"its names and shapes take {told_bytes} bytes, too many for one message"
    return ""


def _wrong_name(name: str) -> str:
    """Say why a tensor may not have this name, since names reach terminals, files and others' code; "": it may."""
    if name == METADATA:
        return "that is the metadata of a file"
    if not name.isprintable() or not 1 <= len(name) <= _LONGEST_NAME:
        return f"a name has 1 to {_LONGEST_NAME} printable characters"
    if "\\" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        return "that is a path"
    if name.endswith(_SUFFIXES):
        return f"{', '.join(_SUFFIXES)} are for what updates say of a tensor"
    return ""
