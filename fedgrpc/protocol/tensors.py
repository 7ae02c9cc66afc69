"""Tensors on the wire: layouts, manifests, chunks, and the channels of a model.

Every `*_from_proto` raises `LayoutError` for what no honest peer sends (unknown dtypes, encodings and
compressions) and `TooLargeError` for a manifest over the limits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

from fedgrpc.codec.chunk import Chunk
from fedgrpc.codec.encoding import parse_encoding
from fedgrpc.codec.layout import Layout, TensorRole, TensorSpec, check_unique, role_by_name
from fedgrpc.codec.manifest import Frame, Limits, Manifest, TensorEntry, check_entries
from fedgrpc.errors import LayoutError, TooLargeError, UsageError
from fedgrpc.submodels.channels import Axis, ChannelGroup, ChannelMap, Segment
from fedgrpc.submodels.layer_cost import LayerCost
from fedgrpc.v1 import tensor_pb2

_DTYPE_NAMES: Final[dict[int, str]] = {
    number: name.removeprefix("DTYPE_").lower()
    for name, number in tensor_pb2.Dtype.items()
    if number != tensor_pb2.DTYPE_UNSPECIFIED
}
_DTYPE_NUMBERS: Final[dict[str, Any]] = {name: number for number, name in _DTYPE_NAMES.items()}
_ROLES: Final[dict[int, TensorRole]] = {
    number: TensorRole(name.removeprefix("TENSOR_ROLE_").lower())
    for name, number in tensor_pb2.TensorRole.items()
    if number != tensor_pb2.TENSOR_ROLE_UNSPECIFIED
}
_ROLE_NUMBERS: Final[dict[TensorRole, Any]] = {role: number for number, role in _ROLES.items()}
_COMPRESSION_NAMES: Final[dict[int, str]] = {
    tensor_pb2.COMPRESSION_NONE: "none",
    tensor_pb2.COMPRESSION_ZSTD: "zstd",
}
_COMPRESSION_NUMBERS: Final[dict[str, Any]] = {name: number for number, name in _COMPRESSION_NAMES.items()}
# Lists of tensors that are kept parsed, and up to which size each.
_KNOWN_LISTS: Final = 16
_KNOWN_LIST_BYTES: Final = 64 << 10
_NO_TENSORS: Final = Manifest.of_nothing()


def dtype_to_proto(name: str) -> Any:
    """Return the number of a dtype ("float32", "bfloat16", ...)."""
    if name not in _DTYPE_NUMBERS:
        raise LayoutError(f"dtype {name!r} has no number on the wire")
    return _DTYPE_NUMBERS[name]


def dtype_from_proto(number: int) -> str:
    """Return the name of a dtype's number."""
    if number not in _DTYPE_NAMES:
        raise LayoutError(f"unknown dtype number {number}")
    return _DTYPE_NAMES[number]


def compression_from_proto(number: int) -> str:
    """Return "none" or "zstd"."""
    if number not in _COMPRESSION_NAMES:
        raise LayoutError(f"unknown compression number {number}")
    return _COMPRESSION_NAMES[number]


def spec_to_proto(spec: TensorSpec) -> tensor_pb2.TensorSpec:
    """Return the message of one tensor. A parameter's role is left out where its name implies it."""
    message = tensor_pb2.TensorSpec(name=spec.name, dtype=dtype_to_proto(spec.dtype), shape=spec.shape)
    if TensorRole.PARAMETER is not spec.role or TensorRole.PARAMETER is not role_by_name(spec.name):
        message.role = _ROLE_NUMBERS[spec.role]
    message.tied_names.extend(spec.tied_names)
    return message


def spec_from_proto(message: tensor_pb2.TensorSpec) -> TensorSpec:
    """Return one tensor. Without a role, its name implies it."""
    role = _ROLES.get(message.role) if message.role else role_by_name(message.name)
    if role is None:
        raise LayoutError(f"tensor {message.name!r} has the unknown role number {message.role}")
    tied = tuple(message.tied_names)
    return TensorSpec(message.name, dtype_from_proto(message.dtype), tuple(message.shape), role, tied)


def layout_to_proto(layout: Layout) -> list[tensor_pb2.TensorSpec]:
    """Return the messages of a layout, in order."""
    return [spec_to_proto(spec) for spec in layout]


def layout_from_proto(messages: Iterable[tensor_pb2.TensorSpec], max_dims: int = 16) -> Layout:
    """Return a layout, in order, with every spec valid and every name unique."""
    layout = tuple(spec_from_proto(message) for message in messages)
    for spec in layout:
        spec.validate(max_dims)
    check_unique(layout)
    return layout


def manifest_to_proto(manifest: Manifest) -> tensor_pb2.Manifest:
    """Return the message of a manifest."""
    message = tensor_pb2.Manifest()
    message.CopyFrom(_listed(manifest.entries))
    message.compression = _COMPRESSION_NUMBERS[manifest.compression]
    message.frames.extend(
        tensor_pb2.Frame(size_bytes=frame.size_bytes, content_size_bytes=frame.content_size_bytes)
        for frame in manifest.frames
    )
    message.size_bytes, message.digest = manifest.size_bytes, manifest.digest
    return message


