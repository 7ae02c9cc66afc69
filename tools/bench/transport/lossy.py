"""A bad link: a TCP proxy in this event loop with a rate, a delay, lost packets and connections that are reset.

TCP repairs what it loses, so a lost packet is a pause of a round trip (fast retransmit). Everything behind it
waits until it has come again. A reset is what a device sees that changes its network.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass

_PACKET_BYTES = 1448
_READ_BYTES = 16 << 10
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Quality:
    """Of each connection and direction; `reset_every_s` is a mean, None: never."""

    bytes_per_s: float
    round_trip_s: float = 0.05
    loss: float = 0.0
    reset_every_s: float | None = None


class Lossy:
    """An `async with`: a proxy to `target` ("HOST:PORT"); dial `address`."""

    def __init__(self, target: str, quality: Quality, seed: int = 0) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._quality = quality
        self._rng = random.Random(seed)
        self._connections: set[asyncio.Task[None]] = set()
        self.address = ""
        self.resets = 0
        self.carried_bytes = 0

    async def __aenter__(self) -> Lossy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_READ_BYTES)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connect(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far = writer
        every_s = self._quality.reset_every_s
        try:
            async with asyncio.timeout(None if every_s is None else self._rng.uniform(0.5, 1.5) * every_s):
                far_reader, far = await asyncio.open_connection(*self._target, limit=_READ_BYTES)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, far))
                    group.create_task(self._pump(far_reader, writer))
        except* TimeoutError:
            self.resets += 1
        except* OSError:
            # One side has gone: so does the other.
            pass
        finally:
            _reset(writer)
            _reset(far)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop, quality = asyncio.get_running_loop(), self._quality
        free_at = loop.time()
        while data := await reader.read(_READ_BYTES):
            packets = -(-len(data) // _PACKET_BYTES)
            lost = sum(self._rng.random() < quality.loss for _ in range(packets)) if quality.loss else 0
            free_at = max(loop.time(), free_at) + len(data) / quality.bytes_per_s + lost * quality.round_trip_s
            # A sleep is a millisecond late: fast links catch up.
            if (wait_s := free_at - loop.time()) > 0.002:
                await asyncio.sleep(wait_s)
            loop.call_later(quality.round_trip_s / 2, _write, writer, data)
            await writer.drain()
            self.carried_bytes += len(data)
        raise ConnectionResetError


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    if not writer.is_closing():
        writer.write(data)


def _reset(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
