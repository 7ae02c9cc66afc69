"""Feed damaged and invented input to everything that reads: python -m tests.fuzz.run --inputs 1000000

Of each input only three things are asked: no error but the project's own, a bounded time, and bounded memory.
An input is known by the seed and its number; what fails is printed with both, and `--only NAME --at NUMBER` plays
it alone.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import structlog

from fedgrpc.errors import FedgrpcError
from tests.fuzz import files, messages, payloads, secure, updates
from tests.fuzz.mutate import Recording
from tests.fuzz.registry import TARGETS, Target

# Where the targets are; importing them has registered them.
READERS = (payloads, messages, updates, files, secure)
# CPU time of one input; the slowest honest one takes a hundredth of it.
MAX_SECONDS = 2.0
# How much the process may grow within one input; tensors here have a megabyte at most.
MAX_GROWTH_BYTES = 96 << 20
_REPORT_S = 10.0
_MAX_FAULTS = 20


@dataclass
class Tally:
    """What came of the inputs so far."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    slowest_s: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def note(self, target: Target, outcome: str, took_s: float) -> None:
        self.outcomes.setdefault(target.name, Counter())[outcome] += 1
        self.slowest_s[target.name] = max(took_s, self.slowest_s.get(target.name, 0.0))


def play(target: Target, seed: int, number: int, folder: Path, tally: Tally) -> str | None:
    """One input; what is wrong with how it was taken, or None."""
    rnd = Recording(f"{seed}/{target.name}/{number}")
    before, started = _peak_bytes(), time.thread_time()
    wrong, outcome = None, "taken"
    try:
        target.run(rnd, folder)
    except FedgrpcError as error:
        outcome = type(error).__name__
    except Exception:  # noqa: BLE001 - any other is what is looked for
        outcome, wrong = "FAULT", traceback.format_exc(limit=-6)
    took_s, grown_bytes = time.thread_time() - started, _peak_bytes() - before
    if took_s > MAX_SECONDS:
        wrong = f"it took {took_s:.2f} s of CPU time"
    if grown_bytes > MAX_GROWTH_BYTES:
        wrong = f"it took {grown_bytes >> 20} MiB of memory"
    tally.note(target, outcome, took_s)
    return f"{wrong}\n  input: {rnd}" if wrong else None


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def fuzz(inputs: int, seed: int, only: list[str], start: int = 0, quiet: bool = True) -> Tally:
    """Play so many inputs, over the targets by their shares; each fault comes with what plays it again.

    Interrupted, it gives what it has.
    """
    chosen = [TARGETS[name] for name in only] if only else list(TARGETS.values())
    turns = [target for target in chosen for _ in range(target.share)]
    Random(seed).shuffle(turns)
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"), suppress(KeyboardInterrupt):
        told = time.monotonic()
        for number, target in zip(range(start, start + inputs), itertools.cycle(turns), strict=False):
            if wrong := play(target, seed, number, Path(folder), tally):
                again = f"python -m tests.fuzz.run --seed {seed} --only {target.name} --at {number}"
                tally.faults.append(f"seed {seed}, input {number} of {target.name}: {wrong}\n  again: {again}")
                if len(tally.faults) >= _MAX_FAULTS:
                    break
            if not quiet and time.monotonic() - told > _REPORT_S:
                told = time.monotonic()
                print(f"{number - start + 1} inputs, {len(tally.faults)} faults", file=sys.stderr, flush=True)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], choices=sorted(TARGETS), metavar="TARGET")
    parser.add_argument("--at", type=int, help="play this input alone")
    asked = parser.parse_args()
    # What is refused is a line of the log, hundreds of thousands of times.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    started = time.monotonic()
    if asked.at is None:
        tally = fuzz(asked.inputs, asked.seed, asked.only, quiet=False)
    else:
        tally = fuzz(1, asked.seed, asked.only, asked.at)
    for fault in tally.faults:
        print(f"FAULT: {fault}\n")
    total = 0
    for name, outcomes in sorted(tally.outcomes.items()):
        total += outcomes.total()
        told = ", ".join(f"{outcome} {count}" for outcome, count in outcomes.most_common())
        print(f"{name:22} {outcomes.total():9}  slowest {1e3 * tally.slowest_s[name]:7.1f} ms  {told}")
    took_s = time.monotonic() - started
    print(f"{total} inputs of seed {asked.seed} in {took_s:.0f} s: {len(tally.faults)} faults")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
