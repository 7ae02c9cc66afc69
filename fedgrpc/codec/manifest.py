"""Manifests: what a payload declares about itself, and the checks on that before any memory is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedgrpc.codec.digest import DIGEST_BYTES, digest_of
from fedgrpc.codec.encoding import Encoding
from fedgrpc.codec.layout import Layout, TensorSpec, check_unique
from fedgrpc.errors import LayoutError, TooLargeError

GIB = 1 << 30


@dataclass(frozen=True)
class Limits:
    """Bounds that a receiver sets, in bytes.

    `max_payload_bytes` bounds the bytes on the wire, `max_content_bytes` the encoded tensors after inflation, and
    `max_decoded_bytes` the tensors themselves: a sparse tensor of few bytes may declare a huge shape.
    """

    max_payload_bytes: int = 4 * GIB
    max_content_bytes: int = 4 * GIB
    max_decoded_bytes: int = 16 * GIB
    max_tensors: int = 65536
    max_frames: int = 65536
    max_dims: int = 16
    max_frame_content_bytes: int = 8 << 20


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a payload: its spec, its encoding, and how many bytes of the content it takes."""

    spec: TensorSpec
    encoding: Encoding
    size_bytes: int


@dataclass(frozen=True)
class Frame:
    """One independent zstd frame: its bytes on the wire, and the bytes that it inflates to."""

    size_bytes: int
    content_size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """The declaration of a payload. `digest` and `size_bytes` are of the payload as it is on the wire.

    The content (encoded tensors end to end, in order) is cut into `frames`. With compression "none" the payload is
    the content itself and `frames` is empty. A payload without tensors is legal: an evaluation report.
    """

    entries: tuple[TensorEntry, ...]
    compression: str
    frames: tuple[Frame, ...]
    size_bytes: int
    digest: bytes

    @classmethod
    def of_nothing(cls) -> Manifest:
        """Return the manifest of a payload without tensors, which has no bytes."""
        return cls((), "none", (), 0, digest_of(b""))

    @property
    def layout(self) -> Layout:
        """Specs of all tensors, in order."""
        return tuple(entry.spec for entry in self.entries)

    @property
    def content_size_bytes(self) -> int:
        """Bytes of all encoded tensors, before compression."""
        return sum(entry.size_bytes for entry in self.entries)

    def validate(self, limits: Limits) -> None:
        """Raise TooLargeError for a value over a limit, LayoutError for parts that contradict each other."""
        check_entries(self.entries, limits.max_dims)
        self.validate_sizes(limits)

    def validate_sizes(self, limits: Limits) -> None:
        """Check the rest of `validate`, once `check_entries` has passed."""
        _at_most(len(self.entries), limits.max_tensors, "tensors")
        _at_most(len(self.frames), limits.max_frames, "frames")
        _at_most(self.size_bytes, limits.max_payload_bytes, "payload bytes")
        _at_most(self.content_size_bytes, limits.max_content_bytes, "content bytes")
        _at_most(sum(spec.nbytes for spec in self.layout), limits.max_decoded_bytes, "decoded bytes")
        self._check_frames(limits)
        if len(self.digest) != DIGEST_BYTES:
            raise LayoutError(f"the manifest's digest has {len(self.digest)} bytes, expected {DIGEST_BYTES}")

    def _check_frames(self, limits: Limits) -> None:
        if self.compression == "none":
            if self.frames:
                raise LayoutError("the manifest declares frames for a payload without compression")
            _must_equal(self.size_bytes, self.content_size_bytes, "payload", "tensors")
            return
        if self.compression != "zstd":
            raise LayoutError(f"unknown compression {self.compression!r}")
        if len(self.frames) > (most := most_frames(self.content_size_bytes)):
            raise LayoutError(f"the manifest declares {len(self.frames)} frames, for its content {most} at most")
        for frame in self.frames:
            if frame.size_bytes <= 0 or frame.content_size_bytes <= 0:
                raise LayoutError("the manifest declares an empty frame or one of negative size")
            _at_most(frame.content_size_bytes, limits.max_frame_content_bytes, "bytes in one frame")
            if frame.size_bytes > compress_bound(frame.content_size_bytes):
                raise LayoutError(
                    f"the manifest declares a frame of {frame.size_bytes} bytes for {frame.content_size_bytes} of "
                    f"content; zstd takes {compress_bound(frame.content_size_bytes)} at most"
                )
        _must_equal(self.size_bytes, sum(frame.size_bytes for frame in self.frames), "payload", "frames")
        inflated = sum(frame.content_size_bytes for frame in self.frames)
        _must_equal(self.content_size_bytes, inflated, "tensors", "inflated frames")


def compress_bound(content_size_bytes: int) -> int:
    """Return the most bytes that a zstd frame takes: ZSTD_compressBound of zstd.h."""
    short = max(0, (128 << 10) - content_size_bytes)
    return content_size_bytes + (content_size_bytes >> 8) + (short >> 11)


def most_frames(content_size_bytes: int) -> int:
    """Return how many frames the content may be cut into. So few make a payload hardly larger than its content."""
    return 64 + (content_size_bytes >> 10)


def check_entries(entries: Sequence[TensorEntry], max_dims: int) -> None:
    """Raise LayoutError for an impossible tensor, and for one that is named twice."""
    for entry in entries:
        _check_entry(entry, max_dims)
    check_unique(tuple(entry.spec for entry in entries))


def _check_entry(entry: TensorEntry, max_dims: int) -> None:
    entry.spec.validate(max_dims)
    least, most = entry.encoding.size_bounds(entry.spec)
    if not least <= entry.size_bytes <= most:
        raise LayoutError(
            f"tensor {entry.spec.name!r} declares {entry.size_bytes} bytes, "
            f"{entry.encoding} takes {least} to {most}"
        )


def _at_most(value: int, limit: int, what: str) -> None:
    if value > limit:
        raise TooLargeError(f"the manifest declares {value} {what}, the limit is {limit}")


def _must_equal(left: int, right: int, left_name: str, right_name: str) -> None:
    if left != right:
        raise LayoutError(f"the {left_name} take {left} bytes but the {right_name} {right}")
