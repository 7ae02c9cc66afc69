"""What a framework's own marks and its processes say of its rounds."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tools.bench.peers.watch import Group, Watch


@dataclass(frozen=True)
class Result:
    """Medians over the rounds, the first one dropped; memory is the peak of all processes of a side, summed."""

    round_s: float
    server_cpu_s: float
    server_mb: float
    client_mb: float


def measured(play: Callable[[], None], marks: Path, server: Group, clients: Group, count: int) -> Result:
    """Watch while `play` plays rounds and writes `marks`; `client_mb` is that of one of `count` clients."""
    watching = Watch(server), Watch(clients)
    for watch in watching:
        watch.start()
    try:
        play()
    finally:
        for watch in watching:
            watch.stop()
    spans = read_marks(marks)[1:]
    return Result(
        median(end - begin for begin, end in spans),
        median(watching[0].cpu_s(begin, end) for begin, end in spans),
        watching[0].peak_mb(),
        watching[1].peak_mb() / count,
    )


def run_logged(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
    """Run it to its end in `folder`. Raises `RuntimeError` with the last that it said when it fails."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def read_marks(path: Path) -> list[tuple[float, float]]:
    """When each round began and ended."""
    times: dict[str, list[float]] = {"begin": [], "end": []}
    for line in path.read_text().splitlines():
        what, at = line.split()
        times[what].append(float(at))
    return list(zip(times["begin"], times["end"], strict=True))
