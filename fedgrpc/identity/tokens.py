"""Join tokens: fg1.AUTHORITY.ID.SECRET.

    AUTHORITY   SHA-256 of the public key of the fleet's authority, base64url: 43 characters
    ID          name of the token, 8 letters and digits; not secret
    SECRET      24 random bytes, base64url: 32 characters

The rule: the secret never travels, and no disk of the aggregator has it. A private key follows from it. The
aggregator keeps the certificate of that key as a trust anchor, and a device signs with it the certificate with
which it connects. So the handshake shows that a device has the token, as it shows that the aggregator has the
authority's key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from fedgrpc.errors import TokenRefused, UsageError
from fedgrpc.identity.certificates import Certificate, PrivateKey, make_join_anchor
from fedgrpc.identity.roles import DEVICE_ROLES, EVALUATORS, Role, checked_name

_VERSION: Final = "fg1"
_PARTS: Final = re.compile(r"fg1\.([A-Za-z0-9_-]{43})\.([a-z0-9]{8})\.([A-Za-z0-9_-]{32})")
MAX_TOKEN_CHARS: Final = 200
_ID_CHARS: Final = 8
_ID_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz0123456789"
_SECRET_BYTES: Final = 24
_CONTEXT: Final = b"fedgrpc join token 1\0"
# Order of the curve P-256 (FIPS 186-4, D.1.2.3).
_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_PATTERN: Final = re.compile(r"[A-Za-z0-9._*?-]{1,64}")
MAX_USES: Final = 100_000
MAX_TTL_S: Final = 366 * 86_400.0
_TAG: Final = re.compile(r"[A-Za-z0-9._=-]{1,64}")
_MAX_TAGS: Final = 16


@dataclass(frozen=True)
class JoinToken:
    """A join token as its bearer has it."""

    authority_sha256: bytes
    id: str
    secret: str = field(repr=False)

    @classmethod
    def make(cls, authority_sha256: bytes) -> JoinToken:
        """Return a new token."""
        token_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_CHARS))
        return cls(authority_sha256, token_id, secrets.token_urlsafe(_SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Read a token. Raises `TokenRefused`, which repeats nothing of the text."""
        text = text.strip()
        match = _PARTS.fullmatch(text) if len(text) <= MAX_TOKEN_CHARS else None
        if match is None:
            if not text:
                raise TokenRefused("the join token, or its file, is empty: make one with `fedgrpc token create`")
            looks_like_one = text.startswith(_VERSION + ".")
            what = "the join token is cut off or damaged" if looks_like_one else "this is no join token"
            raise TokenRefused(f"{what}: one is a single line that begins with {_VERSION}. and has 89 characters")
        authority, token_id, secret = match.groups()
        try:
            return cls(base64.urlsafe_b64decode(authority + "="), token_id, secret)
        except binascii.Error:
            raise TokenRefused("the join token is damaged") from None

    @property
    def text(self) -> str:
        """Return the line that `parse` reads."""
        authority = base64.urlsafe_b64encode(self.authority_sha256).decode().rstrip("=")
        return f"{_VERSION}.{authority}.{self.id}.{self.secret}"

    @property
    def key(self) -> PrivateKey:
        """Return the private key that follows from the secret: 1 + SHA-512(context, secret) mod (order - 1)."""
        number = int.from_bytes(hashlib.sha512(_CONTEXT + self.secret.encode()).digest(), "big")
        return ec.derive_private_key(1 + number % (_ORDER - 1), ec.SECP256R1())

    def __str__(self) -> str:
        return f"join token {self.id}"


@dataclass(frozen=True)
class TokenRecord:
    """A join token as the aggregator keeps it, with what it is good for. Times are seconds since 1970.

    `names` is the name that a device gets, or a pattern with * and ? that the name it asks for must match.
    `authority` is the one that the token names: they end together.

    Raises:
        UsageError: a value is out of range.
    """

    id: str
    anchor: Certificate
    role: Role
    expires_at: float
    uses_left: int = 1
    names: str = "*"
    tags: tuple[str, ...] = ()
    needs_approval: bool = False
    authority: str = ""

    def __post_init__(self) -> None:
        if self.role not in DEVICE_ROLES:
            raise UsageError(f"the role must be one of {', '.join(DEVICE_ROLES)}, not {self.role}")
        if not 0 <= self.uses_left <= MAX_USES:
            raise UsageError(f"uses must be from 1 to {MAX_USES}, not {self.uses_left}")
        if not _PATTERN.fullmatch(self.names):
            raise UsageError(f"name must be a device's name, perhaps with * and ?, not {self.names[:80]!r}")
        if len(self.tags) > _MAX_TAGS or not all(_TAG.fullmatch(tag) for tag in self.tags):
            raise UsageError(f"tags must be at most {_MAX_TAGS}, each of letters, digits, '.', '_', '=' and '-'")

    @classmethod
    def of(cls, token: JoinToken, role: Role, now: float, ttl_s: float, **more: object) -> TokenRecord:
        """Return the record of a new token, good for `ttl_s` seconds. Raises `UsageError`."""
        if not 0 < ttl_s <= MAX_TTL_S:
            raise UsageError(f"ttl must be above 0 and at most {MAX_TTL_S:g} s, not {ttl_s:g}")
        record = cls(token.id, make_join_anchor(token.id, token.key), role, now + ttl_s, **more)  # type: ignore[arg-type]
        if record.uses_left < 1:
            raise UsageError(f"uses must be from 1 to {MAX_USES}, not 0")
        return record

    def is_live(self, now: float) -> bool:
        """Return whether a device may still join with it."""
        return self.uses_left > 0 and now < self.expires_at

    def check(self, now: float) -> None:
        """Raise `TokenRefused` when it admits no device any more."""
        if now >= self.expires_at:
            ago_s = now - self.expires_at
            raise TokenRefused(f"join token {self.id} expired {ago_s:.0f} s ago; ask for a new one")
        if self.uses_left < 1:
            raise TokenRefused(f"join token {self.id} is used up; ask for a new one")

    def name_for(self, wanted: str) -> str:
        """Return the name that a device gets which asks for `wanted`. Raises `UsageError` and `TokenRefused`."""
        if "*" not in self.names and "?" not in self.names:
            return self.names
        checked_name(wanted, "name of the device")
        if not fnmatchcase(wanted, self.names):
            raise TokenRefused(f"join token {self.id} is for the names {self.names}, and not for {wanted!r}")
        if wanted.endswith(EVALUATORS):
            raise TokenRefused(f"names that end with {EVALUATORS} belong to leaves")
        return wanted

    def used(self) -> TokenRecord:
        """Return the record after one more device has joined."""
        return replace(self, uses_left=self.uses_left - 1)
