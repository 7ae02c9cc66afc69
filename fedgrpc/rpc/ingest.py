"""Ingest processes: several of them share the aggregator's port, so that its connections use more than one core.

    caller --TLS, HTTP/2--> ingest process --frames over a socket pair--> the run's process

The kernel gives each connection to one of them (SO_REUSEPORT). They take TLS, HTTP/2 and gRPC from the run's
process, which serves the calls (`fedgrpc.rpc.relayed_calls`). So any caller may come to any of them, and come back
to another. Work that moves many bytes they do themselves, as the run's process asks (`RelayedCall.do`).

The rule: a process that dies is started again, and one that hangs is killed. What its callers were about continues
as after any broken link.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

import structlog

from fedgrpc.aio import Interrupted, run_until_interrupted
from fedgrpc.errors import FedgrpcError, UsageError
from fedgrpc.process import keep_from_children, kept_from_children, resident_bytes, used_cpu_s
from fedgrpc.rpc.address import Address
from fedgrpc.rpc.relay import OF_PROCESS, Kind
from fedgrpc.rpc.relayed_calls import RelayedCalls
from fedgrpc.rpc.server_tls import ServerTls

_STARTED_WITHIN_S: Final = 60.0
# A process tells every few seconds that it lives, and hangs when it has told nothing for half a minute: until then
# the kernel gives it new connections.
_ALIVE_EVERY_S: Final = 5.0
_MOST_SILENT: Final = 6
# Beyond the grace time of its calls.
_ENDED_WITHIN_S: Final = 2.0
_BUFFER_BYTES: Final = 1 << 20
# Waits before a process that died is started again; one that lived so long had no fault of its own.
_FIRST_WAIT_S, _LONGEST_WAIT_S, _SOUND_S = 0.1, 10.0, 60.0

log = structlog.get_logger()


@dataclass(frozen=True)
class Ingest:
    """Ingest processes that a server asks for. Each runs `module`, which starts its work with `work`."""

    process_count: int
    module: str
    work: Mapping[str, object]


class IngestProcesses:
    """The ingest processes of one server. Lives on one event loop."""

    def __init__(
        self,
        ingest: Ingest,
        address: Address,
        options: Sequence[tuple[str, int | str]],
        tls: ServerTls | None,
        calls: Callable[[Callable[[Kind], None]], RelayedCalls],
    ) -> None:
        """`calls` makes what serves the calls of one process, from what gets its frames that are of no call."""
        self._ingest = ingest
        self.restarts = 0
        self._address = address
        self._options = list(options)
        self._tls = tls
        self._make_calls = calls
        self._serving: dict[int, RelayedCalls] = {}
        # Process ids of those that are running, by index.
        self.pids: dict[int, int] = {}
        self._told_tls: dict[int, object] = {}
        # How many times in a row nothing was heard of each.
        self._silent: dict[int, int] = {}
        self._stopping = False
        self._all_serve = asyncio.Event()

    @property
    def wanted_count(self) -> int:
        """Number of processes that there are to be."""
        return self._ingest.process_count

    @property
    def serving_count(self) -> int:
        """Number of processes that accept connections now."""
        return len(self._serving)

    @property
    def memory_bytes(self) -> int:
        """Resident memory of those that run now."""
        return sum(map(resident_bytes, list(self.pids.values())))

    @property
    def cpu_s(self) -> float:
        """User and system time of those that run now."""
        return sum(map(used_cpu_s, list(self.pids.values())))

    @asynccontextmanager
    async def opened(self, grace_s: float) -> AsyncIterator[int]:
        """Run the processes for the block; yields the port. At the end calls in flight have `grace_s` seconds.

        Raises `UsageError` where the address cannot be used.
        """
        with ExitStack() as stack:
            self._address = _reserved(self._address, stack)
            keeping = [asyncio.create_task(self._keep(index)) for index in range(self._ingest.process_count)]
            try:
                try:
                    await asyncio.wait_for(self._all_serve.wait(), _STARTED_WITHIN_S)
                except TimeoutError:
                    raise UsageError(f"no ingest process listens on {self._address}; see the log") from None
                yield self._address.port
            finally:
                self.refuse_new_calls(grace_s)
                _, late = await asyncio.wait(keeping, timeout=grace_s + _ENDED_WITHIN_S)
                for task in late:
                    task.cancel()
                await asyncio.gather(*keeping, return_exceptions=True)

    def refuse_new_calls(self, grace_s: float) -> None:
        """Take no further calls. Those in flight have `grace_s` seconds, from the first time this is asked."""
        if self._stopping:
            return
        self._stopping = True
        for calls in self._serving.values():
            calls.link.send(Kind.STOP, OF_PROCESS, str(grace_s).encode())

    async def _keep(self, index: int) -> None:
        """Start the process again whenever it dies or hangs."""
        wait_s = _FIRST_WAIT_S
        while not self._stopping:
            began = time.monotonic()
            try:
                why = f"exit code {await self._run(index)}"
            except Interrupted as hanging:
                why = str(hanging)
            except OSError as error:
                # No memory or no descriptor for a process now: later there may be.
                why = str(error)
            if self._stopping:
                return
            self.restarts += 1
            wait_s = _FIRST_WAIT_S if time.monotonic() - began > _SOUND_S else min(2 * wait_s, _LONGEST_WAIT_S)
            log.warning("ingest process ended", index=index, reason=why, again_in_s=wait_s)
            await asyncio.sleep(wait_s)

    async def _run(self, index: int) -> int:
        """Run one process to its end; its exit code. Raises `Interrupted` where it hangs; it is killed then."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                end.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        ours.setblocking(False)
        calls = self._make_calls(lambda kind: self._on_process(index, calls, kind))
        with theirs, kept_from_children(ours.fileno()):
            await asyncio.get_running_loop().create_unix_connection(lambda: calls.link, sock=ours)
            process = await self._started(theirs)
            theirs.close()
            self.pids[index] = process.pid
            try:
                self._told_tls.pop(index, None)
                self._tell_tls(index, calls)
                start = {
                    "address": str(self._address),
                    "options": self._options,
                    "alive_every_s": _ALIVE_EVERY_S,
                    "work": dict(self._ingest.work),
                }
                calls.link.send(Kind.START, OF_PROCESS, json.dumps(start).encode())
                return await run_until_interrupted(process.wait(), self._until_it_hangs(index))
            finally:
                del self.pids[index]
                self._serving.pop(index, None)
                calls.link.close()
                if process.returncode is None:
                    process.kill()
                    await process.wait()

    async def _until_it_hangs(self, index: int) -> str:
        """Return why, once nothing has been heard of the process for long."""
        # Its start may take longer.
        self._silent[index] = -int(_STARTED_WITHIN_S / _ALIVE_EVERY_S)
        # Counted and not timed: where this process was stopped as well, as in a paused container, that is once.
        while self._silent[index] < _MOST_SILENT:
            await asyncio.sleep(_ALIVE_EVERY_S)
            self._silent[index] += 1
        return f"it hung: not a sign of life for {_MOST_SILENT * _ALIVE_EVERY_S:g} s"

    async def _started(self, link: socket.socket) -> asyncio.subprocess.Process:
        # -m alone would import from the current folder first, whatever lies there.
        command = [sys.executable, "-P", "-m", self._ingest.module, str(link.fileno())]
        return await asyncio.create_subprocess_exec(
            *command,
            pass_fds=[link.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )

    def _on_process(self, index: int, calls: RelayedCalls, kind: Kind) -> None:
        self._silent[index] = 0
        if kind is Kind.ASK_TLS:
            self._tell_tls(index, calls)
        if kind is not Kind.SERVING:
            return
        self._serving[index] = calls
        if self.serving_count == self._ingest.process_count:
            self._all_serve.set()

    def _tell_tls(self, index: int, calls: RelayedCalls) -> None:
        """Give the process the keys and certificates, if they have changed since it got them."""
        if self._tls is None:
            return
        material = b""
        try:
            if (revision := self._tls.revision()) != self._told_tls.get(index):
                material = self._tls.material().encoded()
                self._told_tls[index] = revision
        except (OSError, FedgrpcError) as error:
            log.warning("certificates not reloaded", reason=str(error))
        calls.link.send(Kind.TLS, OF_PROCESS, material)


def _reserved(address: Address, stack: ExitStack) -> Address:
    """Take the port, so that nobody else does between two processes. Raises `UsageError`."""
    if address.is_unix or not hasattr(socket, "SO_REUSEPORT") or sys.platform != "linux":
        raise UsageError("--ingest shares a port between processes: it needs HOST:PORT, and Linux")
    try:
        for family, where in address.resolve(listening=True):
            taken = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            taken.bind((where[0], address.port, *where[2:]))
            address = address.with_port(taken.getsockname()[1])
    except OSError as error:
        raise UsageError(f"cannot listen on {address}: {error.strerror or error}") from error
    keep_from_children(address.port)
    return address
