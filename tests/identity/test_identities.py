"""Members: joining, renewal, revocation and what is remembered, with real certificates and a real database."""

import sys
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from fedgrpc.errors import (
    CertificateStale,
    Exhausted,
    IllegalTransition,
    NameTaken,
    NotApproved,
    NotEnrolled,
    NotFound,
    StorageError,
    TokenRefused,
    UsageError,
    WrongIdentity,
)
from fedgrpc.identity import identities as module
from fedgrpc.identity import join_tokens, shown_certificates
from fedgrpc.identity.certificates import (
    Authority,
    _common_name,
    _sign,
    end_of,
    issue_to_itself,
    load_certificate,
    make_key,
    make_request,
    pem_of,
)
from fedgrpc.identity.identities import Identities
from fedgrpc.identity.members import Lives, MemberState
from fedgrpc.identity.roles import Identity, Role
from fedgrpc.identity.store import DATABASE, IdentityStore

NOW = 2_000_000_000.0
LIVES = Lives(device_s=100.0, operator_s=1000.0, grace_s=50.0)
AUTHORITY = Authority.make("f1")


def opened(tmp_path, *authorities):
    return Identities(IdentityStore(tmp_path / DATABASE), authorities or (AUTHORITY,), LIVES)


@pytest.fixture
def known(tmp_path):
    found = opened(tmp_path)
    yield found
    found.close()


def joined(known, name="pi-7", key=None, role=Role.TRAINER, now=NOW, **token):
    """Certificate (PEM) and token of a device that has joined."""
    made = known.create_token(role, now, 60.0, **token)
    found = known.enroll(made.id, make_request(key or make_key()), name, now)
    return found.certificate, made


def test_a_device_that_joins_is_known_by_its_certificate_under_the_name_and_role_of_its_token(known):
    certificate, _ = joined(known, "asked-for", names="pi-7", role=Role.EVALUATOR, tags=("attic",))
    assert known.identify(certificate, NOW) == Identity("pi-7", Role.EVALUATOR)
    assert known.member("pi-7").tags == ("attic",)
    assert end_of(load_certificate(certificate)) == NOW + LIVES.device_s + LIVES.grace_s


def test_everything_is_remembered(known, tmp_path):
    certificate, token = joined(known, uses=3)
    known.revoke("pi-7", "stolen", NOW)
    known.close()
    again = opened(tmp_path)
    assert [member.why for member in again.members()] == ["stolen"]
    assert [kept.uses_left for kept in again.tokens()] == [2]
    with pytest.raises(WrongIdentity, match="revoked: stolen"):
        again.identify(certificate, NOW)
    again.enroll(token.id, make_request(make_key()), "pi-8", NOW)
    again.close()


def test_no_disk_has_the_secret_of_a_token(known, tmp_path):
    made = known.create_token(Role.TRAINER, NOW, 60.0)
    known.close()
    for path in tmp_path.iterdir():
        assert made.secret.encode() not in path.read_bytes()


def test_a_lost_answer_costs_no_use_of_the_token(known):
    made, key = known.create_token(Role.TRAINER, NOW, 60.0, uses=1), make_key()
    known.enroll(made.id, make_request(key), "pi-7", NOW)
    again = known.enroll(made.id, make_request(key), "pi-7", NOW + 1)
    assert known.identify(again.certificate, NOW) == Identity("pi-7", Role.TRAINER)
    with pytest.raises(TokenRefused, match="used up"):
        known.enroll(made.id, make_request(make_key()), "pi-8", NOW)
    with pytest.raises(TokenRefused, match="expired"):
        known.enroll(made.id, make_request(key), "pi-7", NOW + 60)


def test_a_second_device_of_the_same_name_is_refused(known):
    certificate, token = joined(known, uses=5)
    with pytest.raises(NameTaken, match="another key is enrolled"):
        known.enroll(token.id, make_request(make_key()), "pi-7", NOW)
    assert known.identify(certificate, NOW).name == "pi-7"
    assert known.tokens()[0].uses_left == 4


def test_a_token_that_was_deleted_or_never_was_opens_nothing(known):
    made = known.create_token(Role.TRAINER, NOW, 60.0)
    shown = pem_of(issue_to_itself(made.id, made.key, make_key().public_key()))
    assert known.identify(shown, NOW) == Identity(made.id, Role.JOINING)
    known.delete_token(made.id)
    with pytest.raises(NotEnrolled):
        known.identify(shown, NOW)
    for token_id in (made.id, "unheard"):
        with pytest.raises(TokenRefused, match="deleted"):
            known.enroll(token_id, make_request(make_key()), "pi-7", NOW)
        with pytest.raises(NotFound):
            known.delete_token(token_id)


def test_tokens_are_bounded_and_dead_ones_make_room(known, monkeypatch):
    monkeypatch.setattr(join_tokens, "MAX_TOKENS", 3)
    first = known.create_token(Role.TRAINER, NOW, 1.0)
    for _ in range(2):
        known.create_token(Role.TRAINER, NOW, 100.0)
    with pytest.raises(Exhausted, match="token delete"):
        known.create_token(Role.TRAINER, NOW, 100.0)
    known.create_token(Role.TRAINER, NOW + 2, 100.0)
    assert first.id not in {token.id for token in known.tokens()}


