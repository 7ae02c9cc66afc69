"""The model that a worker holds: read as a whole, or a tensor at a time, also once a newer one has come."""

import io
import zlib

import numpy as np

from fedgrpc.codec.chunk import Chunk
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.rpc.convert import manifest_to_proto
from fedgrpc.v1.aggregator_pb2 import ModelHeader
from fedgrpc.worker.held import ModelFolder, Source


def model(version):
    return {
        "w": np.full((40, 50), version, np.float32),
        "n": np.array(version),
        "none": np.zeros((0, 3), np.float32),
    }


def pulled(folder, version, recipe):
    """Version `version` as it is once its download is whole."""
    out = io.BytesIO()
    manifest = write_payload(model(version), Recipe.parse(recipe), out, np.random.default_rng(0))
    header = ModelHeader(version=version, manifest=manifest_to_proto(manifest))
    partial = folder.open_partial(Source("run", version, recipe), header, 0)
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
