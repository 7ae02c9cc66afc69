"""An aggregator within a program: a script, a test or a notebook. It is the one that `fedgrpc aggregator` runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fedgrpc.aggregator.run_files import holds_run
from fedgrpc.aggregator.server import Aggregator as Server
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.api.block import Block, Handle, LoopThread, blocking, folder_of, log_quietly
from fedgrpc.api.client import BlockingClient, Client, opened
from fedgrpc.api.model import stored_model
from fedgrpc.api.records import Run
from fedgrpc.api.settings import values_of
from fedgrpc.cli.aggregator import COMMAND, prepared, settings_from
from fedgrpc.cli.aggregator_settings import PROCESS_NAMES
from fedgrpc.identity.folder import IDENTITY
from fedgrpc.rpc.address import local_address


class RunningAggregator:
    """An aggregator that serves. `client` calls it with all rights."""

    def __init__(self, owner: Aggregator, port: int, client: Client, serving: asyncio.Task[int]) -> None:
        address = owner.settings.address
        self.address = f"{address.rpartition(':')[0]}:{port}" if port else address
        self.data_dir = owner.settings.data_dir
        self.client = client
        self._serving = serving
        # A temporary data folder goes with it.
        self._owner = owner

    async def until_ended(self) -> Run:
        """Wait until its run has ended, and return that. Raises what ends the aggregator before."""
        ended = asyncio.create_task(self.client.until_ended())
        try:
            await asyncio.wait((ended, self._serving), return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                self._serving.result()
            return await ended
        finally:
            ended.cancel()

    def model(self, version: str | int = "latest", run: str = "") -> dict[str, np.ndarray]:
        """Return the weights of a version, from the data folder, as `load_model` does."""
        return stored_model(self.data_dir, run, version)


class BlockingAggregator(Handle[RunningAggregator]):
    """A `RunningAggregator` whose calls block."""

    until_ended = blocking(RunningAggregator.until_ended)

    @property
    def address(self) -> str:
        """Address that it listens on."""
        return self.own.address

    @property
    def data_dir(self) -> Path:
        """Folder of its rounds, updates and models."""
        return self.own.data_dir

    @property
    def client(self) -> BlockingClient:
        """Calls to it, with all rights."""
        return BlockingClient(self.own.client, self._loop, self._block)

    def model(self, version: str | int = "latest", run: str = "") -> dict[str, np.ndarray]:
        """Return the weights of a version. See `RunningAggregator.model`."""
        return self.own.model(version, run)


class Aggregator(Block[RunningAggregator, BlockingAggregator]):
    """An aggregator that serves for the length of a block, and leads a run if it is given settings of one.

        async with Aggregator(rounds=3, min_workers=5) as aggregator:    # a RunningAggregator
            ...
        with Aggregator(rounds=3, min_workers=5) as aggregator:          # a BlockingAggregator
            ...

    `settings` are the keys of the table [aggregator] (docs/settings.md). Without `data_dir`, rounds and models are
    in a folder that goes with this object. It listens on a free port of this machine, unless `address` says
    otherwise, and serves until the block ends, also when its run has ended. Signals belong to the program.

    Raises `UsageError` for settings that cannot be, when it is made.
    """

    def __init__(self, data_dir: str | PathLike[str] | None = None, **settings: Any) -> None:
        self.data_dir = Path(data_dir) if data_dir is not None else folder_of(self, "fedgrpc-aggregator-")
        table = {"address": "127.0.0.1:0", "stay": True, **settings}
        self._values = values_of(COMMAND, table, {"data_dir": self.data_dir})
        self.settings = settings_from(self._values)
        names = {setting.key: setting.name for setting in COMMAND.settings()}
        self._has_run = any(names[key.replace("-", "_")] not in PROCESS_NAMES for key in settings) or (
            "run_name" in settings
        )
        self._log_level: str | None = settings.get("log_level")

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[RunningAggregator]:
        log_quietly(self._log_level)
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        has_own = self._has_run or holds_run(self.data_dir)
        with prepared(self._values, self.settings, has_own) as server:
            ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            serving = asyncio.create_task(server.run(ready.set_result))
            try:
                await asyncio.wait((serving, ready), return_when=asyncio.FIRST_COMPLETED)
                if serving.done():
                    serving.result()
                async with _calling(self.settings, ready.result()) as client:
                    yield RunningAggregator(self, ready.result(), client, serving)
            finally:
                await _ended(server, serving, ready.done())

    def _handle(self, running: RunningAggregator, loop: LoopThread) -> BlockingAggregator:
        return BlockingAggregator(running, loop, self)


async def _ended(server: Server, serving: asyncio.Task[int], serves: bool) -> None:
    """Let an aggregator drain and end. Raises what has ended it before."""
    if not serving.done():
        if serves:
            server.stop()
        else:
            serving.cancel()
    try:
        await serving
    except asyncio.CancelledError:
        if not serving.cancelled():
            serving.cancel()
            raise


@asynccontextmanager
async def _calling(settings: AggregatorSettings, port: int) -> AsyncIterator[Client]:
    with local_address(settings.data_dir / IDENTITY) as address:
        async with opened(address) as client:
            yield client
