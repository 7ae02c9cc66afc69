"""The same round of models out and updates in, in other frameworks and in fedgrpc.

    python3.11 -m venv flower && flower/bin/pip install flwr==1.41.0
    python3.11 -m venv nvflare && nvflare/bin/pip install nvflare==2.9.0
    python -m tools.bench.peers --flower flower/bin/python --nvflare nvflare/bin/python [--sizes 0.28M]

Every client is a process of its own (with the frameworks' helpers, several), without TLS, and returns the model it
was given plus noise. A framework's round lasts from before its first message is built until its mean is there;
that of fedgrpc from one version's commit to the next one's. Figures are medians, the first round dropped.
Frameworks run as their documents set them up, with their own settings for waiting and asking.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tools.bench.peers import flower, nvflare
from tools.bench.peers.rounds import Result
from tools.bench.transport import measure as transport
from tools.bench.transport.workload import WIDTHS

_OURS = ("fedgrpc float32", "fedgrpc int8+zstd both ways")


def main() -> None:
    args = _arguments()
    found: list[dict[str, object]] = []
    for size in args.sizes:
        for name, run in _contestants(args).items():
            result = run(size)
            found.append({"size": size, "contestant": name, **asdict(result)})
            print(_line(name, size, result), flush=True)
        print()
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def _contestants(args: argparse.Namespace) -> dict[str, Callable[[str], Result]]:
    others = {"Flower": (flower.run, args.flower), "NVFlare": (nvflare.run, args.nvflare)}
    ours = {name: partial(_ours, name, args.clients, args.rounds) for name in _OURS}
    theirs = {
        name: partial(_theirs, run, python.absolute(), args.clients, args.rounds)
        for name, (run, python) in others.items()
        if python is not None
    }
    return {**ours, **theirs}


def _ours(name: str, clients: int, rounds: int, size: str) -> Result:
    row = transport.measure(name, size, clients, rounds)
    return Result(row.server.wall_s, row.server.cpu_s, row.server.peak_rss_mb, row.worker_peak_rss_mb)


def _theirs(run: Callable[..., Result], python: Path, clients: int, rounds: int, size: str) -> Result:
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
        return run(python, WIDTHS[size], clients, rounds + 1, Path(folder))


def _line(name: str, size: str, result: Result) -> str:
    return (
        f"{name:28} {size:>6}  round {result.round_s:7.3f} s  server cpu {result.server_cpu_s:7.3f} s  "
        f"server {result.server_mb:6.0f} MB  a client {result.client_mb:6.0f} MB"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flower", type=Path, help="a Python that has Flower")
    parser.add_argument("--nvflare", type=Path, help="a Python that has NVFlare")
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=list(WIDTHS))
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count; one more is dropped")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    if unknown := set(args.sizes) - set(WIDTHS):
        parser.error(f"{unknown.pop()!r} is none of {', '.join(WIDTHS)}")
    return args


if __name__ == "__main__":
    main()
