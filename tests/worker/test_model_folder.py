"""The model that a worker holds: read as a whole, or a tensor at a time, also once a newer one has come."""

import errno
import io
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fedgrpc.codec.chunk import Chunk
from fedgrpc.codec.digest import digest_of
from fedgrpc.codec.encoding import parse_encoding
from fedgrpc.codec.layout import TensorSpec
from fedgrpc.codec.manifest import Manifest, TensorEntry
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import CorruptError, LayoutError, StorageError, TooLargeError
from fedgrpc.protocol.tensors import manifest_to_proto
from fedgrpc.v1.aggregator_pb2 import ModelHeader
from fedgrpc.worker.held_model import Source
from fedgrpc.worker.model_folder import ModelFolder


def model(version):
    return {
        "w": np.full((40, 50), version, np.float32),
        "n": np.array(version),
        "none": np.zeros((0, 3), np.float32),
    }


def pulled(folder, version, recipe, base=0, **told):
    """Version `version`, or what is to be added to `base`, as it is once its download is whole."""
    out = io.BytesIO()
    manifest = write_payload(model(version), Recipe.parse(recipe), out, np.random.default_rng(0))
    header = ModelHeader(version=version, manifest=manifest_to_proto(manifest), base_version=base, **told)
    partial = folder.open_partial(Source("run", version), header, 0)
    partial.append([Chunk(0, out.getvalue(), zlib.crc32(out.getvalue()))])
    return folder.finish(partial)


def test_tensors_read_one_by_one_are_the_weights_also_when_a_newer_version_has_come(tmp_path):
    """In the place of the held file the next download begins: not while somebody reads it."""
    folder = ModelFolder(tmp_path)
    for version, recipe in enumerate(("raw", "float16+zstd", "raw", "raw"), start=1):
        held = pulled(folder, version, recipe)
        tensors = held.tensors()
        assert list(tensors) == list(held.weights()) == list(model(version))
        for later in (version + 10, version + 20, version + 30):
            pulled(folder, later, "raw")
        for name, values in model(version).items():
            np.testing.assert_array_equal(tensors[name], values)
            assert tensors[name].dtype == values.dtype


RECIPES = ["raw", "int8", "int8+zstd", "int4+zstd", "entropy:c=0.5+zstd", "float16+zstd"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("first", ["raw", "int8+zstd"])
def test_a_difference_is_added_to_what_is_held(tmp_path, first, recipe):
    folder = ModelFolder(tmp_path)
    before = pulled(folder, 1, first).weights()
    held = pulled(folder, 2, recipe, base=1)
    np.testing.assert_allclose(held.weights()["w"], before["w"] + 2, rtol=0.02)
    assert held.weights()["n"] == 2
    added = pulled(ModelFolder(tmp_path / "other"), 2, recipe).weights()["w"]
    np.testing.assert_array_equal(held.weights()["w"], before["w"] + added)


def test_a_sum_that_a_power_cut_has_damaged_is_not_held_after_a_restart(tmp_path):
    folder = ModelFolder(tmp_path)
    pulled(folder, 1, "int8+zstd")
    held = pulled(folder, 2, "int8+zstd", base=1)
    weights = held.weights()
    again = ModelFolder(tmp_path).held
    assert (again.source, again.origin_digest) == (held.source, held.origin_digest)
    for name, values in again.weights().items():
        np.testing.assert_array_equal(values, weights[name])
    del again, values, weights
    content = bytearray((held.folder / "payload").read_bytes())
    content[4096:] = bytes(len(content) - 4096)
    (held.folder / "payload").write_bytes(content)
    assert ModelFolder(tmp_path).held is None


@pytest.mark.parametrize("restarted", [False, True])
def test_whoever_pulls_a_sum_from_the_device_gets_its_digest(tmp_path, restarted):
    folder = ModelFolder(tmp_path)
    pulled(folder, 1, "int8+zstd")
    pulled(folder, 2, "int8+zstd", base=1)
    if restarted:
        folder = ModelFolder(tmp_path)
    for _ in range(2):
        manifest, file = folder.held.open_raw()
        with file:
            content = file.read()
        assert manifest.digest == digest_of(content)
        assert (manifest.size_bytes, manifest.compression) == (len(content), "none")
        assert content.startswith(folder.held.weights()["w"].tobytes())


@pytest.mark.parametrize("recipe", ["raw", "int8+zstd"])
def test_what_a_power_cut_left_of_raw_weights_is_written_anew(tmp_path, recipe):
    folder = ModelFolder(tmp_path)
    pulled(folder, 1, "raw")
    held = pulled(folder, 2, "raw", base=1) if recipe == "raw" else pulled(folder, 2, recipe)
    before, _ = held.open_raw()
    (held.folder / "header.raw.pb").write_bytes(b"")
    after, file = ModelFolder(tmp_path).held.open_raw()
    assert after == before
    assert digest_of(file.read()) == before.digest


@pytest.mark.parametrize("recipe", ["raw", "int8+zstd"])
def test_all_who_ask_for_raw_weights_at_once_get_them(tmp_path, recipe):
    folder = ModelFolder(tmp_path)
    pulled(folder, 1, "raw")
    for version in range(2, 22):
        held = pulled(folder, version, recipe, base=version - 1)
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda _, held=held: held.open_raw(), range(8)))
        for manifest, file in got:
            with file:
                assert digest_of(file.read()) == manifest.digest == got[0][0].digest


