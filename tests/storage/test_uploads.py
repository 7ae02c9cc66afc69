"""The journal of updates: "the files of accepted updates ARE the record of acceptance"."""

import errno
import gc
import os
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedgrpc.codec.digest import digest_of
from fedgrpc.codec.layout import spec_of
from fedgrpc.codec.manifest import Manifest, TensorEntry
from fedgrpc.codec.payload import tensors_of
from fedgrpc.codec.uniform import Uniform
from fedgrpc.errors import CorruptError, StorageError, TooLargeError, WrongOffset
from fedgrpc.storage.files import RecycledFiles
from fedgrpc.storage.uploads import UploadJournal
from tests.support.stored_updates import accept, chunk, encoded, header_of

TENSORS = {"w": np.arange(1000, dtype=np.float32), "n": np.array(3)}
MANIFEST, PAYLOAD = encoded(TENSORS)
HEADER = header_of(MANIFEST)


@pytest.fixture
def journal(tmp_path):
    return UploadJournal(tmp_path / "uploads")


def send(upload, stop, start=None, size=512):
    start = upload.size_bytes if start is None else start
    for at in range(start, stop, size):
        upload.append([chunk(PAYLOAD, at, min(at + size, stop))])


def names(journal):
    return sorted(path.name for path in journal.folder.iterdir() if path.is_file())


def test_an_update_sent_in_pieces_is_loaded_whole(journal):
    upload = journal.begin(HEADER, MANIFEST)
    send(upload, len(PAYLOAD))
    assert upload.complete
    upload.finish()
    assert journal.load("token") is None
    upload.seal()
    assert names(journal) == ["token.update"]
    stored = journal.load("token")
    assert (stored.header, stored.manifest) == (HEADER, MANIFEST)
    with stored.open() as reader:
        loaded = tensors_of(reader)
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(loaded[name], values)


def test_updates_just_sealed_are_remembered_as_far_as_their_headers_have_room(journal, monkeypatch):
    sealed = {token: accept(journal, token, TENSORS) for token in ("a", "b", "c")}
    monkeypatch.setattr("fedgrpc.storage.uploads._REMEMBERED_BYTES", 2 << 10)
    for token in ("a", "a", "b", "c"):
        journal.remember(token, sealed[token])
    assert [journal.load(token) is sealed[token] for token in sealed] == [True, True, False]
    journal.discard(["a"])
    journal.remember("c", sealed["c"])
    assert journal.load("c") is sealed["c"]
    assert journal.load("a") is None


@pytest.mark.parametrize("at", [0, 1, 512, 1300, len(PAYLOAD) - 1, len(PAYLOAD)])
def test_an_upload_goes_on_at_the_byte_that_is_held(tmp_path, at):
    """As after a lost link, and as after a restart."""
    upload = UploadJournal(tmp_path).begin(HEADER, MANIFEST)
    send(upload, at)
    upload.close()
    journal = UploadJournal(tmp_path)
    assert journal.committed_bytes("token") == at
    upload = journal.begin(HEADER, MANIFEST)
    assert upload.size_bytes == at
    send(upload, len(PAYLOAD))
    upload.finish()
    upload.seal()
    assert PAYLOAD in journal.load("token").path.read_bytes()


def test_a_part_cut_anywhere_by_a_crash_is_continued_from_what_is_there(tmp_path):
    journal = UploadJournal(tmp_path)
    upload = journal.begin(HEADER, MANIFEST)
    send(upload, len(PAYLOAD))
    upload.close()
    whole = (tmp_path / "token.part").read_bytes()
    start = len(whole) - len(PAYLOAD)
    for size in (0, 1, 3, 4, 5, start - 1, start, start + 1, len(whole) - 1):
        (tmp_path / "token.part").write_bytes(whole[:size])
        assert journal.committed_bytes("token") == max(0, size - start)
        upload = journal.begin(HEADER, MANIFEST)
        assert upload.size_bytes == max(0, size - start)
        assert journal.committed_bytes("token") in (0, upload.size_bytes)
        send(upload, len(PAYLOAD))
        upload.finish()
        upload.close()


def test_a_part_that_cannot_be_opened_is_a_storage_error(journal, tmp_path):
    (tmp_path / "token.part").mkdir()
    with pytest.raises(StorageError):
        UploadJournal(tmp_path).committed_bytes("token")


