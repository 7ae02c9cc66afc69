"""Mean completion time of a mix of runs that share one fleet, under a virtual clock, by the order of the runs.

    python -m tools.bench.scheduler --seeds 10

As in Venn's evaluation (arXiv 2312.08298, section 5) devices are of four kinds, each with a share of the fleet,
and runs ask for one of the kinds: any device, much memory, a fast processor, or both. Runs come one after another
and have rounds of many tasks. A round takes workers as they become idle and ends with the last of its updates.

    random           an idle worker goes to any run that wants it
    fifo             to the run that came first
    least-supplied   as `fedgrpc.runs.scheduler` shares the fleet, which is what an aggregator does
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean, median

import numpy as np

from fedgrpc.runs.scheduler import Demand, Order, share_out

# Kinds that a run may ask for, as (memory, processor), and the shares of devices that have each.
_KINDS = {"any": (False, False), "memory": (True, False), "processor": (False, True), "both": (True, True)}
_HAS_MEMORY, _HAS_PROCESSOR = 0.4, 0.4
_TASK_S = 60.0


@dataclass
class Run:
    """One run of the mix; `at_work` and `done` count tasks of its present round."""

    name: str
    kind: str
    began_at: float
    rounds: int
    size: int
    at_work: int = 0
    done: int = 0
    waited_since: float = 0.0
    ended_at: float | None = None
    busy_until: list[float] = field(default_factory=list)

    @property
    def wanted(self) -> int:
        return 0 if self.ended_at is not None or not self.rounds else self.size - self.at_work - self.done


@dataclass(frozen=True)
class Device:
    """One device; `slowness` multiplies the time of its tasks."""

    name: str
    memory: bool
    processor: bool
    slowness: float

    def serves(self, run: Run) -> bool:
        memory, processor = _KINDS[run.kind]
        return self.memory >= memory and self.processor >= processor


Assign = Callable[[list[Run], list[Device], float], dict[str, str]]


def mix(seed: int, runs: int, devices: int, gap_s: float, largest: float) -> tuple[list[Run], list[Device]]:
    """Return a mix of runs and a fleet, as the seed has them."""
    rng = np.random.default_rng(seed)
    fleet = [
        Device(
            f"device-{number}",
            bool(rng.random() < _HAS_MEMORY),
            bool(rng.random() < _HAS_PROCESSOR),
            float(rng.lognormal(0.0, 0.5)),
        )
        for number in range(devices)
    ]
    arrivals = np.cumsum(rng.exponential(gap_s, runs))
    jobs = [
        Run(
            f"run-{number}",
            str(rng.choice(list(_KINDS))),
            float(arrivals[number]),
            int(rng.integers(5, 41)),
            int(rng.integers(4, max(5, round(largest * devices)))),
        )
        for number in range(runs)
    ]
    return jobs, fleet


def play(jobs: list[Run], fleet: list[Device], assign: Assign, seed: int) -> list[float]:
    """Return the completion times of the runs, in seconds from the arrival of each."""
    rng = np.random.default_rng([seed, 1])
    idle = {device.name: device for device in fleet}
    by_name = {job.name: job for job in jobs}
    # (time, number, run, device): an arrival has no device, an end of a task has both.
    events: list[tuple[float, int, Run, Device | None]] = []
    for number, job in enumerate(jobs):
        heapq.heappush(events, (job.began_at, number, job, None))
    number, here = len(jobs), []
    while events:
        now, _, job, device = heapq.heappop(events)
        if device is None:
            here.append(job)
            job.waited_since = now
        else:
            idle[device.name] = device
            job.at_work, job.done = job.at_work - 1, job.done + 1
            if job.done == job.size:
                job.rounds, job.done, job.waited_since = job.rounds - 1, 0, now
                job.ended_at = None if job.rounds else now
        given = assign([each for each in here if each.wanted > 0], list(idle.values()), now)
        for name, run in given.items():
            device, job = idle.pop(name), by_name[run]
            job.at_work += 1
            number += 1
            task_s = _TASK_S * device.slowness * float(rng.lognormal(0.0, 0.2))
            heapq.heappush(events, (now + task_s, number, job, device))
    return [job.ended_at - job.began_at for job in jobs if job.ended_at is not None]


def at_random(seed: int) -> Assign:
    """Return random sharing: each idle worker goes to any run that wants it."""
    rng = np.random.default_rng([seed, 2])

    def assign(jobs: list[Run], idle: list[Device], now: float) -> dict[str, str]:
        left = {job.name: job.wanted for job in jobs}
        given = {}
        for device in idle:
            able = [job.name for job in jobs if left[job.name] > 0 and device.serves(job)]
            if able:
                given[device.name] = name = str(rng.choice(able))
                left[name] -= 1
        return given

    return assign


def scheduled(fleet: list[Device], order: Order, patience_s: float) -> Assign:
    """Return what the aggregator's scheduler does."""
    supply: dict[str, int] = {}

    def assign(jobs: list[Run], idle: list[Device], now: float) -> dict[str, str]:
        for job in jobs:
            supply.setdefault(job.kind, sum(device.serves(job) for device in fleet))
        demands = [
            Demand(
                job.name,
                job.wanted,
                1,
                supply[job.kind],
                job.at_work,
                job.rounds * job.size - job.done - job.at_work,
                now - job.waited_since,
                job.began_at,
            )
            for job in jobs
        ]
        able = {device.name: {job.name for job in jobs if device.serves(job)} for device in idle}
        return share_out(demands, able, patience_s, order)

    return assign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--devices", type=int, default=60)
    parser.add_argument("--gap", type=float, default=30.0, help="mean seconds between two arrivals of runs")
    parser.add_argument(
        "--largest", type=float, default=0.8, help="share of the fleet that the largest round asks"
    )
    parser.add_argument("--patience", type=float, default=3600.0, help="seconds after which a run comes first")
    args = parser.parse_args()
    print(f"{'seed':>4} {'random':>9} {'fifo':>9} {'least-supplied':>15} {'speed-up':>9} {'longest run':>12}")
    over_random, over_fifo = [], []
    for seed in range(args.seeds):
        times = {}
        for name in ("random", "fifo", "least-supplied"):
            jobs, fleet = mix(seed, args.runs, args.devices, args.gap, args.largest)
            order = Order.FIFO if name == "fifo" else Order.LEAST_SUPPLIED
            assign = at_random(seed) if name == "random" else scheduled(fleet, order, args.patience)
            times[name] = play(jobs, fleet, assign, seed)
            assert len(times[name]) == args.runs
        average = {name: mean(each) for name, each in times.items()}
        over_random.append(average["random"] / average["least-supplied"])
        over_fifo.append(average["fifo"] / average["least-supplied"])
        longest = max(times["least-supplied"]) / max(times["random"])
        print(
            f"{seed:>4} {average['random']:>8.0f}s {average['fifo']:>8.0f}s {average['least-supplied']:>14.0f}s "
            f"{over_random[-1]:>8.2f}x {longest:>11.2f}x"
        )
    print(f"times better than random: median {median(over_random):.2f}, from {min(over_random):.2f}", end="")
    print(f" to {max(over_random):.2f}; than fifo: median {median(over_fifo):.2f}")


if __name__ == "__main__":
    main()
