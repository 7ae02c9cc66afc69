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
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from safetensors.numpy import save_file

from fedgrpc.codec.chunk import chunks
from fedgrpc.codec.encoding import ENCODING_NAMES
from fedgrpc.codec.payload import buffer_reader, write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import Exhausted
from fedgrpc.rpc import framing
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.client_stream import ClientStream
from fedgrpc.rpc.convert import duration_to_proto, manifest_to_proto
from fedgrpc.rpc.retry import Retries
from fedgrpc.rpc.status import error_from
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc, round_pb2, tensor_pb2

_CONNECTING_AT_ONCE = 50
_ZSTD = tensor_pb2.COMPRESSION_ZSTD
_PATIENCE_S = 300.0
_WAIT_S = 30.0
_LOOK_S = 0.02
_TICKS = os.sysconf("SC_CLK_TCK")
_MIB = 1 << 20


@dataclass(frozen=True)
class Update:
    """One payload for everybody: its manifest and its framed chunks."""

    manifest: Any
    frames: tuple[bytes, ...]
    size_bytes: int

    @classmethod
    def of(cls, model: dict[str, np.ndarray], recipe: str) -> Update:
        """A payload of noise in the shape of `model`."""
        rng = np.random.default_rng(0)
        noise = {name: rng.normal(0, 0.01, a.shape).astype(a.dtype) for name, a in model.items()}
        out = io.BytesIO()
        manifest = write_payload(noise, Recipe.parse(recipe), out, rng)
        pieces = chunks(buffer_reader(out.getvalue()), manifest.size_bytes, 0)
        return cls(manifest_to_proto(manifest), tuple(map(framing.frame, pieces)), manifest.size_bytes)


@dataclass
class Seen:
    """What the workers have seen: seconds of polls that do not wait, when each round's tasks came, what failed."""

    connected: int = 0
    measuring: bool = False
    late_s: list[float] = field(default_factory=list)
    tasks_at: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    pushed: int = 0
    failures: Counter[str] = field(default_factory=Counter)


class Worker:
    """One connection; `eager` ones ask for a task without waiting for it."""

    def __init__(
        self, address: str, name: str, update: Update, seen: Seen, options: argparse.Namespace, eager: bool
    ) -> None:
        self._address = address
        self._name = name
        self._update = update
        self._seen = seen
        self._train_s = options.train_s
        self._deaf = options.deaf
        self._eager = eager
        self._rng = random.Random(name)

    async def live(self, connecting: asyncio.Semaphore) -> None:
        """Until cancelled."""
        async with open_channel(self._address) as channel:
            self._stub: Any = aggregator_pb2_grpc.AggregatorStub(channel)
            self._pull = channel.unary_stream(
                "/fedgrpc.v1.Aggregator/PullModel", pb.PullModelRequest.SerializeToString, lambda data: data
            )
            self._push = framing.push_update(channel)
            async with connecting:
                about = pb.RegisterRequest(worker=self._name, encodings=ENCODING_NAMES, compressions=[_ZSTD])
                await self._stub.Register(about, timeout=_PATIENCE_S)
            self._seen.connected += 1
            retries = Retries()
            while True:
                try:
                    await self._turn()
                    retries.reset()
                except grpc.aio.AioRpcError as error:
                    self._failed(error)
                    await asyncio.sleep(retries.next_delay_s())

    def _failed(self, error: grpc.aio.AioRpcError) -> None:
        """Count it. Raises CancelledError where the call failed since its task is cancelled."""
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError from error
        reason = re.sub(r"[0-9.]+", "N", error.details() or "")[:80]
        self._seen.failures[f"{error.code().name}: {reason}"] += 1

    async def _turn(self) -> None:
        begun = time.monotonic()
        wait = pb.PollTaskRequest(worker=self._name, wait=duration_to_proto(0.0 if self._eager else _WAIT_S))
        reply = await self._stub.PollTask(wait, timeout=_WAIT_S + 60)
        if self._eager:
            print(begun, time.monotonic() - begun, flush=True)
        if reply.HasField("task"):
            await self._perform(reply.task)
        elif self._eager:
            await asyncio.sleep(self._rng.uniform(0.1, 0.3))

    async def _perform(self, task: Any) -> None:
        self._seen.tasks_at[task.round].append(time.monotonic())
        async for _ in self._pull(pb.PullModelRequest(version=task.model_version, recipe=task.download_recipe)):
            pass
        beat = pb.HeartbeatRequest(worker=self._name, token=task.token, phase=round_pb2.TASK_PHASE_TRAINING)
        await self._stub.Heartbeat(beat, timeout=60)
        await asyncio.sleep(self._rng.uniform(0, self._train_s))
        header = pb.UpdateHeader(
            worker=self._name, token=task.token, manifest=self._update.manifest, example_count=10, steps=1
        )
        retries = Retries()
        while True:
            try:
                stream = ClientStream(self._push(timeout=_PATIENCE_S))
                for message in (pb.PushUpdateRequest(header=header), *self._update.frames):
                    if not await stream.write(message):
                        break
                await stream.finish()
                self._seen.pushed += 1
                return
            except grpc.aio.AioRpcError as error:
                self._failed(error)
                refusal = error_from(error)
                if not isinstance(refusal, Exhausted):
                    return
                told_s = None if self._deaf else refusal.retry_after_s
                await asyncio.sleep(retries.next_delay_s() if told_s is None else told_s)


