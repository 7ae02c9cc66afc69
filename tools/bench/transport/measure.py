"""A round of models out and updates in, side by side: fedgrpc, a bare grpc.aio floor, and raw TCP.

    python -m tools.bench.transport [--sizes 0.28M,2.5M,11.2M,25.2M] [--workers 4] [--turns N] [--json FILE]
    python -m tools.bench.transport --latency

Over TLS, the aggregator is the authority and every worker has joined it: TLS 1.3, certificates both ways. Behind
it stands how much more it takes than the same in plaintext.

Every worker is a process on this machine and returns the model it was given plus noise: communication and
aggregation, no training. Figures are medians over the rounds, the first one dropped; of several turns, in which
all contestants of a size run one after the other, medians of those, and the largest memory. "loopback" is what the
interface carried in a round; the run takes a network namespace of its own where it may, so that nobody else's
bytes are in it.

With --latency it is told instead how long polls and heartbeats take while eight workers upload 100 MB each, again
and again: as often as it takes for 2,000 polls and as many heartbeats (--calls). Beside it stands how late two
timers were meanwhile: one on the aggregator's event loop, and one in the process that asks, which has nothing else
to do and so waits for a core alone.

With ingest processes, the server's CPU time is that of all its processes; how much they took stands behind it.

With --former COMMIT every contestant that is fedgrpc runs as it was at that commit, too, beside itself as it is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tools.bench.transport.federation import OUTSIDE
from tools.bench.transport.latency import Latency, Probe, Span
from tools.bench.transport.meter import Usage
from tools.bench.transport.processes import Target, process, reply, several
from tools.bench.transport.workload import WIDTHS, size_of

_ISOLATED = "FEDGRPC_BENCH_ISOLATED"
_UPLOADS = 8
_UPDATES_EACH = 4
_LATENCIES = ("polls", "heartbeats", "aggregator's timer late", "asking process's timer late")
_LARGE = "25.2M"
_TLS = " over TLS"

FLOAT32: Mapping[str, object] = {"download_recipe": "raw", "upload_recipe": "raw"}
INT8: Mapping[str, object] = {"download_recipe": "int8+zstd", "upload_recipe": "int8+zstd"}
FEDGRPC: dict[str, Mapping[str, object]] = {
    "fedgrpc float32": {**FLOAT32, "durable": True},
    "fedgrpc float32, not durable": {**FLOAT32, "durable": False},
    "fedgrpc int8+zstd both ways": {**INT8, "durable": True},
    "fedgrpc float32, 2 ingest": {**FLOAT32, "durable": True, "ingest": 2},
    f"fedgrpc float32{_TLS}": {**FLOAT32, "durable": True, "address": OUTSIDE},
    f"fedgrpc float32, 2 ingest{_TLS}": {**FLOAT32, "durable": True, "ingest": 2, "address": OUTSIDE},
    f"fedgrpc int8+zstd both ways{_TLS}": {**INT8, "durable": True, "address": OUTSIDE},
}
CONTESTANTS = ("raw TCP", "floor", *FEDGRPC)
# Contestants of a former commit, and where its files are.
FORMER: dict[str, Path] = {}


@dataclass(frozen=True)
class Row:
    """One contestant at one size: the server's usage, the mean worker's CPU, and the peak of the worker that goes
    furthest beyond what it takes itself (`Usage.own_rss_mb`).
    """

    contestant: str
    size: str
    parameters: int
    workers: int
    server: Usage
    worker_cpu_s: float
    worker_peak_rss_mb: float
    worker_own_rss_mb: float


def main() -> None:
    args = _arguments()
    if args.latency:
        found = measure_latency(args.calls, args.folder)
        print("\n".join(_latency_line(kind, latency) for kind, latency in found.items()))
        if args.json:
            args.json.write_text(json.dumps({kind: asdict(latency) for kind, latency in found.items()}, indent=1))
        return
    with _formerly(args.former) as former:
        _compare(args, former)


def _compare(args: argparse.Namespace, former: Path | None) -> None:
    rows: list[Row] = []
    contestants = list(args.contestants)
    if former is not None:
        FORMER.update({f"{name} at {args.former}": former for name in contestants if name in FEDGRPC})
        contestants += FORMER
    for size in args.sizes:
        for workers in args.workers:
            for row in in_turns(contestants, size, workers, args.rounds, args.turns, args.folder):
                rows.append(row)
                floor = _same(rows, row, "floor")
                print(_line(row, floor) + _beside_plaintext(rows, row), flush=True)
            print()
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


@contextmanager
def _formerly(commit: str | None) -> Iterator[Path | None]:
    """The files of a commit in a folder of their own, while the block runs."""
    if commit is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="fedgrpc-former-") as name:
        archive = subprocess.run(["git", "archive", commit, "fedgrpc", "tools"], check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", name], check=True, input=archive.stdout)
        yield Path(name)


def measure(contestant: str, size: str, workers: int, rounds: int, folder: Path | None = None) -> Row:
    """Run one contestant; the server's process and each worker's are new ones."""
    width = WIDTHS[size]
    with tempfile.TemporaryDirectory(dir=folder, prefix="fedgrpc-bench-") as name:
        serve, work = _targets(contestant, Path(name))
        server, *clients = _run(serve, work, width, workers, rounds + 1)
    cpu_s = sum(client.cpu_s for client in clients) / workers
    largest = max(clients, key=lambda client: client.peak_rss_mb - client.own_rss_mb)
    peak, own = largest.peak_rss_mb, largest.own_rss_mb
    return Row(contestant, size, size_of(width), workers, server, cpu_s, peak, own)


def in_turns(
    contestants: Sequence[str], size: str, workers: int, rounds: int, turns: int, folder: Path | None = None
) -> Iterator[Row]:
    """One row of each contestant. What slows the machine down for a while then meets all of them."""
    found: dict[str, list[Row]] = {contestant: [] for contestant in contestants}
    for turn in range(turns):
        for contestant, rows in found.items():
            rows.append(measure(contestant, size, workers, rounds, folder))
            if turn == turns - 1:
                yield _of_turns(rows)


def _of_turns(rows: Sequence[Row]) -> Row:
    servers = [row.server for row in rows]
    server = Usage(
        wall_s=median(server.wall_s for server in servers),
        cpu_s=median(server.cpu_s for server in servers),
        loopback_mb=median(server.loopback_mb for server in servers),
        peak_rss_mb=max(server.peak_rss_mb for server in servers),
        walls_s=tuple(wall_s for server in servers for wall_s in server.walls_s),
        ingest_cpu_s=median(server.ingest_cpu_s for server in servers),
    )
    largest = max(rows, key=lambda row: row.worker_peak_rss_mb - row.worker_own_rss_mb)
    return replace(largest, server=server, worker_cpu_s=median(row.worker_cpu_s for row in rows))


def measure_latency(calls: int, folder: Path | None = None) -> dict[str, Latency]:
    """Polls and heartbeats while `_UPLOADS` uploads run, at least `calls` of each; a new aggregator each time."""
    spans: dict[str, list[Span]] = {name: [] for name in _LATENCIES}
    while min(map(len, spans.values())) < calls:
        with tempfile.TemporaryDirectory(dir=folder, prefix="fedgrpc-bench-") as name:
            for kind, found in _probe(Path(name)).items():
                spans[kind] += found
        print(f"{len(spans['polls'])} polls", file=sys.stderr, flush=True)
    return {kind: Latency.of(found) for kind, found in spans.items()}


def _probe(folder: Path) -> dict[str, list[Span]]:
    """What was seen while there were uploads, by kind."""
    latency, width = partial(_enter, "latency"), WIDTHS[_LARGE]
    workers = _UPLOADS * _UPDATES_EACH + 1
    with process(partial(latency, "serve"), 0.0, width=width, workers=workers, folder=folder) as server:
        port = reply(server)

        def uploader(number: int) -> Any:
            upload = partial(latency, "upload", updates=_UPDATES_EACH)
            return process(upload, port=port, number=number, width=width)

        with (
            several(_UPLOADS, uploader) as uploaders,
            process(partial(latency, "ask"), port=port) as asking,
        ):
            for pipe in (*uploaders, asking):
                reply(pipe)
            for pipe in uploaders:
                pipe.send("begin")
            uploading = [reply(pipe) for pipe in uploaders]
            asking.send("stop")
            probe: Probe = reply(asking)
            server.send("tell")
            late = reply(server)
    # Until the first has sent all of its updates there are always as many uploads.
    since, until = min(began for began, _ in uploading), min(ended for _, ended in uploading)
    found = dict(zip(_LATENCIES, (probe.polls, probe.heartbeats, late, probe.late), strict=True))
    return {kind: [span for span in spans if since <= span[0] <= until] for kind, spans in found.items()}


def _latency_line(kind: str, found: Latency) -> str:
    numbers = f"p50 {1e3 * found.median_s:6.1f} ms  p99 {1e3 * found.p99_s:6.1f} ms"
    longest = f"longest {1e3 * found.longest_s:6.1f} ms"
    return f"{kind:28} while {_UPLOADS} uploads of 100 MB run  {numbers}  {longest}  ({found.count} times)"


def _targets(contestant: str, folder: Path) -> tuple[Target, Target]:
    tree = FORMER.get(contestant)
    name = contestant if tree is None else contestant.rpartition(" at ")[0]
    if name in FEDGRPC:
        serve = partial(_enter, "federation", "serve", folder=folder, settings=FEDGRPC[name], tree=tree)
        return serve, partial(_enter, "federation", "work", folder=folder, tree=tree)
    module = "floor" if contestant == "floor" else "tcp"
    return partial(_enter, module, "serve"), partial(_enter, module, "work")


def _enter(module: str, function: str, pipe: Any, tree: Path | None = None, **arguments: Any) -> None:
    """In the new process: only the contestant's own modules are imported, and counted in its memory.

    `tree`: those of this folder, in place of what was imported to come here.
    """
    if tree is not None:
        for known in [name for name in sys.modules if name.partition(".")[0] in ("fedgrpc", "tools")]:
            del sys.modules[known]
        sys.path.insert(0, str(tree))
    getattr(importlib.import_module(f"tools.bench.transport.{module}"), function)(pipe, **arguments)


def _run(serve: Target, work: Target, width: int, workers: int, rounds: int) -> list[Usage]:
    with process(serve, width=width, workers=workers, rounds=rounds) as server:
        port = reply(server)
        with several(workers, lambda number: process(work, port=port, number=number, width=width)) as clients:
            return [reply(server), *(reply(client) for client in clients)]


def _same(rows: list[Row], row: Row, contestant: str) -> Row | None:
    """The row of another contestant with the same work."""
    wanted = (contestant, row.size, row.workers)
    return next((each for each in rows if (each.contestant, each.size, each.workers) == wanted), None)


def _beside_plaintext(rows: list[Row], row: Row) -> str:
    plain = _same(rows, row, row.contestant.removesuffix(_TLS))
    if plain is None or plain is row:
        return ""
    wall, cpu = row.server.wall_s / plain.server.wall_s, row.server.cpu_s / plain.server.cpu_s
    worker = row.worker_cpu_s / plain.worker_cpu_s
    return f"  over plaintext: wall {wall:.2f}, server cpu {cpu:.2f}, worker cpu {worker:.2f}"


def _line(row: Row, base: Row | None) -> str:
    over = f"{row.server.wall_s / base.server.wall_s:5.2f}" if base else "    -"
    cpu_over = f"{row.server.cpu_s / base.server.cpu_s:5.2f}" if base else "    -"
    ingest = f", ingest {row.server.ingest_cpu_s:.3f} s" if row.server.ingest_cpu_s else ""
    return (
        f"{row.contestant:30} {row.size:>6} x{row.workers:<3} wall {row.server.wall_s:7.3f} s  over floor {over}  "
        f"loopback {row.server.loopback_mb:7.1f} MB  server cpu {row.server.cpu_s:6.3f} s ({cpu_over}){ingest}  "
        f"rss {row.server.peak_rss_mb:6.0f} MB  worker cpu {row.worker_cpu_s:6.3f} s  "
        f"rss {row.worker_peak_rss_mb:6.0f} MB" + _beyond(row)
    )


def _beyond(row: Row) -> str:
    """What the transport takes of a worker's memory, in models, too."""
    if not row.worker_own_rss_mb:
        return ""
    beyond_mb = row.worker_peak_rss_mb - row.worker_own_rss_mb
    return f", {beyond_mb:.0f} MB beyond its own ({beyond_mb / (4e-6 * row.parameters):.1f} models)"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=partial(_choices, known=tuple(WIDTHS)), default=list(WIDTHS))
    parser.add_argument("--workers", type=_counts, default=[4], help="worker counts, as in 2,8,32")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count; one more is dropped")
    parser.add_argument("--turns", type=int, default=1, help="how often each contestant runs")
    parser.add_argument("--latency", action="store_true", help="of polls and heartbeats while large uploads run")
    parser.add_argument("--calls", type=int, default=2000, help="polls, and heartbeats, that --latency measures")
    parser.add_argument("--contestants", type=_contestants, default=list(CONTESTANTS), help="parts of their names")
    parser.add_argument("--former", metavar="COMMIT", help="beside fedgrpc as it was at this commit")
    parser.add_argument("--folder", type=Path, help="where data folders go")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    if args.rounds < 2 and not args.latency:
        parser.error("at least two rounds count")
    if args.turns < 1:
        parser.error("at least one turn is needed")
    return args