def test_a_difference_can_be_added_after_the_disk_has_stopped_it_once(tmp_path):
    pulled(ModelFolder(tmp_path), 1, "raw")
    (tmp_path / "recycled" / "1").mkdir()  # cannot be written to
    folder = ModelFolder(tmp_path)
    with pytest.raises(StorageError):
        pulled(folder, 2, "raw", base=1)
    assert pulled(folder, 2, "raw", base=1).version == 2


def test_a_version_with_other_tensors_than_the_one_before_it_is_refused(tmp_path):
    """What those took is known to fit the device: a few bytes could declare gigabytes."""
    folder = ModelFolder(tmp_path)
    pulled(folder, 1, "raw")
    huge = TensorEntry(TensorSpec("w", "float32", (1 << 30,)), parse_encoding("entropy"), 8)
    header = ModelHeader(version=2, manifest=manifest_to_proto(Manifest((huge,), "none", (), 8, bytes(16))))
    with pytest.raises(LayoutError, match="version 2"):
        folder.open_partial(Source("run", 2), header, 0)
    folder.open_partial(Source("another run", 2), header, 0).close()


def test_a_model_that_does_not_fit_into_the_devices_memory_is_refused(tmp_path):
    folder = ModelFolder(tmp_path)
    folder.limit(1000)
    with pytest.raises(TooLargeError):
        pulled(folder, 1, "raw")
    assert not folder.has_partial


def flip(path, at=100):
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, at)[0] ^ 0x40
        os.pwrite(file.fileno(), bytes([byte]), at)


@pytest.mark.parametrize("sums", [0, 1])
def test_no_difference_is_added_to_a_model_that_has_changed_on_the_disk(tmp_path, sums):
    """The CRC of the sum would be that of a wrong one: it is healed by a whole model."""
    folder = ModelFolder(tmp_path)
    held = pulled(folder, 1, "int8")
    if sums:
        held = pulled(folder, 2, "int8", base=1)
    flip(held.folder / "payload")
    with pytest.raises(CorruptError, match="changed on the disk"):
        pulled(folder, 3, "int8", base=held.version)
    assert folder.held is None
    assert not folder.has_partial
    np.testing.assert_allclose(pulled(folder, 3, "int8").weights()["w"], 3, rtol=0.02)


def test_a_held_model_is_checked_before_anybody_trains_on_it(tmp_path):
    folder = ModelFolder(tmp_path)
    held = pulled(folder, 1, "raw")
    folder.check_held()
    flip(held.folder / "payload")
    with pytest.raises(CorruptError, match="changed on the disk"):
        folder.check_held()
    assert folder.held is None
    folder.check_held()


def test_a_sum_that_is_not_what_the_aggregator_takes_it_for_is_dropped(tmp_path):
    folder = ModelFolder(tmp_path)
    pulled(folder, 1, "int8")
    twin = ModelFolder(tmp_path / "twin")
    pulled(twin, 1, "int8")
    crc = pulled(twin, 2, "int8", base=1).record.crc32
    assert pulled(folder, 2, "int8", base=1, held_crc32=crc).record.crc32 == crc
    with pytest.raises(CorruptError, match="not what the aggregator takes it for"):
        pulled(folder, 3, "int8", base=2, held_crc32=crc ^ 1)
    assert folder.held is None


def test_a_download_begins_although_a_full_disk_has_stopped_one_before(tmp_path, monkeypatch):
    folder = ModelFolder(tmp_path)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedgrpc.storage.files.RecycledFiles.create", fail)
        for _ in range(2):
            with pytest.raises(StorageError, match="No space left"):
                pulled(folder, 1, "raw")
    assert pulled(folder, 1, "raw").version == 1


def test_a_held_model_that_cannot_be_read_now_is_there_at_the_next_start(tmp_path, monkeypatch):
    pulled(ModelFolder(tmp_path), 1, "raw")

    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        assert ModelFolder(tmp_path).held is None
    assert ModelFolder(tmp_path).held.version == 1


def test_a_folder_that_was_deleted_meanwhile_is_begun_anew(tmp_path):
    folder = ModelFolder(tmp_path / "model")
    pulled(folder, 1, "raw")
    pulled(folder, 2, "raw")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(CorruptError, match="gone"):
        folder.check_held()
    try:
        pulled(folder, 3, "raw")
    except StorageError:
        # Files that were to be written over are gone, too; it is known now.
        pulled(folder, 3, "raw")
    assert folder.held.version == 3
