"""Milliseconds per million elements and bits per element of every encoding, as a table.

    python -m tools.bench.codec [--elements N] [--data laplace|gauss|student] [--json FILE] [ENCODING ...]
    python -m tools.bench.codec --entropy [--elements N] [ENCODING ...]

One core, best of several repetitions, on one float32 tensor. "encode" includes drawing random numbers;
"feedback" is error feedback around it: add the residual, encode, decode, keep the new residual. "wire" is
after zstd level 1 in frames of 1 MiB, "over entropy" that size over the order-0 entropy of the symbols: the codes
of quantizers ("not kept" is one, where only some elements travel), of everything else the bytes. With --entropy
only that is measured, for each kind of data.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from fedgrpc.codec.budget import measure
from fedgrpc.codec.encoding import Encoding, parse_encoding
from fedgrpc.codec.feedback import correct, left_over, quantize_with_feedback
from fedgrpc.codec.layout import Array, spec_of
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import PayloadReader, PayloadWriter, buffer_reader
from fedgrpc.codec.recipe import Compression
from fedgrpc.codec.uniform import Uniform

DATA = ("laplace", "gauss", "student")
DEFAULT = [
    "raw",
    "raw:shuffle=yes",
    "float16",
    "float16:shuffle=yes",
    "bfloat16:shuffle=yes",
    "int8",
    "int8:rounding=nearest",
    "int6",
    "int4",
    "int3",
    "int2",
    "rotated4",
    "rotated3",
    "rotated2",
    "rotated1",
    "topk:fraction=0.1",
    "topk:fraction=0.01,bits=4",
    "threshold",
    "entropy:c=0.25",
    "entropy:c=0.5",
    "entropy:c=1",
    "entropy:c=2",
    "entropy:c=3",
    "entropy:c=5",
    "entropy:c=8",
]


@dataclass(frozen=True)
class Row:
    """One encoding; times in milliseconds per million elements, sizes in bits per element."""

    encoding: str
    content_bits: float
    wire_bits: float
    over_entropy: float
    relative_error: float
    encode_ms: float
    feedback_ms: float | None
    decode_ms: float
    zstd_ms: float
    unzstd_ms: float


def best_ms(work: Callable[[], object], repeats: int = 9) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def pack(encoding: Encoding, array: Array, data: memoryview, method: str) -> tuple[Manifest, bytes]:
    out = BytesIO()
    writer = PayloadWriter(out, Compression(method))
    writer.add(spec_of("x", array), encoding, data)
    return writer.finish(), out.getvalue()


def read(manifest: Manifest, payload: bytes) -> Array:
    return PayloadReader(manifest, buffer_reader(payload)).tensor(0)


def bench(encoding: Encoding, array: Array) -> Row:
    rng, spec = np.random.default_rng(0), spec_of("x", array)
    per_million = 1e6 / array.size
    data = memoryview(encoding.encode(array, rng)).toreadonly()
    decoded = encoding.decode(data, spec)
    found = measure(array, encoding, Compression("zstd"), rng)
    residual = array - decoded if encoding.contractive and not encoding.lossless else None
    plain, packed = pack(encoding, array, data, "none"), pack(encoding, array, data, "zstd")

    left, at = np.empty(array.size, np.float32), 0

    def keep(name: str, part: Array) -> None:
        nonlocal at
        left[at : at + part.size] = part
        at = (at + part.size) % left.size

    def feedback() -> Array:
        if isinstance(encoding, Uniform):
            quantize_with_feedback({"x": array}, {"x": residual}, spec, encoding, rng, keep)
            return left
        corrected = correct(array, residual)
        return left_over(corrected, encoding.decode(memoryview(encoding.encode(corrected, rng)), spec))

    # The writer's and the reader's own work (digest, copies) is in both and falls out of the difference.
    writing = [best_ms(partial(pack, encoding, array, data, method)) for method in ("zstd", "none")]
    reading = [best_ms(partial(read, *source)) for source in (packed, plain)]
    return Row(
        str(encoding),
        found.content_bits,
        found.wire_bits,
        found.ratio,
        float(((decoded - array) ** 2).sum() / (array**2).sum()),
        per_million * best_ms(lambda: encoding.encode(array, rng)),
        per_million * best_ms(feedback) if residual is not None else None,
        per_million * best_ms(lambda: encoding.decode(data, spec)),
        per_million * max(0.0, writing[0] - writing[1]),
        per_million * max(0.0, reading[0] - reading[1]),
    )


def table(rows: list[Row]) -> str:
    lines = [
        "| encoding | content bits | wire bits | over entropy | relative error | encode ms | with feedback ms "
        "| decode ms | zstd ms | unzstd ms |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        feedback = "" if row.feedback_ms is None else f"{row.feedback_ms:.2f}"
        lines.append(
            f"| {row.encoding} | {row.content_bits:.3f} | {row.wire_bits:.3f} | {row.over_entropy:.3f} "
            f"| {row.relative_error:.2g} | {row.encode_ms:.2f} | {feedback} "
            f"| {row.decode_ms:.2f} | {row.zstd_ms:.2f} | {row.unzstd_ms:.2f} |"
        )
    return "\n".join(lines)


def draw(data: str, elements: int) -> Array:
    rng = np.random.default_rng(1)
    draws: dict[str, Callable[..., Any]] = {
        "laplace": rng.laplace,
        "gauss": rng.normal,
        "student": partial(rng.standard_t, 3),
    }
    return (0.01 * draws[data](size=elements)).astype(np.float32)


def distances(encodings: list[str], elements: int) -> str:
    """How far each output stands from the order-0 entropy of its symbols, for each kind of data."""
    arrays = [draw(data, elements) for data in DATA]
    lines = [
        "| encoding | " + " | ".join(f"{data}: entropy | zstd | over" for data in DATA) + " |",
        "| --- |" + " --: | --: | --: |" * len(DATA),
    ]
    for text in encodings:
        encoding = parse_encoding(text)
        cells = []
        for array in arrays:
            found = measure(array, encoding, Compression("zstd"), np.random.default_rng(0))
            cells.append(f"{found.entropy_bits:.3f} | {found.wire_bits:.3f} | {found.ratio - 1:+.1%}")
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encodings", nargs="*", default=DEFAULT)
    parser.add_argument("--elements", type=int, default=1_000_000)
    parser.add_argument("--data", choices=DATA, default="laplace")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--entropy", action="store_true", help="only how far from the entropy, for all data")
    args = parser.parse_args()
    if args.entropy:
        print(distances(args.encodings, args.elements))
        return
    array = draw(args.data, args.elements)
    rows = []
    for text in args.encodings:
        rows.append(bench(parse_encoding(text), array))
        print(".", end="", file=sys.stderr, flush=True)
    print(
        f"\n{args.elements:,} {args.data} elements, numpy {np.__version__}, one core, best of 9\n", file=sys.stderr
    )
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
