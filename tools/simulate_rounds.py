"""Play the production round in many simulated worlds, and print the short trace of those where a promise broke."""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from tests.simulator.world import Outcome, World

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
        print(f"again: python -m tools.simulate_rounds --seeds 1 --first {outcome.seed}\n")
    total = {
        "rounds committed": sum(outcome.rounds for outcome in outcomes),
        "abandoned": sum(outcome.abandoned for outcome in outcomes),
        "updates": sum(outcome.updates for outcome in outcomes),
        "of them stale": sum(outcome.stale_updates for outcome in outcomes),
        "kills": sum(outcome.crashes for outcome in outcomes),
        "ledger entries": sum(outcome.ledger_entries for outcome in outcomes),
        "worlds with a ledger": sum(outcome.ledger_entries > 0 for outcome in outcomes),
        "virtual hours": round(sum(outcome.virtual_s for outcome in outcomes) / 3600),
    }
    print(f"{len(outcomes)} worlds, {len(broken)} with a broken promise, in {time.monotonic() - begun:.0f} s:")
    print(", ".join(f"{count} {name}" for name, count in total.items()))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
