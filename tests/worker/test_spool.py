import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedgrpc.codec.digest import digest_of
from fedgrpc.codec.feedback import Residual
from fedgrpc.codec.layout import layout_of
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import EncodeError, StorageError
from fedgrpc.protocol.tensors import manifest_to_proto
from fedgrpc.storage.residual_file import write_residual
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.worker.spool import Spool
from tests.support.residuals import equal, residual_of, tensors


def task(token="token", run="run"):
    return aggregator_pb2.Task(token=token, run=run, round=3)


def fill(token="token", residual=None, size=1000):
    def write(payload, keep):
        array = {"w": np.arange(size, dtype=np.float32)}
        manifest = write_payload(array, Recipe.parse("raw"), payload, np.random.default_rng(0))
        header = aggregator_pb2.UpdateHeader(token=token, manifest=manifest_to_proto(manifest))
        for name, left in {} if residual is None else residual.tensors.items():
            keep(name, left)
        return header, None if residual is None else residual.layout

    return write


def test_an_update_is_found_again_after_a_restart_with_every_byte(tmp_path):
    Spool(tmp_path).write(task(), fill())
    [update] = Spool(tmp_path).updates()
    assert (update.token, update.task.round) == ("token", 3)
    with update.reader() as read:
        payload = read(0, update.size_bytes)
    assert digest_of(payload) == update.header.manifest.digest
    assert len(payload) == 4000


def test_updates_come_back_oldest_first(tmp_path):
    spool = Spool(tmp_path)
    for number in range(12):
        spool.write(task(), fill(f"token-{number}"))
    assert [update.token for update in Spool(tmp_path, max_updates=99).updates()][-2:] == ["token-10", "token-11"]


def test_an_acknowledged_update_is_gone_and_its_residual_is_owed(tmp_path):
    spool = Spool(tmp_path)
    update = spool.write(task(), fill(residual=residual_of(tensors(1))))
    assert spool.residual("run") == Residual()
    spool.acknowledge(update)
    assert Spool(tmp_path).updates() == []
    assert equal(Spool(tmp_path).residual("run"), residual_of(tensors(1)))


def test_a_refused_update_is_gone_and_the_residual_before_it_is_owed_still(tmp_path):
    spool = Spool(tmp_path)
    spool.acknowledge(spool.write(task(), fill(residual=residual_of(tensors(1)))))
    spool.drop(spool.write(task(), fill(residual=residual_of(tensors(2)))))
    assert spool.updates() == []
    assert equal(spool.residual("run"), residual_of(tensors(1)))


def test_what_an_algorithm_keeps_follows_its_update_as_the_residual_does(tmp_path):
    spool = Spool(tmp_path)

    def keeping(seed):
        return lambda path: write_residual(path, residual_of(tensors(seed)), "run")

    first = spool.write(task(), fill(), keep=keeping(1))
    assert spool.kept("run") == Residual()
    spool.acknowledge(first)
    assert equal(Spool(tmp_path).kept("run"), residual_of(tensors(1)))
    spool.drop(spool.write(task(), fill(), keep=keeping(2)))
    # An update that keeps nothing leaves what was kept.
    spool.acknowledge(spool.write(task(), fill()))
    assert equal(spool.kept("run"), residual_of(tensors(1)))
    assert spool.kept("other") == Residual()


def test_what_is_owed_to_one_run_is_not_owed_to_another(tmp_path):
    spool = Spool(tmp_path)
    spool.acknowledge(spool.write(task(run="one"), fill(residual=residual_of(tensors(1)))))
    assert spool.residual("other") == Residual()


def test_a_full_spool_drops_its_oldest_updates(tmp_path):
    spool = Spool(tmp_path, max_updates=2)
    for number in range(4):
        spool.write(task(), fill(f"token-{number}"))
    assert [update.token for update in spool.updates()] == ["token-2", "token-3"]


def test_the_bytes_of_the_spool_are_bounded(tmp_path):
    spool = Spool(tmp_path, max_bytes=10_000)
    for number in range(5):
        spool.write(task(), fill(f"token-{number}"))
    assert [update.token for update in spool.updates()] == ["token-3", "token-4"]
    with pytest.raises(StorageError, match="over the spool"):
        spool.write(task(), fill(size=5000))
    assert spool.count() == 2


def test_an_update_that_cannot_be_encoded_leaves_nothing_behind(tmp_path):
    def refuse(payload, keep):
        payload.write(b"half of it")
        raise EncodeError("w: NaN")

    spool = Spool(tmp_path)
    with pytest.raises(EncodeError):
        spool.write(task(), refuse)
    assert {path.name for path in tmp_path.iterdir()} == {"recycled", "recycled-residuals"}


