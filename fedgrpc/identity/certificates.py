"""X.509 certificates of the built-in authority: ECDSA over P-256, with SHA-256.

The rule: pure functions. Keys come from the system's generator, times are arguments, and nothing touches a disk.

Certificates are valid from 1970 on, since many devices start without a clock. Freshness is for the aggregator to
check, by its own clock: a certificate's end is the last moment at which it may be renewed.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgrpc.errors import CorruptError, UsageError
from fedgrpc.identity.roles import Role, uri_of

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
Certificate = x509.Certificate

MAX_PEM_BYTES: Final = 16 << 10
_FLEET_BYTES: Final = 5
_CURVE: Final = ec.SECP256R1()
_HASH: Final = hashes.SHA256()
_BEGINNING: Final = datetime(1970, 1, 1, tzinfo=UTC)
# The last second that RFC 5280 can write: no end.
_END: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
_KEY: Final = re.compile(rb"-----BEGIN PRIVATE KEY-----[^-]+-----END PRIVATE KEY-----")
_UNREADABLE: Final = (ValueError, TypeError, UnsupportedAlgorithm)


def make_key() -> PrivateKey:
    """Return a new private key."""
    return ec.generate_private_key(_CURVE)


def key_sha256(key: PublicKey) -> bytes:
    """Return the SHA-256 of a public key, in DER (SubjectPublicKeyInfo)."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).digest()


@dataclass(frozen=True)
class Authority:
    """A certificate authority: its certificate, its key, and its name for the fleet. Each has another name."""

    certificate: Certificate
    key: PrivateKey
    fleet: str

    @classmethod
    def make(cls, fleet: str = "") -> Authority:
        """Return a new authority, with a name of its own unless `fleet` is given."""
        fleet = fleet or secrets.token_hex(_FLEET_BYTES)
        key = make_key()
        name = _common_name(f"fedgrpc authority {fleet}")
        certificate = _sign(name, key.public_key(), name, key, _END, authority=True)
        return cls(certificate, key, fleet)

    @classmethod
    def of(cls, certificate: Certificate, key: PrivateKey) -> Authority:
        """Return the authority with this certificate and key. Raises `CorruptError` when they do not fit."""
        if key_sha256(public_key_of(certificate)) != key_sha256(key.public_key()):
            raise CorruptError("the authority's key does not belong to its certificate")
        return cls(certificate, key, fleet_of(certificate))

    @property
    def sha256(self) -> bytes:
        """Return the SHA-256 of the authority's public key, which join tokens pin."""
        return key_sha256(self.key.public_key())

    @property
    def server_name(self) -> str:
        """Return the host name that every server certificate of the fleet has, whatever address is dialled."""
        return server_name_of(self.certificate)

    def issue_member(self, key: PublicKey, role: Role, name: str, until: float) -> Certificate:
        """Return a member's certificate; `until` is its end, seconds since 1970."""
        alternative = [x509.UniformResourceIdentifier(uri_of(self.fleet, role, name))]
        return self._issue(name, key, alternative, ExtendedKeyUsageOID.CLIENT_AUTH, until)

    def issue_server(self, key: PublicKey, hosts: Iterable[str], until: float) -> Certificate:
        """Return a server's certificate for the fleet's server name and for `hosts`."""
        alternative = [_host(host) for host in dict.fromkeys((self.server_name, *hosts))]
        return self._issue(self.server_name, key, alternative, ExtendedKeyUsageOID.SERVER_AUTH, until)

    def _issue(
        self,
        name: str,
        key: PublicKey,
        alternative: Sequence[x509.GeneralName],
        use: x509.ObjectIdentifier,
        until: float,
    ) -> Certificate:
        end = datetime.fromtimestamp(min(until, _END.timestamp()), UTC)
        issuer = self.certificate.subject
        return _sign(_common_name(name), key, issuer, self.key, end, alternative=alternative, use=use)

    def has_issued(self, certificate: Certificate) -> bool:
        """Return whether this authority itself signed the certificate.

        A handshake does not say that. It also succeeds with a chain to the anchor of a join token, whose bearer
        can give any name to a certificate and to the authority in between.
        """
        return is_signed_by(certificate, self.certificate)


def fleet_of(authority: Certificate) -> str:
    """Return the fleet of an authority's certificate."""
    return _text_of(authority.subject).rpartition(" ")[2]


def server_name_of(authority: Certificate) -> str:
    """Return the host name that the server certificates of an authority have."""
    return f"{fleet_of(authority)}.fedgrpc.internal"


def make_join_anchor(token_id: str, key: PrivateKey) -> Certificate:
    """Return the self-signed certificate by which a server recognizes the bearers of a join token."""
    name = _common_name(join_name(token_id))
    return _sign(name, key.public_key(), name, key, _END, authority=True)


