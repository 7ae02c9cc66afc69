"""Read a fedgrpc payload with the standard library, numpy, xxhash and zstandard only.

    python examples/read_payload.py tests/golden/int8.json tests/golden/int8.bin

It imports nothing of fedgrpc: it is protos/WIRE.md as a program, and a start for a worker in another
language. Simple rather than fast, and it trusts the manifest: set limits before you read a stranger's.
"""

import json
import struct
import sys
from itertools import pairwise

import numpy as np
import xxhash
import zstandard

DTYPES = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",  # numpy has none: given back as float32
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "i1",
    "uint8": "u1",
    "bool": "?",
}
CENTROIDS = {
    1: (0.7978846,),
    2: (0.45278, 1.5104176),
    3: (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    4: (0.128395, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
}


def read_payload(manifest: dict, payload: bytes) -> dict:
    """Tensors by name. `manifest` has the fields of fedgrpc.v1.Manifest, see tests/golden/*.json."""
    if xxhash.xxh3_128(payload).hexdigest() != manifest["xxh3_128"]:
        raise ValueError("the payload is not the one that the manifest declares")
    content, at, tensors = inflate(manifest, payload), 0, {}
    for tensor in manifest["tensors"]:
        data = content[at : at + tensor["size_bytes"]]
        at += tensor["size_bytes"]
        tensors[tensor["name"]] = decode(data, tensor["encoding"], tensor["dtype"], tensor["shape"])
    return tensors


def inflate(manifest: dict, payload: bytes) -> bytes:
    if manifest["compression"] == "none":
        return payload
    parts, at = [], 0
    for size, content_size in manifest["frames"]:
        part = zstandard.ZstdDecompressor().decompress(payload[at : at + size], max_output_size=content_size)
        at += size
        if len(part) != content_size:
            raise ValueError(f"a frame inflates to {len(part)} bytes, declared are {content_size}")
        parts.append(part)
    return b"".join(parts)


def decode(data: bytes, encoding: str, dtype: str, shape: list) -> np.ndarray:
    name, _, text = encoding.partition(":")
    options = dict(pair.split("=") for pair in text.split(",") if pair)
    size = int(np.prod(shape, dtype=np.int64))
    if name in ("raw", "float16", "bfloat16"):
        values = plain(data, dtype if name == "raw" else name, options.get("shuffle") == "yes")
    elif name.startswith("int"):
        values = uniform(data, int(name[3:]), int(options.get("block", 256)), size)
    elif name.startswith("rotated"):
        values = rotated(data, int(name[7:]), int(options.get("block", 4096)), size)
    elif name in ("topk", "threshold"):
        values = sparse(data, int(options.get("bits", 8)), size)
    elif name == "codebook":
        values = codebook(data, dtype, size)
    elif name == "entropy":
        values = entropy(data, size)
    else:
        raise ValueError(f"unknown encoding {name!r}")
    wanted = "<f4" if dtype == "bfloat16" else DTYPES[dtype]
    return values.astype(wanted).reshape(shape)


def plain(data: bytes, dtype: str, shuffled: bool) -> np.ndarray:
    stored = np.dtype(DTYPES[dtype])
    values = np.frombuffer(unshuffle(data, stored.itemsize) if shuffled else data, stored)
    return (values.astype("<u4") << 16).view("<f4") if dtype == "bfloat16" else values


def unshuffle(data: bytes, width: int) -> bytes:
    step = 131072 * width
    blocks = [np.frombuffer(data[at : at + step], "u1") for at in range(0, len(data), step)]
    return b"".join(block.reshape(width, -1).T.tobytes() for block in blocks)


def unpack(packed: bytes, count: int, bits: int) -> np.ndarray:
    """Codes of `bits` bits, lowest bit first."""
    stream = np.unpackbits(np.frombuffer(packed, "u1"), bitorder="little")[: count * bits]
    return stream.reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits))