def test_an_update_in_the_file_of_a_larger_one_is_only_itself(journal):
    """Files are used again: what a former update has left behind belongs to nobody."""
    accept(journal, "large", {"w": np.full(5000, 7.0, np.float32)})
    journal.discard(["large"])
    upload = journal.begin(HEADER, MANIFEST)
    assert journal.committed_bytes("token") == 0
    send(upload, 1024)
    upload.close()
    upload = journal.begin(HEADER, MANIFEST)
    assert (upload.size_bytes, journal.committed_bytes("token")) == (1024, 1024)
    send(upload, len(PAYLOAD))
    upload.finish()
    upload.seal()
    with journal.load("token").open() as reader:
        np.testing.assert_array_equal(tensors_of(reader)["w"], TENSORS["w"])


def test_a_part_of_another_header_is_begun_anew(journal):
    upload = journal.begin(HEADER, MANIFEST)
    send(upload, 1024)
    upload.close()
    other = header_of(MANIFEST, steps=2)
    upload = journal.begin(other, MANIFEST)
    assert upload.size_bytes == 0
    send(upload, len(PAYLOAD))
    upload.finish()
    upload.seal()
    assert journal.load("token").header == other


def test_a_chunk_that_is_refused_leaves_what_came_before_it(journal):
    upload = journal.begin(HEADER, MANIFEST)
    send(upload, 1024)
    broken = chunk(PAYLOAD, 1536, 2048)
    broken = type(broken)(broken.offset, broken.data, broken.crc32 ^ 1)
    for batch, error in (
        ([chunk(PAYLOAD, 0, 512)], WrongOffset),
        ([chunk(PAYLOAD, 1025, 1500)], WrongOffset),
        ([chunk(PAYLOAD + b"more", 1024, len(PAYLOAD) + 4)], TooLargeError),
    ):
        with pytest.raises(error):
            upload.append(batch)
        assert upload.size_bytes == 1024
    with pytest.raises(CorruptError):
        upload.append([chunk(PAYLOAD, 1024, 1536), broken, chunk(PAYLOAD, 2048, 2500)])
    assert (upload.size_bytes, journal.committed_bytes("token")) == (1536, 1536)
    send(upload, len(PAYLOAD))
    upload.finish()


def test_a_digest_that_does_not_match_forgets_the_upload(journal):
    upload = journal.begin(HEADER, MANIFEST)
    wrong = bytes([PAYLOAD[0] ^ 1]) + PAYLOAD[1:]
    upload.append([chunk(wrong, 0, len(wrong))])
    with pytest.raises(CorruptError, match="does not match its digest; send it again from the start"):
        upload.finish()
    upload.close()
    assert names(journal) == []
    assert journal.committed_bytes("token") == 0


def test_what_is_discarded_is_gone_whether_in_progress_or_accepted(journal):
    accept(journal, "one", TENSORS)
    journal.begin(header_of(MANIFEST, "two"), MANIFEST).close()
    accept(journal, "three", TENSORS)
    journal.discard(["one", "two", "unknown"])
    assert names(journal) == ["three.update"]


def test_only_what_belongs_to_a_task_is_kept_after_a_restart(journal):
    for token in ("one", "two"):
        accept(journal, token, TENSORS)
    for token in ("three", "four"):
        journal.begin(header_of(MANIFEST, token), MANIFEST).close()
    journal.keep_only(["one", "three"])
    assert names(journal) == ["one.update", "three.part"]


def test_an_update_without_tensors_is_kept_too(journal):
    stored = accept(journal, "report", {})
    with stored.open() as reader:
        assert list(reader) == []


@pytest.mark.parametrize("content", [b"", b"\0", b"\xff" * 300, b"\x05\0\0\0junk!"])
def test_an_accepted_update_that_is_damaged_is_no_fault_of_the_disk_that_waiting_mends(journal, content):
    path = journal.folder / "token.update"
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="damaged"):
        journal.load("token")


def accepted(journal):
    upload = journal.begin(HEADER, MANIFEST)
    send(upload, len(PAYLOAD))
    upload.finish()
    return upload.seal()


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("where", [0, 9, 13, 17, 30, -1, -len(PAYLOAD)])
def test_a_bit_that_flips_in_an_accepted_update_is_found_before_anything_is_decided_by_it(journal, where):
    stored = accepted(journal)
    stored.check()
    flip(stored.path, where)
    with pytest.raises(CorruptError, match=r"token\.update"):
        stored.check()


def test_a_header_that_has_changed_is_found_when_it_is_read(tmp_path):
    stored = accepted(UploadJournal(tmp_path))
    flip(stored.path, stored.payload_start - 1)
    with pytest.raises(CorruptError, match="header has changed"):
        UploadJournal(tmp_path).load("token")


