import io

import numpy as np
import pytest

from fedgrpc.codec.chunk import Chunk, chunks
from fedgrpc.codec.layout import DTYPE_NAMES, TensorSpec, layout_of
from fedgrpc.codec.manifest import Limits
from fedgrpc.codec.payload import buffer_reader, write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import LayoutError, TooLargeError
from fedgrpc.protocol import tensors
from fedgrpc.v1 import tensor_pb2


def payload(recipe="int8+zstd"):
    rng = np.random.default_rng(0)
    tensors = {
        "weight": rng.normal(size=(300, 40)).astype(np.float32),
        "steps": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }
    out = io.BytesIO()
    return write_payload(tensors, Recipe.parse(recipe), out, rng), out.getvalue()


def through_the_wire(message):
    return type(message).FromString(message.SerializeToString())


def test_every_dtype_of_the_codec_has_its_number_and_comes_back():
    numbers = {tensors.dtype_to_proto(name) for name in DTYPE_NAMES}
    assert numbers == set(tensor_pb2.Dtype.values()) - {tensor_pb2.DTYPE_UNSPECIFIED}
    assert [tensors.dtype_from_proto(tensors.dtype_to_proto(name)) for name in DTYPE_NAMES] == list(DTYPE_NAMES)


@pytest.mark.parametrize("number", [0, 99])
def test_an_unknown_dtype_is_refused(number):
    with pytest.raises(LayoutError, match="dtype"):
        tensors.layout_from_proto([tensor_pb2.TensorSpec(name="w", dtype=number)])


@pytest.mark.parametrize("recipe", ["raw", "raw+zstd", "int8+zstd", "float16"])
def test_a_manifest_comes_back_equal(recipe):
    manifest, _ = payload(recipe)
    assert tensors.manifest_from_proto(through_the_wire(tensors.manifest_to_proto(manifest))) == manifest


def test_a_list_of_tensors_that_is_known_is_held_to_the_limits_of_each_who_reads_it():
    message = tensors.manifest_to_proto(payload()[0])
    known = tensors.manifest_from_proto(message)
    for limits in (Limits(max_tensors=1), Limits(max_decoded_bytes=1)):
        with pytest.raises(TooLargeError):
            tensors.manifest_from_proto(message, limits)
    with pytest.raises(LayoutError, match="dimensions"):
        tensors.manifest_from_proto(message, Limits(max_dims=1))
    assert tensors.manifest_from_proto(message) == known


def test_writing_into_a_message_changes_no_other_of_the_same_tensors():
    manifest, _ = payload()
    tensors.manifest_to_proto(manifest).entries[0].size_bytes += 1
    assert tensors.manifest_from_proto(tensors.manifest_to_proto(manifest)) == manifest


def test_a_manifest_that_is_not_set_declares_no_tensors():
    empty = write_payload({}, Recipe.parse("raw"), io.BytesIO(), np.random.default_rng(0))
    assert tensors.manifest_from_proto(tensor_pb2.Manifest()) == empty


def test_an_unknown_encoding_is_refused_with_the_tensor_it_is_for():
    message = tensors.manifest_to_proto(payload()[0])
    message.entries[0].encoding.spec = "telepathy"
    with pytest.raises(LayoutError, match=r"weight.*telepathy"):
        tensors.manifest_from_proto(message)


@pytest.mark.parametrize("number", [0, 77])
def test_an_unknown_compression_is_refused(number):
    message = tensors.manifest_to_proto(payload()[0])
    message.compression = number
    with pytest.raises(LayoutError, match="compression"):
        tensors.manifest_from_proto(message)


def test_a_manifest_over_a_limit_is_refused():
    message = tensors.manifest_to_proto(payload()[0])
    with pytest.raises(TooLargeError):
        tensors.manifest_from_proto(message, Limits(max_payload_bytes=100))


def test_a_layout_comes_back_equal_and_names_each_tensor_once():
    layout = layout_of({"a": np.zeros((2, 3), np.float32), "b": np.zeros((), np.bool_)})
    messages = tensors.layout_to_proto(layout)
    assert tensors.layout_from_proto(messages) == layout
    with pytest.raises(LayoutError, match="twice"):
        tensors.layout_from_proto([messages[0], messages[0]])


def test_a_shape_that_no_machine_could_hold_is_refused():
    spec = TensorSpec("w", "float32", (2**40, 2**40))
    with pytest.raises(LayoutError, match="shape"):
        tensors.layout_from_proto([tensors.spec_to_proto(spec)])


def test_chunks_come_back_equal_whatever_buffer_they_are_cut_from():
    manifest, data = payload()
    for chunk in chunks(buffer_reader(data), manifest.size_bytes, chunk_bytes=1000):
        back = tensors.chunk_from_proto(through_the_wire(tensors.chunk_to_proto(chunk)))
        assert back == Chunk(chunk.offset, bytes(chunk.data), chunk.crc32)
