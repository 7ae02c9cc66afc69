from __future__ import annotations

import dataclasses
import io
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrpc.codec.encoding import parse_encoding
from fedgrpc.codec.layout import Array, TensorRole, TensorSpec, layout_of
from fedgrpc.codec.manifest import Frame, Limits, Manifest, TensorEntry, compress_bound
from fedgrpc.codec.payload import (
    PayloadReader,
    buffer_reader,
    file_reader,
    inflate,
    tensors_of,
    verify_digest,
    write_payload,
)
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import CodecError, CorruptError, EncodeError, LayoutError, TooLargeError
from tests.codec.strategies import float_arrays, other_arrays

RECIPES = (
    *("raw", "raw+zstd", "float16+zstd", "bfloat16", "int8+zstd", "int4;*1=int8;*2=raw+zstd:3"),
    *("rotated2+zstd", "topk:fraction=0.1+zstd", "threshold", "entropy+zstd", "entropy:c=0.3"),
)


def write(tensors: dict[str, Array], recipe: str = "int8+zstd", seed: int = 0) -> tuple[Manifest, bytes]:
    out = io.BytesIO()
    manifest = write_payload(tensors, Recipe.parse(recipe), out, np.random.default_rng(seed))
    return manifest, out.getvalue()


def state_dict(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "conv.weight": rng.standard_normal((64, 3, 7, 7)).astype(np.float32),
        "bn.num_batches_tracked": np.array(12345678901, np.int64),
        "mask": rng.random(100) < 0.5,
        "half": rng.standard_normal(5000).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float32),
        "big": rng.standard_normal((1500, 1000)).astype(np.float32).T,
        "one": np.array([2.5], np.float32),
    }


@settings(deadline=None)
@given(
    arrays=st.lists(st.one_of(float_arrays(max_size=800), other_arrays()), max_size=6),
    recipe=st.sampled_from(RECIPES),
)
def test_every_payload_reads_back_with_its_layout_and_validates(arrays: list[Array], recipe: str) -> None:
    arrays = [a if a.dtype.kind in "iub" else np.nan_to_num(a) for a in arrays]
    tensors = {f"t{i}": array for i, array in enumerate(arrays)}
    manifest, payload = write(tensors, recipe)
    manifest.validate(Limits())
    assert manifest.size_bytes == len(payload)
    assert manifest.layout == layout_of(tensors)
    verify_digest(manifest, buffer_reader(payload))
    decoded = tensors_of(PayloadReader(manifest, buffer_reader(payload)))
    for entry in manifest.entries:
        assert decoded[entry.spec.name].shape == entry.spec.shape
        if entry.encoding.lossless:
            wanted = np.ascontiguousarray(tensors[entry.spec.name]).tobytes()
            assert decoded[entry.spec.name].tobytes() == wanted


@pytest.mark.parametrize("recipe", RECIPES)
def test_any_tensor_can_be_read_alone_from_a_file_and_equals_the_one_read_in_order(
    recipe: str, tmp_path: Path
) -> None:
    manifest, payload = write(state_dict(), recipe)
    (tmp_path / "payload").write_bytes(payload)
    in_order = tensors_of(PayloadReader(manifest, buffer_reader(payload)))
    with (tmp_path / "payload").open("rb") as file:
        reader = PayloadReader(manifest, file_reader(file.fileno()))
        for name in ("one", "half", "big", "conv.weight", "empty"):
            np.testing.assert_array_equal(reader.tensor(name), in_order[name])


def test_integers_bool_and_tiny_tensors_travel_raw_under_any_recipe() -> None:
    manifest, _ = write(state_dict(), "int2+zstd")
    raw = {entry.spec.name for entry in manifest.entries if entry.encoding == Raw()}
    assert raw == {"bn.num_batches_tracked", "mask", "empty", "one"}


def test_frames_are_a_mebibyte_and_end_with_a_tensor_once_they_are_half_full() -> None:
    tensors = {f"t{i}": np.random.default_rng(i).standard_normal(700_000).astype(np.float32) for i in range(3)}
    manifest, _ = write(tensors, "int8+zstd")
    assert [frame.content_size_bytes for frame in manifest.frames] == [manifest.entries[0].size_bytes] * 3
    manifest, _ = write({"t": np.zeros(1 << 20, np.float32)}, "raw+zstd")
    assert [frame.content_size_bytes for frame in manifest.frames] == [1 << 20] * 4


