"""Add golden vectors: payloads that every later version must decode to the same values.

    python -m tests.golden.generate

A vector is NAME.json (the manifest, and what each tensor decodes to) and NAME.bin (the payload). Files
that exist are never touched: a format that has been released stays readable.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from fedgrpc.codec.layout import DTYPE_NAMES, Array, TensorSpec
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import PayloadReader, buffer_reader, write_payload
from fedgrpc.codec.recipe import Recipe

HERE = Path(__file__).parent


def normal(*shape: int, seed: int = 0) -> Array:
    return (0.01 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def heavy(size: int) -> Array:
    """Laplace values, some of them far out, so that marks have several levels."""
    values = np.random.default_rng(3).laplace(size=size)
    values[::1000] *= 20
    return values.astype(np.float32)


def every_dtype() -> dict[str, Array]:
    rng = np.random.default_rng(1)
    tensors: dict[str, Array] = {}
    for name in DTYPE_NAMES:
        dtype = TensorSpec("", name, ()).numpy_dtype
        tensors[name] = (rng.standard_normal((3, 5)) * 50).astype(dtype)
    tensors["scalar"] = np.array(-7, np.int64)
    tensors["empty"] = np.zeros((0, 3), np.float32)
    return tensors


def lossy() -> dict[str, Array]:
    return {
        "weight": normal(7, 100),
        "bias": normal(10, seed=1),
        "half": normal(130, seed=2).astype(ml_dtypes.bfloat16),
        "zeros": np.zeros(300, np.float32),
        "step": np.array(3, np.int64),
    }


def frames() -> dict[str, Array]:
    """Three frames: the second tensor begins in the first frame and ends in the second."""
    ramp = np.arange(300_000, dtype=np.int32) // 1000
    return {"a": ramp[:100_000], "b": ramp, "c": ramp[:200_000], "d": ramp[:10]}


def levels() -> dict[str, Array]:
    return {"weight": heavy(15000), "zeros": np.zeros(100, np.float32)}


def few() -> dict[str, Array]:
    """Tensors of few different values, one of many, and one of three bits."""
    numbers = np.random.default_rng(5).integers(0, 16, (40, 50))
    return {
        "clusters": normal(16, seed=6)[numbers],
        "five": normal(5, seed=7)[numbers % 5].astype(ml_dtypes.bfloat16),
        "many": normal(20, 30),
        "zeros": np.zeros(300, np.float32),
    }


VECTORS: dict[str, tuple[Callable[[], dict[str, Array]], str]] = {
    "no-tensors": (dict, "raw+zstd"),
    "every-dtype": (every_dtype, "raw"),
    "frames": (frames, "raw+zstd"),
    "raw-shuffled": (lossy, "raw+zstd"),
    "float16": (lossy, "float16"),
    "float16-shuffled": (lossy, "float16+zstd"),
    "bfloat16": (lossy, "bfloat16"),
    **{f"int{bits}": (lossy, f"int{bits}") for bits in (8, 6, 4, 3, 2)},
    "int8-zstd": (lossy, "int8+zstd"),
    "int4-small-blocks": (lossy, "int4:block=16,rounding=nearest+zstd"),
    **{f"rotated{bits}": (lossy, f"rotated{bits}:block=512") for bits in (1, 2, 3, 4)},
    "topk": (lossy, "topk:fraction=0.05"),
    "codebook": (few, "codebook+zstd"),
    "threshold": (lossy, "threshold:times=2.0,bits=4+zstd"),
    **{
        f"entropy-base-{base}": (levels, f"entropy:c={c}+zstd")
        for base, c in ((255, 0.1), (15, 0.4), (5, 1.1), (1, 2.0))
    },
    "mixed": (lossy, "entropy:c=5.0;weight=int6;half=rotated2+zstd:3"),
}


def as_json(manifest: Manifest, payload: bytes) -> str:
    """The manifest, and the sha256 of each decoded tensor."""
    reader = PayloadReader(manifest, buffer_reader(payload))
    tensors = []
    for entry, (spec, array) in zip(manifest.entries, reader, strict=True):
        row: dict[str, object] = {"name": spec.name, "dtype": spec.dtype, "shape": spec.shape}
        row |= {"encoding": str(entry.encoding), "size_bytes": entry.size_bytes}
        row["decoded_sha256"] = hashlib.sha256(array.tobytes()).hexdigest()
        tensors.append(json.dumps(row))
    rest = {
        "compression": manifest.compression,
        "frames": [[frame.size_bytes, frame.content_size_bytes] for frame in manifest.frames],
        "size_bytes": manifest.size_bytes,
        "xxh3_128": manifest.digest.hex(),
    }
    return '{"tensors": [\n' + ",\n".join(tensors) + "\n],\n" + json.dumps(rest)[1:] + "\n"


def main() -> None:
    for name, (make, recipe) in VECTORS.items():
        target = HERE / f"{name}.bin"
        if target.exists():
            continue
        out = io.BytesIO()
        manifest = write_payload(make(), Recipe.parse(recipe), out, np.random.default_rng(7))
        target.write_bytes(out.getvalue())
        target.with_suffix(".json").write_text(as_json(manifest, out.getvalue()))
        print(f"{name}: {manifest.size_bytes} bytes")


if __name__ == "__main__":
    main()
