"""Messages of identity.proto to values and back."""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp

from fedgrpc.errors import UsageError
from fedgrpc.identity.identities import Credentials
from fedgrpc.identity.members import Member
from fedgrpc.identity.roles import Role
from fedgrpc.identity.tokens import TokenRecord
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.v1 import identity_pb2 as pb

_WIRE: Final[dict[Role, Any]] = {
    role: pb.Role.Value(f"ROLE_{role.name}") for role in Role if role is not Role.JOINING
}
_ROLES: Final = {number: role for role, number in _WIRE.items()}


def role_to_proto(role: Role) -> Any:
    """Return the number of a role."""
    return _WIRE[role]


def role_from_proto(number: int) -> Role:
    """Return the role of a number. Raises `UsageError`."""
    if number not in _ROLES:
        raise UsageError(f"role {number} is none that this version knows")
    return _ROLES[number]


def credentials_to_proto(made: Credentials, now: float) -> pb.Credentials:
    """Return the message of credentials; `now` is the aggregator's time, seconds since 1970."""
    return pb.Credentials(
        certificate=made.certificate,
        ca=made.ca,
        valid_for=duration_to_proto(made.valid_for_s),
        name=made.identity.name,
        role=role_to_proto(made.identity.role),
        now=_timestamp(now),
    )


def token_to_proto(record: TokenRecord) -> pb.Token:
    """Return the message of a token."""
    return pb.Token(
        id=record.id,
        role=role_to_proto(record.role),
        expires_at=_timestamp(record.expires_at),
        uses_left=record.uses_left,
        names=record.names,
        tags=record.tags,
        needs_approval=record.needs_approval,
    )


def member_to_proto(member: Member) -> pb.Member:
    """Return the message of a member."""
    state: Any = member.state.value
    return pb.Member(
        name=member.name,
        role=role_to_proto(member.role),
        state=state,
        joined_at=_timestamp(member.joined_at),
        expires_at=_timestamp(member.expires_at),
        why=member.why,
        tags=member.tags,
        token=member.token,
        key_sha256=member.key_sha256,
    )


def _timestamp(seconds: float) -> Timestamp:
    found = Timestamp()
    found.FromNanoseconds(int(seconds * 1e9))
    return found