def test_what_a_crash_left_half_written_is_swept_at_the_next_start(tmp_path):
    unfinished = tmp_path / ".new-00000001"
    unfinished.mkdir()
    (unfinished / "payload").write_bytes(b"half")
    assert Spool(tmp_path).updates() == []
    assert {path.name for path in tmp_path.iterdir()} == {"recycled", "recycled-residuals"}


def damaged(content):
    header_bytes = int.from_bytes(content[-16:-8], "little")
    yield from (content[:-1], content[1:], b"", content[:10], b"\xff" * 77, content[:-16] + b"\xff" * 16)
    yield content[:-16] + (header_bytes + 1).to_bytes(8, "little") + content[-8:]


@pytest.mark.parametrize("number", range(7))
def test_a_damaged_update_is_dropped_and_the_others_stay(tmp_path, number):
    spool = Spool(tmp_path)
    first, second = spool.write(task(), fill("first")), spool.write(task(), fill("second"))
    path = first.folder / "payload"
    path.write_bytes(list(damaged(path.read_bytes()))[number])
    assert [update.token for update in spool.updates()] == [second.token]
    assert not first.folder.exists()


def test_an_update_that_is_over_a_limit_is_dropped_and_the_others_stay(tmp_path):
    def too_large(payload, keep):
        header, layout = fill("first")(payload, keep)
        header.manifest.size_bytes = 1 << 62
        return header, layout

    spool = Spool(tmp_path)
    spool.write(task(), too_large)
    second = spool.write(task(), fill("second"))
    assert [update.token for update in spool.updates()] == [second.token]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_a_read_only_folder_is_a_storage_error(tmp_path):
    spool = Spool(tmp_path)
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="ermission"):
        spool.write(task(), fill())


def test_a_folder_that_is_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        Spool(tmp_path / "file")


