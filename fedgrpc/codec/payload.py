"""Payloads: encoded tensors end to end, plain or in independent zstd frames, written and read as streams.

Writing holds one encoded tensor and one frame. Reading inflates only the frames that cover the wanted tensor and
keeps the last one. A frame never inflates past the size that the manifest declares for it.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import BinaryIO, Protocol

import numpy as np
import zstandard

from fedgrpc.codec.digest import new_digest
from fedgrpc.codec.encoding import Buffer, Encoding
from fedgrpc.codec.layout import Array, Layout, TensorRole, TensorSpec, spec_of
from fedgrpc.codec.manifest import Frame, Limits, Manifest, TensorEntry
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.recipe import Compression, Recipe
from fedgrpc.codec.uniform import Uniform
from fedgrpc.codec.values import Fill, InParts, Part, part_filled
from fedgrpc.errors import CorruptError, EncodeError

FRAME_CONTENT_BYTES = 1 << 20
# The end of a tensor closes a frame that holds at least this much, so that fewer tensors span two frames.
EARLY_CUT_BYTES = 512 << 10
# The window that RFC 8878 recommends every decoder to support, and the most that a frame may hold.
MAX_WINDOW_BYTES = 8 << 20
# Below this gain, inflating costs more time than the saved bytes are worth.
MIN_GAIN = 0.02

Read = Callable[[int, int], bytes | memoryview]
Submit = Callable[[Callable[[int], memoryview], int], "Result"]


def in_pieces(entry: TensorEntry) -> bool:
    """Return whether a tensor can be decoded a piece at a time, by `PayloadReader.fill_from`."""
    return _is_raw(entry) or (isinstance(entry.encoding, Uniform) and entry.spec.dtype == "float32")


def neighbours(manifest: Manifest) -> set[tuple[str, str]]:
    """Return the pairs of names of tensors that lie end to end in the payload as they do in memory.

    Both are floats of one dtype and role. So one read of the first (`PayloadReader.raw_place`) may run on into the
    second.
    """
    if manifest.compression != "none":
        return set()
    together = set()
    for (first, raw), (second, raw_too) in pairwise((entry.spec, _is_raw(entry)) for entry in manifest.entries):
        alike = first.is_float and first.dtype == second.dtype and first.role == second.role
        if raw and raw_too and alike and first.size and second.size:
            together.add((first.name, second.name))
    return together


def _is_raw(entry: TensorEntry) -> bool:
    return isinstance(entry.encoding, Raw) and not entry.encoding.shuffle


def write_payload(
    tensors: Mapping[str, Array],
    recipe: Recipe,
    out: BinaryIO,
    rng: np.random.Generator,
    known: Layout = (),
) -> Manifest:
    """Write all tensors to `out`, one at a time; `known` as in `layout_of`.

    Raises EncodeError that names the tensor which cannot be encoded.
    """
    writer = PayloadWriter(out, recipe.compression)
    by_name = {spec.name: spec for spec in known}
    for name, array in tensors.items():
        spec = spec_of(name, array, by_name.get(name))
        encoding, data = encode_tensor(spec, array, recipe.for_tensor(spec), rng)
        writer.add(spec, encoding, data)
    return writer.finish()


def encode_tensor(
    spec: TensorSpec, array: Array, encoding: Encoding, rng: np.random.Generator
) -> tuple[Encoding, Buffer]:
    """Encode one tensor, or leave it raw where that turns out no larger; return the encoding that it has."""
    # Only parameters must be finite: a mask may hold infinities.
    if isinstance(encoding, Raw) and spec.role is not TensorRole.PARAMETER:
        return encoding, encoding.encode_any(array)
    try:
        data = encoding.encode(array, rng)
        if not encoding.lossless and memoryview(data).nbytes >= spec.nbytes:
            encoding = Raw()
            data = encoding.encode(array, rng)
    except EncodeError as error:
        raise EncodeError(f"{spec.name}: {error}") from None
    return encoding, data


@contextmanager
def naming(spec: TensorSpec) -> Iterator[None]:
    """Context in which an EncodeError gets the name of the tensor."""
    try:
        yield
    except EncodeError as error:
        raise EncodeError(f"{spec.name}: {error}") from None


class Result(Protocol):
    """A result to wait for, such as a `concurrent.futures.Future`."""

    def result(self) -> memoryview: ...


class PayloadWriter:
    """Appends encoded tensors to a stream, and collects what becomes the manifest.

    The first frame decides whether the payload is compressed at all.
    """

    def __init__(self, out: BinaryIO, compression: Compression) -> None:
        self._out = out
        self._zstd = zstandard.ZstdCompressor(level=compression.level) if compression.method == "zstd" else None
        self._pending = bytearray()
        self._entries: list[TensorEntry] = []
        self._frames: list[Frame] = []
        self._digest = new_digest()
        self._size_bytes = 0

    def add(self, spec: TensorSpec, encoding: Encoding, data: Buffer) -> None:
        """Append one encoded tensor."""
        view = memoryview(data)
        # A view without elements cannot be cast.
        view = view.cast("B") if view.nbytes else memoryview(b"")
        self._entries.append(TensorEntry(spec, encoding, view.nbytes))
        # The first frame may switch compression off, which ends the loop.
        while self._zstd and len(self._pending) + view.nbytes >= FRAME_CONTENT_BYTES:
            room = FRAME_CONTENT_BYTES - len(self._pending)
            self._fill_frame(view[:room])
            view = view[room:]
        if not self._zstd:
            self._write(view)
            return
        self._pending += view
        if len(self._pending) >= EARLY_CUT_BYTES:
            self._fill_frame(memoryview(b""))

    def finish(self) -> Manifest:
        """Write what is pending and return the manifest. The writer cannot be used afterwards."""
        if self._pending:
            self._fill_frame(memoryview(b""))
        compression = "zstd" if self._zstd else "none"
        return Manifest(
            tuple(self._entries), compression, tuple(self._frames), self._size_bytes, self._digest.digest()
        )

    def _fill_frame(self, rest: memoryview) -> None:
        # A frame out of one tensor alone is compressed where it lies, without a copy.
        content: Buffer = rest
        if self._pending:
            self._pending += rest
            content, self._pending = self._pending, bytearray()
        size = memoryview(content).nbytes
        frame = self._zstd.compress(content) if self._zstd else content
        # Every frame holds a cut through all byte planes (see `shuffle`), so the first one is typical.
        if not self._frames and len(frame) > (1 - MIN_GAIN) * size:
            self._zstd = None
        if self._zstd is None:
            self._write(content)
            return
        self._frames.append(Frame(len(frame), size))
        self._write(frame)

    def _write(self, data: Buffer) -> None:
        self._out.write(data)
        self._digest.update(data)
        self._size_bytes += memoryview(data).nbytes


class PayloadReader:
    """Tensors of a payload by index or name, or all in order, one in memory at a time.

    `read(offset, size)` returns bytes of the payload, as those of `buffer_reader` and `file_reader` do. The
    manifest is validated first, unless `valid` is given. The digest is not checked here (see `verify_digest`). A
    decoded tensor may be a read-only view of a frame: copy it to change it. Use one reader per thread. With the
    `submit` of an executor, the next frame is inflated there while one is decoded.
    """

    def __init__(
        self,
        manifest: Manifest,
        read: Read,
        limits: Limits | None = None,
        *,
        valid: bool = False,
        submit: Submit | None = None,
    ) -> None:
        if not valid:
            manifest.validate(limits or Limits())
        self.manifest = manifest
        self._read = read
        self._submit = submit
        self._next: tuple[int, Result] | None = None
        self._index = {entry.spec.name: i for i, entry in enumerate(manifest.entries)}
        self._starts = list(accumulate((entry.size_bytes for entry in manifest.entries), initial=0))
        self._frame_starts = list(accumulate((f.content_size_bytes for f in manifest.frames), initial=0))
        self._frame_offsets = list(accumulate((f.size_bytes for f in manifest.frames), initial=0))
        self._zstd: zstandard.ZstdDecompressor | None = None
        self._held: tuple[int, memoryview] = (-1, memoryview(b""))

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors."""
        return self._index.keys()

    def __iter__(self) -> Iterator[tuple[TensorSpec, Array]]:
        for i, entry in enumerate(self.manifest.entries):
            yield entry.spec, self.tensor(i)

    def tensor(self, which: int | str) -> Array:
        """Decode one tensor. Raises CorruptError, LayoutError, or KeyError for an unknown name."""
        i = self._index[which] if isinstance(which, str) else which
        entry = self.manifest.entries[i]
        data = self._content(self._starts[i], entry.size_bytes)
        return entry.encoding.decode(data, entry.spec)

    def fill_from(self, name: str) -> Fill:
        """Return a function that decodes elements of a tensor that is `in_pieces`. It raises as `tensor` does."""
        i = self._index[name]
        entry = self.manifest.entries[i]
        assert isinstance(entry.encoding, Raw | Uniform)
        return entry.encoding.fill_from(lambda at, size: self._content(self._starts[i] + at, size), entry.spec)

    def bounds(self, name: str) -> Array | None:
        """Return numbers that no value of a quantized tensor exceeds; None where all values must be decoded.

        The whole tensor is inflated nevertheless, which proves its frames sound. Raises as `tensor` does.
        """
        i = self._index[name]
        entry, start = self.manifest.entries[i], self._starts[i]
        if not (isinstance(entry.encoding, Uniform) and in_pieces(entry)):
            return None
        bounds = entry.encoding.bounds_from(lambda at, size: self._content(start + at, size), entry.spec)
        if self.manifest.compression != "none":
            first = bisect_right(self._frame_starts, start) - 1
            for index in range(first, bisect_left(self._frame_starts, start + entry.size_bytes)):
                self._frame(index)
        return bounds

    def part_of(self, name: str) -> Part | None:
        """See `InParts.part_of`. The part raises as `tensor` does."""
        i = self._index[name]
        entry = self.manifest.entries[i]
        if not (entry.spec.is_float and in_pieces(entry)):
            return None
        dtype, start_bytes = entry.spec.numpy_dtype, self._starts[i]
        if _is_raw(entry):

            def elements(start: int, stop: int) -> Array:
                at = start_bytes + start * dtype.itemsize
                return np.frombuffer(self._content(at, (stop - start) * dtype.itemsize), dtype)

            return elements
        return part_filled(self.fill_from(name), dtype)

    def raw_place(self, name: str) -> int | None:
        """Return the offset in the payload where a tensor lies as it does in memory; None if it does not."""
        i = self._index[name]
        if self.manifest.compression != "none" or self.manifest.entries[i].encoding != Raw():
            return None
        return self._starts[i]

    def _content(self, start: int, size: int) -> memoryview:
        if not size:
            return memoryview(b"")
        if self.manifest.compression == "none":
            return self._exactly(start, size)
        first = bisect_right(self._frame_starts, start) - 1
        within = start - self._frame_starts[first]
        if within + size <= self.manifest.frames[first].content_size_bytes:
            return self._frame(first)[within : within + size]
        # Only a tensor across frames is copied; any other is a view of its frame.
        return self._gather(first, within, size)

    def _gather(self, index: int, within: int, size: int) -> memoryview:
        out, filled = memoryview(bytearray(size)), 0
        while filled < size:
            part = self._frame(index)[within : within + size - filled]
            out[filled : filled + part.nbytes] = part
            filled, index, within = filled + part.nbytes, index + 1, 0
        return out

    def _frame(self, index: int) -> memoryview:
        if self._held[0] == index:
            return self._held[1]
        # Take the frame that was inflated ahead. When another one is wanted, wait for that work all the same: the
        # decompressor serves one thread at a time.
        coming, self._next = self._next, None
        if coming is None:
            content = self._inflated(index)
        elif coming[0] == index:
            content = coming[1].result()
        else:
            coming[1].result()
            content = self._inflated(index)
        self._held = (index, content)
        # Tensors are read in order nearly always. A guess that is wrong costs one frame.
        if self._submit is not None and index + 1 < len(self.manifest.frames):
            self._next = (index + 1, self._submit(self._inflated, index + 1))
        return content

    def _inflated(self, index: int) -> memoryview:
        frame = self.manifest.frames[index]
        compressed = self._exactly(self._frame_offsets[index], frame.size_bytes)
        # Made when it is needed: it takes as long as reading a small payload that is not compressed.
        self._zstd = self._zstd or zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        return memoryview(inflate(self._zstd, compressed, frame.content_size_bytes))

    def _exactly(self, offset: int, size: int) -> memoryview:
        data = memoryview(self._read(offset, size)).cast("B")
        # A file that was cut short gives what is left of it.
        if data.nbytes != size:
            raise CorruptError(f"the payload ends at byte {offset + data.nbytes}, declared: {offset + size}")
        return data


