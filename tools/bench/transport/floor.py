"""The floor: bare grpc.aio, protobuf chunks of 1 MiB, a streaming sum. No codec, no checks, no disk.

A round: every worker pulls the model, adds its noise, and pushes the sum back; the server adds the pushed
chunks into one float32 array as they come, and divides.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio
import numpy as np

from fedgrpc.v1.tensor_pb2 import Chunk
from tools.bench.transport.meter import Mark, Usage
from tools.bench.transport.workload import Array, Noise, flat, initial_model

CHUNK_BYTES = 1 << 20
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_PULL, _PUSH = "/floor.Floor/Pull", "/floor.Floor/Push"


class _Server:
    def __init__(self, width: int, workers: int, rounds: int) -> None:
        self._model = flat(initial_model(width))
        self._sum = np.zeros_like(self._model)
        self._workers, self._rounds = workers, rounds
        self._pulling = self._pushed = 0
        self._open = asyncio.Event()
        self.marks: list[Mark] = []
        self.done = asyncio.Event()

    async def pull(self, request: bytes, context: Any) -> AsyncIterator[Chunk]:
        """The model, once all workers ask for it; nothing after the last round."""
        self._pulling += 1
        opened = self._open
        if self._pulling == self._workers:
            self._pulling = 0
            self._open = asyncio.Event()
            self.marks.append(Mark.now())
            opened.set()
        await opened.wait()
        if len(self.marks) > self._rounds:
            self.done.set()
            return
        data = self._model.data.cast("B")
        for offset in range(0, data.nbytes, CHUNK_BYTES):
            yield Chunk(offset=offset, data=bytes(data[offset : offset + CHUNK_BYTES]))

    async def push(self, chunks: AsyncIterator[Chunk], context: Any) -> bytes:
        """Add one worker's model; after the last one, average."""
        async for chunk in chunks:
            values = np.frombuffer(chunk.data, np.float32)
            start = chunk.offset // 4
            self._sum[start : start + values.size] += values
        self._pushed += 1
        if self._pushed == self._workers:
            self._pushed = 0
            np.divide(self._sum, self._workers, out=self._model)
            self._sum[:] = 0
        return b""


def serve(pipe: Connection, width: int, workers: int, rounds: int) -> None:
    """Process target of the server."""
    pipe.send(asyncio.run(_serve(pipe, width, workers, rounds)))


async def _serve(pipe: Connection, width: int, workers: int, rounds: int) -> Usage:
    floor = _Server(width, workers, rounds)
    server = grpc.aio.server(options=_OPTIONS)
    handlers = {
        "Pull": grpc.unary_stream_rpc_method_handler(floor.pull, None, Chunk.SerializeToString),
        "Push": grpc.stream_unary_rpc_method_handler(floor.push, Chunk.FromString, None),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("floor.Floor", handlers),))
    pipe.send(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    await floor.done.wait()
    usage = Usage.of(floor.marks)
    await server.stop(1)
    return usage


def work(pipe: Connection, port: int, number: int, width: int) -> None:
    """Process target of a worker."""
    pipe.send(asyncio.run(_work(f"127.0.0.1:{port}", Noise(number), width)))


async def _work(target: str, noise: Noise, width: int) -> Usage:
    size = flat(initial_model(width)).size
    marks = [Mark.now()]
    async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
        pull = channel.unary_stream(_PULL, None, Chunk.FromString)
        push = channel.stream_unary(_PUSH, Chunk.SerializeToString, None)
        while True:
            model = np.empty(size, np.float32)
            received = 0
            async for chunk in pull(b""):
                values = np.frombuffer(chunk.data, np.float32)
                model[chunk.offset // 4 : chunk.offset // 4 + values.size] = values
                received += values.size
            if not received:
                return Usage.of(marks)
            noise.shift()
            await push(_chunks(noise.add_to(model)))
            marks.append(Mark.now())


async def _chunks(values: Array) -> AsyncIterator[Chunk]:
    data = values.data.cast("B")
    for offset in range(0, data.nbytes, CHUNK_BYTES):
        yield Chunk(offset=offset, data=bytes(data[offset : offset + CHUNK_BYTES]))
