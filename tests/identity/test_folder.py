"""Files of keys: private, checked at each start, and lost ones said so."""

import stat

import pytest

from fedgrpc.errors import StorageError, UsageError
from fedgrpc.identity.certificates import Authority, end_of, key_pem, make_key, pem_of
from fedgrpc.identity.folder import AUTHORITIES, AuthorityFile, DeviceFolder
from fedgrpc.identity.roles import Identity, Role

NOW = 2_000_000_000.0


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def open_authority(tmp_path):
    (found,) = AuthorityFile(tmp_path / "identity" / AUTHORITIES).opened()
    return found


def joined(path):
    authority = Authority.make("f1")
    device = DeviceFolder(path)
    certificate = authority.issue_member(device.own_key().public_key(), Role.TRAINER, "pi-7", NOW)
    device.save(pem_of(certificate), pem_of(authority.certificate))
    return device, authority


def test_an_authority_is_made_once_and_nobody_else_reads_its_key(tmp_path):
    made = open_authority(tmp_path)
    assert (mode(tmp_path / "identity"), mode(tmp_path / "identity" / "authorities.pem")) == (0o700, 0o600)
    again = open_authority(tmp_path)
    assert (again.sha256, again.fleet, again.certificate) == (made.sha256, made.fleet, made.certificate)


def test_a_key_that_others_may_read_is_not_used(tmp_path):
    open_authority(tmp_path)
    key = tmp_path / "identity" / "authorities.pem"
    key.chmod(0o604)
    with pytest.raises(UsageError, match=r"chmod 600 .*authorities\.pem"):
        open_authority(tmp_path)
    key.chmod(0o600)
    (tmp_path / "identity").chmod(0o755)
    with pytest.raises(UsageError, match="chmod 700"):
        open_authority(tmp_path)


def test_a_volume_that_was_opened_to_the_process_s_own_group_becomes_private_again(tmp_path):
    open_authority(tmp_path)
    key = tmp_path / "identity" / "authorities.pem"
    key.chmod(0o660)
    (tmp_path / "identity").chmod(0o2770)
    open_authority(tmp_path)
    assert (mode(key), mode(tmp_path / "identity")) == (0o600, 0o700)


def test_a_damaged_file_of_authorities_is_said_so_and_none_is_made_anew(tmp_path):
    made = open_authority(tmp_path)
    file = tmp_path / "identity" / "authorities.pem"
    kept = file.read_bytes()
    certificate = pem_of(made.certificate)
    for content in (b"", b"rubbish", certificate, key_pem(made.key), certificate + key_pem(make_key())):
        file.write_bytes(content)
        with pytest.raises(StorageError, match="backup"):
            open_authority(tmp_path)
    file.write_bytes(kept)
    assert open_authority(tmp_path).sha256 == made.sha256


def test_a_kill_while_authorities_are_written_leaves_those_before(tmp_path, monkeypatch):
    made = open_authority(tmp_path)
    file = AuthorityFile(tmp_path / "identity" / AUTHORITIES)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            file.write((Authority.make(), made))
    assert [each.fleet for each in file.opened()] == [made.fleet]
    newer = Authority.make()
    file.write((newer, made))
    assert [each.fleet for each in file.opened()] == [newer.fleet, made.fleet]
    assert mode(file.path) == 0o600


def killed(_):
    raise KeyboardInterrupt


def test_a_device_keeps_its_key_and_reads_its_name_from_its_certificate(tmp_path):
    device, authority = joined(tmp_path / "identity")
    assert mode(device.key) == 0o600
    assert device.identity() == Identity("pi-7", Role.TRAINER)
    assert device.server_name() == "f1.fedgrpc.internal" == authority.server_name
    assert device.authority_sha256s() == {authority.sha256}
    assert end_of(device.own_certificate()) == NOW


def test_a_lost_key_is_said_so(tmp_path):
    device, _ = joined(tmp_path / "identity")
    device.key.unlink()
    with pytest.raises(StorageError, match="key of this device's certificate is lost"):
        device.identity()


def test_a_certificate_of_another_key_is_not_used(tmp_path):
    device, _ = joined(tmp_path / "identity")
    device.key.unlink()
    device.own_key()
    with pytest.raises(StorageError, match="does not belong"):
        device.identity()


def test_a_device_s_key_that_others_may_read_is_not_used(tmp_path):
    device, _ = joined(tmp_path / "identity")
    device.key.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        device.identity()


@pytest.mark.parametrize("damage", ["certificate", "ca", "no ca"])
def test_a_damaged_or_missing_file_is_said_with_what_to_do(tmp_path, damage):
    device, _ = joined(tmp_path / "identity")
    if damage == "no ca":
        device.ca.unlink()
    else:
        getattr(device, damage).write_bytes(b"-----BEGIN CERTIFICATE-----\ncut")
    with pytest.raises(StorageError, match=r"remove certificate\.pem beside the key, and join again"):
        (device.identity if damage == "certificate" else device.server_name)()
