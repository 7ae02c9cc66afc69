"""Clients that a simulator trains in a CPU second: fedgrpc, pfl-research, and Flower with Ray.

    python3.11 -m venv pfl && pfl/bin/pip install pfl==0.6.0 torch
    python3.11 -m venv flower && flower/bin/pip install 'flwr[simulation]==1.42.0' torch
    python -m tools.bench.simulated_clients --pfl pfl/bin/python --flower flower/bin/python

The same LeNet, data, batch and number of clients (tools/bench/simulators). Counted from the end of the first round
to that of the last: CPU time of all processes of the simulator, and how long it took. Memory is the most that they
have held at the end of a round. What processes share counts once (PSS). The simulators take turns, since the speed
of a shared machine changes: figures are medians over `--turns`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil

_FOLDER = Path(__file__).parent / "simulators"
_MB = 1e6


@dataclass(frozen=True)
class Speed:
    """One turn of one simulator."""

    clients_per_cpu_s: float
    clients_per_s: float
    memory_mb: float


def main() -> None:
    """Measure, and print a table."""
    args = _arguments()
    found: dict[str, list[Speed]] = defaultdict(list)
    for turn in range(args.turns):
        for name, command in _simulators(args).items():
            try:
                found[name].append(measure(command))
            except RuntimeError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            print(f"turn {turn + 1}: {name}: {found[name][-1]}, load {os.getloadavg()[0]:.0f}", flush=True)
    print("\n| simulator | clients in a CPU second | clients in a second | memory |\n| --- | --- | --- | --- |")
    for name, speeds in found.items():
        cpu, wall = (median(getattr(each, of) for each in speeds) for of in ("clients_per_cpu_s", "clients_per_s"))
        print(f"| {name} | {cpu:.0f} | {wall:.0f} | {median(each.memory_mb for each in speeds):.0f} MB |")
    if args.json:
        args.json.write_text(json.dumps({name: [asdict(each) for each in all_] for name, all_ in found.items()}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--pfl", type=Path, help="Python that has pfl")
    parser.add_argument("--flower", type=Path, help="Python that has flwr[simulation]")
    parser.add_argument("--encodings", nargs="*", default=["raw"], help="encodings of fedgrpc to measure")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _simulators(args: argparse.Namespace) -> dict[str, list[str]]:
    rounds = str(args.rounds)
    found = {
        f"fedgrpc, inline, {encoding}": [sys.executable, "-m", "tools.bench.simulators.ours", rounds, encoding]
        for encoding in args.encodings
    }
    if args.pfl:
        found["pfl-research"] = [str(args.pfl.absolute()), str(_FOLDER / "pfl_research.py"), rounds]
    if args.flower:
        found["Flower, Ray"] = [str(args.flower.absolute()), str(_FOLDER / "flower.py"), rounds]
    return found


def measure(command: Sequence[str]) -> Speed:
    """Run one simulator. Raises `RuntimeError` with the last that it said when it fails."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # Actors of Ray find `workload` by it.
        "PYTHONPATH": f"{_FOLDER}:{os.environ.get('PYTHONPATH', '')}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    marks: list[tuple[float, float]] = []
    clients, memory_mb = 0, 0.0
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith("round "):
                    continue
                clients += int(line.split()[1]) if marks else 0
                cpu_s, held_mb = _of_tree(process.pid)
                marks.append((cpu_s, time.monotonic()))
                memory_mb = max(memory_mb, held_mb)
            code = process.wait()
        finally:
            for each in [*_tree(process.pid)[1:], *_tree(process.pid)[:1]]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        if code or len(marks) < 2:
            log.seek(0)
            raise RuntimeError(f"ended with {code} after {len(marks)} rounds: {log.read()[-600:]}")
    (cpu_s, at), (last_cpu_s, last_at) = marks[0], marks[-1]
    return Speed(clients / (last_cpu_s - cpu_s), clients / (last_at - at), memory_mb)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _of_tree(pid: int) -> tuple[float, float]:
    """CPU seconds of a process and of all below it, ended ones included, and their memory in MB."""
    cpu_s = memory_mb = 0.0
    for each in _tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            cpu_s += sum(each.cpu_times()[:4])
            memory_mb += each.memory_full_info().pss / _MB
    return cpu_s, memory_mb


if __name__ == "__main__":
    main()