def test_members_are_bounded(known, monkeypatch):
    monkeypatch.setattr(module, "MAX_MEMBERS", 1)
    joined(known)
    with pytest.raises(Exhausted, match="forget"):
        joined(known, "pi-8")


def test_a_certificate_past_its_life_only_renews_and_past_the_grace_not_even_that(known):
    certificate, _ = joined(known)
    late, too_late = NOW + LIVES.device_s, NOW + LIVES.device_s + LIVES.grace_s
    with pytest.raises(CertificateStale):
        known.identify(certificate, late)
    with pytest.raises(NotEnrolled, match="too old"):
        known.renew(certificate, too_late)
    renewed = known.renew(certificate, late)
    assert renewed.valid_for_s == LIVES.device_s
    assert known.identify(renewed.certificate, late + LIVES.device_s - 1).name == "pi-7"


def test_a_revoked_device_neither_calls_nor_renews_nor_joins_again_until_it_is_forgotten(known):
    key = make_key()
    certificate, _ = joined(known, key=key)
    known.revoke("pi-7", "stolen\n\x1b[2J", NOW)
    known.revoke("pi-7", "stolen", NOW)
    for attempt in (known.identify, known.renew):
        with pytest.raises(WrongIdentity, match="revoked: stolen"):
            attempt(certificate, NOW)
    with pytest.raises(WrongIdentity, match="revoked"):
        joined(known, key=key)
    with pytest.raises(NameTaken, match="device forget pi-7"):
        joined(known, "pi-7")
    with pytest.raises(IllegalTransition):
        known.approve("pi-7")
    known.forget("pi-7")
    with pytest.raises(NotEnrolled, match="forgotten"):
        known.identify(certificate, NOW)
    joined(known, "pi-7")
    with pytest.raises(NotEnrolled):
        known.identify(certificate, NOW)


def test_a_device_that_needs_approval_waits_for_it(known):
    certificate, _ = joined(known, needs_approval=True)
    assert known.member("pi-7").state is MemberState.PENDING
    with pytest.raises(NotApproved, match="device approve pi-7"):
        known.identify(certificate, NOW)
    known.approve("pi-7")
    assert known.identify(certificate, NOW).name == "pi-7"


def test_a_renamed_device_learns_its_name_by_renewing(known):
    certificate, _ = joined(known)
    joined(known, "pi-8")
    with pytest.raises(NameTaken):
        known.rename("pi-7", "pi-8", NOW)
    known.rename("pi-7", "attic", NOW)
    with pytest.raises(CertificateStale):
        known.identify(certificate, NOW)
    renewed = known.renew(certificate, NOW)
    assert renewed.identity == known.identify(renewed.certificate, NOW) == Identity("attic", Role.TRAINER)
    with pytest.raises(NotFound):
        known.member("pi-7")


def test_an_operator_is_made_with_a_key_of_its_own(known):
    made = known.create_operator("alice", Role.VIEWER, make_request(make_key()), NOW)
    assert known.identify(made.certificate, NOW) == Identity("alice", Role.VIEWER)
    assert made.valid_for_s == LIVES.operator_s
    with pytest.raises(NameTaken):
        known.create_operator("alice", Role.ADMIN, make_request(make_key()), NOW)
    with pytest.raises(UsageError, match="role"):
        known.create_operator("bob", Role.TRAINER, make_request(make_key()), NOW)


@pytest.mark.parametrize("request_pem", [b"", b"rubbish", b"x" * 100_000, pem_of(AUTHORITY.certificate)])
def test_what_is_no_signing_request_is_refused_and_uses_nothing(known, request_pem):
    made = known.create_token(Role.TRAINER, NOW, 60.0)
    with pytest.raises(UsageError, match="signing request"):
        known.enroll(made.id, request_pem, "pi-7", NOW)
    assert known.tokens()[0].uses_left == 1


def test_a_signing_request_without_the_private_key_is_refused(known):
    made = known.create_token(Role.TRAINER, NOW, 60.0)
    pem = make_request(make_key())
    damaged = x509.load_pem_x509_csr(pem).public_bytes(Encoding.DER)
    damaged = damaged[:-3] + bytes(byte ^ 1 for byte in damaged[-3:])
    with pytest.raises(UsageError, match="signing request"):
        known.enroll(made.id, x509.load_der_x509_csr(damaged).public_bytes(Encoding.PEM), "pi-7", NOW)


def test_a_key_of_another_curve_is_refused(known):
    made = known.create_token(Role.TRAINER, NOW, 60.0)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = builder.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256())
    with pytest.raises(UsageError, match="P-256"):
        known.enroll(made.id, request.public_bytes(Encoding.PEM), "pi-7", NOW)