@lru_cache(maxsize=_KNOWN_LISTS)
def _listed(entries: tuple[TensorEntry, ...]) -> tensor_pb2.Manifest:
    """Return a manifest of tensors alone. Callers copy it: all payloads of a run begin with the same."""
    return tensor_pb2.Manifest(
        entries=[
            tensor_pb2.TensorEntry(
                tensor=spec_to_proto(entry.spec),
                encoding=tensor_pb2.Encoding(spec=str(entry.encoding)),
                size_bytes=entry.size_bytes,
            )
            for entry in entries
        ]
    )


def manifest_from_proto(message: tensor_pb2.Manifest, limits: Limits | None = None) -> Manifest:
    """Return a manifest within `limits`. A message that is not set declares no tensors."""
    if message == tensor_pb2.Manifest():
        return _NO_TENSORS
    limits = limits or Limits()
    # Count before parsing, which takes a hundred times as long.
    for listed, most, what in (
        (message.entries, limits.max_tensors, "tensors"),
        (message.frames, limits.max_frames, "frames"),
    ):
        if len(listed) > most:
            raise TooLargeError(f"the manifest declares {len(listed)} {what}, the limit is {most}")
    manifest = Manifest(
        _entries_from_proto(message, limits.max_dims),
        compression_from_proto(message.compression),
        tuple(Frame(frame.size_bytes, frame.content_size_bytes) for frame in message.frames),
        message.size_bytes,
        message.digest,
    )
    manifest.validate_sizes(limits)
    return manifest


def _entries_from_proto(message: tensor_pb2.Manifest, max_dims: int) -> tuple[TensorEntry, ...]:
    """Parse and check the tensors, once for all payloads of a run, which list the same."""
    listed = tensor_pb2.Manifest()
    listed.CopyFrom(message)
    for rest in ("compression", "frames", "size_bytes", "digest"):
        listed.ClearField(rest)
    text = listed.SerializeToString()
    if len(text) > _KNOWN_LIST_BYTES:
        return _checked_entries(listed, max_dims)
    return _known_entries(text, max_dims)


@lru_cache(maxsize=_KNOWN_LISTS)
def _known_entries(text: bytes, max_dims: int) -> tuple[TensorEntry, ...]:
    return _checked_entries(tensor_pb2.Manifest.FromString(text), max_dims)


def _checked_entries(listed: tensor_pb2.Manifest, max_dims: int) -> tuple[TensorEntry, ...]:
    entries = tuple(_parsed_entry(entry) for entry in listed.entries)
    check_entries(entries, max_dims)
    return entries


def _parsed_entry(message: tensor_pb2.TensorEntry) -> TensorEntry:
    try:
        encoding = parse_encoding(message.encoding.spec)
    except UsageError as error:
        raise LayoutError(f"tensor {message.tensor.name!r}: {error}") from error
    return TensorEntry(spec_from_proto(message.tensor), encoding, message.size_bytes)


def chunk_to_proto(chunk: Chunk) -> tensor_pb2.Chunk:
    """Return the message of a chunk."""
    data = chunk.data if isinstance(chunk.data, bytes) else bytes(chunk.data)
    return tensor_pb2.Chunk(offset=chunk.offset, data=data, crc32=chunk.crc32)


def chunk_from_proto(message: tensor_pb2.Chunk) -> Chunk:
    """Return a chunk, not yet verified (`fedgrpc.codec.chunk.check_chunk`)."""
    return Chunk(message.offset, message.data, message.crc32)


def channels_to_proto(channel_map: ChannelMap) -> tensor_pb2.ChannelMap:
    """Return the message of a model's channels."""
    message = tensor_pb2.ChannelMap()
    for group in channel_map.groups:
        message.groups.add(channels=group.channels, blocks=group.blocks, rank=group.rank)
    for name, axes in channel_map.tensors.items():
        for axis in axes:
            segments = message.tensors[name].axes.add().segments
            for segment in axis:
                segments.add(group=0 if segment.group is None else segment.group + 1, repeat=segment.repeat)
    message.blocks.update(channel_map.blocks)
    for cost in channel_map.costs:
        message.costs.add(**dataclasses.asdict(cost))
    return message


def channels_from_proto(message: tensor_pb2.ChannelMap) -> ChannelMap:
    """Return the channels of a model, not yet compared with its tensors (`ChannelMap.validate`)."""
    groups = tuple(ChannelGroup(group.channels, group.blocks, group.rank) for group in message.groups)
    tensors = {name: tuple(_axis(axis) for axis in axes.axes) for name, axes in message.tensors.items()}
    costs = tuple(
        LayerCost(*(getattr(cost, each.name) for each in dataclasses.fields(LayerCost))) for cost in message.costs
    )
    return ChannelMap(groups, tensors, dict(message.blocks), costs)


def _axis(message: tensor_pb2.ChannelAxis) -> Axis:
    return tuple(
        Segment(segment.group - 1 if segment.group else None, segment.repeat) for segment in message.segments
    )
