"""A round's policy on the wire, under the names of its fields."""

from __future__ import annotations

from typing import Any, Final

from fedgrpc.protocol.fields import fill, values_of
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.v1 import round_pb2

_LATE: Final = {"discard": round_pb2.LATE_POLICY_DISCARD, "carry": round_pb2.LATE_POLICY_CARRY}
_MOST: Final = (1 << 64) - 1


def policy_to_proto(policy: RoundPolicy) -> round_pb2.RoundPolicy:
    """Return the message of a policy. Numbers that a message cannot hold are cut."""
    message = round_pb2.RoundPolicy()
    fill(message, {name: _sendable(value) for name, value in vars(policy).items()})
    return message


def _sendable(value: Any) -> Any:
    if isinstance(value, str):
        return _LATE[value]
    return min(value, _MOST) if isinstance(value, int) else value


def policy_from_proto(message: round_pb2.RoundPolicy) -> RoundPolicy:
    """Return the policy of a message. Raises `UsageError` for one that cannot be, as `RoundPolicy` does."""
    late = "carry" if message.late == round_pb2.LATE_POLICY_CARRY else "discard"
    return RoundPolicy(**values_of(message, RoundPolicy) | {"late": late})
