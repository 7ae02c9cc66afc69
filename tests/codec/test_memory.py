"""A decode takes what its spec implies: about the tensor once or twice, whatever the bytes say."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest

from fedgrpc.codec.encoding import ENCODING_NAMES, parse_encoding
from fedgrpc.codec.entropy import Entropy
from fedgrpc.codec.layout import TensorSpec
from fedgrpc.codec.sparse import TopK
from fedgrpc.errors import CodecError

SIZE = 1 << 21
TEXTS = (
    *ENCODING_NAMES,
    *("raw:shuffle=yes", "bfloat16:shuffle=yes", "int8:block=8", "rotated4:block=16", "rotated1:block=65536"),
    *("topk:fraction=0.4", "threshold:times=0.5", "entropy:c=0.05", "entropy:c=0.5", "entropy:c=1", "entropy:c=8"),
)
# Scratch of a piece, whatever the tensor.
CONSTANT_BYTES = 3 << 20


def peak_of_decode(text: str, data: bytes, spec: TensorSpec) -> int:
    """Bytes that decoding takes at most; a refusal is a result, too."""
    encoding = parse_encoding(text)
    tracemalloc.start()
    try:
        encoding.decode(memoryview(data), spec)
    except CodecError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("text", sorted(set(TEXTS)))
def test_an_honest_tensor_is_decoded_in_at_most_twice_its_size(text: str, dtype: str) -> None:
    spec = TensorSpec("x", dtype, (SIZE,))
    values = np.random.default_rng(0).laplace(size=SIZE).astype(dtype)
    if text == "float32":
        values = values.astype(np.float32)
        spec = TensorSpec("x", "float32", (SIZE,))
    data = bytes(parse_encoding(text).encode(values, np.random.default_rng(1)))
    assert peak_of_decode(text, data, spec) <= 2 * spec.nbytes + CONSTANT_BYTES


def entropy(base: int, levels: list[bytes], counts: bytes) -> bytes:
    sizes = struct.pack(f"<{len(levels) + 1}I", *map(len, levels), len(counts))
    return struct.pack("<fBBH", 1.0, base, len(levels), 0) + sizes + b"".join(levels) + counts


HOSTILE = {
    "counts of no member": ("entropy", entropy(1, [b""], bytes(4 * SIZE - 20))),
    "one count of passes": ("entropy", entropy(1, [b"\0"], b"\xff" * (4 * SIZE - 22) + b"\0")),
    "all marked": ("entropy", entropy(1, [bytes(SIZE)], bytes(SIZE))),
    "more marks than elements": ("entropy", entropy(1, [bytes(3 * SIZE)], bytes(SIZE - 20))),
    "all marked in every level": ("entropy", entropy(1, [bytes(SIZE // 2)] * 7, bytes(SIZE // 2 - 40))),
    "marks without an end": ("entropy", entropy(1, [b"\xff" * (4 * SIZE - 20)], b"")),
    "topk of marks alone": ("topk", struct.pack("<II", 0, 4 * SIZE - 8) + bytes(4 * SIZE - 8)),
    "topk of every element": ("topk", struct.pack("<II", SIZE, SIZE) + bytes(SIZE + SIZE // 64 + SIZE)),
    "topk of passes": ("topk", struct.pack("<II", 1, 3 * SIZE) + b"\xff" * (3 * SIZE - 1) + bytes(6)),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_counts_and_marks_take_no_more_than_honest_ones(name: str) -> None:
    text, data = HOSTILE[name]
    spec = TensorSpec("x", "float32", (SIZE,))
    assert len(data) <= spec.nbytes
    assert peak_of_decode(text, data, spec) <= spec.nbytes + 2 * CONSTANT_BYTES


def test_tensors_of_no_elements_have_no_marks_and_no_counts() -> None:
    empty = TensorSpec("x", "float32", (0,))
    for data in (entropy(1, [b"\0"], b"\0"), entropy(1, [b""], b"\0")):
        with pytest.raises(CodecError):
            Entropy().decode(memoryview(data), empty)
    with pytest.raises(CodecError):
        TopK().decode(memoryview(struct.pack("<II", 0, 1) + b"\0"), empty)


@pytest.mark.parametrize("name", ["counts of no member", "more marks than elements", "topk of marks alone"])
def test_streams_that_do_not_fit_each_other_are_refused_before_memory_is_taken(name: str) -> None:
    text, data = HOSTILE[name]
    spec = TensorSpec("x", "float32", (SIZE,))
    with pytest.raises(CodecError):
        parse_encoding(text).decode(memoryview(data), spec)
    assert peak_of_decode(text, data, spec) < 1 << 20
