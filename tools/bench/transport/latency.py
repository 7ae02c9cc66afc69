"""How long polls and heartbeats take while large uploads run.

A real aggregator; eight processes that push updates of 100 MB, one after the other, as fast as they can; and one
worker that holds a task, too, and all the while sends a heartbeat and polls again, every few milliseconds.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from fedgrpc import logging
from tools.bench.transport.federation import layout, write_initial
from tools.bench.transport.workload import initial_model

_PAUSE_S = 0.005
_WAIT_S = 60.0

Span = tuple[float, float]


@dataclass(frozen=True)
class Probe:
    """(when it was sent on the monotonic clock, seconds until its answer) of every call, and (when it was due, by
    how many seconds it came late) of a timer of this process.
    """

    polls: tuple[Span, ...]
    heartbeats: tuple[Span, ...]
    late: tuple[Span, ...]


@dataclass(frozen=True)
class Latency:
    """Seconds of the calls of one kind that were sent while uploads ran."""

    count: int
    median_s: float
    p99_s: float
    longest_s: float

    @staticmethod
    def of(samples: Sequence[Span]) -> Latency:
        """Of them all."""
        seconds = [took_s for _, took_s in samples]
        median, p99 = np.percentile(seconds, [50, 99])
        return Latency(len(seconds), float(median), float(p99), max(seconds))


def serve(pipe: Connection, width: int, workers: int, folder: Path) -> None:
    """Process target of the aggregator: one round of `workers`, the one that only asks among them.

    Asked for it, it tells how late its event loop was.
    """
    logging.configure("warning")
    path = folder / "initial.safetensors"
    write_initial(path, width)
    asyncio.run(_serve(pipe, folder, path, workers))


async def _serve(pipe: Connection, folder: Path, initial: Path, workers: int) -> None:
    from fedgrpc.aggregator.server import Aggregator
    from fedgrpc.aggregator.settings import AggregatorSettings
    from fedgrpc.rounds.policy import RoundPolicy

    policy = RoundPolicy(min_workers=workers, min_sample_size=workers)
    settings = AggregatorSettings(
        folder / "aggregator",
        address="127.0.0.1:0",
        rounds=1,
        policy=policy,
        initial_model=initial,
        evaluate=False,
        download_recipe="raw",
        upload_recipe="raw",
    )
    late: list[Span] = []

    def tell() -> None:
        pipe.recv()
        pipe.send(late)

    noting = asyncio.create_task(_note_lateness(late))
    asyncio.get_running_loop().add_reader(pipe.fileno(), tell)
    await Aggregator(settings).run(pipe.send)
    noting.cancel()


async def _note_lateness(late: list[Span]) -> None:
    """How late this event loop comes to what it has to do: it is busy, or has no core."""
    while True:
        due = time.monotonic() + _PAUSE_S
        await asyncio.sleep(_PAUSE_S)
        late.append((due, time.monotonic() - due))


def upload(pipe: Connection, port: int, number: int, width: int, updates: int = 1) -> None:
    """Process target of one that pushes `updates`, each as a worker of its own: says that it is ready, is told to
    begin, and tells when it pushed.
    """
    logging.configure("warning")
    pipe.send(asyncio.run(_upload(pipe, port, number, width, updates)))


async def _upload(pipe: Connection, port: int, number: int, width: int, updates: int) -> Span:
    from fedgrpc.codec.payload import buffer_reader, write_payload
    from fedgrpc.codec.recipe import Recipe
    from fedgrpc.protocol.tensors import manifest_to_proto
    from fedgrpc.rpc.channel import open_channel
    from fedgrpc.v1.aggregator_pb2 import UpdateHeader
    from fedgrpc.worker.client import AggregatorClient

    out = io.BytesIO()
    manifest = write_payload(
        initial_model(width), Recipe.parse("raw"), out, np.random.default_rng(number), layout(width)
    )
    message, read = manifest_to_proto(manifest), buffer_reader(out.getbuffer())
    async with AsyncExitStack() as stack:
        tasks: list[tuple[AggregatorClient, UpdateHeader]] = []
        for turn in range(updates):
            channel = await stack.enter_async_context(open_channel(f"127.0.0.1:{port}"))
            name = f"uploader-{number}-{turn}"
            client = AggregatorClient(channel, name)
            await _register(client)
            tasks.append((client, UpdateHeader(worker=name, manifest=message, example_count=10)))
        tokens = await asyncio.gather(*(_task_of(client) for client, _ in tasks))
        for (_, header), token in zip(tasks, tokens, strict=True):
            header.token = token
        pipe.send("ready")
        await asyncio.to_thread(pipe.recv)
        began = time.monotonic()
        for client, header in tasks:
            await client.pushes.push(header, read, 0)
        return began, time.monotonic()


async def _register(client: Any) -> None:
    from fedgrpc.protocol.tasks import WorkerRole
    from fedgrpc.worker.device import detect

    await client.register(detect(), WorkerRole.TRAINER)


async def _task_of(client: Any) -> str:
    async with asyncio.timeout(_WAIT_S):
        while (polled := await client.poll(5.0, None)).task is None:
            pass
    return str(polled.task.token)


def ask(pipe: Connection, port: int) -> None:
    """Process target of the worker that asks, until it is told to stop."""
    logging.configure("warning")
    pipe.send(asyncio.run(_ask(pipe, port)))


async def _ask(pipe: Connection, port: int) -> Probe:
    from fedgrpc.rounds.events import TaskPhase
    from fedgrpc.rpc.channel import open_channel
    from fedgrpc.worker.client import AggregatorClient

    polls: list[Span] = []
    beats: list[Span] = []
    late: list[Span] = []
    async with open_channel(f"127.0.0.1:{port}") as channel:
        client = AggregatorClient(channel, "asking")
        await _register(client)
        token = await _task_of(client)
        noting = asyncio.create_task(_note_lateness(late))
        pipe.send("ready")
        while not pipe.poll():
            await _timed(beats, lambda: client.heartbeat(token, TaskPhase.TRAINING, 0.5))
            # A worker that holds a task is told of it at once.
            await _timed(polls, lambda: client.poll(5.0, None))
            await asyncio.sleep(_PAUSE_S)
        noting.cancel()
    return Probe(tuple(polls), tuple(beats), tuple(late))


async def _timed(spans: list[Span], call: Callable[[], Awaitable[object]]) -> None:
    sent = time.monotonic()
    await call()
    spans.append((sent, time.monotonic() - sent))
