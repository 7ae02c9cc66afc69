"""Chunk messages framed by hand: the bytes that protobuf would write, without protobuf's copies of `data`.

The messages that carry payloads have a chunk as field 2: `PullModelResponse`, `PullVersionResponse`,
`WorkerPullModelResponse` and `PushUpdateRequest`. On the wire such a message is (https://protobuf.dev/programming-guides/encoding/):

    12 LENGTH               field 2 of the message: the chunk
       08 OFFSET            varint; absent when 0
       12 LENGTH DATA       absent when empty
       1d CRC32             4 bytes, little-endian; absent when 0

`message_of` writes exactly what the generated classes serialize. `parse` reads this form alone. The generated
classes read everything else (headers, other orders of fields, unknown fields), so any peer is understood.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final, Protocol

import grpc
import grpc.aio

from fedgrpc.codec.chunk import FIRST_CHUNK_BYTES, Chunk
from fedgrpc.errors import TooLargeError
from fedgrpc.protocol.tensors import chunk_from_proto
from fedgrpc.rpc.channel import MAX_MESSAGE_BYTES
from fedgrpc.rpc.requests import bounded, parsed
from fedgrpc.v1 import (
    aggregator_pb2,
    aggregator_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

_AGGREGATOR: Final = "fedgrpc.v1.Aggregator"
_MODELS: Final = "fedgrpc.v1.Models"
_WORKER: Final = "fedgrpc.v1.Worker"
# Their messages are as large as a chunk or a manifest. This module bounds them.
LARGE_CALLS: Final = frozenset({f"/{_AGGREGATOR}/PushUpdate", f"/{_AGGREGATOR}/DescribeModel"})
# Initial metadata of a side stream whose chunks are read.
SIDE_KEY: Final = "fedgrpc-side"
_CHUNK_TAG: Final = 0x12
_OFFSET_TAG: Final = 0x08
_DATA_TAG: Final = 0x12
_CRC_TAG: Final = 0x1D
_ANSWER_TAG: Final = b"\x0a"
_MODEL_TAG: Final = b"\x22"
_CRC: Final = struct.Struct("<BI")
_MAX_VARINT_BYTES: Final = 10
_CHUNK_BESIDE_BYTES: Final = 32


class _Message(Protocol):
    def SerializeToString(self) -> bytes: ...  # noqa: N802


def message_of(chunk: Chunk) -> bytes:
    """Return the serialized message around `chunk`. This is the only copy of its data."""
    size = len(chunk.data)
    before = b"" if not chunk.offset else b"\x08" + _varint(chunk.offset)
    if size:
        before += b"\x12" + _varint(size)
    after = _CRC.pack(_CRC_TAG, chunk.crc32) if chunk.crc32 else b""
    head = b"\x12" + _varint(len(before) + size + len(after)) + before
    return b"".join((head, chunk.data, after))


def polled(answer: _Message, model: bytes) -> bytes:
    """Return a `PollTasksResponse` with an answer and the `TaskModel`, serialized, that comes along; b"": none."""
    # Fields of a message may come in any number of pieces, so the model is copied once.
    fields = answer.SerializeToString()
    added = _MODEL_TAG + _varint(len(model)) if model else b""
    size = _varint(len(fields) + len(added) + len(model))
    return b"".join((_ANSWER_TAG, size, fields, added, model))


def parse(message: bytes) -> Chunk | None:
    """Return the chunk in a serialized message, its data a view of the message. None for any other form."""
    try:
        return _parse(message)
    except IndexError:
        return None


def _parse(message: bytes) -> Chunk | None:
    if message[0] != _CHUNK_TAG:
        return None
    size, at = _read_varint(message, 1)
    if at + size != len(message):
        return None
    offset, data, crc32 = 0, memoryview(b""), 0
    if at < len(message) and message[at] == _OFFSET_TAG:
        offset, at = _read_varint(message, at + 1)
    if at < len(message) and message[at] == _DATA_TAG:
        size, at = _read_varint(message, at + 1)
        data = memoryview(message)[at : at + size]
        at += size
    if at + _CRC.size == len(message) and message[at] == _CRC_TAG:
        _, crc32 = _CRC.unpack_from(message, at)
        at += _CRC.size
    return Chunk(offset, data, crc32) if at == len(message) and offset < 1 << 64 else None


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the value and the position after it. Raises IndexError if the message ends within, or at 10 bytes."""
    value = 0
    for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError("a varint of more than 10 bytes")