def _choices(text: str, known: tuple[str, ...]) -> list[str]:
    chosen = text.split(",")
    if unknown := [item for item in chosen if item not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return chosen


def _contestants(text: str) -> list[str]:
    parts = text.split(",")
    # A whole name means that contestant alone.
    chosen = [
        name
        for name in CONTESTANTS
        if any(part == name or (part in name and part not in CONTESTANTS) for part in parts)
    ]
    if not chosen:
        raise argparse.ArgumentTypeError(f"{text!r} names none of: {', '.join(CONTESTANTS)}")
    return chosen


def _counts(text: str) -> list[int]:
    counts = [int(item) for item in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("at least one worker is needed")
    return counts


def isolate() -> None:
    """Go on in a network namespace of its own, where there is one to be had."""
    if os.environ.get(_ISOLATED) or not shutil.which("unshare") or not shutil.which("ip"):
        return
    inside = 'ip link set lo up && exec "$@"'
    command = ["unshare", "--net", "--map-root-user", "sh", "-c"]
    if subprocess.run([*command, "ip link set lo up"], capture_output=True, check=False).returncode == 0:
        os.environ[_ISOLATED] = "yes"
        os.execvp("unshare", [*command, inside, "sh", sys.executable, *sys.orig_argv[1:]])
    print("no network namespace to be had: loopback bytes count what others send, too", file=sys.stderr)
