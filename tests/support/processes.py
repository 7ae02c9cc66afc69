"""The command line's aggregators and workers as processes that can be killed."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from contextlib import asynccontextmanager
from pathlib import Path

from fedgrpc.rpc.channel import open_channel
from fedgrpc.v1 import aggregator_pb2_grpc
from tests.support.hand_driven_device import PATIENCE_S, HandDrivenDevice
from tests.support.running_federation import INGEST, RunningAggregator, settings_for

ROOT = Path(__file__).parents[2]
_LONGEST_LINE_BYTES = 1 << 20
# Of some rounds, on a machine that does a dozen other things.
_WHOLE_RUN_S = 240.0


class Process:
    """`fedgrpc COMMAND ...` with its log as events; what is no log line is an event of its own."""

    def __init__(self, process):
        self._process = process
        self.events = []
        self.over = False
        self._more = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, command, *arguments, program=("-m", "fedgrpc"), before=()):
        """`program` is what Python runs as the command line, `before` what runs Python, such as taskset."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDGRPC_")}
        return cls(
            await asyncio.create_subprocess_exec(
                *(*before, sys.executable, *program),
                *(command, "--log-format", "json", "--log-level", "debug"),
                *map(str, arguments),
                cwd=ROOT,
                env={**environment, "OMP_NUM_THREADS": "1"},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                limit=_LONGEST_LINE_BYTES,
            )
        )

    async def _read(self):
        async for line in self._process.stdout:
            self.events.append(_event(line))
            self._more.set()
        self.over = True
        self._more.set()

    async def until(self, event, since=0, **fields):
        """The first log line with that event and these fields, from line `since` on."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                self._more.clear()
                for line in self.events[since:]:
                    if line["event"] == event and fields.items() <= line.items():
                        return line
                assert not self.over, self.events
                await self._more.wait()

    @property
    def pid(self):
        return self._process.pid

    def send(self, number):
        self._process.send_signal(number)

    async def ended(self):
        """The exit code: minus the signal for one that killed it."""
        code = await asyncio.wait_for(self._process.wait(), _WHOLE_RUN_S)
        await self._reading
        return code

    async def kill(self):
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGKILL)
        return await self.ended()


def _event(line):
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    return event if isinstance(event, dict) and "event" in event else {"event": line.decode().strip()}


@asynccontextmanager
async def running_process(command, *arguments, **how):
    """A process until the block ends; `how` is that of `Process.start`."""
    started = await Process.start(command, *arguments, **how)
    try:
        yield started
    finally:
        await started.kill()


_ports = iter(range(20_000 + os.getpid() % 10_000, 32_000))


def free_address():
    """Below the ports of outgoing connections: a worker that dials a dead aggregator must not take its port.

    Another one each time.
    """
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return f"127.0.0.1:{port}"
    raise AssertionError("no free port")


@asynccontextmanager
async def aggregator_process(folder, *arguments, address="127.0.0.1:0", **how):
    """(process, what the in-process fixture gives) of an aggregator on `folder`."""
    settings = settings_for(folder)
    place = ["--data-dir", settings.data_dir, "--address", address]
    place += ["--initial-model", settings.initial_model]
    round_ = ["--min-workers", 2, "--selection-window", "30s", "--deadline", "10m", "--lease", "5m"]
    round_ += ["--ingest", INGEST]
    async with running_process(
        "aggregator", *place, *round_, "--no-evaluate", "--stay", *arguments, **how
    ) as started:
        address = f"127.0.0.1:{(await started.until('serving'))['port']}"
        async with open_channel(address) as channel:
            yield (
                started,
                RunningAggregator(address, settings, None, None, aggregator_pb2_grpc.AggregatorStub(channel)),
            )


@asynccontextmanager
async def worker_process(running, folder, name, data, *arguments, task="Recorded"):
    """A worker on a task of `tests.support.learning_tasks`, whose data folder is `data`."""
    data.mkdir(exist_ok=True)
    place = ["--aggregator", running.address, "--serve-address", "none"]
    place += ["--name", name, "--state-dir", folder / name]
    learning = ["--task", f"tests.support.learning_tasks:{task}", "--data", data]
    async with running_process("worker", *place, *learning, "--reconnect-first", "50ms", *arguments) as started:
        yield started


def reconnected(running, *devices):
    """The same devices, calling the aggregator that runs now."""
    return [HandDrivenDevice(running.stub, device.name) for device in devices]