def test_a_bearer_of_a_token_cannot_give_itself_a_name(known):
    """A handshake accepts a chain over an authority that the bearer made, which has the name of the fleet's."""
    made = known.create_token(Role.TRAINER, NOW, 60.0)
    own, key = make_key(), make_key()
    false = Authority(AUTHORITY.certificate, own, "f1")
    forged = false.issue_member(key.public_key(), Role.ADMIN, "mallory", NOW + 100)
    with pytest.raises(NotEnrolled, match="signed"):
        known.identify(pem_of(forged), NOW)
    name = _common_name(f"fedgrpc join {made.id}")
    by_token = _sign(
        _common_name("mallory"),
        key.public_key(),
        name,
        own,
        load_certificate(pem_of(AUTHORITY.certificate)).not_valid_after_utc,
    )
    with pytest.raises(NotEnrolled, match="signed"):
        known.identify(pem_of(by_token), NOW)


def test_a_member_of_another_fleet_is_nobody_here(known):
    other = Authority.make("f2")
    certificate = other.issue_member(make_key().public_key(), Role.ADMIN, "alice", NOW + 100)
    with pytest.raises(NotEnrolled):
        known.identify(pem_of(certificate), NOW)
    own = AUTHORITY.issue_member(make_key().public_key(), Role.ADMIN, "alice", NOW + 100)
    with pytest.raises(NotEnrolled, match="forgotten"):
        known.identify(pem_of(own), NOW)


def test_with_the_operator_s_own_authority_its_uris_count_and_names_can_be_revoked(tmp_path):
    known = Identities(IdentityStore(tmp_path / DATABASE), (), LIVES)
    shown = pem_of(AUTHORITY.issue_member(make_key().public_key(), Role.TRAINER, "pi-7", NOW + 100))
    assert known.identify(shown, NOW + 1e6) == Identity("pi-7", Role.TRAINER)
    known.revoke("pi-7", "stolen", NOW)
    with pytest.raises(WrongIdentity, match="stolen"):
        known.identify(shown, NOW)
    known.forget("pi-7")
    assert known.identify(shown, NOW).name == "pi-7"
    with pytest.raises(UsageError, match="no authority of its own"):
        known.create_token(Role.TRAINER, NOW, 60.0)
    known.close()


def test_what_was_read_of_certificates_is_bounded(known, monkeypatch):
    monkeypatch.setattr(shown_certificates, "MAX_KNOWN", 3)
    certificates = [joined(known, f"pi-{number}")[0] for number in range(6)]
    for certificate in certificates * 2:
        known.identify(certificate, NOW)
    assert len(known._shown._known) <= 3


def test_a_damaged_database_is_said_so(tmp_path):
    known = opened(tmp_path)
    joined(known)
    known._store._db.execute("PRAGMA ignore_check_constraints = 1")
    known._store._db.execute("UPDATE members SET role = 'emperor'")
    known.close()
    with pytest.raises(StorageError, match="damaged"):
        opened(tmp_path)


def test_certificates_of_any_size_are_not_kept(known):
    """The bearer of a token signs certificates itself, and may fill them as it likes."""
    made = known.create_token(Role.TRAINER, NOW, 60.0)
    key = make_key()
    large = _sign(
        _common_name("joining"),
        key.public_key(),
        _common_name(f"fedgrpc join {made.id}"),
        made.key,
        AUTHORITY.certificate.not_valid_after_utc,
        alternative=[x509.DNSName("x" * 60 + f".{n}") for n in range(500)],
    )
    assert known.identify(pem_of(large), NOW).role is Role.JOINING
    assert sum(len(each) for each in known._shown._known) < 100


def test_an_aggregator_that_starts_without_a_clock_issues_nothing_until_it_has_one(known):
    """By the right clock all of it would be past its grace, and every device in need of a visit."""
    certificate, _ = joined(known)
    waiting = known.create_token(Role.TRAINER, NOW, 60.0)
    for call in (
        lambda: known.renew(certificate, 0.0),
        lambda: known.enroll(waiting.id, make_request(make_key()), "pi-8", 0.0),
        lambda: known.create_token(Role.TRAINER, 0.0, 60.0),
        lambda: known.create_operator("alice", Role.ADMIN, make_request(make_key()), 0.0),
    ):
        with pytest.raises(Exhausted, match="clock is years behind"):
            call()
    assert known.identify(certificate, 0.0).name == "pi-7"
    known.renew(certificate, NOW)


def test_handshakes_and_calls_go_on_while_tokens_come_and_go(known):
    """They look tokens up in other threads than the one that changes them."""
    for _ in range(50):
        last = known.create_token(Role.TRAINER, NOW, 60.0)
    shown = pem_of(issue_to_itself(last.id, last.key, make_key().public_key()))

    def change():
        for _ in range(40):
            known.delete_token(known.create_token(Role.TRAINER, NOW, 60.0).id)

    changing = threading.Thread(target=change)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        changing.start()
        while changing.is_alive():
            assert len(known.anchors()) > 50
            assert known.identify(shown, NOW).role is Role.JOINING
    finally:
        changing.join()
        sys.setswitchinterval(interval_s)
