"""Engines by name, for those who start simulations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from fedgrpc.errors import UsageError
from fedgrpc.simulation.learning.engine import Engine, InProcess
from fedgrpc.simulation.learning.experiment import Experiment
from fedgrpc.simulation.learning.pool import ProcessPool

ENGINES: Final = ("auto", "inline", "processes", "ray")


@contextmanager
def running_engine(name: str, experiment: Experiment, processes: int) -> Iterator[Engine]:
    """Give the engine of that name while the block lasts; auto: processes where more than one is wanted.

    Raises `UsageError` for a learning task that cannot be, and where Ray is missing.
    """
    engine = _engine(name, experiment, processes)
    try:
        yield engine
    finally:
        engine.close()


def _engine(name: str, experiment: Experiment, processes: int) -> Engine:
    learning, count = experiment.learning, experiment.count
    if name == "ray":
        from fedgrpc.simulation.learning.ray_engine import RayEngine

        return RayEngine(learning, count, processes)
    if name == "processes" or (name == "auto" and processes > 1):
        return ProcessPool(learning, count, processes)
    if name not in ENGINES:
        raise UsageError(f"there is no engine {name!r}: choose {', '.join(ENGINES)}")
    return InProcess(learning, count)
