"""A round over bad links: from 5 kB/s to 100 MB/s, with lost packets and connections that are reset.

    python -m tools.bench.links [--rates 5k,20k,100k,1M,10M,100M] [--seconds 20] [--resets 15] [--json FILE]

For each rate three links: a clean one, one that loses 1 % of its packets, and one that loses them and is reset
every 15 s or so. Over each a real worker gets a model from a real aggregator and returns an update of the same
size, both raw and with default settings (a lease of 30 s). The model is what the link carries in `--seconds`, and
has 45 MB at most. Slow links of one rate run at the same time. One that takes ten times as long as it has to is
given up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from safetensors.numpy import save_file

from fedgrpc.aggregator.server import Aggregator
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.trainer import EvalResult, TrainResult
from fedgrpc.worker.process import Worker
from fedgrpc.worker.settings import WorkerSettings
from tools.bench.transport.lossy import Lossy, Quality

_MOST_BYTES = 45_000_000
_LEAST_BYTES = 100_000
_ROUND_TRIP_S = 0.05
_UNITS = {"k": 1e3, "M": 1e6}


@dataclass(frozen=True)
class Row:
    """One link; times in seconds, None: not done in time. `carried` is what went through it, by what had to."""

    bytes_per_s: float
    loss: float
    reset_every_s: float | None
    model_bytes: int
    download_s: float | None
    upload_s: float | None
    resets: int
    carried: float

    def __str__(self) -> str:
        resets = "-" if self.reset_every_s is None else f"{self.reset_every_s:g} s"
        done = "gave up" if self.upload_s is None else f"{self.download_s:7.1f} s {self.upload_s:7.1f} s"
        ideal_s = self.model_bytes / self.bytes_per_s
        return (
            f"{self.bytes_per_s / 1e3:8.0f} kB/s  loss {self.loss:4.0%}  resets every {resets:>5}  "
            f"{self.model_bytes / 1e6:6.2f} MB  at the link's rate {ideal_s:5.1f} s  down, up {done}  "
            f"resets {self.resets:2d}  carried {self.carried:.2f}"
        )


class Adds:
    """A trainer that has nothing to do."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def initial_weights(self) -> Any:
        raise AssertionError("the aggregator has a model")

    def train(self, weights: Any, job: Any) -> TrainResult:
        self.began.append(time.monotonic())
        return TrainResult({name: array + 1 for name, array in weights.items()}, 10, 1, {})

    def evaluate(self, weights: Any) -> EvalResult | None:
        return None


async def measure(quality: Quality, size_bytes: int, limit_s: float, seed: int) -> Row:
    """Play one round over one link."""
    with tempfile.TemporaryDirectory(prefix="fedgrpc-links-") as name:
        folder = Path(name)
        values = np.random.default_rng(seed).normal(size=size_bytes // 4).astype(np.float32)
        save_file({"w": values}, folder / "model.safetensors")
        settings = AggregatorSettings(
            data_dir=folder / "data",
            address="127.0.0.1:0",
            rounds=1,
            evaluate=False,
            initial_model=folder / "model.safetensors",
            download_recipe="raw",
            upload_recipe="raw",
            policy=RoundPolicy(min_workers=1, deadline_s=2 * limit_s),
        )
        listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        aggregator = Aggregator(settings)
        serving = asyncio.create_task(aggregator.run(listening.set_result))
        target = f"127.0.0.1:{await listening}"
        trainer, done = Adds(), False
        async with Lossy(target, quality, seed) as link:
            began = time.monotonic()
            worker = Worker(
                WorkerSettings(name="pi", aggregator=link.address, state_dir=folder / "pi", serve_address=None),
                lambda _: trainer,
            )
            working = asyncio.create_task(worker.run())
            try:
                async with asyncio.timeout(limit_s):
                    await serving
                    done = True
            except TimeoutError:
                serving.cancel()
            ended = time.monotonic()
            working.cancel()
            await asyncio.gather(working, serving, return_exceptions=True)
            moved = link.carried_bytes / (2 * size_bytes)
        trained = trainer.began[0] if trainer.began else None
        return Row(
            quality.bytes_per_s,
            quality.loss,
            quality.reset_every_s,
            size_bytes,
            trained - began if trained is not None else None,
            ended - trained if trained is not None and done else None,
            link.resets,
            moved,
        )


async def measure_all(rates: list[float], seconds: float, reset_every_s: float) -> list[Row]:
    """All links, those of one rate at the same time; each row is printed as it is known."""
    rows: list[Row] = []
    for rate in rates:
        size_bytes = int(min(_MOST_BYTES, max(_LEAST_BYTES, rate * seconds))) // 4 * 4
        limit_s = 10 * (2 * size_bytes / rate + 10)
        qualities = [
            Quality(rate, _ROUND_TRIP_S),
            Quality(rate, _ROUND_TRIP_S, 0.01),
            Quality(rate, _ROUND_TRIP_S, 0.01, reset_every_s),
        ]
        if rate < 2e6:
            found = await asyncio.gather(*(measure(q, size_bytes, limit_s, s) for s, q in enumerate(qualities)))
        else:
            # They would share the cores.
            found = [await measure(quality, size_bytes, limit_s, seed) for seed, quality in enumerate(qualities)]
        for row in found:
            print(row, flush=True)
        rows += found
    return rows


def _rate(text: str) -> float:
    return float(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else float(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="5k,20k,100k,1M,10M,100M", help="bytes a second, as in 20k or 1M")
    parser.add_argument("--seconds", type=float, default=20.0, help="what a model takes at the link's rate")
    parser.add_argument("--resets", type=float, default=15.0, help="mean seconds between resets")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    rows = asyncio.run(
        measure_all([_rate(text) for text in options.rates.split(",")], options.seconds, options.resets)
    )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0 if all(row.upload_s is not None for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
