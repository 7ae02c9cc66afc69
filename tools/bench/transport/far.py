"""A link that is far: a TCP proxy that delays every byte, and lets through so many a second over all connections.

TCP itself ends on this side of it, so what is seen is the flow control of HTTP/2 and what stands on it. A
connection takes a round trip to open.
"""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection

_SLACK_BYTES = 256 << 10


class _Direction:
    """One direction of the link, which all connections share."""

    def __init__(self, one_way_s: float, bytes_per_s: float) -> None:
        self.one_way_s, self._bytes_per_s = one_way_s, bytes_per_s
        self._most_bytes = int(bytes_per_s * 2 * one_way_s) + _SLACK_BYTES
        self._flying_bytes = 0
        self._free_at = 0.0
        self._paused: set[asyncio.Transport] = set()

    def send(self, data: bytes, sender: _Half) -> None:
        """Bring `data` to the other side of the connection, once the link has carried what came before."""
        loop = asyncio.get_running_loop()
        self._free_at = max(loop.time(), self._free_at) + len(data) / self._bytes_per_s
        self._flying_bytes += len(data)
        if self._flying_bytes > self._most_bytes:
            sender.transport.pause_reading()
            self._paused.add(sender.transport)
        loop.call_at(self._free_at + self.one_way_s, self._arrive, data, sender)

    def _arrive(self, data: bytes, sender: _Half) -> None:
        self._flying_bytes -= len(data)
        if self._flying_bytes <= self._most_bytes:
            for transport in self._paused:
                if not transport.is_closing():
                    transport.resume_reading()
            self._paused.clear()
        if sender.to is not None:
            sender.to.write(data)


class _Half(asyncio.Protocol):
    """One side of a connection: what comes in leaves `to`, when it has been through the link."""

    def __init__(self, direction: _Direction) -> None:
        self.direction = direction
        self.to: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.direction.send(data, self)

    def connection_lost(self, error: Exception | None) -> None:
        if self.to is not None:
            self.to.close()


def serve(pipe: Connection, port: int, round_trip_s: float, bits_per_s: float) -> None:
    """Process target of the proxy to `port` of this machine; it tells its own."""
    asyncio.run(_serve(pipe, port, round_trip_s / 2, bits_per_s / 8))


async def _serve(pipe: Connection, port: int, one_way_s: float, bytes_per_s: float) -> None:
    loop = asyncio.get_running_loop()
    dialling: set[asyncio.Task[None]] = set()
    there, back_again = _Direction(one_way_s, bytes_per_s), _Direction(one_way_s, bytes_per_s)

    class Front(_Half):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.transport.pause_reading()
            task = loop.create_task(self._dial())
            dialling.add(task)
            task.add_done_callback(dialling.discard)

        async def _dial(self) -> None:
            await asyncio.sleep(2 * one_way_s)
            back = _Half(back_again)
            self.to, _ = await loop.create_connection(lambda: back, "127.0.0.1", port)
            back.to = self.transport
            self.transport.resume_reading()

    server = await loop.create_server(lambda: Front(there), "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()