def test_an_update_that_is_gone_or_cut_short_does_not_pass_for_what_was_accepted(journal):
    stored = accepted(journal)
    whole = stored.path.read_bytes()
    for size in (0, 5, 40, len(whole) - 1):
        stored.path.write_bytes(whole[:size])
        with pytest.raises(CorruptError):
            stored.check()
    stored.path.unlink()
    with pytest.raises(StorageError, match="cannot read"):
        stored.check()


def test_bytes_that_changed_while_an_upload_was_away_are_sent_again(tmp_path):
    upload = UploadJournal(tmp_path).begin(HEADER, MANIFEST)
    send(upload, 1024)
    upload.close()
    flip(tmp_path / "token.part", -1 - (len((tmp_path / "token.part").read_bytes()) - upload.payload_start - 1024))
    again = UploadJournal(tmp_path).begin(HEADER, MANIFEST)
    assert again.size_bytes == 0


def test_nothing_of_a_file_whose_sync_failed_is_acknowledged(journal, monkeypatch):
    """Linux takes its pages for clean then: to sync again would succeed, and write nothing."""
    upload = journal.begin(HEADER, MANIFEST)
    send(upload, len(PAYLOAD))
    upload.finish()

    def fail(handle):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.fdatasync", fail)
        with pytest.raises(StorageError, match="Input/output"):
            upload.seal()
    assert names(journal) == []
    assert journal.committed_bytes("token") == 0
    again = journal.begin(HEADER, MANIFEST)
    assert again.size_bytes == 0
    send(again, len(PAYLOAD))
    again.finish()
    again.seal().check()


def test_an_accepted_update_that_goes_before_it_is_read_is_a_storage_error(journal):
    """A commit finds its file and then opens it: the disk may fail in between."""
    stored = accept(journal, "token", TENSORS)
    shutil.rmtree(journal.folder)
    with pytest.raises(StorageError, match=r"cannot read the update .*: No such file"), stored.open():
        pass


def test_a_folder_that_is_gone_is_a_storage_error(journal):
    shutil.rmtree(journal.folder)
    with pytest.raises(StorageError, match="cannot store an update: No such file"):
        journal.begin(HEADER, MANIFEST)
    with pytest.raises(StorageError, match=r"cannot use .*: No such file"):
        journal.keep_only([])
    assert journal.load("token") is None


def test_what_was_read_of_an_update_goes_with_its_file(journal):
    """Else a commit would hold what it has read of hundreds of updates until Python's collector comes."""
    update = accept(journal, "token", TENSORS, "int8+zstd")
    gc.disable()
    try:
        file = update.open()
        with file as reader:
            reader.tensor("w")
        gone = [weakref.ref(file), weakref.ref(reader)]
        del file, reader
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("recipe", ["raw", "raw+zstd", "int8", "entropy:c=1+zstd", "float16"])
def test_an_update_is_read_in_pieces_that_are_its_tensors(journal, recipe):
    rng = np.random.default_rng(1)
    tensors = {
        "large": rng.normal(size=(300, 301)).astype(np.float32),
        "half": rng.normal(size=70_000).astype(np.float16),
        "n": np.array(3),
        "none": np.empty((0, 4), np.float32),
        "mask": np.array([True, False]),
    }
    update = accept(journal, "token", tensors, recipe).open()
    with update as reader:
        found = {name: [] for name in tensors}
        for spec, piece in update.pieces():
            found[spec.name].append(piece.reshape(-1).copy())
        for name in tensors:
            joined = np.concatenate(found[name]) if found[name] else np.empty(0)
            np.testing.assert_array_equal(joined, reader.tensor(name).reshape(-1))


@pytest.mark.parametrize("recipe", ["raw", "raw+zstd", "int8"])
def test_long_pieces_are_all_elements_once_and_in_order(journal, recipe):
    rng = np.random.default_rng(1)
    sizes = {"a": 300, "b": 40_000, "c": 0, "d": 5, "e": 1}
    tensors = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    tensors |= {"half": rng.normal(size=70).astype(np.float16), "n": np.array(3), "z": np.ones(2, np.float32)}
    with accept(journal, "token", tensors, recipe).open() as reader:
        wanted = {dtype: [] for dtype in (np.float32, np.float16, np.int64)}
        for name, values in tensors.items():
            wanted[values.dtype.type].append(reader.tensor(name).reshape(-1))
    update = journal.load("token").open()
    with update:
        found, count = {dtype: [] for dtype in wanted}, 0
        for spec, piece in update.long_pieces():
            assert spec.numpy_dtype == piece.dtype
            found[piece.dtype.type].append(piece.reshape(-1).copy())
            count += 1
    for dtype in wanted:
        np.testing.assert_array_equal(np.concatenate(found[dtype]), np.concatenate(wanted[dtype]))
    if recipe == "raw":
        # a and b, in two pieces; d and e; half; n; z.
        assert count == 6


