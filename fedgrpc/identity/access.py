"""The table of RPCs and roles: which roles may call what.

The rule: what has no row is refused. A row says who may call; the handler then keeps devices to their own name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fedgrpc.errors import WrongIdentity
from fedgrpc.identity.roles import DEVICE_ROLES, OPERATOR_ROLES, Identity, Role

Roles = frozenset[Role]

_DEVICES: Final = frozenset(DEVICE_ROLES)
_READERS: Final = frozenset(OPERATOR_ROLES)
_STEERING: Final = frozenset({Role.OPERATOR, Role.ADMIN})
_ADMINS: Final = frozenset({Role.ADMIN})
_JOINING: Final = frozenset({Role.JOINING})
_MEMBERS: Final = _DEVICES | _READERS
# The worker's own service is for its device: callers there are local, whatever their role.
_LOCAL: Final[Roles] = frozenset()


def _rows(service: str, rows: Mapping[str, Roles]) -> dict[str, Roles]:
    return {f"/{service}/{method}": roles for method, roles in rows.items()}


ROLES: Final[Mapping[str, Roles]] = {
    **_rows(
        "fedgrpc.v1.Aggregator",
        {
            "Register": _DEVICES,
            "DescribeModel": _DEVICES,
            "PollTask": _DEVICES,
            "PollTasks": _DEVICES,
            "PullModel": _DEVICES | _STEERING,
            "Heartbeat": _DEVICES,
            "PushUpdate": _DEVICES,
            "QueryPush": _DEVICES,
            "ExchangeParts": _DEVICES,
            "ReportFailure": _DEVICES,
            "Leave": _DEVICES,
            "GetRun": _READERS,
            "GetRound": _READERS,
            "ListRounds": _READERS,
            "WatchRounds": _READERS,
            "ListWorkers": _READERS,
            "GetPrivacy": _READERS,
            "PauseRun": _STEERING,
            "ResumeRun": _STEERING,
            "RollBackRun": _STEERING,
            "StopRun": _STEERING,
            "ListRuns": _READERS,
            "SubmitRun": _STEERING,
            "SetRun": _STEERING,
            "CloneRun": _STEERING,
            "RemoveRun": _STEERING,
        },
    ),
    **_rows(
        "fedgrpc.v1.Identity",
        {
            "Enroll": _JOINING,
            "Renew": _MEMBERS,
            "CreateToken": _ADMINS,
            "ListTokens": _READERS,
            "DeleteToken": _ADMINS,
            "ListMembers": _READERS,
            "ApproveMember": _ADMINS,
            "RevokeMember": _STEERING,
            "RenameMember": _ADMINS,
            "ForgetMember": _ADMINS,
            "CreateOperator": _ADMINS,
            "RotateAuthority": _ADMINS,
            "ListAuthorities": _READERS,
            "RetireAuthority": _ADMINS,
            "ReadAudit": _READERS,
        },
    ),
    **_rows(
        "fedgrpc.v1.Models",
        {
            "ListVersions": _READERS,
            "GetVersion": _READERS,
            "PullVersion": _DEVICES | _STEERING,
            "TagVersion": _STEERING,
            "StartRelease": _STEERING,
            "AbortRelease": _STEERING,
            "ListReleases": _READERS,
            "FollowReleases": _DEVICES,
            "ReportRelease": _DEVICES,
        },
    ),
    **_rows(
        "fedgrpc.v1.Worker",
        dict.fromkeys(("GetStatus", "WatchStatus", "PullModel", "WatchModel", "Pause", "Resume", "Drain"), _LOCAL),
    ),
    **_rows("grpc.health.v1.Health", {"Check": _MEMBERS, "Watch": _MEMBERS, "List": _MEMBERS}),
    **_rows("grpc.reflection.v1alpha.ServerReflection", {"ServerReflectionInfo": _READERS}),
    **_rows("grpc.reflection.v1.ServerReflection", {"ServerReflectionInfo": _READERS}),
}

# Calls that change something. The audit log has each of them.
AUDITED: Final = frozenset(
    method for method, roles in ROLES.items() if roles and roles <= _STEERING | _JOINING
) | {"/fedgrpc.v1.Identity/Renew"}


def check_call(identity: Identity, method: str) -> None:
    """Raise `WrongIdentity` unless the caller may call `method`, "/SERVICE/METHOD"."""
    allowed = ROLES.get(method, frozenset())
    if identity.local or identity.role in allowed:
        return
    who = " or ".join(role for role in Role if role in allowed) or "a caller on the same machine"
    raise WrongIdentity(f"{identity} may not call {method.rpartition('/')[2][:80]}: that takes {who}")
