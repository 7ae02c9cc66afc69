"""Updates for the tests of this folder: encoded, with their header, in a journal."""

import io
import zlib

import numpy as np

from fedgrpc.codec.chunk import Chunk
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.protocol.tensors import manifest_to_proto
from fedgrpc.v1.aggregator_pb2 import UpdateHeader


def encoded(tensors, recipe="raw"):
    """(manifest, payload)."""
    out = io.BytesIO()
    manifest = write_payload(tensors, Recipe.parse(recipe), out, np.random.default_rng(1))
    return manifest, out.getvalue()


def header_of(manifest, token="token", **values):
    return UpdateHeader(worker="a", token=token, manifest=manifest_to_proto(manifest), example_count=5, **values)


def chunk(payload, start, stop):
    data = payload[start:stop]
    return Chunk(start, data, zlib.crc32(data))


def accept(journal, token, tensors, recipe="raw"):
    """An update as it lies in the journal once it is accepted."""
    manifest, payload = encoded(tensors, recipe)
    upload = journal.begin(header_of(manifest, token), manifest)
    if payload:
        upload.append([chunk(payload, 0, len(payload))])
    upload.finish()
    upload.seal()
    upload.close()
    return journal.load(token)
