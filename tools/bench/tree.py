"""What a worker's update costs an aggregator, at the root and below another: CPU seconds and memory.

    python -m tools.bench.tree [--sizes 0.28M,2.5M] [--workers 8,24,48] [--rounds N] [--json FILE]

Workers add noise to the model they are given, many in one process, which is not the aggregator's. CPU is that of
the aggregator's process for one round, the median over rounds, the first one dropped; a line through the worker
counts gives what a round costs and what an update costs. Both ends share this machine: wall times say little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.transport import federation
from tools.bench.transport.meter import Mark, Usage
from tools.bench.transport.processes import process, reply
from tools.bench.transport.workload import WIDTHS, size_of

ENCODINGS = ("raw", "int8+zstd")
PLACES = ("root", "below")


@dataclass(frozen=True)
class Row:
    """One aggregator's use in a round of so many workers."""

    place: str
    encoding: str
    size: str
    parameters: int
    workers: int
    usage: Usage


def main() -> None:
    args = _arguments()
    rows: list[Row] = []
    for size in args.sizes:
        for encoding in ENCODINGS:
            for place in PLACES:
                found = [measure(place, encoding, size, count, args.rounds) for count in args.workers]
                rows += found
                print("\n".join(map(_line, found)))
                print(f"{_fit(found)}\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def measure(place: str, encoding: str, size: str, workers: int, rounds: int) -> Row:
    """One run; the aggregators and the workers are processes of their own."""
    width = WIDTHS[size]
    settings = {"download_recipe": encoding, "upload_recipe": encoding, "max_uploads": 64}
    with tempfile.TemporaryDirectory(prefix="fedgrpc-bench-") as name:
        folder = Path(name)
        direct = workers if place == "root" else 1
        common = {"rounds": rounds + 1, "folder": folder, "settings": settings}
        with process(federation.serve, width=width, workers=direct, **common) as root:
            port = reply(root)
            if place == "root":
                with process(crew, port=port, workers=workers, folder=folder) as working:
                    usage = reply(root)
                    reply(working)
            else:
                with process(lead, port=port, workers=workers, folder=folder, settings=settings) as leaf:
                    with process(crew, port=reply(leaf), workers=workers, folder=folder) as working:
                        usage = reply(leaf)
                        reply(working)
                    reply(root)
    return Row(place, encoding, size, size_of(width), workers, usage)


def crew(pipe: Any, port: int, workers: int, folder: Path) -> None:
    """Process target of all workers."""
    from fedgrpc import logging

    logging.configure("warning")

    async def work() -> None:
        await asyncio.gather(*(federation.take_part(port, number, folder) for number in range(workers)))

    asyncio.run(work())
    pipe.send("done")


def lead(pipe: Any, port: int, workers: int, folder: Path, settings: Mapping[str, Any]) -> None:
    """Process target of an aggregator below the one at `port`."""
    pipe.send(asyncio.run(_lead(pipe, port, workers, folder, settings)))


async def _lead(pipe: Any, port: int, workers: int, folder: Path, settings: Mapping[str, Any]) -> Usage:
    from fedgrpc import logging
    from fedgrpc.aggregator.settings import AggregatorSettings
    from fedgrpc.hierarchy.process import Leaf
    from fedgrpc.protocol.tasks import WorkerRole
    from fedgrpc.rounds.policy import RoundPolicy
    from fedgrpc.worker.settings import WorkerSettings

    logging.configure("warning")
    data_dir = folder / "leaf"
    policy = RoundPolicy(min_workers=workers, min_sample_size=workers)
    own = AggregatorSettings(data_dir, address="127.0.0.1:0", policy=policy, **settings)
    address = f"127.0.0.1:{port}"
    above = WorkerSettings("leaf", address, data_dir / "upstream", WorkerRole.AGGREGATOR, serve_address=None)
    leaf = Leaf(own, above)
    marks: list[Mark] = []
    watching: list[asyncio.Task[None]] = []

    def ready(own_port: int) -> None:
        pipe.send(own_port)
        watching.append(asyncio.create_task(federation.watch(leaf, marks)))

    await leaf.run(ready)
    marks.append(Mark.now())
    for task in watching:
        task.cancel()
    return Usage.of(marks)


def _line(row: Row) -> str:
    return (
        f"{row.place:6} {row.size:>6} {row.encoding:10} {row.workers:4} workers  cpu {row.usage.cpu_s:7.3f} s  "
        f"wall {row.usage.wall_s:7.3f} s  peak {row.usage.peak_rss_mb:5.0f} MB"
    )


def _fit(rows: list[Row]) -> str:
    """CPU as a line over the number of workers."""
    if len(rows) < 2:
        return ""
    each, base = np.polyfit([row.workers for row in rows], [row.usage.cpu_s for row in rows], 1)
    return f"  {1e3 * each:.1f} ms of CPU for an update, {1e3 * base:.0f} ms for a round"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=["0.28M", "2.5M"])
    parser.add_argument(
        "--workers", type=lambda text: [int(each) for each in text.split(",")], default=[8, 24, 48]
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; one more is dropped")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