class LazyTensors(InParts):
    """The tensors of a payload by name, in its order, each decoded on access."""

    def __init__(self, reader: PayloadReader) -> None:
        self._reader = reader
        self.layout = reader.manifest.layout

    def __getitem__(self, name: str) -> Array:
        return self._reader.tensor(name)

    def part_of(self, name: str) -> Part | None:
        """See `InParts.part_of`."""
        return self._reader.part_of(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.names)

    def __len__(self) -> int:
        return len(self._reader.names)


def inflate(zstd: zstandard.ZstdDecompressor, frame: memoryview, content_size_bytes: int) -> bytes:
    """Inflate one zstd frame to exactly its declared size, never beyond. Raises CorruptError."""
    try:
        # A frame's own header is not trusted: it, not max_output_size, would decide what is allocated.
        named = zstandard.frame_content_size(frame)
        if named not in (-1, content_size_bytes):
            raise CorruptError(f"a frame names {named} bytes of content, the manifest {content_size_bytes}")
        window = zstandard.get_frame_parameters(frame).window_size
        if window > MAX_WINDOW_BYTES:
            raise CorruptError(f"a frame wants a window of {window} bytes, allowed: {MAX_WINDOW_BYTES}")
        content = zstd.decompress(frame, max_output_size=content_size_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptError(f"a zstd frame is corrupt: {error}") from None
    if len(content) != content_size_bytes:
        raise CorruptError(f"a frame inflates to {len(content)} bytes, the manifest says {content_size_bytes}")
    return content


def verify_digest(manifest: Manifest, read: Read) -> None:
    """Read the whole payload in pieces. Raises CorruptError unless its digest is the declared one."""
    digest = new_digest()
    for offset in range(0, manifest.size_bytes, FRAME_CONTENT_BYTES):
        digest.update(read(offset, min(FRAME_CONTENT_BYTES, manifest.size_bytes - offset)))
    if digest.digest() != manifest.digest:
        raise CorruptError("the payload's digest is not the one its manifest declares")


def buffer_reader(payload: Buffer) -> Read:
    """Return a reader of bytes in memory, without copying."""
    view = memoryview(payload).cast("B") if memoryview(payload).nbytes else memoryview(b"")
    return lambda offset, size: view[offset : offset + size]


def file_reader(descriptor: int) -> Read:
    """Return a reader of an open file by pread, so that threads can share the descriptor."""

    def read(offset: int, size: int) -> bytes:
        parts: list[bytes] = []
        while size and (part := os.pread(descriptor, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    return read


def tensors_of(reader: PayloadReader) -> dict[str, Array]:
    """Return all tensors at once, for callers that hold the whole model anyway."""
    return {spec.name: array for spec, array in reader}
