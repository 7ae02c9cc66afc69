"""Everyone whom an aggregator knows, and the tokens with which others may join.

The rule: stored first, then known. Each change is one transaction. What is looked up at every call is in memory.
Methods that change something block on the disk. One of them runs at a time, and lookups may run beside it.

Certificates either come from built-in authorities, where a member is known by its key, or, without any, from the
operator's own, whose word on names and roles is taken. A member that is revoked stays out in both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from fedgrpc.errors import (
    Exhausted,
    IllegalTransition,
    NameTaken,
    NotEnrolled,
    NotFound,
    UsageError,
    WrongIdentity,
)
from fedgrpc.identity.certificates import (
    Authority,
    Certificate,
    PublicKey,
    key_of_request,
    key_sha256,
    load_certificate,
    pem_of,
    public_key_of,
)
from fedgrpc.identity.join_tokens import JoinTokens
from fedgrpc.identity.members import Lives, Member, MemberState
from fedgrpc.identity.roles import OPERATOR_ROLES, Identity, Role, checked_name
from fedgrpc.identity.shown_certificates import ShownCertificates
from fedgrpc.identity.store import IdentityStore
from fedgrpc.identity.tokens import JoinToken, TokenRecord

MAX_MEMBERS: Final = 50_000
# The one that signs, and the one before it.
MAX_AUTHORITIES: Final = 2
_NAMED: Final = 5
# 2026-01-01, seconds since 1970: before the first of these aggregators.
_EARLIEST: Final = 1_767_225_600.0


@dataclass(frozen=True)
class Credentials:
    """A certificate and the authorities to trust, as PEM, and for how many seconds the certificate counts."""

    certificate: bytes
    ca: bytes
    valid_for_s: float
    identity: Identity


class Identities:
    """Members and tokens of one fleet."""

    def __init__(
        self,
        store: IdentityStore,
        authorities: Sequence[Authority] = (),
        lives: Lives | None = None,
        keep: Callable[[Sequence[Authority]], None] = lambda authorities: None,
    ) -> None:
        """Read what the store knows. `keep` stores other authorities than these. Raises `StorageError`."""
        self._store = store
        self._keep = keep
        # Newest first: that one signs, and all are trusted.
        self.authorities = tuple(authorities)
        # By key: the authority of the certificate that a member has shown, where the store knows an older one.
        self._moved: dict[bytes, str] = {}
        self._lives = lives or Lives()
        self._members = {member.name: member for member in store.members()}
        self._by_key = {member.key_sha256: member for member in self._members.values() if member.key_sha256}
        self._tokens = JoinTokens(store, {each.fleet for each in self.authorities})
        self._shown = ShownCertificates()
        # Counts changes of the trust anchors.
        self.anchors_revision = 0

    def close(self) -> None:
        """Let the database go."""
        self._store.close()

    # Who calls.

    def identify(self, certificate_pem: bytes, now: float, renewing: bool = False) -> Identity:
        """Return the identity of the bearer of a certificate that a handshake has accepted.

        Raises:
            NotEnrolled: it counts for nothing here; as `CertificateStale`: it is past its life.
            WrongIdentity: its bearer was revoked.
            NotApproved: its bearer waits for approval.
        """
        shown = self._shown.read(certificate_pem, self.authorities, self._tokens.all())
        if isinstance(shown, Identity):
            if (member := self._members.get(shown.name)) is not None:
                member.check(now, renewing=True)
            return shown
        if shown.token:
            return Identity(shown.token, Role.JOINING)
        member = self._by_key.get(shown.key_sha256)
        if member is None:
            raise NotEnrolled("this device was forgotten; join again with a new token")
        if shown.authority != member.authority and shown.authority == self.authorities[0].fleet:
            self._moved[member.key_sha256] = shown.authority
        member.check(now, renewing)
        return member.identity

    def anchors(self) -> list[Certificate]:
        """Return the certificates whose signatures a server accepts."""
        own = [each.certificate for each in self.authorities]
        return [*own, *(token.anchor for token in self.tokens())]

    def members(self) -> list[Member]:
        """Return every member."""
        return list(self._members.values())

    def tokens(self) -> list[TokenRecord]:
        """Return every token."""
        return self._tokens.all()

    def member(self, name: str) -> Member:
        """Return a member. Raises `NotFound`."""
        if name not in self._members:
            raise NotFound(f"there is no member {name[:80]!r}; `fedgrpc device list` shows the names")
        return self._members[name]

    def has_revoked(self, name: str) -> bool:
        """Return whether `name` is of a member that was revoked."""
        member = self._members.get(name)
        return member is not None and member.state is MemberState.REVOKED

    # Joining.

    def create_token(
        self,
        role: Role,
        now: float,
        ttl_s: float,
        uses: int = 1,
        names: str = "*",
        tags: tuple[str, ...] = (),
        needs_approval: bool = False,
    ) -> JoinToken:
        """Return a new join token. Raises `UsageError`, `Exhausted` and `StorageError`."""
        self._check_clock(now)
        authority = self._newest()
        token = JoinToken.make(authority.sha256)
        record = TokenRecord.of(
            *(token, role, now, ttl_s),
            uses_left=uses,
            names=names,
            tags=tags,
            needs_approval=needs_approval,
            authority=authority.fleet,
        )
        self._tokens.add(record, now)
        self._anchors_changed()
        return token

    def delete_token(self, token_id: str) -> TokenRecord:
        """Remove a token, so that no device joins with it any more. Raises `NotFound` and `StorageError`."""
        token = self._tokens.delete(token_id)
        self._anchors_changed()
        return token

    def _anchors_changed(self) -> None:
        self._shown.clear()
        self.anchors_revision += 1

    def enroll(self, token_id: str, request: bytes, wanted: str, now: float) -> Credentials:
        """Make the bearer of a token, whose signing request this is, a member.

        Idempotent: the same key gets a certificate again, and uses the token once.

        Raises:
            TokenRefused: the token is expired, used up, or for other names.
            NameTaken: a device with another key has the name.
            WrongIdentity: this device was revoked, or is a member in another role.
            UsageError, Exhausted, StorageError.
        """
        token = self._tokens.shown(token_id)
        self._check_clock(now)
        key = key_of_request(request)
        known = self._by_key.get(key_sha256(key))
        if known is not None:
            return self._enroll_again(known, token, key, now)
        token.check(now)
        name = token.name_for(wanted)
        self._check_free(name)
        state = MemberState.PENDING if token.needs_approval else MemberState.ACTIVE
        until = now + self._lives.of(token.role)
        member = Member(
            *(name, token.role, key_sha256(key), state, now, until, "", token.tags, token.id, self._newest().fleet)
        )
        self._store.save(member, token.used())
        self._tokens.note(token.used())
        self._know(member)
        return self._credentials(member, key, now)

    def _enroll_again(self, member: Member, token: TokenRecord, key: PublicKey, now: float) -> Credentials:
        member.check(now, renewing=True)
        if now >= token.expires_at:
            token.check(now)
        if member.role is not token.role:
            raise WrongIdentity(
                f"this device is already {member.identity}; have it forgotten to join as {token.role}"
            )
        return self._renewed(member, key, now)

    def _check_clock(self, now: float) -> None:
        """Raise `Exhausted` when the clock is certainly wrong: a machine may start without one.

        What is issued by such a clock has ended long ago once the clock is right, and nobody could renew it.
        """
        if now < _EARLIEST:
            raise Exhausted(
                "the aggregator's clock is years behind; try again once it is right", retry_after_s=60.0
            )

    def _check_free(self, name: str) -> None:
        if (other := self._members.get(name)) is not None:
            if other.state is MemberState.REVOKED:
                raise NameTaken(f"{name!r} was revoked; `fedgrpc device forget {name}` frees the name")
            raise NameTaken(
                f"another key is enrolled as {name!r}; give this device another --name, or, if that key is lost, "
                f"`fedgrpc device forget {name}`"
            )
        if len(self._members) >= MAX_MEMBERS:
            raise Exhausted(f"there are {MAX_MEMBERS} members; forget some with `fedgrpc device forget`")

    def renew(self, certificate_pem: bytes, now: float) -> Credentials:
        """Return a new certificate for the bearer of one. Raises as `identify`, and `StorageError`."""
        identity = self.identify(certificate_pem, now, renewing=True)
        if identity.role is Role.JOINING:
            raise NotEnrolled("a join token has no certificate to renew")
        self._newest()
        self._check_clock(now)
        member = self._members[identity.name]
        member.check_grace(now, self._lives.grace_s)
        return self._renewed(member, public_key_of(load_certificate(certificate_pem)), now)

    def _renewed(self, member: Member, key: PublicKey, now: float) -> Credentials:
        renewed = member.renewed(now + self._lives.of(member.role))
        self._store.save(renewed)
        self._know(renewed)
        return self._credentials(renewed, key, now)

    def create_operator(self, name: str, role: Role, request: bytes, now: float) -> Credentials:
        """Add an operator or a viewer as a member. Raises `UsageError`, `NameTaken` and `StorageError`."""
        if role not in OPERATOR_ROLES:
            raise UsageError(f"the role must be one of {', '.join(OPERATOR_ROLES)}, not {role}")
        key = key_of_request(request)
        self._check_clock(now)
        self._check_free(checked_name(name, "name of the operator"))
        authority = self._newest()
        if key_sha256(key) in self._by_key:
            raise NameTaken("another member has this key")
        until = now + self._lives.of(role)
        member = Member(*(name, role, key_sha256(key), MemberState.ACTIVE, now, until), authority=authority.fleet)
        self._store.save(member)
        self._know(member)
        return self._credentials(member, key, now)

    def _credentials(self, member: Member, key: PublicKey, now: float) -> Credentials:
        authority = self._newest()
        until = member.expires_at + self._lives.grace_s
        certificate = authority.issue_member(key, member.role, member.name, until)
        ca = pem_of(*(each.certificate for each in self.authorities))
        return Credentials(pem_of(certificate), ca, member.expires_at - now, member.identity)

    # What operators do.

    def approve(self, name: str) -> Member:
        """Let a waiting member call. Idempotent. Raises `NotFound`, `IllegalTransition` and `StorageError`."""
        member = self.member(name)
        if member.state is MemberState.REVOKED:
            raise IllegalTransition(f"{name!r} was revoked; forget it, and let it join again")
        return self._change(member, member.approved())

    def revoke(self, name: str, why: str, now: float) -> Member:
        """Let a member call no more. Idempotent. Raises `NotFound` and `StorageError`."""
        known = self._members.get(name)
        if known is None and not self.authorities:
            # Known by its certificate alone; which role it names does not matter any more.
            known = Member(checked_name(name), Role.TRAINER, b"", MemberState.ACTIVE, now, now)
        return self._change(known, (known or self.member(name)).revoked(why))

    def rename(self, name: str, new: str, now: float) -> Member:
        """Give a member another name. Its calls are refused as stale until it has a certificate with that name.

        Raises `NotFound`, `NameTaken`, `UsageError` and `StorageError`.
        """
        member = self.member(name)
        if checked_name(new) == name:
            return member
        self._check_free(new)
        renamed = member.renamed(new).renewed(min(member.expires_at, now))
        self._store.save(renamed, former_name=name)
        del self._members[name]
        self._know(renamed)
        return renamed

    def forget(self, name: str) -> Member:
        """Remove a member; its certificate counts for nothing any more, and its name is free.

        Raises `NotFound` and `StorageError`.
        """
        member = self.member(name)
        self._store.forget_member(name)
        del self._members[name]
        self._by_key.pop(member.key_sha256, None)
        return member

    def _change(self, before: Member | None, after: Member) -> Member:
        if before != after:
            self._store.save(after)
            self._know(after)
        return after

    def _know(self, member: Member) -> None:
        self._members[member.name] = member
        if member.key_sha256:
            self._by_key[member.key_sha256] = member

    # Authorities.

    def rotate(self) -> Authority:
        """Make a new authority, which signs from now on; the one before stays trusted until `retire`.

        Raises `IllegalTransition` while there are two, `UsageError` and `StorageError`.
        """
        self._newest()
        if len(self.authorities) >= MAX_AUTHORITIES:
            raise IllegalTransition(f"retire the authority {self.authorities[-1].fleet} first: two are trusted")
        self.save_moved()
        made = Authority.make()
        self._set_authorities((made, *self.authorities))
        return made

    def retire(self, name: str, now: float, force: bool = False) -> Authority:
        """Trust an older authority no more. Its tokens end with it.

        Raises `NotFound`, `IllegalTransition`, for the newest or, without `force`, while members need it, and
        `UsageError` and `StorageError`.
        """
        newest = self._newest()
        found = next((each for each in self.authorities if each.fleet == name), None)
        if found is None:
            raise NotFound(f"there is no authority {name[:80]!r}; `fedgrpc ca list` shows the names")
        if found is newest:
            raise IllegalTransition(f"the authority {name} signs; make another one first with `fedgrpc ca rotate`")
        self.save_moved()
        waiting = sorted(each.name for each in self.held_by(name, now))
        if waiting and not force:
            more = f" and {len(waiting) - _NAMED} more" if len(waiting) > _NAMED else ""
            raise IllegalTransition(
                f"{name} is still needed by {', '.join(waiting[:_NAMED])}{more}, until they have renewed; with "
                "--force they have to join again"
            )
        self._shown.retire(found)
        self._set_authorities(tuple(each for each in self.authorities if each is not found))
        ended = self._tokens.end_with(name)
        self._anchors_changed()
        self._store.forget_tokens(*ended)
        return found

    def _set_authorities(self, authorities: tuple[Authority, ...]) -> None:
        self._keep(authorities)
        self.authorities = authorities
        self._anchors_changed()

    def held_by(self, authority: str, now: float) -> list[Member]:
        """Return the members who would have to join again without this authority."""
        return [
            each
            for each in self._members.values()
            if self._moved.get(each.key_sha256, each.authority) == authority
            and each.may_renew(now, self._lives.grace_s)
        ]

    def save_moved(self) -> None:
        """Store who has shown a certificate of the newest authority. Raises `StorageError`."""
        for key, authority in list(self._moved.items()):
            if (member := self._by_key.get(key)) is not None:
                self._change(member, replace(member, authority=authority))
            self._moved.pop(key, None)

    def _newest(self) -> Authority:
        if not self.authorities:
            raise UsageError(
                "this aggregator has no authority of its own: it listens without TLS, or with --tls-cert"
            )
        return self.authorities[0]
