"""How fast a model comes down and an update goes up over links that are far: round trip and rate.

    python -m tools.bench.far [--links 50:100,150:100,50:1000,150:1000]

One worker's client, a real aggregator and a proxy that delays every byte (`transport/far.py`), each in a
process of its own. The payload is raw and has 45 MB, on fast links 100 MB. Up it goes twice: over one stream, and
with side streams, as many as the worker takes by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.transport import far, federation, latency
from tools.bench.transport.processes import process, reply
from tools.bench.transport.workload import WIDTHS, initial_model

_SMALL, _LARGE = WIDTHS["11.2M"], WIDTHS["25.2M"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", default="50:100,150:100,50:1000,150:1000", help="round trip in ms, Mbit/s")
    for link in parser.parse_args().links.split(","):
        round_trip_ms, mbits = map(float, link.split(":"))
        _, alone = measure(round_trip_ms * 1e-3, mbits, has_sides=False)
        down, up = measure(round_trip_ms * 1e-3, mbits, has_sides=True)
        link_text = f"{round_trip_ms:4.0f} ms, {mbits:5.0f} Mbit/s"
        print(f"{link_text}: down {down:6.1f}, up {alone:6.1f}, with sides {up:6.1f} Mbit/s", flush=True)


def measure(round_trip_s: float, mbits: float, has_sides: bool) -> tuple[float, float]:
    """Mbit/s down and up; `has_sides`: the upload may have side streams."""
    width = _LARGE if mbits > 200 else _SMALL
    with tempfile.TemporaryDirectory(prefix="fedgrpc-bench-") as name:
        folder = Path(name)
        with process(latency.serve, width=width, workers=1, folder=folder) as server:
            link = {"port": reply(server), "round_trip_s": round_trip_s, "bits_per_s": mbits * 1e6}
            with process(far.serve, 0.0, **link) as proxy:
                return asyncio.run(_exchange(reply(proxy), width, folder / "worker", has_sides))


async def _exchange(port: int, width: int, folder: Path, has_sides: bool) -> tuple[float, float]:
    from fedgrpc.codec.payload import buffer_reader, write_payload
    from fedgrpc.codec.recipe import Recipe
    from fedgrpc.protocol.tasks import WorkerRole
    from fedgrpc.protocol.tensors import manifest_to_proto
    from fedgrpc.rounds.events import TaskPhase
    from fedgrpc.rpc.channel import open_channel
    from fedgrpc.v1.aggregator_pb2 import UpdateHeader
    from fedgrpc.worker.client import AggregatorClient
    from fedgrpc.worker.device import detect
    from fedgrpc.worker.held_model import Source
    from fedgrpc.worker.model_folder import ModelFolder

    out = io.BytesIO()
    manifest = write_payload(
        initial_model(width), Recipe.parse("raw"), out, np.random.default_rng(0), federation.layout(width)
    )
    mbit = manifest.size_bytes * 8e-6
    async with open_channel(f"127.0.0.1:{port}") as channel:
        client = AggregatorClient(channel, "far")
        client.use(channel, (lambda: open_channel(f"127.0.0.1:{port}")) if has_sides else None)
        registration = await client.register(detect(), WorkerRole.TRAINER)
        while (polled := await client.poll(5.0, None)).task is None:
            pass
        source = Source(registration.run_id, polled.task.model_version)
        down_s = await _timed(client.pulls.pull(ModelFolder(folder), source, polled.task.token))
        # As a worker does that trains for longer than a second.
        await client.heartbeat(polled.task.token, TaskPhase.TRAINING, 1.0)
        header = UpdateHeader(
            worker="far", token=polled.task.token, manifest=manifest_to_proto(manifest), example_count=10
        )
        up_s = await _timed(client.pushes.push(header, buffer_reader(out.getbuffer()), 0))
    return mbit / down_s, mbit / up_s


async def _timed(call: Any) -> float:
    began = time.monotonic()
    await call
    return time.monotonic() - began


if __name__ == "__main__":
    main()