def uniform(data: bytes, bits: int, block: int, size: int) -> np.ndarray:
    blocks = -(-size // block)
    scales = np.frombuffer(data, "<f4", blocks)
    codes = unpack(data[4 * blocks :], size, bits)
    signed = np.where(codes < 1 << (bits - 1), codes, codes - (1 << bits))  # two's complement
    return signed.astype("<f4") * np.repeat(scales, block)[:size]


def rotated(data: bytes, bits: int, block: int, size: int) -> np.ndarray:
    (seed,) = struct.unpack_from("<Q", data)
    blocks = -(-size // block)
    scales = np.frombuffer(data, "<f4", blocks, 8)
    widths = [min(block, max(16, 1 << (size - i * block - 1).bit_length())) for i in range(blocks)]
    codes = unpack(data[8 + 4 * blocks :], sum(widths), bits)
    upper = np.array(CENTROIDS[bits], "<f4").astype("<f8")
    table = np.concatenate([-upper[::-1], upper])
    signs, out, at = random_signs(seed, block), [], 0
    for width, scale in zip(widths, scales.astype("<f8"), strict=True):
        sums = hadamard(table[codes[at : at + width]])  # exact in float64
        out.append((sums * scale / np.sqrt(width)).astype("<f4") * signs[:width].astype("<f4"))
        at += width
    return np.concatenate(out)[:size]


def random_signs(seed: int, count: int) -> np.ndarray:
    """SplitMix64; lowest bit of each word first; a set bit is -1."""
    bits, mask = [], (1 << 64) - 1
    while len(bits) < count:
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        word = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        word ^= word >> 31
        bits += [(word >> i) & 1 for i in range(64)]
    return 1.0 - 2.0 * np.array(bits[:count])


def hadamard(values: np.ndarray) -> np.ndarray:
    """Walsh-Hadamard transform by butterflies: sums and differences alone."""
    half = 1
    while half < values.size:
        pairs = values.reshape(-1, 2, half)
        values = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(-1)
        half *= 2
    return values


def counts_of(stream: bytes) -> list:
    """Every count is some bytes 255 and a last byte below: their sum."""
    ends = [i + 1 for i, byte in enumerate(stream) if byte < 255]
    return [sum(stream[start:stop]) for start, stop in pairwise([0, *ends])]


def positions_of(stream: bytes) -> np.ndarray:
    """Every count is the gap before the next position."""
    return np.cumsum([gap + 1 for gap in counts_of(stream)], dtype=np.int64) - 1


def sparse(data: bytes, bits: int, size: int) -> np.ndarray:
    count, size_of_marks = struct.unpack_from("<II", data)
    out = np.zeros(size, "<f4")
    out[positions_of(data[8 : 8 + size_of_marks])] = uniform(data[8 + size_of_marks :], bits, 256, count)
    return out


def codebook(data: bytes, dtype: str, size: int) -> np.ndarray:
    (count,), width = struct.unpack_from("<H", data), np.dtype(DTYPES[dtype]).itemsize
    values = plain(data[2 : 2 + (count or size) * width], dtype, False)
    bits = next(bits for bits in (1, 2, 3, 4, 6, 8) if count <= 1 << bits)
    return values[unpack(data[2 + count * width :], size, bits)] if count else values


def entropy(data: bytes, size: int) -> np.ndarray:
    step, base, levels, _ = struct.unpack_from("<fBBH", data)
    sizes = struct.unpack_from(f"<{levels + 1}I", data, 8) if levels else ()
    at, middle = 8 + 4 * len(sizes), (base - 1) // 2
    per_byte = {255: 1, 15: 2, 5: 3, 1: 0}[base]
    digit_bytes = np.frombuffer(data, "u1", -(-size // per_byte) if per_byte else 0, at).astype(np.int64)
    symbols = np.zeros(size, np.int64)
    if per_byte:
        symbols = np.stack([digit_bytes // base**k % base - middle for k in range(per_byte)], 1).reshape(-1)[:size]
    at += digit_bytes.size
    ends = [at + sum(sizes[:k]) for k in range(len(sizes) + 1)]
    if levels:
        marked(symbols, [data[start:stop] for start, stop in pairwise(ends)], middle)
    return symbols.astype("<f4") * np.float32(step)


def marked(symbols: np.ndarray, streams: list, middle: int) -> None:
    """Add what is beyond the digits: position and sign, then further levels, then what is left."""
    position, positions, signs = -1, [], []
    for byte in streams[0]:
        position += 127 if byte == 255 else (byte >> 1) + 1
        if byte != 255:
            positions.append(position)
            signs.append(-1 if byte & 1 else 1)
    magnitudes, members = np.full(len(positions), middle + 1), np.arange(len(positions))
    for stream in streams[1:-1]:
        members = members[positions_of(stream)]
        magnitudes[members] += 1
    magnitudes[members] += counts_of(streams[-1])
    symbols[positions] = np.array(signs) * magnitudes


if __name__ == "__main__":
    with open(sys.argv[1]) as manifest_file, open(sys.argv[2], "rb") as payload_file:
        for name, array in read_payload(json.load(manifest_file), payload_file.read()).items():
            print(f"{name}  {array.dtype}{list(array.shape)}  {array.reshape(-1)[:4]}")
