"""A round's policy on the wire: the fields of `RoundPolicy` under their own names, times without their unit."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from fedgrpc import claims
from fedgrpc.protocol.durations import duration_from_proto, duration_to_proto
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.v1 import round_pb2

_LATE: Final = {"discard": round_pb2.LATE_POLICY_DISCARD, "carry": round_pb2.LATE_POLICY_CARRY}
_SECONDS: Final = "_s"
_MOST: Final = (1 << 64) - 1


def policy_to_proto(policy: RoundPolicy) -> round_pb2.RoundPolicy:
    """Return the message of a policy. Fields that are None stay absent, and numbers too large are cut."""
    message = round_pb2.RoundPolicy()
    for name, value in vars(policy).items():
        if name == "late":
            message.late = _LATE[value]
        elif name.endswith(_SECONDS) and value is not None:
            duration = duration_to_proto(claims.SECONDS.clamped(value))
            getattr(message, name.removesuffix(_SECONDS)).CopyFrom(duration)
        elif value is not None:
            setattr(message, name, min(value, _MOST))
    return message


def policy_from_proto(message: round_pb2.RoundPolicy) -> RoundPolicy:
    """Return the policy of a message. Raises `UsageError` for one that cannot be, as `RoundPolicy` does."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(RoundPolicy):
        name = field.name.removesuffix(_SECONDS)
        value = getattr(message, name)
        if field.default is None and not message.HasField(name):
            value = None
        elif name != field.name:
            value = duration_from_proto(value)
        elif name == "late":
            value = "carry" if value == round_pb2.LATE_POLICY_CARRY else "discard"
        values[field.name] = value
    return RoundPolicy(**values)
