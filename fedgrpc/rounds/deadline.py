"""Deadlines: one that is learned, which as many workers as wanted should meet, and one after a restart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedgrpc.rounds.events import Deadline
from fedgrpc.rounds.history import Histories, WorkerHistory, expected_s, usual_parts
from fedgrpc.rounds.policy import RoundPolicy


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


@dataclass(frozen=True)
class TimeLeft:
    """Seconds until the deadline of a restored round, and how many of all its seconds restarts have added."""

    seconds: float
    granted_s: float


def left_after_restart(left_s: float, granted_s: float, policy: RoundPolicy) -> TimeLeft:
    """What is left of a deadline that was `left_s` away by a wall clock which may have been set meanwhile.

    Workers are given time to deliver what they finished while the aggregator was away: `reconnect_grace_s`. All
    restarts of a round together add no more than that or the deadline once more: a process that comes back again
    and again still ends its round. `granted_s` is what former restarts have added.
    """
    own_s = min(max(left_s, 0.0), policy.deadline_s)
    most_s = max(policy.reconnect_grace_s, policy.deadline_s)
    added_s = min(max(policy.reconnect_grace_s - own_s, 0.0), max(most_s - granted_s, 0.0))
    return TimeLeft(own_s + added_s, granted_s + added_s)
