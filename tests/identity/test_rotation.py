"""Rotation of the built-in authority: who signs, who is trusted, and who needs the one before still."""

import pytest

from fedgrpc.errors import (
    CertificateStale,
    IllegalTransition,
    NotEnrolled,
    NotFound,
    StorageError,
    TokenRefused,
    UsageError,
)
from fedgrpc.identity.certificates import Authority, load_certificate, load_certificates, make_key, make_request
from fedgrpc.identity.identities import Identities
from fedgrpc.identity.members import Lives
from fedgrpc.identity.roles import Role
from fedgrpc.identity.store import DATABASE, IdentityStore

NOW = 2_000_000_000.0
LIVES = Lives(device_s=100.0, operator_s=1000.0, grace_s=50.0)


class Kept:
    """What a file would hold."""

    def __init__(self):
        self.authorities = (Authority.make("old"),)
        self.fails = False

    def __call__(self, authorities):
        if self.fails:
            raise StorageError("no space left")
        self.authorities = authorities


@pytest.fixture
def kept():
    return Kept()


@pytest.fixture
def known(tmp_path, kept):
    found = opened(tmp_path, kept)
    yield found
    found.close()


def opened(tmp_path, kept):
    return Identities(IdentityStore(tmp_path / DATABASE), kept.authorities, LIVES, kept)


def joined(known, name="pi-7", **token):
    made = known.create_token(Role.TRAINER, NOW, 60.0, **token)
    return known.enroll(made.id, make_request(make_key()), name, NOW).certificate


def names(known):
    return [each.fleet for each in known.authorities]


def test_a_new_authority_signs_and_the_one_before_stays_trusted(known, kept):
    before = joined(known)
    made = known.rotate()
    assert names(known) == [made.fleet, "old"] == [each.fleet for each in kept.authorities]
    assert known.identify(before, NOW).name == "pi-7"
    renewed = known.renew(before, NOW)
    assert made.has_issued(load_certificate(renewed.certificate))
    assert load_certificates(renewed.ca) == [made.certificate, kept.authorities[1].certificate]
    assert known.identify(renewed.certificate, NOW).name == "pi-7"


def test_an_authority_is_retired_once_every_member_has_shown_a_newer_certificate(known):
    first, second = joined(known, "pi-1"), joined(known, "pi-2")
    made = known.rotate()
    joined(known, "pi-3")
    renewed = known.renew(first, NOW).certificate
    # A certificate that was made may never have arrived.
    with pytest.raises(IllegalTransition, match="needed by pi-1, pi-2,"):
        known.retire("old", NOW)
    known.identify(renewed, NOW)
    with pytest.raises(IllegalTransition, match="needed by pi-2,"):
        known.retire("old", NOW)
    known.identify(known.renew(second, NOW).certificate, NOW)
    known.retire("old", NOW)
    assert names(known) == [made.fleet]
    # Connections that began with it may still be open: those members connect again.
    with pytest.raises(CertificateStale, match="retired"):
        known.identify(first, NOW)


def test_who_has_come_over_is_remembered(known, kept, tmp_path):
    certificate = joined(known)
    known.rotate()
    known.identify(known.renew(certificate, NOW).certificate, NOW)
    assert [len(known.held_by(name, NOW)) for name in names(known)] == [1, 0]
    known.save_moved()
    known.close()
    again = opened(tmp_path, kept)
    assert [len(again.held_by(name, NOW)) for name in names(again)] == [1, 0]
    again.retire("old", NOW)
    again.close()


def test_a_certificate_of_the_older_authority_on_a_connection_that_drains_takes_nobody_back(known):
    before = joined(known)
    known.rotate()
    known.identify(known.renew(before, NOW).certificate, NOW)
    known.identify(before, NOW)
    known.save_moved()
    known.identify(before, NOW)
    assert not known.held_by("old", NOW)


def test_members_that_cannot_come_back_hold_up_nothing(known):
    joined(known, "revoked")
    joined(known, "gone")
    known.revoke("revoked", "stolen", NOW)
    known.rotate()
    end = NOW + LIVES.device_s + LIVES.grace_s
    assert [each.name for each in known.held_by("old", end - 1)] == ["gone"]
    known.retire("old", end)


def test_a_token_works_until_its_authority_is_retired(known, kept, tmp_path):
    old = known.create_token(Role.TRAINER, NOW, 1000.0, uses=5)
    made = known.rotate()
    new = known.create_token(Role.TRAINER, NOW, 1000.0, uses=5)
    assert (old.authority_sha256, new.authority_sha256) == (kept.authorities[1].sha256, made.sha256)
    for number, token in enumerate((old, new)):
        certificate = known.enroll(token.id, make_request(make_key()), f"pi-{number}", NOW).certificate
        assert made.has_issued(load_certificate(certificate))
    known.retire("old", NOW)
    with pytest.raises(TokenRefused, match="deleted"):
        known.enroll(old.id, make_request(make_key()), "pi-3", NOW)
    assert [each.id for each in known.tokens()] == [new.id]
    assert len(known.anchors()) == 2


def test_a_kill_after_the_authorities_are_written_leaves_no_token_of_the_retired_one(known, kept, tmp_path):
    known.create_token(Role.TRAINER, NOW, 1000.0)
    known.rotate()
    kept(known.authorities[:1])
    known.close()
    again = opened(tmp_path, kept)
    assert again.tokens() == []
    assert len(again.anchors()) == 1
    again.close()


def test_a_forced_retirement_leaves_members_to_join_again(known, kept, tmp_path):
    certificate = joined(known)
    known.rotate()
    known.retire("old", NOW, force=True)
    known.close()
    again = opened(tmp_path, kept)
    with pytest.raises(NotEnrolled, match="neither"):
        again.identify(certificate, NOW)
    again.close()


def test_what_cannot_be_stored_changes_nothing(known, kept):
    kept.fails = True
    with pytest.raises(StorageError):
        known.rotate()
    assert names(known) == ["old"]
    kept.fails = False
    known.rotate()
    kept.fails = True
    with pytest.raises(StorageError):
        known.retire("old", NOW)
    assert names(known)[1:] == ["old"]


def test_the_authority_that_signs_stays_and_at_most_two_are_trusted(known, tmp_path):
    with pytest.raises(IllegalTransition, match="ca rotate"):
        known.retire("old", NOW)
    with pytest.raises(NotFound):
        known.retire("other", NOW)
    made = known.rotate()
    with pytest.raises(IllegalTransition, match="retire the authority old first"):
        known.rotate()
    known.retire("old", NOW)
    assert names(known) == [made.fleet]
    known.rotate()


def test_without_an_authority_of_its_own_there_is_nothing_to_rotate(tmp_path):
    known = Identities(IdentityStore(tmp_path / DATABASE))
    for call in (known.rotate, lambda: known.retire("old", NOW)):
        with pytest.raises(UsageError, match="no authority of its own"):
            call()
    known.close()