@pytest.mark.parametrize("restarted", ["never", "before the acknowledgement", "after it"])
def test_a_residual_is_checked_before_it_is_applied(tmp_path, restarted):
    spool = Spool(tmp_path)
    update = spool.write(task(), fill(residual=residual_of(tensors())))
    if restarted == "before the acknowledgement":
        spool = Spool(tmp_path)
        [update] = spool.updates()
    spool.acknowledge(update)
    if restarted == "after it":
        spool = Spool(tmp_path)
    content = bytearray((tmp_path / "residual").read_bytes())
    content[0] ^= 1
    (tmp_path / "residual").write_bytes(content)
    assert not spool.residual("run").tensors


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ENOMEM])
def test_an_update_that_cannot_be_read_now_is_kept_and_found_later(tmp_path, monkeypatch, number):
    Spool(tmp_path).write(task("first"), fill("first"))
    Spool(tmp_path).write(task("second"), fill("second"))
    real = Path.open

    def fail(path, *how):
        if path.parent.name == "00000001":
            raise OSError(number, os.strerror(number))
        return real(path, *how)

    spool = Spool(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        assert [update.token for update in spool.updates()] == ["second"]
        assert spool.unreadable == 1
    assert [update.token for update in spool.updates()] == ["first", "second"]
    assert not spool.unreadable


def test_an_update_that_could_not_be_read_while_it_was_sent_is_read_through_before_the_next_try(tmp_path):
    spool = Spool(tmp_path)
    update = spool.write(task(), fill())
    payload = bytearray((update.folder / "payload").read_bytes())
    payload[17] ^= 1
    (update.folder / "payload").write_bytes(payload)
    assert spool.updates()
    spool.doubt(update)
    assert not spool.updates()
    assert not update.folder.exists()


def test_updates_of_another_run_are_kept_for_their_aggregator_and_not_for_ever(tmp_path):
    spool = Spool(tmp_path)
    own = spool.write(aggregator_pb2.Task(token="own", run_id="a"), fill("own"))
    other = spool.write(aggregator_pb2.Task(token="other", run_id="b"), fill("other"))
    assert [update.is_of("a") for update in (own, other)] == [True, False]
    assert (spool.count(), spool.count("a"), spool.count("b")) == (2, 1, 1)
    spool.keep_for_later([other], 3600.0)
    assert spool.count("b") == 1
    spool.keep_for_later([other], 0.0)
    assert [update.token for update in spool.updates()] == ["own"]


def test_a_sync_that_failed_is_made_up_for_before_an_update_goes(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    update = spool.write(task(), fill(residual=residual_of(tensors())))

    def fail(handle):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        for _ in range(2):
            with pytest.raises(StorageError, match="Input/output"):
                spool.acknowledge(update)
            assert update.folder.exists()
    spool.acknowledge(update)
    assert not update.folder.exists()
    assert equal(spool.residual("run"), residual_of(tensors()))


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    """What is asked of the disk, in order: ("sync" or "rename" or "remove", the name it is asked of)."""
    asked = []

    def noted(kind, call, name_of):
        def noting(*arguments, **named):
            asked.append((kind, Path(name_of(arguments[0])).name))
            return call(*arguments, **named)

        return noting

    monkeypatch.setattr(
        os, "fsync", noted("sync", os.fsync, lambda handle: os.readlink(f"/proc/self/fd/{handle}"))
    )
    monkeypatch.setattr(os, "rename", noted("rename", os.rename, os.fspath))
    monkeypatch.setattr(os, "replace", noted("rename", os.replace, os.fspath))
    return asked


def test_an_update_and_what_it_leaves_behind_are_on_the_disk_before_it_has_its_name(tmp_path, on_disk):
    Spool(tmp_path).write(task(), fill(residual=residual_of(tensors(1))))
    named = on_disk.index(("rename", ".new-00000001"))
    assert {name for kind, name in on_disk[:named] if kind == "sync"} == {
        *(".new-00000001", "payload", "residual")
    }
    assert on_disk[named + 1 :] == [("sync", tmp_path.name)]


def test_what_is_owed_is_on_the_disk_before_the_update_that_left_it_goes(tmp_path, on_disk):
    spool = Spool(tmp_path)
    update = spool.write(task(), fill(residual=residual_of(tensors(1))))
    on_disk.clear()
    spool.acknowledge(update)
    synced = on_disk.index(("sync", tmp_path.name))
    assert on_disk[synced - 1] == ("rename", "residual")
    assert on_disk[synced + 1 :] == [("rename", "payload"), ("rename", "00000001")]


def test_an_update_without_loss_leaves_nothing_to_sync_when_it_goes(tmp_path, on_disk):
    spool = Spool(tmp_path)
    update = spool.write(task(), fill(residual=residual_of({})))
    on_disk.clear()
    spool.acknowledge(update)
    assert [name for kind, name in on_disk if kind == "sync"] == []
    assert spool.residual("run") == Residual()


def test_an_update_without_loss_makes_good_what_was_owed_before_it(tmp_path):
    spool = Spool(tmp_path)
    spool.acknowledge(spool.write(task(), fill(residual=residual_of(tensors(1)))))
    update = spool.write(task(), fill(residual=Residual(layout_of(tensors(1)))))
    assert equal(spool.residual("run"), residual_of(tensors(1)))
    spool.acknowledge(update)
    assert not Spool(tmp_path).residual("run").tensors


def kept(text):
    return lambda path: path.write_text(text)


def test_what_stays_here_is_kept_with_its_update_or_not_at_all(tmp_path):
    spool = Spool(tmp_path)
    spool.write(task("a"), fill("a"), kept("first"))
    assert Spool(tmp_path).personal.read_text() == "first"

    def fails(path):
        path.write_text("second")
        raise OSError("power cut")

    with pytest.raises(StorageError):
        spool.write(task("b"), fill("b"), fails)
    assert Spool(tmp_path).personal.read_text() == "first"
    assert Spool(tmp_path).count() == 1


@pytest.mark.parametrize("end", ["acknowledge", "drop"])
def test_what_stays_here_outlives_its_update_whatever_becomes_of_it(tmp_path, end):
    spool = Spool(tmp_path)
    first = spool.write(task("a"), fill("a"), kept("first"))
    second = spool.write(task("b"), fill("b"), kept("second"))
    getattr(spool, end)(first)
    assert Spool(tmp_path).personal.read_text() == "second"
    third = spool.write(task("c"), fill("c"))
    getattr(spool, end)(second)
    getattr(spool, end)(third)
    assert Spool(tmp_path).personal.read_text() == "second"
    assert Spool(tmp_path).count() == 0


def test_what_stays_here_outlives_an_update_that_a_full_spool_drops(tmp_path):
    spool = Spool(tmp_path, max_updates=1)
    spool.write(task("a"), fill("a"), kept("first"))
    spool.write(task("b"), fill("b"))
    assert Spool(tmp_path).personal.read_text() == "first"


def test_a_spool_that_was_deleted_meanwhile_takes_updates_again(tmp_path):
    spool = Spool(tmp_path / "spool")
    spool.write(task("first"), fill("first"))
    shutil.rmtree(tmp_path / "spool")
    assert spool.updates() == []
    spool.write(task("second"), fill("second"))
    assert [update.token for update in spool.updates()] == ["second"]
