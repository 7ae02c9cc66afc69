"""A payload that arrives in pieces: continued where it stands, or begun anew, and never something else."""

import errno
import os

import pytest

from fedgrpc.codec.chunk import Chunk, crc32
from fedgrpc.codec.digest import digest_of
from fedgrpc.errors import CorruptError, StorageError
from fedgrpc.storage.files import RecycledFiles
from fedgrpc.storage.resumable import ResumableFile, committed_bytes

PAYLOAD = bytes(range(256)) * 8
HEADER = b"what the sender declared"


@pytest.fixture(params=["one file", "head apart"])
def opened(request, tmp_path):
    """Open the file of `PAYLOAD`, as each connection and each process does."""
    head_path = tmp_path / "head" if request.param == "head apart" else None

    def open_file(header=HEADER):
        recycled = RecycledFiles(tmp_path / "recycled", 1)
        digest = digest_of(PAYLOAD)
        return ResumableFile(tmp_path / "file", header, len(PAYLOAD), digest, recycled, head_path=head_path)

    open_file.committed = lambda: committed_bytes(tmp_path / "file", head_path)
    return open_file


def chunk(start, stop):
    return Chunk(start, PAYLOAD[start:stop], crc32(PAYLOAD[start:stop]))


def part_sent(opened, stop=1000):
    file = opened()
    file.append([chunk(0, stop // 2), chunk(stop // 2, stop)])
    file.close()


def test_what_was_committed_is_there_for_the_next_process_and_the_rest_completes_it(opened):
    assert opened.committed() == 0
    part_sent(opened)
    assert opened.committed() == 1000
    file = opened()
    assert (file.size_bytes, file.complete) == (1000, False)
    file.append([chunk(1000, len(PAYLOAD))])
    assert file.complete
    assert file.matches_digest
    start = file.payload_start
    file.close()
    assert file.path.read_bytes()[start:] == PAYLOAD


def test_a_payload_with_another_header_is_begun_anew(opened):
    part_sent(opened)
    file = opened(b"another header")
    assert file.size_bytes == 0
    file.close()
    assert opened.committed() == 0


def test_bytes_that_changed_on_the_disk_are_not_continued(opened):
    part_sent(opened)
    file = opened()
    with file.path.open("r+b") as changed:
        changed.seek(file.payload_start + 700)
        changed.write(b"\xff" if PAYLOAD[700] != 255 else b"\0")
    file.close()
    assert opened().size_bytes == 0


def test_a_file_that_a_crash_has_cut_short_is_continued_at_its_end(opened):
    part_sent(opened)
    file = opened()
    os.truncate(file.path, file.payload_start + 300)
    file.close()
    assert opened.committed() == 300
    file = opened()
    assert file.size_bytes == 300
    file.append([chunk(300, len(PAYLOAD))])
    assert file.matches_digest


def test_chunks_before_a_broken_one_are_committed_and_no_others(opened):
    file = opened()
    broken = Chunk(20, PAYLOAD[20:30], crc32(PAYLOAD[20:30]) ^ 1)
    with pytest.raises(CorruptError):
        file.append([chunk(0, 20), broken, chunk(30, 40)])
    assert (file.size_bytes, opened.committed()) == (20, 20)


def test_chunks_that_a_full_disk_refuses_are_not_counted(opened, monkeypatch):
    file = opened()
    file.append([chunk(0, 100)])

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedgrpc.storage.resumable.pwrite", fail)
        with pytest.raises(StorageError, match="No space left"):
            file.append([chunk(100, 200)])
    assert (file.size_bytes, opened.committed()) == (100, 100)
    file.append([chunk(100, len(PAYLOAD))])
    assert file.matches_digest
