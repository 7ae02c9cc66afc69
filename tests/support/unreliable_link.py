"""A link between workers and an aggregator that can be made as bad as wanted: a TCP proxy in this event loop.

`delay_s` is one way, `bytes_per_s` for each connection and direction. `cut` resets every connection and whoever
dials, until `mend`; `freeze` swallows without a word whatever comes, until `thaw`, which then delivers it. Bytes
are never changed or lost within a connection: that is TCP's own promise.
"""

import asyncio
import contextlib
import socket
import struct

_READ_BYTES = 16 << 10
_QUEUED = 16
_RESET = struct.pack("ii", 1, 0)


class UnreliableLink:
    """An `async with`: listens on `address`, and is mended whenever it is not made worse."""

    def __init__(self, target, delay_s=0.0, bytes_per_s=None):
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self.delay_s = delay_s
        self.bytes_per_s = bytes_per_s
        self.dialled = 0
        self.refused = 0
        self.up_bytes = 0
        self.down_bytes = 0
        self._whole = True
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._connections = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        going = list(self._connections)
        for task in going:
            task.cancel()
        await asyncio.gather(*going, return_exceptions=True)

    @property
    def connections(self):
        return len(self._connections)

    def cut(self):
        """Reset every connection, and whoever dials from now on."""
        self._whole = False
        for task in self._connections:
            task.cancel()

    def mend(self):
        self._whole = True

    def freeze(self):
        """Connections stay, and nothing comes through: what a dead route looks like for a while."""
        self._flowing.clear()

    def thaw(self):
        self._flowing.set()

    def _accept(self, reader, writer):
        self.dialled += 1
        if not self._whole:
            self.refused += 1
            _reset(writer)
            return
        task = asyncio.create_task(self._connect(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _connect(self, reader, writer):
        far = writer
        try:
            await self._flowing.wait()
            far_reader, far = await asyncio.open_connection(*self._target)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far, "up_bytes"))
                group.create_task(self._pump(far_reader, writer, "down_bytes"))
        except* OSError:
            # One side has gone: so does the other.
            pass
        finally:
            _reset(writer)
            _reset(far)

    async def _pump(self, reader, writer, counter):
        """One direction. A delay holds nothing up: what has been read waits for its time in a queue."""
        loop = asyncio.get_running_loop()
        queue = asyncio.Queue(_QUEUED)

        async def read():
            while data := await reader.read(_READ_BYTES):
                await queue.put((loop.time() + self.delay_s, data))
            await queue.put((loop.time() + self.delay_s, b""))

        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                await self._flowing.wait()
                if not data:
                    raise ConnectionResetError
                writer.write(data)
                await writer.drain()
                setattr(self, counter, getattr(self, counter) + len(data))
                if self.bytes_per_s is not None:
                    await asyncio.sleep(len(data) / self.bytes_per_s)


def _reset(writer):
    """Close with a reset, as a router that has forgotten the connection does; not with a goodbye."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
