"""What rounds cost as their number grows: tiny rounds through a real aggregator, one after the other.

    python -m tools.bench.growth --rounds 10000

Each line is the mean of `--every` rounds: seconds and CPU of the aggregator a round, and what the aggregator then
has: resident memory, bytes of its database and of its data folder, open files. Nothing of it is to grow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedgrpc.rpc.channel import open_channel
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc
from tools.bench.load.aggregator import Aggregator
from tools.bench.load.workers import Seen, Update, Worker

_LOOK_S = 0.05


@dataclass(frozen=True)
class Stage:
    """What rounds up to number `rounds` have cost, each in the mean, and what is there then."""

    rounds: int
    round_ms: float
    cpu_ms: float
    rss_mib: float
    database_kib: float
    folder_kib: float
    files: int
    open_files: int


def _bytes(folder: Path, pattern: str) -> tuple[int, int]:
    """Return the bytes and the number of the files there; one that goes meanwhile does not count."""
    sizes = []
    for path in folder.rglob(pattern):
        with contextlib.suppress(OSError):
            sizes.append(path.stat().st_size)
    return sum(sizes), len(sizes)


def stage_of(aggregator: Aggregator, folder: Path, rounds: int, count: int, took_s: float, cpu_s: float) -> Stage:
    """Return the stage that ends now, after `count` rounds."""
    database, _ = _bytes(folder, "run.sqlite*")
    everything, files = _bytes(folder, "*")
    return Stage(
        rounds,
        1e3 * took_s / count,
        1e3 * cpu_s / count,
        aggregator.rss_bytes / (1 << 20),
        database / 1024,
        everything / 1024,
        files,
        len(os.listdir(f"/proc/{aggregator.process.pid}/fd")),
    )


async def grow(options: argparse.Namespace, folder: Path) -> list[Stage]:
    """Play the rounds, and return the stages."""
    model = {"w": np.zeros((options.parameters // 10, 10), np.float32)}
    update, seen, stages = Update.of(model, options.encoding), Seen(), []
    aggregator = Aggregator(folder, model, options, options.workers)
    connecting = asyncio.Semaphore(8)
    try:
        async with open_channel(aggregator.address) as channel, asyncio.TaskGroup() as group:
            workers = [
                Worker(aggregator.address, f"w{i}", update, seen, options, eager=False)
                for i in range(options.workers)
            ]
            living = [group.create_task(worker.live(connecting)) for worker in workers]
            stub: Any = aggregator_pb2_grpc.AggregatorStub(channel)
            version, begun, cpu_s = 1, time.monotonic(), aggregator.cpu_s
            while version < options.rounds:
                await asyncio.sleep(_LOOK_S)
                now = int((await stub.GetRun(pb.GetRunRequest())).run.model_version)
                if now - version >= options.every:
                    took_s, used_s = time.monotonic() - begun, aggregator.cpu_s - cpu_s
                    stages.append(stage_of(aggregator, folder / "run", now, now - version, took_s, used_s))
                    print(json.dumps(asdict(stages[-1])), flush=True)
                    version, begun, cpu_s = now, time.monotonic(), aggregator.cpu_s
            for task in living:
                task.cancel()
    finally:
        aggregator.end()
    if seen.failures:
        print(f"failures: {dict(seen.failures)}")
    return stages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10_000, help="to play (default: %(default)s)")
    parser.add_argument("--every", type=int, default=500, help="rounds a line (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="of each round (default: %(default)s)")
    parser.add_argument("--parameters", type=int, default=1000, help="of the model (default: %(default)s)")
    parser.add_argument("--encoding", default="raw", help="both ways (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the stages to this file, too")
    parser.add_argument(
        "--aggregator-option", action="append", default=[], help="one more word of its command line"
    )
    options = parser.parse_args()
    options.core, options.train_s, options.deaf, options.unary = None, 0.0, False, False
    with tempfile.TemporaryDirectory() as folder:
        stages = asyncio.run(grow(options, Path(folder)))
    if options.json:
        options.json.write_text(json.dumps([asdict(stage) for stage in stages], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
