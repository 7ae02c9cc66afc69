"""The demo's federation: an aggregator, its workers and an evaluator as processes, followed to the run's end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import click

from fedgrpc.calls import Calls, connect
from fedgrpc.cli.demo.processes import DemoDevice, Processes
from fedgrpc.errors import FedgrpcError, UsageError
from fedgrpc.v1.aggregator_pb2 import Run, RunPhase
from fedgrpc.v1.round_pb2 import Round, RoundPhase, TaskKind, TaskPhase
from fedgrpc.words import SETTLED, first_failure, round_line

_WATCH_HZ: Final = 20.0
_RECENT: Final = 5
_LAST_SCORES_S: Final = 15.0
_LOST_IN_A_ROW: Final = 3
_AGGREGATOR: Final = "aggregator"
_EVALUATOR: Final = "evaluator"


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo. Times in seconds.

    Without a `partition` every device has all of the task's data; without a deadline it is learned.
    """

    out: Path
    task: str = "fedgrpc.tasks.digits"
    model: str | None = None
    data: Path | None = None
    workers: int = 5
    rounds: int = 12
    epochs: float = 3.0
    partition: str | None = None
    encoding: str = "int8+zstd"
    deadline_s: float | None = None
    straggler_round: int = 3
    seed: int = 0

    def task_arguments(self) -> list[str]:
        """Return the flags of the learning task for workers and for the pooled training."""
        arguments = ["--task", self.task, "--seed", str(self.seed), "--device", "cpu"]
        arguments += ["--model", self.model] if self.model else []
        return arguments + (["--data", str(self.data)] if self.data else [])


@dataclass(frozen=True)
class PastFederation:
    """Results of a federation that has ended."""

    run: Run
    rounds: list[Round]
    model: bytes


def _deadline(seconds: float | None) -> list[str]:
    """Return the flags of the deadline: as set, or learned, since tasks may take seconds or minutes."""
    if seconds is not None:
        return ["--deadline", f"{seconds:g}s"]
    return ["--deadline", "30m", "--learn-deadline", "--deadline-floor", "6s", "--deadline-margin", "2"]


def _reason(record: Round) -> str:
    """Return why an abandoned round has no version."""
    late = any(task.phase == TaskPhase.TASK_PHASE_LATE for task in record.tasks)
    hint = "; --deadline gives them longer" if late else ""
    return first_failure(record) or record.reason + hint


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