def test_compression_is_dropped_where_the_first_frame_does_not_gain() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 3 << 20).astype(np.uint8)
    manifest, payload = write({"noise": noise}, "raw+zstd")
    assert (manifest.compression, manifest.frames) == ("none", ())
    np.testing.assert_array_equal(PayloadReader(manifest, buffer_reader(payload)).tensor(0), noise)


def test_a_payload_without_tensors_is_legal() -> None:
    for recipe in RECIPES:
        manifest, payload = write({}, recipe)
        assert payload == b""
        verify_digest(manifest, buffer_reader(payload))
        assert list(PayloadReader(manifest, buffer_reader(payload))) == []


def test_the_tensor_that_cannot_be_encoded_is_named() -> None:
    with pytest.raises(EncodeError, match=r"fc\.weight"):
        write({"fc.weight": np.array([1, np.nan] * 50, np.float32)})
    with pytest.raises(EncodeError, match="complex64"):
        write({"z": np.zeros(3, np.complex64)})


def test_writing_and_reading_hold_about_one_tensor_and_one_frame(tmp_path: Path) -> None:
    shared = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    tensors = {f"t{i}": shared for i in range(24)}
    with (tmp_path / "p").open("w+b") as file:
        tracemalloc.start()
        manifest = write_payload(tensors, Recipe.parse("int8+zstd"), file, np.random.default_rng(0))
        written_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        file.flush()
        for _ in PayloadReader(manifest, file_reader(file.fileno())):
            pass
        read_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert written_peak < 8 << 20
    assert read_peak < 12 << 20


