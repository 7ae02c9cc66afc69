"""The `Identity` service: protobuf in, `Identities` behind it, protobuf out.

The rule: `fedgrpc.identity.access` has said who may call what. One change at a time, in a thread: each is a
sync of the disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import islice
from typing import Final, TypeVar

import grpc.aio
import structlog

from fedgrpc.errors import StorageError, UsageError, WrongIdentity
from fedgrpc.identity.audit import AuditLog
from fedgrpc.identity.identities import Credentials, Identities
from fedgrpc.identity.messages import credentials_to_proto, member_to_proto, role_from_proto, token_to_proto
from fedgrpc.identity.roles import OPERATOR_ROLES, Role
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.rpc.admission import Admission, caller, note, shown_certificate
from fedgrpc.rpc.identity import peer_of
from fedgrpc.v1 import identity_pb2 as pb
from fedgrpc.v1 import identity_pb2_grpc

_MAX_PAGE: Final = 1000

log = structlog.get_logger()
T = TypeVar("T")
PutOut = Callable[[str, str, bool], None]


class IdentityService(identity_pb2_grpc.IdentityServicer):
    """Each method is one RPC of identity.proto, which says what it does and how it fails."""

    def __init__(
        self, identities: Identities, admission: Admission, audit: AuditLog, clock: Callable[[], float]
    ) -> None:
        self._identities = identities
        self._audit = audit
        self._clock = clock
        self._changing = asyncio.Lock()
        self._on_put_out: list[PutOut] = []
        self._admission = admission

    def on_put_out(self, call: PutOut) -> None:
        """Call `call(name, why, drop_updates)` whenever a member may call no more under that name."""
        self._on_put_out.append(call)

    async def _change(self, change: Callable[[], T]) -> T:
        """Make one change. Raises what `change` raises."""
        async with self._changing:
            return await asyncio.to_thread(change)

    async def _put_out(self, change: Callable[[], T], name: str, why: str, drop_updates: bool = False) -> T:
        """Make a change by which a member may call no more under this name, and end its open calls."""
        result = await self._change(change)
        self._admission.end_stale_calls()
        for call in self._on_put_out:
            call(name, why, drop_updates)
        return result

    async def Enroll(self, request: pb.EnrollRequest, context: grpc.aio.ServicerContext) -> pb.EnrollResponse:
        token = caller()
        if token.role is not Role.JOINING:
            raise UsageError("joining takes a connection with TLS and a join token")
        made = await self._change(
            lambda: self._identities.enroll(token.name, request.signing_request, request.name, self._clock())
        )
        note(member=made.identity.name, token=token.name)
        log.info("member joined", member=made.identity.name, role=made.identity.role.value, token=token.name)
        return pb.EnrollResponse(credentials=self._credentials(made))

    async def Renew(self, request: pb.RenewRequest, context: grpc.aio.ServicerContext) -> pb.RenewResponse:
        certificate = shown_certificate(context)
        made = await self._change(lambda: self._identities.renew(certificate, self._clock()))
        note(member=made.identity.name)
        log.info("certificate renewed", member=made.identity.name)
        return pb.RenewResponse(credentials=self._credentials(made))

    def _credentials(self, made: Credentials) -> pb.Credentials:
        return credentials_to_proto(made, self._clock())

    async def CreateToken(
        self, request: pb.CreateTokenRequest, context: grpc.aio.ServicerContext
    ) -> pb.CreateTokenResponse:
        token = await self._change(
            lambda: self._identities.create_token(
                role_from_proto(request.role),
                self._clock(),
                duration_from_proto(request.ttl),
                request.uses,
                request.names or "*",
                tuple(request.tags),
                request.needs_approval,
            )
        )
        note(token=token.id)
        self._log("token created", context, token=token.id)
        (record,) = (each for each in self._identities.tokens() if each.id == token.id)
        return pb.CreateTokenResponse(secret=token.text, token=token_to_proto(record))

    async def ListTokens(
        self, request: pb.ListTokensRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListTokensResponse:
        return pb.ListTokensResponse(tokens=map(token_to_proto, self._identities.tokens()))

    async def DeleteToken(
        self, request: pb.DeleteTokenRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteTokenResponse:
        await self._change(lambda: self._identities.delete_token(request.id))
        self._log("token deleted", context, token=request.id)
        return pb.DeleteTokenResponse()

    async def ListMembers(
        self, request: pb.ListMembersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListMembersResponse:
        # By name and not by place: members may be forgotten between two pages.
        found = sorted(self._identities.members(), key=lambda member: member.name)
        later = (member for member in found if member.name > request.page_token)
        size = min(request.page_size or _MAX_PAGE, _MAX_PAGE)
        page = list(islice(later, size + 1))
        more = len(page) > size
        return pb.ListMembersResponse(
            members=map(member_to_proto, page[:size]), next_page_token=page[size - 1].name if more else ""
        )

    async def ApproveMember(
        self, request: pb.ApproveMemberRequest, context: grpc.aio.ServicerContext
    ) -> pb.ApproveMemberResponse:
        member = await self._change(lambda: self._identities.approve(request.name))
        self._log("member approved", context, member=member.name)
        return pb.ApproveMemberResponse(member=member_to_proto(member))

    async def RevokeMember(
        self, request: pb.RevokeMemberRequest, context: grpc.aio.ServicerContext
    ) -> pb.RevokeMemberResponse:
        self._check_may_revoke(request.name)
        member = await self._put_out(
            lambda: self._identities.revoke(request.name, request.why, self._clock()),
            *(request.name, "its device was revoked", request.drop_updates),
        )
        self._log("member revoked", context, member=member.name, reason=member.why)
        return pb.RevokeMemberResponse(member=member_to_proto(member))

    def _check_may_revoke(self, name: str) -> None:
        """Raise `WrongIdentity` for an operator who would revoke operators: that would be the last word of any."""
        by = caller()
        if by.local or by.role is Role.ADMIN:
            return
        role = next((each.role for each in self._identities.members() if each.name == name), None)
        if role in OPERATOR_ROLES:
            raise WrongIdentity(f"{by} may revoke devices; to revoke an operator takes an admin")

    async def RenameMember(
        self, request: pb.RenameMemberRequest, context: grpc.aio.ServicerContext
    ) -> pb.RenameMemberResponse:
        member = await self._put_out(
            lambda: self._identities.rename(request.name, request.new_name, self._clock()),
            *(request.name, "its device has another name now"),
        )
        self._log("member renamed", context, member=member.name, former=request.name)
        return pb.RenameMemberResponse(member=member_to_proto(member))

    async def ForgetMember(
        self, request: pb.ForgetMemberRequest, context: grpc.aio.ServicerContext
    ) -> pb.ForgetMemberResponse:
        await self._put_out(
            lambda: self._identities.forget(request.name), request.name, "its device was forgotten"
        )
        self._log("member forgotten", context, member=request.name)
        return pb.ForgetMemberResponse()

    async def CreateOperator(
        self, request: pb.CreateOperatorRequest, context: grpc.aio.ServicerContext
    ) -> pb.CreateOperatorResponse:
        made = await self._change(
            lambda: self._identities.create_operator(
                request.name, role_from_proto(request.role), request.signing_request, self._clock()
            )
        )
        self._log("operator created", context, member=request.name, role=made.identity.role.value)
        return pb.CreateOperatorResponse(credentials=self._credentials(made))

    async def RotateAuthority(
        self, request: pb.RotateAuthorityRequest, context: grpc.aio.ServicerContext
    ) -> pb.RotateAuthorityResponse:
        made = await self._change(self._identities.rotate)
        note(authority=made.fleet)
        self._log("authority rotated", context, authority=made.fleet)
        return pb.RotateAuthorityResponse(authority=self._authorities()[0])

    async def ListAuthorities(
        self, request: pb.ListAuthoritiesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAuthoritiesResponse:
        return pb.ListAuthoritiesResponse(authorities=self._authorities())

    async def RetireAuthority(
        self, request: pb.RetireAuthorityRequest, context: grpc.aio.ServicerContext
    ) -> pb.RetireAuthorityResponse:
        await self._change(lambda: self._identities.retire(request.name, self._clock(), request.force))
        self._admission.end_stale_calls()
        self._log("authority retired", context, authority=request.name)
        return pb.RetireAuthorityResponse()

    def _authorities(self) -> list[pb.Authority]:
        now, tokens = self._clock(), [each.authority for each in self._identities.tokens()]
        return [
            pb.Authority(
                name=each.fleet,
                key_sha256=each.sha256,
                members=len(self._identities.held_by(each.fleet, now)),
                tokens=tokens.count(each.fleet),
            )
            for each in self._identities.authorities
        ]

    async def save_moved(self) -> None:
        """Store which members have come over to the newest authority; what fails is tried again."""
        try:
            await self._change(self._identities.save_moved)
        except StorageError as error:
            log.error("members not stored", reason=str(error))

    async def ReadAudit(
        self, request: pb.ReadAuditRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReadAuditResponse:
        lines = await asyncio.to_thread(self._audit.read, request.offset)
        return pb.ReadAuditResponse(lines=lines, next_offset=request.offset + len(lines))

    def _log(self, event: str, context: grpc.aio.ServicerContext, **about: object) -> None:
        log.info(event, by=str(caller()), peer=peer_of(context), **about)
