"""One-time keys of secure sums under the signatures of devices' certificates.

The rule: keys count for the trainer, the run and the day that their signature names, and only with a certificate
of an authority that the reader trusts. So an aggregator makes no devices up, unless it has the authority's key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from fedgrpc.errors import CorruptError, NotEnrolled, StorageError, UpdateRefused
from fedgrpc.identity.certificates import (
    Certificate,
    end_of,
    is_signed_by,
    load_certificates,
    load_chain_der,
    uris_of,
)
from fedgrpc.identity.roles import Role, identity_from
from fedgrpc.privacy.one_time_keys import KeySignature, PublicKeys, key_statement
from fedgrpc.protocol.secure import is_short
from fedgrpc.storage.files import storage_errors

# How long a signature counts. Devices sign anew each hour, and a round takes hours at most.
FRESH_S: Final = 86_400
_SIGN_EVERY_S: Final = 3600
_ECDSA: Final = ec.ECDSA(SHA256())
_PSS: Final = padding.PSS(padding.MGF1(SHA256()), SHA256.digest_size)


class KeySigner:
    """Signs a device's one-time keys with the key of its certificate, which may be replaced meanwhile."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._certificate = certificate
        self._key = key
        self._signed: dict[tuple[str, PublicKeys], PublicKeys] = {}

    def signed(self, run_id: str, worker: str, keys: PublicKeys, now: float) -> PublicKeys:
        """Return the keys with a signature that is an hour old at most; `now`: seconds since 1970. Blocks.

        Raises `StorageError` where certificate or key cannot be read or used.
        """
        with storage_errors(self._certificate, "read"):
            chain = tuple(each.public_bytes(Encoding.DER) for each in _certificates_in(self._certificate))
        known = self._signed.get((run_id, keys))
        signature = None if known is None else known.signature
        if known is not None and signature is not None and signature.chain == chain:
            age_s = now - signature.signed_at
            if 0 <= age_s < _SIGN_EVERY_S:
                return known
        if not is_short(chain):
            raise StorageError(f"{self._certificate} has too many certificates to travel with one-time keys")
        signed_at = max(0, int(now))
        value = self._signature(key_statement(run_id, worker, keys, signed_at))
        made = replace(keys, signature=KeySignature(signed_at, value, chain))
        # Keys are of one sum: those of former ones are not signed again.
        self._signed = {each: one for each, one in self._signed.items() if each[0] != run_id}
        self._signed[run_id, keys] = made
        return made

    def _signature(self, statement: bytes) -> bytes:
        with storage_errors(self._key, "read"):
            pem = self._key.read_bytes()
        try:
            key = load_pem_private_key(pem, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if isinstance(key, ec.EllipticCurvePrivateKey):
            return key.sign(statement, _ECDSA)
        if isinstance(key, rsa.RSAPrivateKey):
            return key.sign(statement, _PSS, SHA256())
        raise StorageError(f"{self._key} has no EC or RSA key to sign one-time keys with")


@dataclass(frozen=True)
class KeyCheck:
    """Authorities whose trainers may be in a secure sum, and whom of these a list has revoked."""

    authorities: Sequence[Certificate]
    revoked: x509.CertificateRevocationList | None = None

    @classmethod
    def read(cls, authorities: Path, revoked: Path | None = None) -> KeyCheck:
        """Return the check by the certificates, and the revocation list (CRL, PEM), in these files.

        Raises `StorageError`, also for a list by another authority.
        """
        trusted = _certificates_in(authorities)
        if revoked is None:
            return cls(trusted)
        with storage_errors(revoked, "read"):
            try:
                listed = x509.load_pem_x509_crl(revoked.read_bytes())
            except ValueError as error:
                raise StorageError(f"{revoked} is no revocation list: {error}") from error
        if not any(_has_signed(each, listed) for each in trusted):
            raise StorageError(f"{revoked} is not signed by an authority of {authorities}")
        return cls(trusted, listed)

    def check(self, run_id: str, worker: str, keys: PublicKeys, now: float) -> None:
        """Raise `UpdateRefused`, and say why, unless a trainer of this name has signed these keys for this run.

        `now`, in seconds since 1970, is within a day of the signature, and within the certificates' lives.
        """
        whose, signature = f"the one-time keys of {worker[:80]!r}", keys.signature
        if signature is None:
            raise UpdateRefused(f"{whose} are not signed: it has no certificate, or is made up")
        off_s = now - signature.signed_at
        if abs(off_s) > FRESH_S:
            which = "old" if off_s > 0 else "ahead of the clock here"
            raise UpdateRefused(f"{whose} have a signature that is {abs(off_s) / 3600:.0f} hours {which}")
        own = self._checked(whose, signature.chain, now)
        try:
            identity = identity_from(uris_of(own))
        except NotEnrolled as error:
            raise UpdateRefused(f"{whose}: {error}") from error
        if (identity.name, identity.role) != (worker, Role.TRAINER):
            raise UpdateRefused(f"{whose} come with the certificate of {identity}")
        statement = key_statement(run_id, worker, keys, signature.signed_at)
        if not _is_signature(own, signature.value, statement):
            raise UpdateRefused(f"{whose} have a wrong signature: they were changed, or are of another run")

    def _checked(self, whose: str, chain: Sequence[bytes], now: float) -> Certificate:
        """Return the certificate at the beginning of a chain that one of the authorities has signed."""
        try:
            certificates = load_chain_der(chain)
        except CorruptError as error:
            raise UpdateRefused(f"{whose}: {error}") from error
        anchors = (each for each in self.authorities if certificates and is_signed_by(certificates[-1], each))
        issuer = next(anchors, None)
        if issuer is None:
            raise UpdateRefused(f"{whose} come with a certificate of no authority that is trusted here")
        for below, certificate in reversed(list(enumerate(certificates))):
            if not (_may_sign(issuer, below) and is_signed_by(certificate, issuer)):
                raise UpdateRefused(f"{whose} come with certificates that do not follow from the authority")
            if not certificate.not_valid_before_utc.timestamp() <= now <= end_of(certificate):
                raise UpdateRefused(f"{whose} come with a certificate that has expired, or is not valid yet")
            if self._is_revoked(certificate, now):
                raise UpdateRefused(f"{whose} come with a certificate that is revoked")
            issuer = certificate
        return certificates[0]

    def _is_revoked(self, certificate: Certificate, now: float) -> bool:
        listed = self.revoked
        if listed is None or listed.issuer != certificate.issuer:
            return False
        until = listed.next_update_utc
        if until is not None and until < datetime.fromtimestamp(now, UTC):
            raise UpdateRefused("the list of revoked certificates is out of date: get the present one")
        return listed.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None


def _certificates_in(path: Path) -> list[Certificate]:
    with storage_errors(path, "read"):
        pem = path.read_bytes()
    try:
        return load_certificates(pem)
    except CorruptError as error:
        raise StorageError(f"{path}: {error}") from error


def _has_signed(authority: Certificate, listed: x509.CertificateRevocationList) -> bool:
    key: Any = authority.public_key()
    try:
        return listed.issuer == authority.subject and listed.is_signature_valid(key)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        return False


def _may_sign(issuer: Certificate, below: int) -> bool:
    """Return whether a certificate is an authority's, with room for `below` further ones before a device's."""
    try:
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, ValueError):
        return False
    return constraints.ca and (constraints.path_length is None or constraints.path_length >= below)


def _is_signature(certificate: Certificate, value: bytes, statement: bytes) -> bool:
    try:
        key = certificate.public_key()
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(value, statement, _ECDSA)
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(value, statement, _PSS, SHA256())
        else:
            return False
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return True
