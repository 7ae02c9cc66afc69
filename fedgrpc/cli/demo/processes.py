"""Devices of the demo and their processes, which never outlive their parent.

The figures of devices are round ones, to show unequal devices. They are not measurements.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Final

from fedgrpc.claims import printable
from fedgrpc.errors import FedgrpcError, UsageError
from fedgrpc.worker.guarded_trainer import RAISED

_PR_SET_PDEATHSIG: Final = 1
_TERMINATE_S: Final = 2.0
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
class DemoDevice:
    """One simulated device of the demo."""

    name: str
    device_class: DeviceClass


_RASPBERRY_PI_4: Final = DeviceClass("raspberry-pi-4", 4, 1 * GIB, slowdown=12, link_bits_per_second=20_000_000)
_JETSON_NANO: Final = DeviceClass("jetson-nano", 4, 4 * GIB, slowdown=6, link_bits_per_second=50_000_000)
_JETSON_NANO_2GB: Final = DeviceClass("jetson-nano-2gb", 4, 2 * GIB, slowdown=8, link_bits_per_second=5_000_000)

_FLEET: Final = (_JETSON_NANO_2GB, _RASPBERRY_PI_4, _JETSON_NANO, _RASPBERRY_PI_4, _JETSON_NANO)


def make_fleet(count: int) -> list[DemoDevice]:
    """Return `count` devices; five are two Raspberry Pi 4, two Jetson Nano and a Jetson Nano 2GB.

    The first is the weakest, and will miss a deadline.
    """
    numbers: Counter[str] = Counter()
    devices = []
    for device_class in islice(cycle(_FLEET), count):
        numbers[device_class.name] += 1
        devices.append(DemoDevice(f"{device_class.name}-{numbers[device_class.name]}", device_class))
    return devices


class Processes:
    """Child processes that end with the `async with` block, each with a log in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._ended: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self._waiting: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Processes:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._waiting:
            task.cancel()
        living = [process for process in self._running.values() if process.returncode is None]
        for number in (signal.SIGCONT, signal.SIGTERM):
            _send(living, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TERMINATE_S):
                await asyncio.gather(*(process.wait() for process in living))
        _send(living, signal.SIGKILL)
        await asyncio.gather(*(process.wait() for process in living))

    async def start(
        self, name: str, arguments: Sequence[str], pass_fds: Sequence[int] = (), piped: bool = False
    ) -> asyncio.subprocess.Process:
        """Start `python ARGUMENTS`, with its output in its log or, `piped`, for the caller to read.

        The child gets its own session, so that Ctrl-C on the terminal reaches this process alone.
        """
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with self.log(name).open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if piped else output,
                stderr=output,
                env=environment,
                start_new_session=True,
                preexec_fn=partial(die_with, os.getpid()),
                pass_fds=pass_fds,
            )
        self._running[name] = process
        self._waiting.append(asyncio.create_task(self._note_end(name, process)))
        return process

    async def _note_end(self, name: str, process: asyncio.subprocess.Process) -> None:
        self._ended.put_nowait((name, await process.wait()))

    async def next_end(self) -> tuple[str, int]:
        """Wait for the next process to end; return its name and exit code, once each."""
        return await self._ended.get()

    async def wait(self, name: str) -> int:
        """Wait for a process to end; return its exit code."""
        return await self._running[name].wait()

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process that still runs."""
        _send([self._running[name]], number)

    def log(self, name: str) -> Path:
        """Return the log file of a process."""
        return self.folder / f"{name}.log"

    def users_traceback(self) -> str:
        """Return the traceback of a learning task that raised in any process, as its log has it; "" for none."""
        for log in sorted(self.folder.glob("*.log")):
            for line in log.read_text(errors="replace").splitlines():
                if RAISED in line:
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        return "\n".join(map(printable, str(json.loads(line)["exception"]).splitlines()))
        return ""

    def failure(self, name: str, code: int) -> FedgrpcError:
        """Return the error for a process that ended unexpectedly; for exit code 2, the process's own message."""
        lines = self.log(name).read_text(errors="replace").strip().splitlines() or ["no output"]
        said = lines[-1].removeprefix("error: ")
        return UsageError(said) if code == 2 else FedgrpcError(f"{name} ended with exit code {code}: {said}")


def _send(processes: Sequence[asyncio.subprocess.Process], number: signal.Signals) -> None:
    for process in processes:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def die_with(parent: int) -> None:
    """Let Linux kill this child process when process `parent` ends, even by SIGKILL.

    On other systems children end only with an orderly end of the parent.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # The parent ended before the request took effect.
        os.kill(os.getpid(), signal.SIGKILL)


_POOLED: Final = "pooled"

Scores = dict[str, float]


async def train_pooled(
    processes: Processes,
    task_arguments: Sequence[str],
    rounds: int,
    epochs: float,
    step: Callable[[int, Scores], None],
) -> list[Scores]:
    """Train on the pooled data; return the scores after each round's worth of epochs, and pass them to `step`.

    Raises:
        FedgrpcError: the training failed.
    """
    arguments = ["-m", "fedgrpc.tasks.pooled", *task_arguments, "--rounds", str(rounds), "--epochs", f"{epochs:g}"]
    process = await processes.start(_POOLED, arguments, piped=True)
    assert process.stdout is not None
    scores: list[Scores] = []
    async for line in process.stdout:
        scores.append(json.loads(line)["metrics"])
        step(len(scores), scores[-1])
    if (code := await process.wait()) != 0:
        raise processes.failure(_POOLED, code)
    return scores
