"""Join tokens: their text, the key that follows from one, and what each is good for."""

import dataclasses

import pytest

from fedgrpc.errors import TokenRefused, UsageError
from fedgrpc.identity.certificates import is_signed_by, issue_to_itself, key_sha256, make_key, public_key_of
from fedgrpc.identity.roles import Role
from fedgrpc.identity.tokens import JoinToken, TokenRecord

NOW = 1_000_000.0
# The key of the secret of 32 letters A.
KNOWN_KEY = "d9664ce98ceaaaec87870698bc8ecca16a43d340ba5f3bf8370e4ff46a2ad8e1"


def token():
    return JoinToken.make(b"\x05" * 32)


def record(**more):
    return TokenRecord.of(token(), Role.TRAINER, NOW, 60.0, **more)


def test_a_token_is_read_as_it_was_written():
    made = token()
    assert JoinToken.parse(f" {made.text}\n") == made
    assert len(made.text) == 89


def test_the_secret_is_in_no_text_but_the_token_itself():
    made = token()
    for text in (repr(made), str(made), repr(TokenRecord.of(made, Role.TRAINER, NOW, 60.0))):
        assert made.secret not in text


@pytest.mark.parametrize("cut", [1, 5, 32, 33, 60, 80])
def test_a_token_that_was_cut_off_is_refused_without_being_repeated(cut):
    text = token().text[:-cut]
    with pytest.raises(TokenRefused) as caught:
        JoinToken.parse(text)
    assert text not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "secret", "fg2.a.b.c", "fg1...", "fg1." + "A" * 10_000, "fg1.\0", "K10abc::x"]
)
def test_what_is_no_token_is_refused(text):
    with pytest.raises(TokenRefused, match="token"):
        JoinToken.parse(text)


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_token_is_refused_as_empty_with_the_command_that_makes_one(text):
    with pytest.raises(TokenRefused, match=r"empty.*fedgrpc token create"):
        JoinToken.parse(text)


def test_the_key_follows_from_the_secret_alone():
    made = token()
    other = dataclasses.replace(made, id="zzzzzzzz", authority_sha256=b"\x06" * 32)
    assert key_sha256(made.key.public_key()) == key_sha256(other.key.public_key())
    assert key_sha256(made.key.public_key()) != key_sha256(token().key.public_key())


def test_a_known_secret_gives_a_known_key():
    """As another implementation derives it: the numbers are in identity.proto."""
    made = JoinToken(b"\0" * 32, "abcdefgh", "A" * 32)
    number = made.key.private_numbers().private_value
    assert f"{number:064x}" == KNOWN_KEY


def test_a_certificate_signed_with_the_token_goes_with_its_anchor_and_no_other():
    made, key = token(), make_key()
    kept = TokenRecord.of(made, Role.TRAINER, NOW, 60.0)
    certificate = issue_to_itself(made.id, made.key, key.public_key())
    assert is_signed_by(certificate, kept.anchor)
    assert key_sha256(public_key_of(certificate)) == key_sha256(key.public_key())
    assert not is_signed_by(certificate, record().anchor)
    forged = issue_to_itself(made.id, make_key(), key.public_key())
    assert not is_signed_by(forged, kept.anchor)


def test_a_token_is_good_until_it_expires_or_is_used_up():
    kept = record(uses_left=2)
    kept.check(NOW + 59)
    kept.used().check(NOW)
    with pytest.raises(TokenRefused, match="expired"):
        kept.check(NOW + 60)
    with pytest.raises(TokenRefused, match="used up"):
        kept.used().used().check(NOW)
    assert kept.is_live(NOW)
    assert not kept.used().used().is_live(NOW)


def test_the_name_comes_from_the_token():
    assert record(names="pi-7").name_for("anything") == "pi-7"
    assert record(names="pi-*").name_for("pi-8") == "pi-8"
    with pytest.raises(TokenRefused, match=r"for the names pi-\*"):
        record(names="pi-*").name_for("jetson-1")
    with pytest.raises(TokenRefused, match="belong to leaves"):
        record().name_for("leaf.evaluators")
    with pytest.raises(UsageError, match="name of the device"):
        record().name_for("a b")


@pytest.mark.parametrize(
    "wrong",
    [
        {"uses_left": 0},
        {"uses_left": 100_001},
        {"names": ""},
        {"names": "[a-z]"},
        {"names": "a" * 65},
        {"tags": ("a b",)},
        {"tags": tuple("abcdefghijklmnopq")},
    ],
)
def test_what_a_token_is_good_for_is_bounded(wrong):
    with pytest.raises(UsageError):
        record(**wrong)


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, 367 * 86_400.0, float("nan"), float("inf")])
def test_the_life_of_a_token_is_bounded(ttl_s):
    with pytest.raises(UsageError, match="ttl"):
        TokenRecord.of(token(), Role.TRAINER, NOW, ttl_s)


@pytest.mark.parametrize("role", [Role.ADMIN, Role.OPERATOR, Role.VIEWER, Role.JOINING])
def test_nobody_becomes_an_operator_by_a_token(role):
    with pytest.raises(UsageError, match="role"):
        TokenRecord.of(token(), role, NOW, 60.0)
