"""The floor of the load: a server that answers the same calls from bytes made once, and keeps and checks nothing.

What it takes of a core is what `grpc.aio` itself takes for these calls and bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from fedgrpc.codec.chunk import Chunk, crc32
from fedgrpc.rpc import framing
from fedgrpc.rpc.channel import SERVER_OPTIONS
from fedgrpc.v1 import aggregator_pb2 as pb


class BareServer:
    """Gives `updates` tasks a round to those who poll, and begins the next round with the last update."""

    def __init__(self, updates: int, model_bytes: int) -> None:
        self._updates = updates
        self._model = framing.message_of(Chunk(0, data := os.urandom(model_bytes), crc32(data)))
        self._round = 1
        self._left_to_give = self._left_to_come = updates
        self._begun = asyncio.Event()

    async def _register(self, request: bytes, context: Any) -> bytes:
        return b""

    async def _run(self, request: bytes, context: Any) -> bytes:
        return pb.GetRunResponse(run=pb.Run(model_version=self._round)).SerializeToString()

    async def _poll_tasks(self, requests: AsyncIterator[bytes], context: Any) -> None:
        async for request in requests:
            await context.write(await self._answer(pb.PollTasksRequest.FromString(request).poll.wait.seconds))

    async def _answer(self, wait_s: float) -> bytes:
        try:
            async with asyncio.timeout(wait_s):
                while not self._left_to_give:
                    await self._begun.wait()
        except TimeoutError:
            return framing.polled(pb.PollTaskResponse(), b"")
        self._left_to_give -= 1
        if not self._left_to_give:
            self._begun.clear()
        return framing.polled(pb.PollTaskResponse(task=pb.Task(token="0" * 32, round=self._round)), self._model)

    async def _push_update(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        while (await context.read()) is not grpc.aio.EOF:
            pass
        self._left_to_come -= 1
        if not self._left_to_come:
            self._round += 1
            self._left_to_give = self._left_to_come = self._updates
            self._begun.set()
        return pb.PushUpdateResponse(complete=True).SerializeToString()

    async def serve(self, tell_port: Callable[[int], object]) -> None:
        """Until killed."""
        server = grpc.aio.server(options=SERVER_OPTIONS)
        handlers = {
            "Register": grpc.unary_unary_rpc_method_handler(self._register),
            "Heartbeat": grpc.unary_unary_rpc_method_handler(self._register),
            "GetRun": grpc.unary_unary_rpc_method_handler(self._run),
            "PollTasks": grpc.stream_stream_rpc_method_handler(self._poll_tasks),
            "PushUpdate": grpc.stream_unary_rpc_method_handler(self._push_update),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("fedgrpc.v1.Aggregator", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        tell_port(port)
        await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--model-bytes", type=int, required=True)
    options = parser.parse_args()

    server = BareServer(options.updates, options.model_bytes)
    asyncio.run(server.serve(lambda port: options.port_file.write_text(str(port))))


if __name__ == "__main__":
    main()
