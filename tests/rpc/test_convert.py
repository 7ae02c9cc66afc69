import io
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from fedgrpc.codec.chunk import Chunk, chunks
from fedgrpc.codec.layout import DTYPE_NAMES, TensorSpec, layout_of
from fedgrpc.codec.manifest import Limits
from fedgrpc.codec.payload import buffer_reader, write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import LayoutError, TooLargeError
from fedgrpc.rpc import convert
from fedgrpc.v1 import device_pb2, tensor_pb2


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
    numbers = {convert.dtype_to_proto(name) for name in DTYPE_NAMES}
    assert numbers == set(tensor_pb2.Dtype.values()) - {tensor_pb2.DTYPE_UNSPECIFIED}
    assert [convert.dtype_from_proto(convert.dtype_to_proto(name)) for name in DTYPE_NAMES] == list(DTYPE_NAMES)


@pytest.mark.parametrize("number", [0, 99])
def test_an_unknown_dtype_is_refused(number):
    with pytest.raises(LayoutError, match="dtype"):
        convert.layout_from_proto([tensor_pb2.TensorSpec(name="w", dtype=number)])


@pytest.mark.parametrize("recipe", ["raw", "raw+zstd", "int8+zstd", "float16"])
def test_a_manifest_comes_back_equal(recipe):
    manifest, _ = payload(recipe)
    assert convert.manifest_from_proto(through_the_wire(convert.manifest_to_proto(manifest))) == manifest


def test_a_list_of_tensors_that_is_known_is_held_to_the_limits_of_each_who_reads_it():
    message = convert.manifest_to_proto(payload()[0])
    known = convert.manifest_from_proto(message)
    for limits in (Limits(max_tensors=1), Limits(max_decoded_bytes=1)):
        with pytest.raises(TooLargeError):
            convert.manifest_from_proto(message, limits)
    with pytest.raises(LayoutError, match="dimensions"):
        convert.manifest_from_proto(message, Limits(max_dims=1))
    assert convert.manifest_from_proto(message) == known


def test_writing_into_a_message_changes_no_other_of_the_same_tensors():
    manifest, _ = payload()
    convert.manifest_to_proto(manifest).entries[0].size_bytes += 1
    assert convert.manifest_from_proto(convert.manifest_to_proto(manifest)) == manifest


def test_a_manifest_that_is_not_set_declares_no_tensors():
    empty = write_payload({}, Recipe.parse("raw"), io.BytesIO(), np.random.default_rng(0))
    assert convert.manifest_from_proto(tensor_pb2.Manifest()) == empty


def test_an_unknown_encoding_is_refused_with_the_tensor_it_is_for():
    message = convert.manifest_to_proto(payload()[0])
    message.entries[0].encoding.spec = "telepathy"
    with pytest.raises(LayoutError, match=r"weight.*telepathy"):
        convert.manifest_from_proto(message)


@pytest.mark.parametrize("number", [0, 77])
def test_an_unknown_compression_is_refused(number):
    message = convert.manifest_to_proto(payload()[0])
    message.compression = number
    with pytest.raises(LayoutError, match="compression"):
        convert.manifest_from_proto(message)


def test_a_manifest_over_a_limit_is_refused():
    message = convert.manifest_to_proto(payload()[0])
    with pytest.raises(TooLargeError):
        convert.manifest_from_proto(message, Limits(max_payload_bytes=100))


def test_a_layout_comes_back_equal_and_names_each_tensor_once():
    layout = layout_of({"a": np.zeros((2, 3), np.float32), "b": np.zeros((), np.bool_)})
    messages = convert.layout_to_proto(layout)
    assert convert.layout_from_proto(messages) == layout
    with pytest.raises(LayoutError, match="twice"):
        convert.layout_from_proto([messages[0], messages[0]])


def test_a_shape_that_no_machine_could_hold_is_refused():
    spec = TensorSpec("w", "float32", (2**40, 2**40))
    with pytest.raises(LayoutError, match="shape"):
        convert.layout_from_proto([convert.spec_to_proto(spec)])


def test_chunks_come_back_equal_whatever_buffer_they_are_cut_from():
    manifest, data = payload()
    for chunk in chunks(buffer_reader(data), manifest.size_bytes, chunk_bytes=1000):
        back = convert.chunk_from_proto(through_the_wire(convert.chunk_to_proto(chunk)))
        assert back == Chunk(chunk.offset, bytes(chunk.data), chunk.crc32)


@given(st.floats(0, 1e8))
def test_a_duration_comes_back_to_the_nanosecond(seconds):
    assert convert.duration_from_proto(convert.duration_to_proto(seconds)) == pytest.approx(
        seconds, abs=1e-8, rel=1e-9
    )


def test_a_duration_before_zero_is_written_correctly_and_read_as_zero():
    message = convert.duration_to_proto(-1.5)
    assert (message.seconds, message.nanos) == (-1, -500_000_000)
    assert convert.duration_from_proto(message) == 0


def test_timings_come_back_equal():
    timings = convert.Timings(1.5, 2.5, 3.5, 4.5)
    assert convert.timings_from_proto(convert.timings_to_proto(timings)) == timings


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf])
def test_an_impossible_timing_is_refused(seconds):
    with pytest.raises(LayoutError, match="timing"):
        convert.timings_from_proto(device_pb2.Timings(upload_seconds=seconds))


@pytest.mark.parametrize(
    "metrics", [{"loss": math.nan}, {"": 1.0}, {"x" * 65: 1.0}, {f"m{i}": 1.0 for i in range(65)}]
)
def test_metrics_without_a_short_name_and_a_finite_value_are_refused(metrics):
    with pytest.raises(LayoutError, match="metric"):
        convert.metrics_from_proto(metrics)
