"""Everyone whom an aggregator knows, and the tokens with which others may join.

The rule: stored first, then known. Each change is one transaction. What is looked up at every call is in memory.
Methods that change something block on the disk. One of them runs at a time, and lookups may run beside it.

Certificates either come from the built-in authority, which knows each by its key, or, without an `authority`, from
the operator's own, whose word on names and roles is taken. A member that is revoked stays out in both cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fedgrpc.errors import (
    CorruptError,
    Exhausted,
    IllegalTransition,
    NameTaken,
    NotEnrolled,
    NotFound,
    TokenRefused,
    UsageError,
    WrongIdentity,
)
from fedgrpc.identity.certificates import (
    Authority,
    Certificate,
    PublicKey,
    is_signed_by,
    issuer_of,
    join_name,
    key_of_request,
    key_sha256,
    load_certificate,
    pem_of,
    public_key_of,
    uris_of,
)
from fedgrpc.identity.members import Lives, Member, MemberState
from fedgrpc.identity.roles import OPERATOR_ROLES, Identity, Role, checked_name, identity_from
from fedgrpc.identity.store import IdentityStore
from fedgrpc.identity.tokens import JoinToken, TokenRecord, find_token

MAX_MEMBERS: Final = 50_000
# A server names all of its trust anchors in each handshake, where they have to fit into 64 KiB.
MAX_TOKENS: Final = 200
# A dead token is refused as such for this long.
_KEEP_DEAD_S: Final = 30 * 86_400.0
_KNOWN_CERTIFICATES: Final = 20_000


@dataclass(frozen=True)
class Credentials:
    """A certificate and the authorities to trust, as PEM, and for how many seconds the certificate counts."""

    certificate: bytes
    ca: bytes
    valid_for_s: float
    identity: Identity


@dataclass(frozen=True)
class _Shown:
    """Content of a certificate whose signature is checked: a member's key, or the token of a new one."""

    key_sha256: bytes = b""
    token: str = ""


class Identities:
    """Members and tokens of one fleet."""

    def __init__(
        self, store: IdentityStore, authority: Authority | None = None, lives: Lives | None = None
    ) -> None:
        """Read what the store knows. Raises `StorageError`."""
        self._store = store
        self.authority = authority
        self._lives = lives or Lives()
        self._members = {member.name: member for member in store.members()}
        self._by_key = {member.key_sha256: member for member in self._members.values() if member.key_sha256}
        self._tokens = {token.id: token for token in store.tokens()}
        self._shown: dict[bytes, _Shown | Identity] = {}
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
        shown = self._shown.get(certificate_pem)
        if shown is None:
            shown = self._read(certificate_pem)
            if len(self._shown) >= _KNOWN_CERTIFICATES:
                del self._shown[next(iter(self._shown))]
            self._shown[certificate_pem] = shown
        if isinstance(shown, Identity):
            if (member := self._members.get(shown.name)) is not None:
                member.check(now, renewing=True)
            return shown
        if shown.token:
            return Identity(shown.token, Role.JOINING)
        member = self._by_key.get(shown.key_sha256)
        if member is None:
            raise NotEnrolled("this device was forgotten; join again with a new token")
        member.check(now, renewing)
        return member.identity

    def _read(self, pem: bytes) -> _Shown | Identity:
        try:
            certificate = load_certificate(pem)
            if self.authority is None:
                return identity_from(uris_of(certificate))
            if self.authority.has_issued(certificate):
                return _Shown(key_sha256(public_key_of(certificate)))
        except (CorruptError, UsageError) as error:
            raise NotEnrolled(str(error)) from error
        for token in self._tokens.values():
            if issuer_of(certificate) == join_name(token.id) and is_signed_by(certificate, token.anchor):
                return _Shown(token=token.id)
        raise NotEnrolled("neither this aggregator's authority nor a join token has signed the certificate")

    def anchors(self) -> list[Certificate]:
        """Return the certificates whose signatures a server accepts."""
        authority = [] if self.authority is None else [self.authority.certificate]
        return [*authority, *(token.anchor for token in self._tokens.values())]

    def members(self) -> list[Member]:
        """Return every member."""
        return list(self._members.values())

    def tokens(self) -> list[TokenRecord]:
        """Return every token."""
        return list(self._tokens.values())

    def member(self, name: str) -> Member:
        """Return a member. Raises `NotFound`."""
        if name not in self._members:
            raise NotFound(f"there is no member {name[:80]!r}; `fedgrpc device list` shows the names")
        return self._members[name]

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
        token = JoinToken.make(self._own_authority().sha256)
        record = TokenRecord.of(
            *(token, role, now, ttl_s), uses_left=uses, names=names, tags=tags, needs_approval=needs_approval
        )
        self._make_room_for_token(now)
        self._store.save(token=record)
        self._tokens[record.id] = record
        self._anchors_changed()
        return token

    def _make_room_for_token(self, now: float) -> None:
        dead = [each for each in self._tokens.values() if not each.is_live(now)]
        old = [each.id for each in dead if now >= each.expires_at + _KEEP_DEAD_S]
        if len(self._tokens) - len(old) >= MAX_TOKENS:
            if not dead:
                raise Exhausted(f"there are {MAX_TOKENS} join tokens; delete one with `fedgrpc token delete`")
            old += [min(dead, key=lambda each: each.expires_at).id]
        if old:
            self._store.forget_tokens(*old)
            for token_id in old:
                self._tokens.pop(token_id, None)

    def delete_token(self, token_id: str) -> TokenRecord:
        """Remove a token, so that no device joins with it any more. Raises `NotFound` and `StorageError`."""
        token = find_token(self._tokens, token_id)
        self._store.forget_tokens(token_id)
        del self._tokens[token_id]
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
        token = self._tokens.get(token_id)
        if token is None:
            raise TokenRefused(f"join token {token_id[:20]!r} was deleted; ask for a new one")
        key = key_of_request(request)
        known = self._by_key.get(key_sha256(key))
        if known is not None:
            return self._enroll_again(known, token, key, now)
        token.check(now)
        name = token.name_for(wanted)
        self._check_free(name)
        state = MemberState.PENDING if token.needs_approval else MemberState.ACTIVE
        until = now + self._lives.of(token.role)
        member = Member(*(name, token.role, key_sha256(key), state, now, until), tags=token.tags, token=token.id)
        self._store.save(member, token.used())
        self._tokens[token.id] = token.used()
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
        self._own_authority()
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
        self._check_free(checked_name(name, "name of the operator"))
        self._own_authority()
        if key_sha256(key) in self._by_key:
            raise NameTaken("another member has this key")
        until = now + self._lives.of(role)
        member = Member(name, role, key_sha256(key), MemberState.ACTIVE, now, until)
        self._store.save(member)
        self._know(member)
        return self._credentials(member, key, now)

    def _credentials(self, member: Member, key: PublicKey, now: float) -> Credentials:
        authority = self._own_authority()
        until = member.expires_at + self._lives.grace_s
        certificate = authority.issue_member(key, member.role, member.name, until)
        ca = pem_of(authority.certificate)
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
        if known is None and self.authority is None:
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

    def _own_authority(self) -> Authority:
        if self.authority is None:
            raise UsageError(
                "this aggregator has no authority of its own: it listens without TLS, or with --tls-cert"
            )
        return self.authority
