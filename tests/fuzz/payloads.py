"""Bytes of tensors and of payloads, damaged or made up."""

from __future__ import annotations

import dataclasses
import io
import tracemalloc
from functools import cache
from pathlib import Path
from random import Random
from typing import Final

import numpy as np

from fedgrpc.codec.encoding import ENCODING_NAMES, parse_encoding
from fedgrpc.codec.layout import TensorSpec, layout_of
from fedgrpc.codec.manifest import Frame, Limits, Manifest
from fedgrpc.codec.payload import LazyTensors, PayloadReader, buffer_reader, in_pieces, write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import FedgrpcError
from tests.fuzz.mutate import mutated
from tests.fuzz.registry import target
from tests.golden.reading import GOLDEN_NAMES, read_golden

MODEL: Final = {
    "w": np.ones((8, 6), np.float32),
    "b": np.ones(8, np.float32),
    "s": np.ones((), np.float32),
    "n": np.ones(3, np.int64),
    "e": np.ones((0, 4), np.float32),
    "o": np.ones(4, np.bool_),
}
LAYOUT: Final = layout_of(MODEL)
SHAPES: Final = {name: array.shape for name, array in MODEL.items()}

# No input is worth more memory than this on top of what its kind needs: a megabyte of tensors at most.
SMALL: Final = Limits(max_payload_bytes=1 << 20, max_content_bytes=1 << 20, max_decoded_bytes=1 << 20)

ENCODINGS: Final = (
    *ENCODING_NAMES,
    *("raw:shuffle=yes", "float16:shuffle=yes", "bfloat16:shuffle=yes", "int8:block=64", "int4:block=8"),
    *("rotated1:block=16", "rotated3:block=64", "topk:fraction=0.1", "topk:bits=3", "threshold:times=1.5,bits=4"),
    *("entropy:c=0.05", "entropy:c=0.5", "entropy:c=1", "entropy:c=8"),
)
SPECS: Final = tuple(
    TensorSpec("t", dtype, shape)
    for dtype, shape in (
        *(("float32", (1,)), ("float32", (100,)), ("float32", (7, 13, 11)), ("float32", (3000,))),
        *(("float16", (300,)), ("bfloat16", (129,)), ("float64", (65,)), ("float32", (0,)), ("float32", ())),
        *(("bool", (20,)), ("int64", (9,)), ("float32", (40_000,))),
    )
)


@cache
def _encoded(text: str, spec: TensorSpec, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    scale = (1e-3, 1.0, 1e4)[seed % 3] if spec.is_float else 1.0
    values = np.asarray(rng.standard_normal(spec.size) * scale).astype(spec.numpy_dtype).reshape(spec.shape)
    encoding = parse_encoding(text)
    try:
        return bytes(encoding.encode(values, rng))
    except FedgrpcError:
        return bytes(encoding.size_bounds(spec)[0])


@target(share=60)
def decoders(rnd: Random, folder: Path) -> None:
    text, spec = rnd.choice(ENCODINGS), rnd.choice(SPECS)
    encoding = parse_encoding(text)
    encoding.size_bounds(spec)
    data = mutated(_encoded(text, spec, rnd.randrange(3)), rnd)
    array = encoding.decode(memoryview(data), spec)
    assert array.shape == spec.shape
    assert array.dtype == spec.numpy_dtype


LARGE: Final = TensorSpec("t", "float32", (1 << 20,))


@target(share=2)
def large_decoders(rnd: Random, folder: Path) -> None:
    """A tensor so large that what it takes stands out: at most twice itself, and the scratch of a piece."""
    text, other = rnd.choice(ENCODINGS), rnd.choice(ENCODINGS)
    data = _encoded(other, LARGE, 1) if rnd.random() < 0.2 else mutated(_encoded(text, LARGE, 1), rnd)
    tracemalloc.start()
    try:
        parse_encoding(text).decode(memoryview(data), LARGE)
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes <= 2 * LARGE.nbytes + (4 << 20), f"{text} took {peak_bytes >> 10} KiB"


# The others hold more than a megabyte.
NAMES: Final = tuple(name for name in GOLDEN_NAMES if name != "frames")


@target(share=15)
def payloads(rnd: Random, folder: Path) -> None:
    _, manifest, payload = read_golden(rnd.choice(NAMES))
    if rnd.random() < 0.7:
        payload = mutated(payload, rnd)
    if rnd.random() < 0.4:
        manifest = _changed(manifest, rnd)
    read_all(PayloadReader(manifest, buffer_reader(payload), SMALL), rnd)


def _changed(manifest: Manifest, rnd: Random) -> Manifest:
    entries, frames = list(manifest.entries), list(manifest.frames)
    kind = rnd.randrange(4)
    if kind == 0 and entries:
        at = rnd.randrange(len(entries))
        entries[at] = dataclasses.replace(entries[at], size_bytes=entries[at].size_bytes + rnd.choice((-4, 4, 8)))
    elif kind == 1 and frames:
        at = rnd.randrange(len(frames))
        frames[at] = Frame(frames[at].size_bytes + rnd.choice((-1, 0, 1)), frames[at].content_size_bytes + 1)
    elif kind == 2 and entries:
        at = rnd.randrange(len(entries))
        other = parse_encoding(rnd.choice(ENCODINGS))
        entries[at] = dataclasses.replace(entries[at], encoding=other)
    else:
        rnd.shuffle(entries)
    return dataclasses.replace(manifest, entries=tuple(entries), frames=tuple(frames))


def read_all(reader: PayloadReader, rnd: Random) -> None:
    """Every tensor in every way in which it can be read."""
    tensors = LazyTensors(reader)
    for entry in reader.manifest.entries:
        spec = entry.spec
        array = reader.tensor(spec.name)
        assert (array.shape, array.dtype) == (spec.shape, spec.numpy_dtype)
        reader.bounds(spec.name)
        if in_pieces(entry) and spec.is_float and spec.size:
            part = tensors.part_of(spec.name)
            assert part is not None
            start = rnd.randrange(spec.size) // 16384 * 16384
            stop = min(spec.size, start + rnd.randrange(1, 16384))
            read, whole = part(start, stop), array.reshape(-1)[start:stop]
            assert read.tobytes() == whole.tobytes()


def encoded(tensors: dict[str, np.ndarray], recipe: str, seed: int = 0) -> tuple[Manifest, bytes]:
    """A payload of these tensors."""
    out = io.BytesIO()
    manifest = write_payload(tensors, Recipe.parse(recipe), out, np.random.default_rng(seed))
    return manifest, out.getvalue()
