"""The devices that the demo's workers pretend to be, and the one that hangs for a round.

Round figures, to show unequal devices; not measurements.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Final

from fedgrpc.cli.demo.processes import Processes
from fedgrpc.cli.view import SETTLED
from fedgrpc.v1.round_pb2 import Round, RoundPhase, TaskKind, TaskPhase

GIB: Final = 1 << 30


@dataclass(frozen=True)
class DeviceClass:
    """The profile that a worker reports, and how much slower than this machine it runs.

    `slowdown` stretches every batch; `link_bits_per_second` paces what it downloads and uploads.
    """

    name: str
    cpu_cores: int
    memory_bytes: int
    slowdown: float
    link_bits_per_second: int


@dataclass(frozen=True)
class Device:
    """One device of the fleet."""

    name: str
    device_class: DeviceClass


_RASPBERRY_PI_4: Final = DeviceClass("raspberry-pi-4", 4, 1 * GIB, slowdown=12, link_bits_per_second=20_000_000)
_JETSON_NANO: Final = DeviceClass("jetson-nano", 4, 4 * GIB, slowdown=6, link_bits_per_second=50_000_000)
_JETSON_NANO_2GB: Final = DeviceClass("jetson-nano-2gb", 4, 2 * GIB, slowdown=8, link_bits_per_second=5_000_000)

_FLEET: Final = (_JETSON_NANO_2GB, _RASPBERRY_PI_4, _JETSON_NANO, _RASPBERRY_PI_4, _JETSON_NANO)


def make_fleet(count: int) -> list[Device]:
    """Return `count` devices; five are two Raspberry Pi 4, two Jetson Nano and a Jetson Nano 2GB.

    The first is the weakest, and will miss a deadline.
    """
    numbers: Counter[str] = Counter()
    devices = []
    for device_class in islice(cycle(_FLEET), count):
        numbers[device_class.name] += 1
        devices.append(Device(f"{device_class.name}-{numbers[device_class.name]}", device_class))
    return devices


class Straggler:
    """Stop one worker's process during a task, and resume it when that round has ended without it.

    A fast worker may have sent its update before the stop: then the next round is tried. A learned deadline must
    exist by then, because the first round's deadline is long.
    """

    def __init__(
        self,
        name: str,
        round_number: int,
        processes: Processes,
        tell: Callable[[str], None],
        learned_deadline: bool = False,
    ) -> None:
        self._name = name
        self._round_number = round_number
        self._processes = processes
        self._tell = tell
        self._learned_deadline = learned_deadline
        self._frozen_in: int | None = None
        self._done = round_number < 1

    def follow(self, record: Round) -> None:
        """Handle a change of the current round."""
        if self._done:
            return
        if self._frozen_in is None:
            if self._is_at_work(record):
                self._freeze(record.number)
        elif self._was_too_quick(record):
            self._go_on()
        elif record.number != self._frozen_in or record.phase != RoundPhase.ROUND_PHASE_REPORTING:
            self._go_on()
            self._done = True

    def _freeze(self, number: int) -> None:
        self._processes.signal(self._name, signal.SIGSTOP)
        self._frozen_in = number
        self._tell(f"{self._name} hangs: stopped until round {number} has ended without it")

    def _go_on(self) -> None:
        self._processes.signal(self._name, signal.SIGCONT)
        self._frozen_in = None

    def _is_at_work(self, record: Round) -> bool:
        due = record.number >= self._round_number and record.kind == TaskKind.TASK_KIND_TRAIN
        if self._learned_deadline and not record.deadline_reason:
            return False
        phase = self._phase(record)
        return due and record.phase == RoundPhase.ROUND_PHASE_REPORTING and phase not in {None, *SETTLED}

    def _was_too_quick(self, record: Round) -> bool:
        accepted = self._phase(record) == TaskPhase.TASK_PHASE_ACCEPTED
        if accepted and record.number == self._frozen_in:
            self._round_number = record.number + 1
            return True
        return False

    def _phase(self, record: Round) -> int | None:
        return next((task.phase for task in record.tasks if task.worker == self._name), None)
