"""Play the production round in many simulated worlds, and print the short trace of those where a promise broke."""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from fedgrpc.simulation.world import Outcome, World

_SHOWN = 3


def play(seed: int) -> Outcome:
    return World(seed).play()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many worlds (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    arguments = parser.parse_args()
    begun = time.monotonic()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        outcomes = list(pool.map(play, seeds, chunksize=50))
    broken = [outcome for outcome in outcomes if outcome.violation]
    for outcome in broken[:_SHOWN]:
        print(f"seed {outcome.seed}: {outcome.violation}", *outcome.trace, sep="\n")
        print(f"again: python tools/simulate_rounds.py --seeds 1 --first {outcome.seed}\n")
    print(
        f"{len(outcomes)} worlds, {len(broken)} with a broken promise, in {time.monotonic() - begun:.0f} s: "
        f"{sum(o.rounds for o in outcomes)} rounds committed, {sum(o.abandoned for o in outcomes)} abandoned, "
        f"{sum(o.updates for o in outcomes)} updates, {sum(o.crashes for o in outcomes)} kills, "
        f"{sum(o.virtual_s for o in outcomes) / 3600:.0f} virtual hours"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
