"""One-time keys under certificates: who may be a neighbour, and the one line that each other one gets."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.errors import StorageError, UpdateRefused
from fedgrpc.identity.certificates import Authority, key_pem, make_key, pem_of
from fedgrpc.identity.roles import Role, uri_of
from fedgrpc.identity.signed_keys import FRESH_S, KeyCheck, KeySigner
from fedgrpc.privacy.one_time_keys import KeySignature, PublicKeys, Secrets
from fedgrpc.protocol.secure import keys_from_proto, keys_to_proto

NOW = 1_800_000_000.0
KEYS = Secrets(b"k" * 32).public


class Device:
    """A device with its certificate, and the keys that it signs."""

    def __init__(self, folder, authority, name="w1", role=Role.TRAINER, until=NOW + 1000):
        folder.mkdir(exist_ok=True)
        self.certificate, self.key = folder / f"{name}.pem", folder / f"{name}.key"
        key = make_key()
        self.key.write_bytes(key_pem(key))
        self.issued = authority.issue_member(key.public_key(), role, name, until)
        self.certificate.write_bytes(pem_of(self.issued))
        self.signer = KeySigner(self.certificate, self.key)

    def signed(self, run="run", name="w1", now=NOW, keys=KEYS):
        return self.signer.signed(run, name, keys, now)


@pytest.fixture(scope="module")
def authority():
    return Authority.make("ours")


def check_of(authority):
    return KeyCheck([authority.certificate])


def refused(check, keys, reason, run="run", name="w1", now=NOW):
    with pytest.raises(UpdateRefused, match=reason) as caught:
        check.check(run, name, keys, now)
    assert "\n" not in str(caught.value)


def test_keys_that_a_device_signed_are_taken_also_after_their_way_over_the_wire(tmp_path, authority):
    signed = Device(tmp_path, authority).signed()
    check_of(authority).check("run", "w1", signed, NOW)
    again = keys_from_proto(keys_to_proto(signed))
    assert again == signed
    assert again.signature == signed.signature
    check_of(authority).check("run", "w1", again, NOW + FRESH_S / 100)


def test_keys_without_a_signature_or_with_one_for_others_are_refused(tmp_path, authority):
    check, device = check_of(authority), Device(tmp_path, authority)
    signed = device.signed()
    other = replace(Secrets(b"o" * 32).public, signature=signed.signature)
    refused(check, KEYS, "not signed")
    refused(check, other, "wrong signature")
    refused(check, signed, "another run", run="another")
    refused(check, signed, "certificate of the trainer 'w1'", name="w2")
    # What another device signed in this one's name.
    refused(check, Device(tmp_path, authority, "w2").signed(name="w1"), "certificate of the trainer 'w2'")
    later = replace(signed, signature=replace(signed.signature, signed_at=int(NOW) + 60))
    refused(check, later, "wrong signature")


@pytest.mark.parametrize("role", [Role.EVALUATOR, Role.LEAF, Role.OPERATOR, Role.ADMIN])
def test_only_trainers_are_neighbours(tmp_path, authority, role):
    refused(check_of(authority), Device(tmp_path, authority, role=role).signed(), f"certificate of the {role}")


@given(flipped=st.integers(min_value=0, max_value=511))
def test_any_bit_that_was_changed_in_a_signature_is_noticed(authority, tmp_path_factory, flipped):
    signed = Device(tmp_path_factory.mktemp("device"), authority).signed()
    value = bytearray(signed.signature.value)
    value[flipped // 8 % len(value)] ^= 1 << flipped % 8
    refused(check_of(authority), replace(signed, signature=replace(signed.signature, value=bytes(value))), "wrong")


def test_old_signatures_and_those_of_wrong_clocks_are_refused(tmp_path, authority):
    check, device = check_of(authority), Device(tmp_path, authority, until=NOW + 10 * FRESH_S)
    signed = device.signed()
    check.check("run", "w1", signed, NOW + FRESH_S - 1)
    refused(check, signed, "25 hours old", now=NOW + FRESH_S + 3600)
    refused(check, signed, "ahead of the clock here", now=NOW - FRESH_S - 60)


def test_a_signature_is_made_anew_each_hour_and_with_each_new_certificate(tmp_path, authority):
    device = Device(tmp_path, authority)
    first = device.signed().signature
    assert device.signed(now=NOW + 3000).signature is first
    assert device.signed(now=NOW + 3601).signature.signed_at == NOW + 3601
    # The clock may have fallen back.
    assert device.signed(now=NOW - 10).signature.signed_at == NOW - 10
    renewed = Device(tmp_path, authority)
    assert device.signed(now=NOW - 10).signature.chain != first.chain
    check_of(authority).check("run", "w1", renewed.signed(), NOW)


def test_certificates_that_do_not_count_are_refused(tmp_path, authority):
    check = check_of(authority)
    refused(check, Device(tmp_path, Authority.make("theirs")).signed(), "no authority that is trusted")
    refused(check, Device(tmp_path, Authority.make("ours")).signed(), "no authority that is trusted")
    refused(check, Device(tmp_path, authority, until=NOW - 1).signed(), "expired")
    signed = Device(tmp_path, authority).signed()
    for chain in ((), (b"x",), signed.signature.chain[:1] * 4):
        refused(check, replace(signed, signature=replace(signed.signature, chain=chain)), "certificate")


def test_a_device_cannot_sign_the_certificate_of_another_one(tmp_path, authority):
    """Its certificate follows from the authority, and the made-up one from its own."""
    device = Device(tmp_path, authority)
    key = make_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "w9")])
    uri = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri_of("ours", Role.TRAINER, "w9"))])
    made = signed_by(device.issued.subject, serialization.load_pem_private_key(device.key.read_bytes(), None))
    made_up = made(name, key.public_key(), uri)
    (tmp_path / "w9.pem").write_bytes(pem_of(made_up, device.issued))
    (tmp_path / "w9.key").write_bytes(key_pem(key))
    signed = KeySigner(tmp_path / "w9.pem", tmp_path / "w9.key").signed("run", "w9", KEYS, NOW)
    refused(check_of(authority), signed, "do not follow from the authority", name="w9")


def signed_by(issuer, issuer_key):
    def sign(subject, key, *extensions):
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
            .not_valid_after(datetime(2040, 1, 1, tzinfo=UTC))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(issuer_key, SHA256())

    return sign


@pytest.mark.parametrize(("path_length", "taken"), [(None, True), (1, True), (0, False)])
def test_a_chain_of_rsa_certificates_counts_as_far_as_its_authority_allows(tmp_path, path_length, taken):
    root_key, middle_key, key = (rsa.generate_private_key(65537, 2048) for _ in range(3))
    root_name, middle_name, name = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("root", "middle", "w1")
    )
    root = signed_by(root_name, root_key)(
        root_name, root_key.public_key(), x509.BasicConstraints(True, path_length)
    )
    middle = signed_by(root_name, root_key)(
        middle_name, middle_key.public_key(), x509.BasicConstraints(True, None)
    )
    uri = x509.SubjectAlternativeName(
        [x509.UniformResourceIdentifier("spiffe://example/fedgrpc/trainer/w1")],
    )
    own = signed_by(middle_name, middle_key)(name, key.public_key(), uri)
    (tmp_path / "w1.pem").write_bytes(pem_of(own, middle))
    (tmp_path / "w1.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    signed = KeySigner(tmp_path / "w1.pem", tmp_path / "w1.key").signed("run", "w1", KEYS, NOW)
    check = KeyCheck([root])
    if taken:
        check.check("run", "w1", signed, NOW)
    else:
        refused(check, signed, "do not follow from the authority")


def revocations(authority, *revoked, until=NOW + 1000, path=None):
    listed = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(datetime.fromtimestamp(NOW, UTC) - timedelta(days=400))
        .next_update(datetime.fromtimestamp(until, UTC))
    )
    for certificate in revoked:
        listed = listed.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(certificate.serial_number)
            .revocation_date(datetime.fromtimestamp(NOW, UTC))
            .build()
        )
    path.write_bytes(listed.sign(authority.key, SHA256()).public_bytes(serialization.Encoding.PEM))
    return path


def test_a_revoked_certificate_is_refused_and_so_is_a_list_that_says_nothing(tmp_path, authority):
    ca, listed = tmp_path / "ca.pem", tmp_path / "crl.pem"
    ca.write_bytes(pem_of(authority.certificate))
    good, bad = Device(tmp_path, authority, "w1"), Device(tmp_path, authority, "w2")
    check = KeyCheck.read(ca, revocations(authority, bad.issued, path=listed))
    check.check("run", "w1", good.signed(), NOW)
    refused(check, bad.signed(name="w2"), "revoked", name="w2")
    refused(KeyCheck.read(ca, revocations(authority, until=NOW - 1, path=listed)), good.signed(), "out of date")
    # Whoever could make the list empty would have its devices in again.
    with pytest.raises(StorageError, match="not signed by an authority"):
        KeyCheck.read(ca, revocations(Authority.make("ours"), path=listed))
    listed.write_bytes(b"nothing")
    with pytest.raises(StorageError, match="no revocation list"):
        KeyCheck.read(ca, listed)


@given(
    signed_at=st.integers(min_value=0, max_value=(1 << 64) - 1),
    value=st.binary(max_size=200),
    chain=st.lists(st.binary(max_size=200), max_size=4),
)
def test_whatever_a_peer_sends_as_a_signature_is_refused_and_raises_nothing_else(signed_at, value, chain):
    keys = PublicKeys(b"a" * 32, b"b" * 32, b"c" * 32, KeySignature(signed_at, value, tuple(chain)))
    again = keys_from_proto(keys_to_proto(keys))
    with pytest.raises(UpdateRefused):
        KeyCheck([Authority.make().certificate]).check("run", "w1", again, float(signed_at))