def bomb() -> tuple[Manifest, bytes]:
    """A payload that declares 1000 bytes and whose one frame inflates to a gigabyte."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=1 << 30)
    zeros = bytes(1 << 20)
    payload = b"".join(compressor.compress(zeros) for _ in range(1024)) + compressor.flush()
    entry = TensorEntry(TensorSpec("x", "uint8", (1000,)), Raw(), 1000)
    return Manifest((entry,), "zstd", (Frame(len(payload), 1000),), len(payload), bytes(16)), payload


@pytest.mark.parametrize("with_content_size", [True, False])
def test_a_compression_bomb_is_stopped_at_its_declared_size(with_content_size: bool) -> None:
    manifest, payload = bomb()
    if not with_content_size:
        parts = zstandard.ZstdCompressor(write_content_size=False).compressobj()
        payload = b"".join(parts.compress(bytes(1 << 20)) for _ in range(1024)) + parts.flush()
        manifest = dataclasses.replace(manifest, frames=(Frame(len(payload), 1000),), size_bytes=len(payload))
    with pytest.raises(LayoutError, match="frame of"):
        manifest.validate(Limits())
    tracemalloc.start()
    with pytest.raises(CorruptError):
        PayloadReader(manifest, buffer_reader(payload), valid=True).tensor(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_payload_is_hardly_larger_than_what_it_holds() -> None:
    tensor = entry(shape=(2040,), encoding="raw", size=8160)
    for frames in ((Frame(300 << 20, 8160),), (Frame(1, 1),) * 8160):
        with pytest.raises(LayoutError, match="frame"):
            manifest_of(tensor, frames=frames, size=sum(frame.size_bytes for frame in frames)).validate(Limits())


@pytest.mark.parametrize("size", [0, 1, 100, 5000, 130_000, 140_000, 3_000_000])
def test_bytes_without_a_pattern_fit_into_the_bound_of_a_frame(size: int) -> None:
    content = np.random.default_rng(0).bytes(size)
    for level in (-5, 1, 19):
        assert len(zstandard.ZstdCompressor(level=level, write_checksum=True).compress(content)) <= compress_bound(
            size
        )


def test_a_frame_that_wants_a_large_window_is_refused_before_it_is_inflated() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, compression_level=1, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = stream.compress(bytes(8160)) + stream.flush()
    with pytest.raises(CorruptError, match="window"):
        inflate(zstandard.ZstdDecompressor(), memoryview(frame), 8160)


@settings(deadline=None, max_examples=300)
@given(seed=st.integers(0, 2**32 - 1), recipe=st.sampled_from(RECIPES))
def test_a_garbled_or_truncated_payload_gives_only_codec_errors(seed: int, recipe: str) -> None:
    rng = np.random.default_rng(seed)
    tensors = {k: v for k, v in state_dict().items() if k != "big"}
    manifest, payload = write(tensors, recipe)
    garbled = bytearray(payload)
    for at in rng.integers(0, len(payload), rng.integers(1, 6)):
        garbled[at] ^= int(rng.integers(1, 256))
    if rng.random() < 0.3:
        garbled = garbled[: rng.integers(0, len(garbled))]
    with pytest.raises(CorruptError):
        verify_digest(manifest, buffer_reader(garbled))
    try:
        decoded = tensors_of(PayloadReader(manifest, buffer_reader(garbled)))
    except CodecError:
        return
    assert {name: array.shape for name, array in decoded.items()} == {k: v.shape for k, v in tensors.items()}


def entry(
    shape: tuple[int, ...] = (100,), encoding: str = "int8", size: int = 104, name: str = "x"
) -> TensorEntry:
    return TensorEntry(TensorSpec(name, "float32", shape), parse_encoding(encoding), size)


def manifest_of(*entries: TensorEntry, frames: tuple[Frame, ...] = (), size: int | None = None) -> Manifest:
    total = sum(e.size_bytes for e in entries) if size is None else size
    return Manifest(entries, "zstd" if frames else "none", frames, total, bytes(16))


@pytest.mark.parametrize(
    ("manifest", "why"),
    [
        (manifest_of(entry(), entry()), "twice"),
        (manifest_of(entry(size=103)), "declares 103 bytes"),
        (manifest_of(entry(size=-1)), "declares -1 bytes"),
        (manifest_of(entry((-1, -100))), "negative extent"),
        (manifest_of(entry((2**40, 2**40), size=1)), "impossible shape"),
        (manifest_of(entry((0, 2**40, 2**40), size=0)), "impossible shape"),
        (manifest_of(entry((1,) * 17)), "dimensions"),
        (manifest_of(entry(name="")), "tensor name"),
        (manifest_of(entry(), size=200), "payload take 200"),
        (manifest_of(entry(), frames=(Frame(50, 104),), size=60), "frames 50"),
        (manifest_of(entry(), frames=(Frame(50, 105),), size=50), "inflated frames 105"),
        (manifest_of(entry(), frames=(Frame(50, 0), Frame(1, 104)), size=51), "empty frame"),
        (manifest_of(entry(), frames=(Frame(-50, 104),), size=-50), "negative size"),
        (dataclasses.replace(manifest_of(entry()), compression="lz4"), "unknown compression"),
        (dataclasses.replace(manifest_of(entry()), frames=(Frame(1, 1),)), "without compression"),
        (dataclasses.replace(manifest_of(entry()), digest=b""), "digest"),
        (manifest_of(TensorEntry(TensorSpec("x", "int64", (100,)), parse_encoding("int8"), 104)), "int64"),
        (manifest_of(TensorEntry(TensorSpec("x", "float128", (1,)), Raw(), 16)), "unknown dtype"),
    ],
)
def test_a_manifest_that_does_not_fit_together_is_a_layout_error(manifest: Manifest, why: str) -> None:
    with pytest.raises(LayoutError, match=why):
        manifest.validate(Limits())


@pytest.mark.parametrize("encoding", ["int8", "float16", "entropy"])
def test_what_is_no_trained_float_is_declared_in_lossless_encodings_alone(encoding: str) -> None:
    """A variance that loses bits may become negative, and an optimizer would step on it."""
    size = parse_encoding(encoding).size_bounds(TensorSpec("x", "float32", (100,)))[0]
    for role in (TensorRole.STATISTIC, TensorRole.CONSTANT):
        spec = TensorSpec("x", "float32", (100,), role)
        with pytest.raises(LayoutError, match="cannot be encoded"):
            manifest_of(TensorEntry(spec, parse_encoding(encoding), size)).validate(Limits())


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        (Limits(max_tensors=1), "2 tensors"),
        (Limits(max_frames=1), "2 frames"),
        (Limits(max_payload_bytes=99), "payload bytes"),
        (Limits(max_content_bytes=207), "content bytes"),
        (Limits(max_decoded_bytes=799), "decoded bytes"),
        (Limits(max_frame_content_bytes=103), "one frame"),
    ],
)
def test_a_declared_size_over_its_limit_is_too_large(limits: Limits, why: str) -> None:
    manifest = manifest_of(entry(), entry(name="y"), frames=(Frame(50, 104), Frame(50, 104)), size=100)
    manifest.validate(Limits())
    with pytest.raises(TooLargeError, match=why):
        manifest.validate(limits)
