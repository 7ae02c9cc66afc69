"""Many workers against one aggregator on one core, over real gRPC; nothing is trained.

Each worker has a connection of its own and makes a real worker's calls: Register, PollTask (waiting), PullModel,
Heartbeat, PushUpdate. Its update is the same prepared payload each time, sent after a random "training" time. A
few of the workers do not wait in PollTask but ask again and again, to see how fast it answers. They are in a
process of their own: two thousand workers in one are late themselves, and how much so is measured, too.

Measured over whole rounds, once every worker is connected: the aggregator's resident memory (largest of 20 samples
a second), its CPU time per update, and how long PollTask takes to answer one that does not want to wait.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedgrpc.rpc.channel import open_channel
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc
from tools.bench.load.aggregator import Aggregator
from tools.bench.load.workers import PATIENCE_S, Seen, Update, Worker

_CONNECTING_AT_ONCE = 50
_LOOK_S = 0.02
_SETTLING_S = 10.0
_MIB = 1 << 20


class Probes:
    """The process of those who poll without waiting, and what it tells: when each asked, and how long it took."""

    def __init__(self, address: str) -> None:
        command = [sys.executable, "-m", "tools.bench.load", "--probes-of", address, *sys.argv[1:]]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._answers: list[tuple[float, float]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            begun, took_s = map(float, line.split())
            self._answers.append((begun, took_s))

    def answers_s(self, since: float, until: float) -> list[float]:
        """How long those waited who asked in between."""
        return [took_s for begun, took_s in list(self._answers) if since <= begun < until]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()


async def probe(options: argparse.Namespace) -> None:
    """Be the process of `Probes`, until it is killed."""
    update, seen = Update.of(model_of(options), options.encoding), Seen()
    connecting = asyncio.Semaphore(_CONNECTING_AT_ONCE)
    async with asyncio.TaskGroup() as group:
        for i in range(options.probes):
            worker = Worker(options.probes_of, f"p{i:05}", update, seen, options, eager=True)
            group.create_task(worker.live(connecting))


async def note_lateness(seen: Seen) -> None:
    """How late this process comes to what it wants to do, as long as it is measured."""
    while True:
        due = time.monotonic() + _LOOK_S
        await asyncio.sleep(_LOOK_S)
        if seen.measuring:
            seen.late_s.append(time.monotonic() - due)


def model_of(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """A model of so many parameters."""
    side = int(options.parameters**0.5)
    return {"w": np.zeros((side, options.parameters // side), np.float32)}


@dataclass(frozen=True)
class Row:
    """What was measured with so many updates a round."""

    workers: int
    updates_a_round: int
    rounds: int
    round_s: float
    rss_idle_mib: float
    idle_core_busy: float | None
    rss_mib: float
    cpu_ms_per_update: float
    ingest_cpu_ms_per_update: list[float]
    ingest_rss_mib: float
    core_busy: float
    poll_p50_ms: float
    poll_p99_ms: float
    polls: int
    generator_late_p99_ms: float
    handed_out_p99_s: float
    failures: dict[str, int]


async def measure(options: argparse.Namespace, aim: int, folder: Path) -> Row:
    """Connect everybody, let one round pass, and measure the next ones."""
    model = model_of(options)
    update, seen = Update.of(model, options.encoding), Seen()
    aggregator = Aggregator(folder, model, options, aim)
    probes = Probes(aggregator.address)
    connecting = asyncio.Semaphore(_CONNECTING_AT_ONCE)
    workers = [
        Worker(aggregator.address, f"w{i:05}", update, seen, options, eager=False)
        for i in range(options.workers - options.probes)
    ]
    try:
        async with open_channel(aggregator.address) as channel, asyncio.TaskGroup() as group:
            living = [group.create_task(worker.live(connecting)) for worker in workers]
            living.append(group.create_task(note_lateness(seen)))
            stub: Any = aggregator_pb2_grpc.AggregatorStub(channel)
            row = await _measured(options, aim, aggregator, stub, seen, probes)
            for task in living:
                task.cancel()
    finally:
        probes.end()
        aggregator.end()
    return row


async def _measured(
    options: argparse.Namespace, aim: int, aggregator: Aggregator, stub: Any, seen: Seen, probes: Probes
) -> Row:
    async def until_round(number: int) -> int:
        # The workers know. To ask for it twenty times a second would cost as much as a tenth of the updates.
        while (now := max(seen.tasks_at, default=0)) < number:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)
        return now

    if options.idle_s:
        await stub.PauseRun(pb.PauseRunRequest())
    async with asyncio.timeout(options.patience_s):
        while seen.connected < options.workers - options.probes:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    idle_busy = await _idle(stub, aggregator, options.idle_s) if options.idle_s else None
    idle_bytes = aggregator.rss_bytes
    first = await until_round(await until_round(1) + 2)
    seen.measuring = True
    aggregator.largest_rss_bytes()
    cpu_s, ingest_s, begun = aggregator.cpu_s, aggregator.ingest_cpu_s, time.monotonic()
    last = await until_round(first + options.rounds)
    ended = time.monotonic()
    took_s, cpu_s = ended - begun, aggregator.cpu_s - cpu_s
    ingest_s = [now - then for now, then in zip(aggregator.ingest_cpu_s, ingest_s, strict=True)]
    answers_s = probes.answers_s(begun, ended)
    seen.measuring = False
    spreads = [np.percentile(at, 99) - min(at) for number, at in seen.tasks_at.items() if number >= first]
    return Row(
        workers=options.workers,
        updates_a_round=aim,
        rounds=last - first,
        round_s=took_s / (last - first),
        rss_idle_mib=idle_bytes / _MIB,
        idle_core_busy=idle_busy,
        rss_mib=aggregator.largest_rss_bytes() / _MIB,
        cpu_ms_per_update=1e3 * cpu_s / ((last - first) * aim),
        ingest_cpu_ms_per_update=[1e3 * each / ((last - first) * aim) for each in ingest_s],
        ingest_rss_mib=aggregator.ingest_rss_bytes / _MIB,
        core_busy=cpu_s / took_s,
        poll_p50_ms=1e3 * float(np.percentile(answers_s, 50)),
        poll_p99_ms=1e3 * float(np.percentile(answers_s, 99)),
        polls=len(answers_s),
        generator_late_p99_ms=1e3 * float(np.percentile(seen.late_s, 99)),
        handed_out_p99_s=float(np.median(spreads)),
        failures=dict(seen.failures),
    )


async def _idle(stub: Any, aggregator: Aggregator, seconds: float) -> float:
    """Let everybody wait for a paused run; the share of a core that the aggregator takes meanwhile."""
    # What the last registrations bring is not idle.
    await asyncio.sleep(_SETTLING_S)
    cpu_s, begun = aggregator.cpu_s, time.monotonic()
    await asyncio.sleep(seconds)
    busy = (aggregator.cpu_s - cpu_s) / (time.monotonic() - begun)
    await stub.ResumeRun(pb.ResumeRunRequest())
    return busy


def show(rows: list[Row], options: argparse.Namespace, update_bytes: int) -> None:
    """The table, and how memory follows the number of updates."""
    print(f"{options.parameters} parameters as {options.encoding}: {update_bytes} bytes an update")
    titles = ["workers", "updates a round", "round, s", "RSS idle, MiB", "RSS, MiB", "CPU, ms an update"]
    print("  ".join([*titles, "core busy", "PollTask p50, p99, ms", "workers late, p99, ms"]))
    for row in rows:
        print(
            f"{row.workers:7}  {row.updates_a_round:15}  {row.round_s:8.2f}  {row.rss_idle_mib:13.1f}"
            f"  {row.rss_mib:8.1f}  {row.cpu_ms_per_update:17.2f}  {row.core_busy:8.0%}"
            f"   {row.poll_p50_ms:8.1f}  {row.poll_p99_ms:8.1f}"
            f"  {row.generator_late_p99_ms:21.1f}"
        )
        if row.ingest_cpu_ms_per_update:
            each = ", ".join(f"{ms:.2f}" for ms in row.ingest_cpu_ms_per_update)
            print(f"         ingest processes: {each} ms of CPU an update, {row.ingest_rss_mib:.1f} MiB in all")
        if row.idle_core_busy is not None:
            print(f"         idle: {row.idle_core_busy:.1%} of a core")
        for failure, count in row.failures.items():
            print(f"         {count} x {failure}")
    few, many = min(rows, key=lambda r: r.updates_a_round), max(rows, key=lambda r: r.updates_a_round)
    if few is not many:
        growth = many.rss_mib / few.rss_mib - 1
        print(f"RSS with {many.updates_a_round} updates a round, against {few.updates_a_round}: {growth:+.1%}")


@contextlib.contextmanager
def beside(core: int | None) -> Iterator[None]:
    """This process keeps away from the aggregator's core, where there is another."""
    cores = os.sched_getaffinity(0)
    if core is not None and cores - {core}:
        os.sched_setaffinity(0, cores - {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2000, help="connected (default: %(default)s)")
    parser.add_argument("--updates", default="10,1000", help="a round, a list of counts (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="to measure (default: %(default)s)")
    parser.add_argument("--parameters", type=int, default=250_000, help="of the model (default: %(default)s)")
    parser.add_argument("--encoding", default="int8+zstd", help="both ways (default: %(default)s)")
    parser.add_argument("--train-s", type=float, default=2.0, help="longest training time (default: %(default)s)")
    parser.add_argument("--idle-s", type=float, default=0.0, help="measure so long a paused run first")
    parser.add_argument("--patience-s", type=float, default=PATIENCE_S, help="for all workers to connect")
    parser.add_argument("--deaf", action="store_true", help="workers do not heed when they are told to come back")
    parser.add_argument(
        "--unary", action="store_true", help="a call for each poll, in place of one that stays open"
    )
    parser.add_argument(
        "--bare", action="store_true", help="the floor: a server that answers the same calls and does no more"
    )
    parser.add_argument("--probes", type=int, default=20, help="of them poll without waiting")
    parser.add_argument("--probes-of", help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=0, help="the aggregator's; -1: any (default: %(default)s)")
    parser.add_argument(
        "--aggregator-option", action="append", default=[], help="one more word of its command line"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    options = parser.parse_args()
    options.core = None if options.core < 0 else options.core
    aims = [int(aim) for aim in options.updates.split(",")]
    if max(aims) > options.workers - options.probes:
        parser.error("a round cannot have more updates than there are workers that wait for a task")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if options.probes_of:
        asyncio.run(probe(options))
        return 0
    rows = []
    with beside(options.core):
        for aim in aims:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(asyncio.run(measure(options, aim, Path(folder))))
    show(rows, options, Update.of(model_of(options), options.encoding).size_bytes)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
