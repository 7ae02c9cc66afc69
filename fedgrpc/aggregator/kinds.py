"""What a round's kind makes of the run's policy."""

from __future__ import annotations

from dataclasses import replace

from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.v1.round_pb2 import TASK_KIND_EVALUATE, TASK_KIND_INITIALIZE, TASK_KIND_TRAIN, TaskKind


def policy_of(policy: RoundPolicy, kind: TaskKind) -> RoundPolicy:
    """The run's policy for a round of that kind: whoever comes first gives initial weights, all who come score."""
    if kind != TASK_KIND_TRAIN:
        policy = replace(policy, weight_aim=None, deadline_floor_s=0.0, late="discard", buffer_size=None)
    if kind == TASK_KIND_INITIALIZE:
        return replace(
            policy,
            min_workers=1,
            min_sample_size=1,
            max_participants=1,
            quorum=1,
            over_selection=1.0,
            selection_window_s=0.0,
        )
    if kind == TASK_KIND_EVALUATE:
        timeout_s = policy.lease_s + policy.selection_window_s
        return replace(
            policy,
            min_workers=1,
            min_sample_size=1,
            max_participants=None,
            fraction=1.0,
            over_selection=1.0,
            quorum=1,
            selection_timeout_s=timeout_s,
        )
    return policy
