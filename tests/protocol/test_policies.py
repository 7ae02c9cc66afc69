"""Round policies in messages."""

from __future__ import annotations

import pytest

from fedgrpc.errors import UsageError
from fedgrpc.protocol.plans import policy_from_proto, policy_to_proto
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.v1 import round_pb2

FULL = RoundPolicy(
    min_workers=3,
    min_sample_size=2,
    max_participants=9,
    fraction=0.5,
    quorum=2,
    deadline_s=90.25,
    lease_s=5.0,
    selection_window_s=0.0,
    selection_timeout_s=7.0,
    weight_aim=100.0,
    max_share=0.25,
    deadline_floor_s=1.5,
    late="carry",
    max_staleness=4,
    buffer_size=3,
    reconnect_grace_s=0.5,
    min_new_examples=50,
)


@pytest.mark.parametrize(
    "policy", [RoundPolicy(), FULL, RoundPolicy(over_selection=1.3), RoundPolicy(poisson_rate=0.25, quorum=0)]
)
def test_a_policy_comes_back_as_it_went(policy: RoundPolicy) -> None:
    assert policy_from_proto(policy_to_proto(policy)) == policy


def test_every_field_of_a_policy_has_one_in_the_message() -> None:
    fields = {field.name for field in round_pb2.RoundPolicy.DESCRIPTOR.fields}
    assert fields == {name.removesuffix("_s") for name in vars(RoundPolicy())}


def test_numbers_that_a_message_cannot_hold_are_cut() -> None:
    message = policy_to_proto(RoundPolicy(min_workers=1 << 70, deadline_s=1e300))
    assert message.min_workers == (1 << 64) - 1
    assert message.deadline.seconds == 1_000_000_000


def test_a_message_without_a_policy_is_refused() -> None:
    with pytest.raises(UsageError, match="min_workers"):
        policy_from_proto(round_pb2.RoundPolicy())
