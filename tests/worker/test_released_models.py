"""Released versions on a device's disk: whole or not there, whatever a crash has left."""

import hashlib
import io

import numpy as np
import pytest

from fedgrpc.codec.chunk import chunks
from fedgrpc.codec.digest import digest_of
from fedgrpc.codec.payload import buffer_reader, write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import CorruptError, LayoutError
from fedgrpc.protocol.tensors import manifest_to_proto
from fedgrpc.v1.aggregator_pb2 import ModelHeader
from fedgrpc.worker.held_model import Source
from fedgrpc.worker.released_models import ReleasedModels


def fetch(models, version, run="run-1", whole=True, identity=None):
    """Download a version of one tensor, or half of it."""
    out = io.BytesIO()
    manifest = write_payload(
        {"w": np.full(50_000, version, np.float32)}, Recipe.parse("raw"), out, np.random.default_rng(0)
    )
    folder = models.folder_of(run, version)
    sha256 = hashlib.sha256(out.getvalue()).digest() if identity is None else identity
    header = ModelHeader(version=version, manifest=manifest_to_proto(manifest), sha256=sha256)
    partial = folder.open_partial(Source(run, version), header, 0)
    pieces = list(chunks(buffer_reader(out.getvalue()), manifest.size_bytes))
    partial.append(pieces if whole else pieces[:1])
    partial.close()
    return folder.finish(partial) if whole else None


def released(folder, *versions):
    models = ReleasedModels(folder)
    for number, version in enumerate(versions, 1):
        fetch(models, version)
        models.publish("cars", "run-1", version, number)
    return models


def content_of(served):
    manifest, file = served.model.open_raw()
    with file:
        data = file.read()
    assert digest_of(data) == manifest.digest
    return np.frombuffer(data, np.float32)[0]


def test_a_published_version_is_served_by_name_and_id_and_after_a_restart(tmp_path):
    models = released(tmp_path, 3)
    for again in (models, ReleasedModels(tmp_path)):
        for name in ("", "cars", "run-1"):
            served = again.served(name)
            assert (served.version, served.release, content_of(served)) == (3, 1, 3.0)
        assert again.served("other") is None


@pytest.mark.parametrize("identity", [b"", bytes(32)])
def test_a_version_that_is_not_the_one_of_its_sha256_is_not_kept(tmp_path, identity):
    models = ReleasedModels(tmp_path)
    with pytest.raises(CorruptError):
        fetch(models, 3, identity=identity)
    assert models.whole("run-1", 3) is None
    assert not models.folder_of("run-1", 3).has_partial


def test_the_version_before_stays_for_the_way_back_and_older_ones_go(tmp_path):
    models = released(tmp_path, 3, 5, 7)
    assert models.whole("run-1", 5) is not None
    assert models.whole("run-1", 3) is None
    assert sorted(path.name for path in (tmp_path / "run-1").iterdir()) == ["00000005", "00000007", "release"]
    again = ReleasedModels(tmp_path)
    again.publish("cars", "run-1", 5, 4)
    assert content_of(again.served()) == 5.0
    assert again.whole("run-1", 7) is not None


def test_what_is_read_stays_readable_when_another_version_is_served(tmp_path):
    models = released(tmp_path, 3)
    _, file = models.served().model.open_raw()
    with file:
        for version in (5, 7):
            fetch(models, version)
            models.publish("cars", "run-1", version, version)
        assert np.frombuffer(file.read(), np.float32)[0] == 3.0


def test_half_a_download_is_not_served_and_goes_on_after_a_restart(tmp_path):
    models = released(tmp_path, 3)
    fetch(models, 5, whole=False)
    assert models.whole("run-1", 5) is None
    assert content_of(ReleasedModels(tmp_path).served()) == 3.0


@pytest.mark.parametrize("damage", ["payload", "model.pb", "release"])
def test_a_damaged_version_is_not_served(tmp_path, damage):
    released(tmp_path, 3)
    (path,) = [path for path in tmp_path.rglob(damage) if path.is_file()]
    path.write_bytes(b"\xff" * path.stat().st_size)
    served = ReleasedModels(tmp_path).served()
    assert served is None or served.model is None


def test_a_withdrawn_release_leaves_nothing(tmp_path):
    models = released(tmp_path, 3)
    models.withdraw("run-1")
    assert models.served() is None
    assert list(tmp_path.iterdir()) == []
    assert ReleasedModels(tmp_path).run_ids == []


@pytest.mark.parametrize("run", ["", "..", "a/b", "x" * 65, "a b"])
def test_no_id_of_a_run_names_another_folder(tmp_path, run):
    with pytest.raises(LayoutError):
        ReleasedModels(tmp_path).folder_of(run, 1)


def test_the_releases_of_many_runs_are_bounded(tmp_path):
    models = ReleasedModels(tmp_path)
    for number in range(64):
        models.folder_of(f"run-{number}", 1)
    with pytest.raises(LayoutError, match="at most"):
        models.folder_of("run-64", 1)