def issue_to_itself(token_id: str, token_key: PrivateKey, key: PublicKey) -> Certificate:
    """Return the certificate with which a joining device connects: of its own key, signed with its token's."""
    subject, issuer = _common_name("joining"), _common_name(join_name(token_id))
    return _sign(subject, key, issuer, token_key, _END, use=ExtendedKeyUsageOID.CLIENT_AUTH)


def join_name(token_id: str) -> str:
    """Return the name of the issuer of a joining device's certificate."""
    return f"fedgrpc join {token_id}"


def issuer_of(certificate: Certificate) -> str:
    """Return the common name of a certificate's issuer; "" without one."""
    return _text_of(certificate.issuer)


def is_signed_by(certificate: Certificate, issuer: Certificate) -> bool:
    """Return whether `issuer` itself signed `certificate`."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (*_UNREADABLE, InvalidSignature):
        return False
    return True


def make_request(key: PrivateKey) -> bytes:
    """Return a signing request (PKCS #10, PEM) for `key`. It asks for no name: the token has it."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, _HASH).public_bytes(serialization.Encoding.PEM)


def key_of_request(pem: bytes) -> PublicKey:
    """Return the public key of a signing request, whose sender has shown that it holds the private one.

    Raises `UsageError`.
    """
    if len(pem) > MAX_PEM_BYTES:
        raise UsageError(f"a signing request of {len(pem)} bytes; allowed are {MAX_PEM_BYTES}")
    try:
        request = x509.load_pem_x509_csr(pem)
        if not request.is_signature_valid:
            raise ValueError("its signature is not valid")
        return _p256(request.public_key())
    except _UNREADABLE as error:
        raise UsageError(f"the signing request cannot be used: {error}") from error


def public_key_of(certificate: Certificate) -> PublicKey:
    """Return a certificate's public key. Raises `UsageError` for another kind than P-256."""
    try:
        return _p256(certificate.public_key())
    except _UNREADABLE as error:
        raise UsageError(f"the certificate's key cannot be used: {error}") from error


def load_certificate(pem: bytes) -> Certificate:
    """Return the first certificate in a PEM text. Raises `CorruptError`."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except _UNREADABLE as error:
        raise CorruptError(f"no readable certificate: {error}") from error


def load_certificates(pem: bytes) -> list[Certificate]:
    """Return all certificates in a PEM text. Raises `CorruptError`."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except _UNREADABLE as error:
        raise CorruptError(f"no readable certificate: {error}") from error


def load_chain_der(chain: Iterable[bytes]) -> list[Certificate]:
    """Return the certificates of a chain, each in DER. Raises `CorruptError`."""
    try:
        return [x509.load_der_x509_certificate(der) for der in chain]
    except _UNREADABLE as error:
        raise CorruptError(f"no readable certificate: {error}") from error


def authorities_pem(authorities: Iterable[Authority]) -> bytes:
    """Return certificates and keys of authorities as one PEM text, which `load_authorities` reads."""
    return b"".join(pem_of(each.certificate) + key_pem(each.key) for each in authorities)


def load_authorities(pem: bytes) -> tuple[Authority, ...]:
    """Return the authorities in a PEM text. Raises `CorruptError`."""
    keys = _KEY.findall(pem)
    certificates = load_certificates(pem)
    if len(keys) != len(certificates):
        raise CorruptError(f"{len(certificates)} certificates of authorities, and {len(keys)} keys")
    return tuple(Authority.of(*each) for each in zip(certificates, map(load_key, keys), strict=True))


def load_key(pem: bytes) -> PrivateKey:
    """Return the private key in a PEM text. Raises `CorruptError`, which says nothing of the key."""
    try:
        key = serialization.load_pem_private_key(pem, None)
    except _UNREADABLE:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != _CURVE.name:
        raise CorruptError("no readable private key of the curve P-256")
    return key


def key_pem(key: PrivateKey) -> bytes:
    """Return a private key as PEM (PKCS #8)."""
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def pem_of(*certificates: Certificate) -> bytes:
    """Return certificates as one PEM text."""
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


def uris_of(certificate: Certificate) -> list[str]:
    """Return the URIs among a certificate's alternative names."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def end_of(certificate: Certificate) -> float:
    """Return the end of a certificate's validity, seconds since 1970."""
    return certificate.not_valid_after_utc.timestamp()


def _sign(
    subject: x509.Name,
    key: PublicKey,
    issuer: x509.Name,
    issuer_key: PrivateKey,
    end: datetime,
    *,
    alternative: Sequence[x509.GeneralName] = (),
    use: x509.ObjectIdentifier | None = None,
    authority: bool = False,
) -> Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_BEGINNING)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(authority, 0 if authority else None), critical=True)
        .add_extension(_key_usage(authority), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if alternative:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternative), critical=False)
    if use is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
    return builder.sign(issuer_key, _HASH)


def _key_usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _p256(key: object) -> PublicKey:
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != _CURVE.name:
        raise ValueError("its key is not of the curve P-256")
    return key


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _text_of(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
