"""A worker within a program: a script, a test or a notebook. It is the one that `fedgrpc worker` runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import structlog

from fedgrpc.api.aggregator import BlockingAggregator, RunningAggregator
from fedgrpc.api.block import Block, Handle, LoopThread, blocking, folder_of, log_quietly
from fedgrpc.api.settings import values_of
from fedgrpc.cli.worker import COMMAND, builder_from, settings_from
from fedgrpc.errors import FedgrpcError
from fedgrpc.trainer import Trainer
from fedgrpc.worker.process import Worker as Process
from fedgrpc.worker.settings import WorkerSettings

# After its time to drain, a worker is stopped; what even then does not end is left behind.
_STOP_S = 10.0

log = structlog.get_logger()


class RunningWorker:
    """A worker that works."""

    def __init__(self, owner: Worker, process: Process, working: asyncio.Task[None]) -> None:
        self.name = owner.settings.name
        self.state_dir = owner.settings.state_dir
        self._process = process
        self._working = working
        # A temporary state folder goes with it.
        self._owner = owner

    @property
    def ended(self) -> asyncio.Task[None] | None:
        """Its work once that has ended; None: it works."""
        return self._working if self._working.done() else None

    async def until_ended(self) -> None:
        """Wait until its run has ended. Raises what has ended it before."""
        await asyncio.shield(self._working)

    async def pause(self) -> None:
        """Take no further task until `resume`. The present one is finished."""
        self._process.pause()

    async def resume(self) -> None:
        """Take tasks again."""
        self._process.resume()


class BlockingWorker(Handle[RunningWorker]):
    """A `RunningWorker` whose calls block."""

    pause = blocking(RunningWorker.pause)
    resume = blocking(RunningWorker.resume)

    def until_ended(self) -> None:
        """Wait until its run has ended. Raises what has ended it before."""
        if self.own.ended is None:
            self.call(self.own.until_ended())
        elif (error := self.own.ended.exception()) is not None:
            raise error

    @property
    def name(self) -> str:
        """Name under which it works."""
        return self.own.name


class Worker(Block[RunningWorker, BlockingWorker]):
    """A worker that works for the length of a block, in a thread of this process while it trains.

        async with Worker(aggregator, Mine, name="pi-1") as worker:    # a RunningWorker
            await worker.until_ended()
        with Worker(aggregator, Mine, name="pi-1") as worker:          # a BlockingWorker
            worker.until_ended()

    `aggregator` is an address, or an aggregator of this program. `task` is a `TorchTask`, another class of a
    learning task, its reference as `package.module:Class`, or a `Trainer` that is made already. Without it the
    worker takes the run's task, where `allow_task` allows that. `settings` are the keys of the table [worker]
    (docs/settings.md), as in `partition="iid", part="1/5"`.

    Without `state_dir`, unsent updates are in a folder that goes with this object. At the end of the block a task
    in progress is finished, for as long as the setting `drain` says. Signals belong to the program.

    Raises `UsageError` for settings that cannot be, when it is made.
    """

    def __init__(
        self,
        aggregator: str | RunningAggregator | BlockingAggregator,
        task: str | type | Trainer | None = None,
        *,
        state_dir: str | PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        address = aggregator if isinstance(aggregator, str) else aggregator.address
        state = Path(state_dir) if state_dir is not None else folder_of(self, "fedgrpc-worker-")
        given = {"aggregator": address, "state_dir": state, "task": None}
        values = values_of(COMMAND, {"serve_address": "none", **settings}, given)
        self.settings: WorkerSettings = settings_from(values)
        if task is None or isinstance(task, str | type):
            self._build = builder_from(values, task)
        else:
            trainer = task
            self._build = lambda registration: trainer
        self._log_level: str | None = settings.get("log_level")

    async def run(self) -> None:
        """Work until the run has ended. Raises what ends it before."""
        async with self as worker:
            await worker.until_ended()

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[RunningWorker]:
        log_quietly(self._log_level)
        process = Process(self.settings, self._build)
        working = asyncio.create_task(self._work(process))
        try:
            yield RunningWorker(self, process, working)
        finally:
            if not working.done():
                process.drain(self.settings.drain_s)
                await asyncio.wait((working,), timeout=self.settings.drain_s + _STOP_S)
                working.cancel()
            await asyncio.wait((working,))
        if not working.cancelled():
            working.result()

    async def _work(self, process: Process) -> None:
        try:
            await process.run()
        except FedgrpcError as error:
            # Whoever waits hears of it, too. A worker that was started by a call alone has nobody else to tell.
            log.error("worker failed", worker=self.settings.name, reason=str(error))
            raise
        finally:
            self._ending = asyncio.create_task(self.end_by_itself())

    def _handle(self, running: RunningWorker, loop: LoopThread) -> BlockingWorker:
        return BlockingWorker(running, loop, self)