def to_wire(message: bytes | _Message) -> bytes:
    """Serializer of streams: return bytes as they are, and serialize messages."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def _any_message() -> int:
    return MAX_MESSAGE_BYTES


def _reader(message_class: Any, max_bytes: Callable[[], int] = _any_message) -> Callable[[bytes], Any]:
    """Return a deserializer of streams: to a `Chunk` if the message holds one, else to the message.

    A message without a chunk has at most `max_bytes()`: raises `TooLargeError` before anything is parsed, and
    `LayoutError` for bytes that are no such message.
    """

    def from_wire(data: bytes) -> Any:
        chunk = parse(data)
        if chunk is not None:
            return chunk
        if (size_bytes := len(data)) > (limit := max_bytes()):
            # The error's traceback would keep the bytes alive while the error lives.
            del data
            raise TooLargeError(f"a header of {size_bytes} bytes; allowed are {limit}")
        message = parsed(message_class.FromString, data)
        return chunk_from_proto(message.chunk) if message.WhichOneof("content") == "chunk" else message

    return from_wire


_pull_response = _reader(aggregator_pb2.PullModelResponse)
_version_response = _reader(models_pb2.PullVersionResponse)
_served_response = _reader(worker_pb2.WorkerPullModelResponse)


push_request = _reader(aggregator_pb2.PushUpdateRequest)


def pull_model(channel: grpc.aio.Channel) -> Any:
    """Return the aggregator's `PullModel`, whose stream yields the header's message, then each `Chunk`."""
    return channel.unary_stream(
        f"/{_AGGREGATOR}/PullModel", aggregator_pb2.PullModelRequest.SerializeToString, _pull_response
    )


def pull_version(channel: grpc.aio.Channel) -> Any:
    """Return the aggregator's `PullVersion`, whose stream yields the header's message, then each `Chunk`."""
    return channel.unary_stream(
        f"/{_MODELS}/PullVersion", models_pb2.PullVersionRequest.SerializeToString, _version_response
    )


def pull_served(channel: grpc.aio.Channel) -> Any:
    """Return the worker's `PullModel`, whose stream yields the header's message, then each `Chunk`."""
    return channel.unary_stream(
        f"/{_WORKER}/PullModel", worker_pb2.WorkerPullModelRequest.SerializeToString, _served_response
    )


def push_update(channel: grpc.aio.Channel) -> Any:
    """Return the aggregator's `PushUpdate`, whose stream takes the header's message, then chunk messages."""
    return channel.stream_unary(
        f"/{_AGGREGATOR}/PushUpdate", to_wire, aggregator_pb2.PushUpdateResponse.FromString
    )


def push_whole(channel: grpc.aio.Channel) -> Any:
    """Return the aggregator's `PushUpdate` for an update in one message: on the wire, a stream of one."""
    return channel.unary_unary(
        f"/{_AGGREGATOR}/PushUpdate",
        aggregator_pb2.PushUpdateRequest.SerializeToString,
        aggregator_pb2.PushUpdateResponse.FromString,
    )


def add_aggregator(
    servicer: aggregator_pb2_grpc.AggregatorServicer,
    server: grpc.aio.Server,
    max_header_bytes: Callable[[], int] = _any_message,
) -> None:
    """Serve `servicer`: its `PushUpdate` gets each `Chunk`, its `PullModel` may yield chunk messages.

    Its `WatchRounds` may yield serialized messages, each made once for all who watch.
    """
    # A small update comes along with its header.
    push_request = _reader(
        aggregator_pb2.PushUpdateRequest, lambda: max_header_bytes() + FIRST_CHUNK_BYTES + _CHUNK_BESIDE_BYTES
    )
    aggregator_pb2_grpc.add_AggregatorServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    server.add_registered_method_handlers(
        _AGGREGATOR,
        {
            "PullModel": grpc.unary_stream_rpc_method_handler(
                servicer.PullModel, aggregator_pb2.PullModelRequest.FromString, to_wire
            ),
            "PollTasks": grpc.stream_stream_rpc_method_handler(
                servicer.PollTasks, aggregator_pb2.PollTasksRequest.FromString, to_wire
            ),
            "WatchRounds": grpc.unary_stream_rpc_method_handler(
                servicer.WatchRounds, aggregator_pb2.WatchRoundsRequest.FromString, to_wire
            ),
            "DescribeModel": grpc.unary_unary_rpc_method_handler(
                servicer.DescribeModel,
                lambda data: bounded(aggregator_pb2.DescribeModelRequest.FromString, max_header_bytes())(data),
                aggregator_pb2.DescribeModelResponse.SerializeToString,
            ),
            "PushUpdate": grpc.stream_unary_rpc_method_handler(
                servicer.PushUpdate, push_request, aggregator_pb2.PushUpdateResponse.SerializeToString
            ),
        },
    )


def add_models(servicer: models_pb2_grpc.ModelsServicer, server: grpc.aio.Server) -> None:
    """Serve `servicer`: its `PullVersion` may yield serialized messages."""
    models_pb2_grpc.add_ModelsServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    pull = grpc.unary_stream_rpc_method_handler(
        servicer.PullVersion, models_pb2.PullVersionRequest.FromString, to_wire
    )
    server.add_registered_method_handlers(_MODELS, {"PullVersion": pull})


def add_worker(servicer: worker_pb2_grpc.WorkerServicer, server: grpc.aio.Server) -> None:
    """Serve `servicer`: its `PullModel` may yield chunk messages."""
    worker_pb2_grpc.add_WorkerServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    pull = grpc.unary_stream_rpc_method_handler(
        servicer.PullModel, worker_pb2.WorkerPullModelRequest.FromString, to_wire
    )
    server.add_registered_method_handlers(_WORKER, {"PullModel": pull})