class Federation:
    """A run from its start to its end: processes, progress, and one device that hangs for a round."""

    def __init__(
        self, settings: DemoSettings, devices: list[DemoDevice], processes: Processes, state: Path
    ) -> None:
        self._settings = settings
        self._devices = devices
        self._processes = processes
        self._state = state
        self._told = -1
        self._lost_in_a_row = 0
        self._remarks: list[str] = []

    async def run(self, show: Callable[[Run, Round], None], tell: Callable[[str], None]) -> PastFederation:
        """Run to the end. `show` takes each change, `tell` each line that stays.

        Raises:
            FedgrpcError: a process ended unexpectedly.
        """
        address = f"127.0.0.1:{await self._start_aggregator()}"
        for number, device in enumerate(self._devices, start=1):
            await self._start_worker(device, number, address)
        await self._start_evaluator(address)
        straggler = Straggler(
            self._devices[0].name,
            self._settings.straggler_round,
            self._processes,
            self._remarks.append,
            learned_deadline=self._settings.deadline_s is None,
        )
        async with connect(address) as aggregator:
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
        aggregator: Calls,
        straggler: Straggler,
        show: Callable[[Run, Round], None],
        tell: Callable[[str], None],
    ) -> PastFederation:
        async for news in aggregator.watch(_WATCH_HZ):
            if self._told < news.round.number - 1 or news.round.phase == RoundPhase.ROUND_PHASE_ABANDONED:
                self._tell_ended(await aggregator.latest_rounds(_RECENT), news.round.number, tell)
            if news.run.phase == RunPhase.RUN_PHASE_PAUSED:
                raise FedgrpcError(f"the run is paused: {news.run.paused_reason or 'by an operator'}")
            straggler.follow(news.round)
            self._tell_remarks(news.round.number, tell)
            show(news.run, news.round)
        history = await self._gather(aggregator)
        self._tell_ended(history.rounds, math.inf, tell)
        self._tell_remarks(math.inf, tell)
        return history

    async def _start_aggregator(self) -> int:
        """Start the aggregator, and read its port from a pipe."""
        settings = self._settings
        readable, writable = os.pipe()
        arguments = ["-m", "fedgrpc", "aggregator", "--address", "127.0.0.1:0", "--stay"]
        arguments += ["--data-dir", str(self._state / _AGGREGATOR), "--port-file", f"/dev/fd/{writable}"]
        arguments += ["--rounds", str(settings.rounds), "--epochs", f"{settings.epochs:g}"]
        arguments += ["--min-workers", str(max(1, settings.workers - 1)), "--selection-window", "5s"]
        arguments += [*_deadline(settings.deadline_s), "--heartbeat-interval", "250ms"]
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

    async def _start_worker(self, device: DemoDevice, number: int, address: str) -> None:
        kind = device.device_class
        arguments = [*self._worker(device.name, address), *self._settings.task_arguments()]
        if self._settings.partition is not None:
            arguments += ["--partition", self._settings.partition, "--part", f"{number}/{len(self._devices)}"]
        arguments += ["--device-class", kind.name, "--profile", f"cpu_cores={kind.cpu_cores}"]
        arguments += ["--profile", f"memory_bytes={kind.memory_bytes}"]
        arguments += ["--slowdown", str(kind.slowdown), "--link", str(kind.link_bits_per_second)]
        await self._processes.start(device.name, arguments)

    async def _start_evaluator(self, address: str) -> None:
        arguments = [*self._worker(_EVALUATOR, address), *self._settings.task_arguments(), "--role", "evaluator"]
        await self._processes.start(_EVALUATOR, arguments)

    def _worker(self, name: str, address: str) -> list[str]:
        arguments = ["-m", "fedgrpc", "worker", "--aggregator", address, "--name", name, "--threads", "1"]
        return [*arguments, "--state-dir", str(self._state / name), "--serve-address", "none"]

    async def _guard(self, tell: Callable[[str], None]) -> NoReturn:
        """Report processes that fail; raise for the aggregator, or for more than half of the devices."""
        ended = 0
        while True:
            name, code = await self._processes.next_end()
            if code == 0:
                continue
            ended += 1
            failure = self._processes.failure(name, code)
            # A wrong setting is wrong for every process of its kind.
            if name == _AGGREGATOR or isinstance(failure, UsageError) or ended > len(self._devices) // 2:
                raise failure
            tell(str(failure))

    def _tell_ended(self, rounds: list[Round], current: float, tell: Callable[[str], None]) -> None:
        """A line for each round that has ended, once it is scored or the round after the next has begun.

        Raises:
            FedgrpcError: one round after another ended without an update.
        """
        for record in rounds:
            if record.number <= self._told or record.kind == TaskKind.TASK_KIND_EVALUATE:
                continue
            abandoned = record.phase == RoundPhase.ROUND_PHASE_ABANDONED
            if not abandoned and not record.evaluator_metrics and record.number > current - 2:
                break
            self._told = record.number
            tell(round_line(record))
            self._lost_in_a_row = self._lost_in_a_row + 1 if abandoned else 0
            if self._lost_in_a_row == _LOST_IN_A_ROW:
                if traceback := self._processes.users_traceback():
                    click.echo(traceback, err=True)
                raise FedgrpcError(f"{_LOST_IN_A_ROW} rounds in a row ended without an update: {_reason(record)}")

    def _tell_remarks(self, current: float, tell: Callable[[str], None]) -> None:
        """Print remarks on the current round after the line of the one before."""
        if self._told >= current - 1 or current == math.inf:
            while self._remarks:
                tell(self._remarks.pop(0))

    async def _gather(self, aggregator: Calls) -> PastFederation:
        """Read the history before the aggregator exits. The evaluator ends once it has scored the last version."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_SCORES_S):
                await self._processes.wait(_EVALUATOR)
        run, rounds = await aggregator.run(), await aggregator.all_rounds()
        newest = max((self._state / _AGGREGATOR / "models").glob("*.safetensors"))
        return PastFederation(run, rounds, newest.read_bytes())
