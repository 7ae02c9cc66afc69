"""Certificates that callers show: whose signature they carry, and so which key, token or name they stand for.

The rule: each is checked once. The result is kept, bounded in number, until the trust anchors change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from fedgrpc.errors import CertificateStale, CorruptError, NotEnrolled, UsageError
from fedgrpc.identity import certificates
from fedgrpc.identity.certificates import Authority
from fedgrpc.identity.roles import Identity, identity_from
from fedgrpc.identity.tokens import TokenRecord

MAX_KNOWN: Final = 20_000


@dataclass(frozen=True)
class Shown:
    """Content of a certificate whose signature is checked: a member's key, or the token of a new one."""

    key_sha256: bytes = b""
    authority: str = ""
    token: str = ""


class ShownCertificates:
    """Certificates that were checked since the trust anchors last changed."""

    def __init__(self) -> None:
        self._known: dict[bytes, Shown | Identity] = {}
        # Connections that began with certificates of these may be open still.
        self._retired: list[Authority] = []

    def read(
        self, pem: bytes, authorities: Sequence[Authority], tokens: Iterable[TokenRecord]
    ) -> Shown | Identity:
        """Return the content of a certificate; without authorities, the identity that it names.

        Raises:
            NotEnrolled: none of these authorities and tokens has signed it.
            CertificateStale: an authority that was retired has signed it.
        """
        # By its digest: whoever has a token can show certificates of any size.
        digest = hashlib.sha256(pem).digest()
        found = self._known.get(digest)
        if found is None:
            found = self._checked(pem, authorities, tokens)
            if len(self._known) >= MAX_KNOWN:
                del self._known[next(iter(self._known))]
            self._known[digest] = found
        return found

    def _checked(
        self, pem: bytes, authorities: Sequence[Authority], tokens: Iterable[TokenRecord]
    ) -> Shown | Identity:
        try:
            certificate = certificates.load_certificate(pem)
            if not authorities:
                return identity_from(certificates.uris_of(certificate))
            for authority in authorities:
                if authority.has_issued(certificate):
                    key = certificates.public_key_of(certificate)
                    return Shown(certificates.key_sha256(key), authority.fleet)
        except (CorruptError, UsageError) as error:
            raise NotEnrolled(str(error)) from error
        # The name of the issuer comes first: comparing it is cheap, and checking a signature is not.
        issuer = certificates.issuer_of(certificate)
        for token in tokens:
            if issuer == certificates.join_name(token.id) and certificates.is_signed_by(certificate, token.anchor):
                return Shown(token=token.id)
        if any(authority.has_issued(certificate) for authority in self._retired):
            raise CertificateStale("the authority of this connection's certificate was retired; connect again")
        raise NotEnrolled("neither this aggregator's authority nor a join token has signed the certificate")

    def retire(self, authority: Authority) -> None:
        """Tell bearers of its certificates from now on that they are stale, rather than unknown."""
        self._retired.append(authority)

    def clear(self) -> None:
        """Check every certificate again: the trust anchors have changed."""
        self._known.clear()
