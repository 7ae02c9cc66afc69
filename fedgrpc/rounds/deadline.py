"""The deadline that is learned: the one that as many workers as are wanted are expected to meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedgrpc.rounds.events import Deadline
from fedgrpc.rounds.history import Histories, WorkerHistory, expected_s, usual_parts


@dataclass(frozen=True)
class DeadlineRule:
    """How sure of each worker to be (`quantile` of its own times), and how much to add for what is not in them."""

    quantile: float = 0.9
    margin: float = 1.2


_UNKNOWN = WorkerHistory()


def learned_deadline(
    workers: Sequence[str], aim: int, histories: Histories, rule: DeadlineRule | None = None
) -> Deadline | None:
    """The deadline for a round of `workers` that wants `aim` updates, before the policy's floor and ceiling.

    A worker never timed is taken for a median one. None while nothing at all is known.
    """
    rule = rule or DeadlineRule()
    usual = usual_parts(histories.values(), rule.quantile)
    expected = [
        (seconds, worker)
        for worker in workers
        if (seconds := expected_s(histories.get(worker, _UNKNOWN), rule.quantile, usual)) is not None
    ]
    if not expected:
        return None
    expected.sort()
    count = min(aim, len(expected))
    seconds, slowest = expected[count - 1]
    reason = f"{count} of {len(workers)} are expected within {seconds:.3g} s, {slowest} as the last"
    return Deadline(seconds * rule.margin, reason)
