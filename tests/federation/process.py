"""The command line's aggregators and workers as processes that can be killed."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

from fedgrpc.rpc.channel import open_channel
from fedgrpc.v1 import aggregator_pb2_grpc
from tests.federation.federation import PATIENCE_S, Device, Running, settings_for

ROOT = Path(__file__).parents[2]


class Process:
    """`fedgrpc COMMAND ...` with its log as events."""

    def __init__(self, process):
        self._process = process
        self.events = []
        self._more = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, command, *arguments):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDGRPC_")}
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "fedgrpc", command, "--log-format", "json", "--log-level", "debug"),
                *map(str, arguments),
                cwd=ROOT,
                env={**environment, "OMP_NUM_THREADS": "1"},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        )

    async def _read(self):
        async for line in self._process.stdout:
            try:
                self.events.append(json.loads(line))
            except ValueError:
                self.events.append({"event": line.decode().strip()})
            self._more.set()

    async def until(self, event):
        """The first log line with that event."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                self._more.clear()
                for line in self.events:
                    if line["event"] == event:
                        return line
                assert self._process.returncode is None, self.events
                await self._more.wait()

    def send(self, number):
        self._process.send_signal(number)

    async def ended(self):
        """The exit code: minus the signal for one that killed it."""
        code = await asyncio.wait_for(self._process.wait(), PATIENCE_S)
        await self._reading
        return code

    async def kill(self):
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGKILL)
        return await self.ended()


@asynccontextmanager
async def process(command, *arguments):
    started = await Process.start(command, *arguments)
    try:
        yield started
    finally:
        await started.kill()


@asynccontextmanager
async def aggregator_process(folder, *arguments):
    """(process, what the in-process fixture gives) of an aggregator on `folder`."""
    settings = settings_for(folder)
    place = [
        "--data-dir",
        settings.data_dir,
        "--address",
        "127.0.0.1:0",
        "--initial-model",
        settings.initial_model,
    ]
    round_ = ["--min-workers", 2, "--selection-window", "200ms", "--deadline", "20s", "--lease", "10s"]
    async with process("aggregator", *place, *round_, "--no-evaluate", "--stay", *arguments) as started:
        address = f"127.0.0.1:{(await started.until('serving'))['port']}"
        async with open_channel(address) as channel:
            yield started, Running(address, settings, None, None, aggregator_pb2_grpc.AggregatorStub(channel))


@asynccontextmanager
async def worker_process(running, folder, name, data, *arguments):
    """A worker on the task of `tests.federation.tasks`, whose data folder is `data`."""
    data.mkdir(exist_ok=True)
    place = [
        "--aggregator",
        running.address,
        "--name",
        name,
        "--state-dir",
        folder / name,
        "--serve-address",
        "none",
    ]
    task = ["--task", "tests.federation.tasks:Recorded", "--data", data]
    async with process("worker", *place, *task, "--reconnect-first", "50ms", *arguments) as started:
        yield started


def again(running, *devices):
    """The same devices, calling the aggregator that runs now."""
    return [Device(running.stub, device.name) for device in devices]
