"""Backups: a data folder in one file, and back, or one line that says what is wrong."""

import io
import json
import sqlite3
import tarfile
from contextlib import closing

import pytest

from fedgrpc.errors import CorruptError, StorageError, UsageError
from fedgrpc.storage import backup
from fedgrpc.storage.backup import MANIFEST, read_manifest, restore_backup, write_backup


@pytest.fixture
def folder(tmp_path):
    """A folder like that of an aggregator, with a database that is open."""
    folder = tmp_path / "data"
    for name in ("identity", "models/recycled", "encoded", "uploads"):
        (folder / name).mkdir(parents=True)
    (folder / "identity" / "audit.jsonl").write_bytes(b'{"n":1}\n{"n":2}\n{"n":')
    (folder / "models" / "recycled" / "1").write_bytes(b"old")
    (folder / "encoded" / "1.payload").write_bytes(b"made again")
    (folder / "uploads" / "abc.update").write_bytes(b"an accepted update")
    (folder / "uploads" / "def.part").write_bytes(b"half")
    from fedgrpc.storage.run_store import RunStore

    with closing(RunStore(folder / "run.sqlite")) as store:
        store.save_settings({"rounds": "3"})
        yield folder


def test_everything_that_counts_comes_back(folder, tmp_path):
    file = tmp_path / "a.backup"
    written = write_backup(folder, file)
    assert set(written.files) == {"run.sqlite", "identity/audit.jsonl", "uploads/abc.update"}
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_manifest(file).files == written.files
    restored = tmp_path / "restored"
    assert restore_backup(file, restored).files == written.files
    assert (restored / "identity" / "audit.jsonl").read_bytes() == b'{"n":1}\n{"n":2}\n'
    assert (restored / "uploads" / "abc.update").read_bytes() == b"an accepted update"
    with closing(sqlite3.connect(restored / "run.sqlite")) as database:
        assert database.execute("SELECT value FROM settings").fetchall() == [("3",)]
    assert restored.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.backup", "data", "restored"]


def test_nothing_is_written_over(folder, tmp_path):
    file = tmp_path / "a.backup"
    write_backup(folder, file)
    with pytest.raises(UsageError, match="exists"):
        write_backup(folder, file)
    with pytest.raises(UsageError, match="not empty"):
        restore_backup(file, folder)
    with pytest.raises(UsageError, match="data folder"):
        write_backup(tmp_path / "data" / "identity", tmp_path / "b.backup")


@pytest.mark.parametrize("cut", [0, 1, 100, 600, 2000])
def test_a_backup_that_is_cut_short_makes_no_folder(folder, tmp_path, cut):
    file, target = tmp_path / "a.backup", tmp_path / "restored"
    write_backup(folder, file)
    content = file.read_bytes()
    end = content.rindex(MANIFEST.encode())
    file.write_bytes(content[: min(cut, end)])
    with pytest.raises((UsageError, CorruptError)):
        restore_backup(file, target)
    assert not target.exists()


def test_a_changed_byte_is_noticed(folder, tmp_path):
    file, target = tmp_path / "a.backup", tmp_path / "restored"
    write_backup(folder, file)
    content = bytearray(file.read_bytes())
    content[content.index(b"an accepted update")] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptError, match=r"abc\.update is not what was written"):
        restore_backup(file, target)
    assert not target.exists()


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", ""])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    file = tmp_path / "bad.backup"
    with tarfile.open(file, "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
        content = json.dumps({"format": 1, "created_at": 0, "files": {name: [4, "0"]}}).encode()
        manifest = tarfile.TarInfo(MANIFEST)
        manifest.size = len(content)
        tar.addfile(manifest, io.BytesIO(content))
    with pytest.raises((CorruptError, UsageError)):
        restore_backup(file, tmp_path / "restored")
    assert not (tmp_path / "evil").exists()


def _archive(file, headers, created_at, size):
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (
            ("x", b"0\n0\n"),
            (MANIFEST, b'{"format": 1, "created_at": %s, "files": {"x": [%s, ""]}}' % (created_at, size)),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if name == "x":
                member.pax_headers = headers
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    "headers",
    [
        {"mtime": "1e300"},
        {"mtime": "nan"},
        {"path": "a\0b"},
        {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40)},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)},
    ],
)
def test_a_member_that_no_backup_has_is_refused_before_it_is_written(tmp_path, headers):
    file = tmp_path / "bad.backup"
    _archive(file, headers, b"0", b"4")
    with pytest.raises((CorruptError, UsageError), match="no backup of fedgrpc"):
        restore_backup(file, tmp_path / "restored")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.backup"]


@pytest.mark.parametrize(("created_at", "size"), [(b"1e300", b"4"), (b"1e999", b"4"), (b"0", b"1e999")])
def test_numbers_that_cannot_be_are_damage(tmp_path, created_at, size):
    file = tmp_path / "bad.backup"
    _archive(file, {}, created_at, size)
    with pytest.raises(CorruptError, match="damaged"):
        restore_backup(file, tmp_path / "restored")


def test_of_two_that_restore_to_one_folder_only_one_does_and_it_is_whole(folder, tmp_path, monkeypatch):
    file, target, extract, second = tmp_path / "a.backup", tmp_path / "restored", backup._extract_file, []
    written = write_backup(folder, file)

    def extract_while_another_restores(*arguments):
        found = extract(*arguments)
        if not second:
            second.append("begun")
            second.append(restore_backup(file, target))
        return found

    monkeypatch.setattr(backup, "_extract_file", extract_while_another_restores)
    with pytest.raises(StorageError, match="not empty"):
        restore_backup(file, target)
    assert {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} == set(
        written.files
    )


def test_a_link_in_a_backup_is_refused(tmp_path):
    file = tmp_path / "bad.backup"
    with tarfile.open(file, "w") as tar:
        member = tarfile.TarInfo("link")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(member)
    with pytest.raises(CorruptError, match="no backup of fedgrpc"):
        restore_backup(file, tmp_path / "restored")


def test_a_version_that_is_let_go_while_it_is_copied_begins_the_copy_again(folder, tmp_path, monkeypatch):
    tries = []

    def gone(*_):
        tries.append(1)
        if len(tries) < 3:
            raise backup._Gone

    monkeypatch.setattr(backup, "_check_complete", gone)
    write_backup(folder, tmp_path / "a.backup")
    assert len(tries) == 3
    tries.clear()
    monkeypatch.setattr(backup, "_TRIES", 1)
    with pytest.raises(StorageError, match="keep more"):
        write_backup(folder, tmp_path / "b.backup")
    assert not (tmp_path / "b.backup").exists()
