"""Hand-framed messages against the generated classes: the same wire format, in both directions."""

import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedgrpc.codec.chunk import Chunk
from fedgrpc.rpc import framing
from fedgrpc.v1 import aggregator_pb2, tensor_pb2, worker_pb2

CARRIERS = [
    aggregator_pb2.PullModelResponse,
    aggregator_pb2.PushUpdateRequest,
    worker_pb2.WorkerPullModelResponse,
]
offsets = st.one_of(st.integers(0, 1 << 20), st.integers(0, (1 << 64) - 1))
datas = st.one_of(st.binary(max_size=300), st.integers(0, 1 << 15).map(bytes))
crcs = st.integers(0, (1 << 32) - 1)
READ_PUSH = framing._reader(aggregator_pb2.PushUpdateRequest)


def equal(chunk, offset, data, crc32):
    return (chunk.offset, bytes(chunk.data), chunk.crc32) == (offset, data, crc32)


@pytest.mark.parametrize("carrier", CARRIERS)
@given(offsets, datas, crcs)
@example(0, b"", 0)
@example(127, b"x" * 127, 1)
@example(128, b"x" * 128, (1 << 32) - 1)
@example((1 << 64) - 1, b"x" * 16384, 0)
def test_what_is_framed_by_hand_is_what_protobuf_writes(carrier, offset, data, crc32):
    framed = framing.message_of(Chunk(offset, data, crc32))
    message = carrier(chunk={"offset": offset, "data": data, "crc32": crc32})
    assert framed == message.SerializeToString(deterministic=True)
    assert equal(carrier.FromString(framed).chunk, offset, data, crc32)


@pytest.mark.parametrize("carrier", CARRIERS)
@given(offsets, datas, crcs)
@example(0, b"", 0)
def test_what_protobuf_writes_is_read_by_hand(carrier, offset, data, crc32):
    message = carrier(chunk={"offset": offset, "data": data, "crc32": crc32}).SerializeToString()
    parsed = framing.parse(message)
    assert parsed is not None
    assert equal(parsed, offset, data, crc32)


@given(datas, offsets)
def test_the_data_of_a_parsed_chunk_is_a_view_and_no_copy(data, offset):
    message = framing.message_of(Chunk(offset, memoryview(data), zlib.crc32(data)))
    parsed = framing.parse(message)
    parsed.verify()
    assert isinstance(parsed.data, memoryview)
    assert not data or parsed.data.obj is message


def test_every_other_form_of_a_message_is_left_to_protobuf():
    header = aggregator_pb2.PullModelResponse(header={"version": 3}).SerializeToString()
    assert framing.parse(header) is None
    assert framing.parse(b"") is None
    chunk = tensor_pb2.Chunk(offset=5, data=b"abc", crc32=7)
    turned = b"".join([b"\x1d\x07\x00\x00\x00", b"\x12\x03abc", b"\x08\x05"])
    assert tensor_pb2.Chunk.FromString(turned) == chunk
    message = b"\x12" + bytes([len(turned)]) + turned
    assert framing.parse(message) is None
    # The stream's reader understands it all the same.
    assert equal(READ_PUSH(message), 5, b"abc", 7)
    unknown = chunk.SerializeToString() + b"\x78\x01"
    message = b"\x12" + bytes([len(unknown)]) + unknown
    assert framing.parse(message) is None
    assert equal(READ_PUSH(message), 5, b"abc", 7)


@given(st.binary(max_size=60))
def test_garbage_is_refused_by_both_or_means_the_same_to_both(garbage):
    for message in (garbage, b"\x12" + garbage, b"\x12" + bytes([len(garbage)]) + garbage):
        parsed = framing.parse(message)
        if parsed is not None:
            assert equal(
                aggregator_pb2.PushUpdateRequest.FromString(message).chunk,
                parsed.offset,
                bytes(parsed.data),
                parsed.crc32,
            )
