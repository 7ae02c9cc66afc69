"""Flags of other frameworks' tutorials, and the flag of this one that does the same.

The rule: an unknown flag is answered with the right one, or with a flag that is spelt like it, or not at all. What
the tables have is explained in docs/coming_from.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

AGGREGATOR_FLAGS: Final = {
    "--server-address": "--address",
    "--min-num-clients": "--min-workers",
    "--min-available-clients": "--min-workers",
    "--client-num-in-total": "--min-workers",
    "--min-fit-clients": "--min-sample-size",
    "--client-num-per-round": "--max-participants",
    "--sample-fraction": "--fraction",
    "--fraction-fit": "--fraction",
    "--num-rounds": "--rounds",
    "--comm-round": "--rounds",
    "--local-epochs": "--epochs",
    "--lr": "--learning-rate",
    "--federated-optimizer": "--server-optimizer",
    "--dataset": "--task",
    "--pretrained": "--initial-model",
}
WORKER_FLAGS: Final = {
    "--server-address": "--aggregator",
    "--server-uri": "--aggregator",
    "--superlink": "--aggregator",
    "--cid": "--name",
    "--client-id": "--name",
    "--client-uuid": "--name",
    "--node-id": "--name",
    "--partition-id": "--part",
    "--partition-method": "--partition",
    "--partition-alpha": "--partition",
    "--data-dir": "--data",
    "--dataset": "--task",
    "--use-cuda": "--device",
}
_TABLES: Final[Mapping[str, Mapping[str, str]]] = {"aggregator": AGGREGATOR_FLAGS, "worker": WORKER_FLAGS}
# As the flags of a training plan were each client's own elsewhere, and here are the run's.
_OF_THE_RUN: Final = frozenset(
    {"--epochs", "--batch-size", "--learning-rate", "--momentum", "--rounds", "--weight-decay"}
)


def hint_for(command: str, flag: str, known: Collection[str]) -> str | None:
    """Return a sentence on what to write in place of the unknown `flag`; None where nothing is known of it."""
    dashed = flag.replace("_", "-")
    if dashed in known:
        return f"Write {dashed}"
    if right := _TABLES.get(command, {}).get(dashed):
        return f"Here it is {right} (docs/coming_from.md)"
    run_flag = AGGREGATOR_FLAGS.get(dashed, dashed)
    if command == "worker" and run_flag in _OF_THE_RUN:
        return f"The run has it for all workers: fedgrpc aggregator {run_flag}"
    return None