class Probes:
    """The process of those who poll without waiting, and what it tells: when each asked, and how long it took."""

    def __init__(self, address: str) -> None:
        command = [sys.executable, __file__, "--probes-of", address, *sys.argv[1:]]
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


class Aggregator:
    """The process under load, pinned to one core, and what the system says of it."""

    def __init__(self, folder: Path, model: dict[str, np.ndarray], options: argparse.Namespace, aim: int) -> None:
        save_file(model, folder / "model.safetensors")
        ports = folder / "port"
        arguments = [
            *("aggregator", "--data-dir", folder / "run", "--address", "127.0.0.1:0", "--port-file", ports),
            *("--initial-model", folder / "model.safetensors", "--encoding", options.encoding, "--no-evaluate"),
            *("--rounds", 1_000_000, "--min-workers", aim, "--max-participants", aim, "--quorum", aim),
            *("--deadline", "10m", "--lease", "2m", "--max-workers", options.workers),
            *("--poll-wait", f"{_WAIT_S:g}s", "--log-level", "warning", *options.aggregator_option),
        ]
        pinned = ["taskset", "--cpu-list", str(options.core)] if options.core is not None else []
        command = [*pinned, sys.executable, "-m", "fedgrpc", *map(str, arguments)]
        self.process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        begun = time.monotonic()
        while not ports.exists() or not ports.read_text():
            if self.process.poll() is not None or time.monotonic() > begun + _PATIENCE_S:
                raise SystemExit("the aggregator does not start")
            time.sleep(0.05)
        self.address = f"127.0.0.1:{ports.read_text().strip()}"
        self._largest_bytes = 0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def _sample(self) -> None:
        while not self._ended.wait(0.05):
            self._largest_bytes = max(self._largest_bytes, self.rss_bytes)

    @property
    def rss_bytes(self) -> int:
        """Resident memory now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def largest_rss_bytes(self) -> int:
        """The largest sample since this was last asked."""
        largest, self._largest_bytes = self._largest_bytes, self.rss_bytes
        return largest

    @property
    def cpu_s(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def end(self) -> None:
        self._ended.set()
        self._sampler.join()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@dataclass(frozen=True)
class Row:
    """What was measured with so many updates a round."""

    workers: int
    updates_a_round: int
    rounds: int
    round_s: float
    rss_idle_mib: float
    rss_mib: float
    cpu_ms_per_update: float
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
    async def until_version(version: int) -> int:
        while (now := (await stub.GetRun(pb.GetRunRequest())).run.model_version) < version:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return int(now)

    async with asyncio.timeout(_PATIENCE_S):
        while seen.connected < options.workers - options.probes:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    idle_bytes = aggregator.rss_bytes
    first = await until_version(await until_version(1) + 2)
    seen.measuring = True
    aggregator.largest_rss_bytes()
    cpu_s, begun = aggregator.cpu_s, time.monotonic()
    last = await until_version(first + options.rounds)
    ended = time.monotonic()
    took_s, cpu_s = ended - begun, aggregator.cpu_s - cpu_s
    answers_s = probes.answers_s(begun, ended)
    seen.measuring = False
    spreads = [np.percentile(at, 99) - min(at) for number, at in seen.tasks_at.items() if number >= first]
    return Row(
        workers=options.workers,
        updates_a_round=aim,
        rounds=last - first,
        round_s=took_s / (last - first),
        rss_idle_mib=idle_bytes / _MIB,
        rss_mib=aggregator.largest_rss_bytes() / _MIB,
        cpu_ms_per_update=1e3 * cpu_s / ((last - first) * aim),
        core_busy=cpu_s / took_s,
        poll_p50_ms=1e3 * float(np.percentile(answers_s, 50)),
        poll_p99_ms=1e3 * float(np.percentile(answers_s, 99)),
        polls=len(answers_s),
        generator_late_p99_ms=1e3 * float(np.percentile(seen.late_s, 99)),
        handed_out_p99_s=float(np.median(spreads)),
        failures=dict(seen.failures),
    )


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
    parser.add_argument("--deaf", action="store_true", help="workers do not heed when they are told to come back")
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
