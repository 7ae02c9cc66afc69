"""The operator's API: calls to a running aggregator, whose answers are records (`fedgrpc.api.records`).

`fedgrpc.calls` makes the calls, for the command line and the page, too. This module turns messages into values.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fedgrpc.api.block import Block, Handle, LoopThread, blocking
from fedgrpc.api.records import Device, ModelVersion, Round, Run, device_of, round_of, run_of, version_of
from fedgrpc.api.rows import Rows
from fedgrpc.api.settings import texts_of
from fedgrpc.calls import Calls, connect
from fedgrpc.errors import LinkError, UsageError
from fedgrpc.model_client import download
from fedgrpc.reach import by_default, default_context, on_this_host
from fedgrpc.rpc.channel import Tls
from fedgrpc.storage.model_file import read_weights
from fedgrpc.storage.stored_run import metadata
from fedgrpc.v1 import aggregator_pb2 as pb


class Client(Block["Client", "BlockingClient"]):
    """Calls to one aggregator, for the length of a block.

        async with Client("10.0.0.5:50051") as client:      # methods are awaited
            runs = await client.runs()
        with Client(data_dir="data") as client:             # a BlockingClient, whose methods block
            runs = client.runs()

    An aggregator is reached by its address, by the `data_dir` of one on this host, or by an operator's `context`
    file. Without any, it is the one of ~/.config/fedgrpc/context, else that at 127.0.0.1:50051.

    Calls about a run are about the one named `run`; "": the one that the aggregator was started with, else its
    only one. Every method raises `LinkError` when the aggregator cannot be reached, `NotFound` where there is no
    such run, and `UsageError` where none is named and there are several.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        data_dir: str | PathLike[str] | None = None,
        context: str | PathLike[str] | None = None,
        tls: Tls | None = None,
        run: str = "",
    ) -> None:
        if sum(each is not None for each in (address, data_dir, context)) > 1:
            raise UsageError("give one of address, data_dir and context")
        if context is not None and tls is not None:
            raise UsageError("a context brings its own certificates; leave out tls")
        self.run_name = run
        self._address = address
        self._data_dir = None if data_dir is None else Path(data_dir)
        self._context = None if context is None else Path(context)
        self._tls = tls
        self._calls: Calls | None = None

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[Client]:
        async with self._dialled() as calls:
            self._calls = calls.of(self.run_name)
            try:
                yield self
            finally:
                self._calls = None

    @asynccontextmanager
    async def _dialled(self) -> AsyncIterator[Calls]:
        if self._data_dir is not None:
            async with on_this_host(self._data_dir) as calls:
                yield calls
            return
        context = self._context
        if context is None and self._address is None and self._tls is None:
            context = default_context()
        async with by_default(self._address, self._tls, context) as calls:
            yield calls

    def _handle(self, running: Client, loop: LoopThread) -> BlockingClient:
        return BlockingClient(running, loop, self)

    @property
    def calls(self) -> Calls:
        """The calls themselves, whose answers are messages: for members, join tokens and releases."""
        if self._calls is None:
            raise UsageError("this Client is not open: use it in a block, `async with Client(...) as client`")
        return self._calls

    def of(self, run: str) -> Client:
        """Return a client of another run, over the same connection."""
        other = Client(run=run)
        other._calls = self.calls.of(run)
        return other

    # What there is.

    async def runs(self) -> Rows[Run]:
        """Return every run of the aggregator, oldest first."""
        return Rows(map(run_of, await self.calls.runs()))

    async def run(self) -> Run:
        """Return the run."""
        return await self._run_of(await self.calls.run())

    async def _run_of(self, message: pb.Run) -> Run:
        return run_of(next(run for run in await self.calls.runs() if run.id == message.id))

    async def rounds(self, last: int | None = None) -> Rows[Round]:
        """Return the last rounds of the run, oldest first, each with all of its tasks; None: all of them."""
        found = await (self.calls.all_rounds() if last is None else self.calls.latest_rounds(last))
        return Rows(map(round_of, found))

    async def round(self, number: int) -> Round:
        """Return a round of the run. Raises `NotFound`."""
        return round_of(await self.calls.round(number))

    async def devices(self) -> Rows[Device]:
        """Return every device that has registered, pi-2 before pi-10."""
        return Rows(map(device_of, await self.calls.workers()))

    async def models(self) -> Rows[ModelVersion]:
        """Return the versions of the run's model that are kept, oldest first."""
        found = await self.calls.models.versions(self.run_name)
        return Rows(version_of(found.run, version) for version in found.versions)

    async def watch(self) -> AsyncIterator[Round]:
        """Yield the current round each time it changes, until the run ends."""
        async for news in self.calls.watch():
            yield round_of(news.round)

    async def until_ended(self) -> Run:
        """Wait until the run has ended, and return it. Raises `LinkError` where the aggregator goes before."""
        async for _ in self.calls.watch():
            pass
        if not (run := await self.run()).ended:
            raise LinkError(f"the aggregator at {self.calls.address} ended before its run {run.name}")
        return run

    # Models.

    async def model(self, version: str | int = "latest") -> dict[str, np.ndarray]:
        """Return the weights of a version as arrays by name: its number, "latest", "best", "final" or a tag."""
        with tempfile.TemporaryDirectory(prefix="fedgrpc-model-") as folder:
            path = await self.download(Path(folder) / "model.safetensors", version)
            return await asyncio.to_thread(read_weights, path)

    async def download(self, path: str | PathLike[str], version: str | int = "latest") -> Path:
        """Write a version to a safetensors file; a download that broke off is continued. Return the path."""
        found = await self.calls.models.version(self.run_name, str(version))
        stream = self.calls.models.stream_of(found.run_id, found.version.version.version)
        await download(stream, Path(path), metadata(found))
        return Path(path)

    async def tag(self, version: str | int, tag: str) -> None:
        """Give a version a tag, by which it is kept."""
        await self.calls.models.tag(self.run_name, str(version), tag)

    # What operators do.

    async def submit(self, name: str, /, **settings: Any) -> Run:
        """Start a run with these settings, by their keys in a settings file. Raises `UsageError`, `Exhausted`."""
        return await self._run_of(await self.calls.submit(name, texts_of(settings)))

    async def change(self, /, **settings: Any) -> Mapping[str, str]:
        """Change settings of the run from its next round on. Returns `OLD -> NEW` by setting.

        Raises `UsageError` for a setting that may not change, `IllegalTransition` once the run has ended.
        """
        return await self.calls.change(texts_of(settings))

    async def pause(self) -> Run:
        """Open no further round. Raises `IllegalTransition` once the run has ended."""
        return await self._run_of(await self.calls.pause())

    async def resume(self) -> Run:
        """Open rounds again. Raises `IllegalTransition` once the run has ended."""
        return await self._run_of(await self.calls.resume())

    async def roll_back(self, version: int, reason: str) -> Run:
        """Continue from a kept version; 0: from a new first model. Raises `NotFound`, `IllegalTransition`."""
        return await self._run_of(await self.calls.roll_back(version, reason))

    async def stop(self, reason: str) -> Run:
        """End the run, and record the reason."""
        return await self._run_of(await self.calls.stop(reason))

    async def remove(self) -> None:
        """Remove the run, which has ended, with its models. Raises `NotFound`, `IllegalTransition`."""
        await self.calls.remove()


class BlockingClient(Handle[Client]):
    """The methods of a `Client`, which block; `close` in place of the end of a block."""

    runs = blocking(Client.runs)
    run = blocking(Client.run)
    rounds = blocking(Client.rounds)
    round = blocking(Client.round)
    devices = blocking(Client.devices)
    models = blocking(Client.models)
    until_ended = blocking(Client.until_ended)
    model = blocking(Client.model)
    download = blocking(Client.download)
    tag = blocking(Client.tag)
    submit = blocking(Client.submit)
    change = blocking(Client.change)
    pause = blocking(Client.pause)
    resume = blocking(Client.resume)
    roll_back = blocking(Client.roll_back)
    stop = blocking(Client.stop)
    remove = blocking(Client.remove)

    def of(self, run: str) -> BlockingClient:
        """Return a client of another run, over the same connection."""
        return BlockingClient(self.own.of(run), self._loop, self._block)


@asynccontextmanager
async def opened(address: str) -> AsyncIterator[Client]:
    """Return a client of the aggregator at an address, for the length of the block."""
    async with connect(address) as calls:
        client = Client()
        client._calls = calls
        yield client