def accept_payload(journal, manifest, payload):
    """An update as it is once its last byte is there, whatever is in it."""
    upload = journal.begin(header_of(manifest), manifest)
    upload.append([chunk(payload, 0, len(payload))])
    stored = upload.finish()
    upload.close()
    return stored


@pytest.mark.parametrize("recipe", ["raw", "int8", "int2+zstd", "int8+zstd", "entropy:c=1+zstd"])
def test_bounds_of_an_update_are_no_smaller_than_its_values_and_those_of_floats_are_few(journal, recipe):
    rng = np.random.default_rng(1)
    tensors = {
        "large": rng.normal(size=(3000, 401)).astype(np.float32),
        "half": rng.normal(size=70_000).astype(np.float16),
        "small": rng.normal(size=5).astype(np.float32),
        "n": np.array(3),
    }
    update = accept(journal, "token", tensors, recipe).open()
    with update as reader:
        found = {name: [] for name in tensors}
        for spec, bounds in update.bounds():
            found[spec.name].append(bounds.reshape(-1).copy())
        for name in tensors:
            assert np.abs(np.concatenate(found[name])).max() >= np.abs(reader.tensor(name)).max()
    assert (sum(part.size for part in found["large"]) < 5000) == recipe.startswith("int")


@pytest.mark.parametrize(("code", "finite"), [(1, True), (-2, False)])
def test_where_bounds_are_infinite_the_values_themselves_are_looked_at(journal, code, finite):
    """A code that no encoder writes, -2 of two bits, times a scale that is allowed, is beyond float32."""
    size, encoding = 64, Uniform(2, 64)
    spec = spec_of("w", np.empty(size, np.float32))
    byte = sum((code & 3) << shift for shift in (0, 2, 4, 6))
    payload = np.float32(2.0**127).tobytes() + bytes([byte]) * (size // 4)
    entries = (TensorEntry(spec, encoding, len(payload)),)
    manifest = Manifest(entries, "none", (), len(payload), digest_of(payload))
    update = accept_payload(journal, manifest, payload).open()
    with update:
        values = np.concatenate([piece.copy() for _, piece in update.bounds()])
    assert values.size == size
    assert np.isfinite(values).all() == finite


@pytest.mark.parametrize("which", [0, 1, -1])
def test_every_frame_of_an_update_is_inflated_when_its_bounds_are_asked_for(journal, which):
    """What is accepted can be merged: the digest is of the bytes that were sent, whatever they are."""
    values = np.random.default_rng(0).normal(size=3_000_000).astype(np.float32)
    manifest, payload = encoded({"w": values}, "int8+zstd")
    assert len(manifest.frames) == 3
    starts = np.cumsum([0, *(frame.size_bytes for frame in manifest.frames)])[:-1]
    garbled = bytearray(payload)
    garbled[starts[which] : starts[which] + 4] = b"none"
    manifest = Manifest(manifest.entries, "zstd", manifest.frames, len(garbled), digest_of(garbled))
    update = accept_payload(journal, manifest, bytes(garbled)).open()
    with update, pytest.raises(CorruptError):
        list(update.bounds())


def test_frames_that_are_inflated_ahead_give_the_same_tensors_in_any_order(journal):
    rng = np.random.default_rng(1)
    tensors = {name: rng.normal(size=900_000).astype(np.float32) for name in "abcde"}
    stored = accept(journal, "token", tensors, "int8+zstd")
    with ThreadPoolExecutor(1) as pool, stored.open(pool.submit) as ahead, stored.open() as reader:
        for name in "abcdeedcbaacbed":
            np.testing.assert_array_equal(ahead.tensor(name), reader.tensor(name))


def test_small_files_are_kept_for_reuse_up_to_a_bound_of_their_bytes(tmp_path):
    recycled = RecycledFiles(tmp_path / "recycled", 1, max_bytes=10)

    def keep(name):
        (tmp_path / name).write_bytes(b"1234")
        recycled.keep(tmp_path / name)
        return len(list((tmp_path / "recycled").iterdir()))

    assert [keep(name) for name in "abc"] == [1, 2, 2]
    os.close(recycled.create(tmp_path / "new"))
    assert keep("d") == 2
    # A later process takes up what there is, and its sizes.
    recycled = RecycledFiles(tmp_path / "recycled", 1, max_bytes=10)
    assert keep("e") == 2
