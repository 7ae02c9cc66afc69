"""The demo's federation: an aggregator, its workers and an evaluator as processes, followed to the run's end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from fedgrpc.cli.demo.devices import Device
from fedgrpc.cli.demo.processes import Processes
from fedgrpc.cli.demo.straggler import Straggler
from fedgrpc.cli.operator import Operator, operator
from fedgrpc.cli.view import round_line
from fedgrpc.errors import UsageError
from fedgrpc.v1.aggregator_pb2 import Run
from fedgrpc.v1.round_pb2 import Round, RoundPhase

_WATCH_HZ: Final = 20.0
_RECENT: Final = 5
_LAST_SCORES_S: Final = 15.0
_AGGREGATOR: Final = "aggregator"
_EVALUATOR: Final = "evaluator"


@dataclass(frozen=True)
class DemoSettings:
    """What the demo is asked to do. Times in seconds."""

    out: Path
    task: str = "fedgrpc.tasks.digits"
    model: str | None = None
    data: Path | None = None
    workers: int = 5
    rounds: int = 12
    epochs: float = 3.0
    partition: str = "dirichlet:0.5"
    encoding: str = "int8+zstd"
    deadline_s: float = 6.0
    straggler_round: int = 3
    seed: int = 0

    def task_arguments(self) -> list[str]:
        """The learning task, as `worker` and the pooled training take it."""
        arguments = ["--task", self.task, "--seed", str(self.seed), "--device", "cpu"]
        arguments += ["--model", self.model] if self.model else []
        return arguments + (["--data", str(self.data)] if self.data else [])


@dataclass(frozen=True)
class History:
    """What is left of a federation when it has ended."""

    run: Run
    rounds: list[Round]
    model: bytes


class Federation:
    """Starts everything, shows every change, and freezes one device for one round."""

    def __init__(self, settings: DemoSettings, devices: list[Device], processes: Processes, state: Path) -> None:
        self._settings = settings
        self._devices = devices
        self._processes = processes
        self._state = state
        self._current = -1
        self._told = -1

    async def run(self, show: Callable[[Run, Round], None], tell: Callable[[str], None]) -> History:
        """To the end of the run. `show` is called at each change, `tell` with a line that is to stay.

        Raises:
            FedgrpcError: a process ended that should not have.
        """
        address = f"127.0.0.1:{await self._start_aggregator()}"
        for number, device in enumerate(self._devices, start=1):
            await self._start_worker(device, number, address)
        await self._start_evaluator(address)
        straggler = Straggler(self._devices[0].name, self._settings.straggler_round, self._processes, tell)
        async with operator(address) as aggregator:
            following = asyncio.create_task(self._follow(aggregator, straggler, show, tell))
            guarding = asyncio.create_task(self._guard(tell))
            try:
                await asyncio.wait([following, guarding], return_when=asyncio.FIRST_COMPLETED)
                return guarding.result() if guarding.done() else following.result()
            finally:
                following.cancel()
                guarding.cancel()
                await asyncio.gather(following, guarding, return_exceptions=True)

    async def _follow(
        self,
        aggregator: Operator,
        straggler: Straggler,
        show: Callable[[Run, Round], None],
        tell: Callable[[str], None],
    ) -> History:
        async for news in aggregator.watch(_WATCH_HZ):
            if news.round.number != self._current:
                self._tell_ended(await aggregator.latest_rounds(_RECENT), tell)
                self._current = news.round.number
            straggler.follow(news.round)
            show(news.run, news.round)
        history = await self._gather(aggregator)
        self._tell_ended(history.rounds, tell)
        return history

    async def _start_aggregator(self) -> int:
        """Its port, which it tells through a pipe."""
        settings = self._settings
        readable, writable = os.pipe()
        arguments = ["-m", "fedgrpc", "aggregator", "--address", "127.0.0.1:0", "--stay"]
        arguments += ["--data-dir", str(self._state / _AGGREGATOR), "--port-file", f"/dev/fd/{writable}"]
        arguments += ["--rounds", str(settings.rounds), "--epochs", f"{settings.epochs:g}"]
        arguments += ["--min-workers", str(max(1, settings.workers - 1)), "--selection-window", "5s"]
        arguments += ["--deadline", f"{settings.deadline_s:g}s", "--heartbeat-interval", "250ms"]
        arguments += ["--encoding", settings.encoding, "--seed", str(settings.seed), "--run-name", "demo"]
        with os.fdopen(readable, "rb") as told:
            try:
                await self._processes.start(_AGGREGATOR, arguments, pass_fds=[writable])
            finally:
                os.close(writable)
            port = await asyncio.to_thread(told.readline)
        if not port:
            raise self._processes.failure(*await self._processes.next_end())
        return int(port)

    async def _start_worker(self, device: Device, number: int, address: str) -> None:
        kind = device.device_class
        arguments = [*self._worker(device.name, address), *self._settings.task_arguments()]
        arguments += ["--partition", self._settings.partition, "--part", f"{number}/{len(self._devices)}"]
        arguments += ["--device-class", kind.name, "--profile", f"cpu_cores={kind.cpu_cores}"]
        arguments += ["--profile", f"memory_bytes={kind.memory_bytes}"]
        arguments += ["--slowdown", str(kind.slowdown), "--link", str(kind.link_bits_per_second)]
        await self._processes.start(device.name, arguments)

    async def _start_evaluator(self, address: str) -> None:
        arguments = [*self._worker(_EVALUATOR, address), *self._settings.task_arguments(), "--role", "evaluator"]
        await self._processes.start(_EVALUATOR, arguments)

    def _worker(self, name: str, address: str) -> list[str]:
        arguments = ["-m", "fedgrpc", "worker", "--aggregator", address, "--name", name]
        return [*arguments, "--state-dir", str(self._state / name), "--serve-address", "none"]

    async def _guard(self, tell: Callable[[str], None]) -> NoReturn:
        """A process that fails is named; the run goes on as long as the aggregator does."""
        ended = 0
        while True:
            name, code = await self._processes.next_end()
            if code == 0:
                continue
            ended += 1
            failure = self._processes.failure(name, code)
            # What was set wrong is wrong for every process of its kind.
            if name == _AGGREGATOR or isinstance(failure, UsageError) or ended > len(self._devices) // 2:
                raise failure
            tell(str(failure))

    def _tell_ended(self, rounds: list[Round], tell: Callable[[str], None]) -> None:
        """A line for each round that has ended; its scores come with the next round's updates, so one later."""
        for record in rounds:
            scored = record.evaluator_metrics or record.phase == RoundPhase.ROUND_PHASE_ABANDONED
            if scored and record.number > self._told:
                tell(round_line(record))
                self._told = record.number

    async def _gather(self, aggregator: Operator) -> History:
        """Asked of the aggregator before it goes; the evaluator ends once it has scored the last version."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_SCORES_S):
                await self._processes.wait(_EVALUATOR)
        run, rounds = await aggregator.run(), await aggregator.all_rounds()
        newest = max((self._state / _AGGREGATOR / "models").glob("*.safetensors"))
        return History(run, rounds, newest.read_bytes())
