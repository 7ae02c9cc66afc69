"""A device that hangs in the middle of a round, so that the demo shows a round that ends without it."""

from __future__ import annotations

import signal
from collections.abc import Callable

from fedgrpc.cli.demo.processes import Processes
from fedgrpc.v1.round_pb2 import Round, RoundPhase, TaskKind, TaskPhase


class Straggler:
    """Stops one worker's process while it trains in one round, and lets it go on when that round has ended."""

    def __init__(self, name: str, round_number: int, processes: Processes, tell: Callable[[str], None]) -> None:
        self._name = name
        self._round_number = round_number
        self._processes = processes
        self._tell = tell
        self._frozen = False
        self._done = False

    def follow(self, record: Round) -> None:
        """Called with every change of the current round."""
        if self._frozen and not self._still_in(record):
            self._processes.signal(self._name, signal.SIGCONT)
            self._frozen, self._done = False, True
        elif not self._frozen and not self._done and self._still_in(record) and self._is_training(record):
            self._processes.signal(self._name, signal.SIGSTOP)
            self._frozen = True
            self._tell(f"{self._name} hangs: stopped until round {record.number} has ended without it")

    def _still_in(self, record: Round) -> bool:
        reporting = record.phase == RoundPhase.ROUND_PHASE_REPORTING
        return reporting and record.number == self._round_number and record.kind == TaskKind.TASK_KIND_TRAIN

    def _is_training(self, record: Round) -> bool:
        training = TaskPhase.TASK_PHASE_TRAINING
        return any(task.worker == self._name and task.phase == training for task in record.tasks)
