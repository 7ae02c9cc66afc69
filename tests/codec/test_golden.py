"""Payloads on disk decode for ever, by fedgrpc and by the independent reader in examples/."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fedgrpc.codec.digest import digest_of
from fedgrpc.codec.encoding import ENCODING_NAMES, parse_encoding
from fedgrpc.codec.entropy import Entropy
from fedgrpc.codec.layout import Array, TensorSpec
from fedgrpc.codec.manifest import Frame, Limits
from fedgrpc.codec.packing import pack, write_marks
from fedgrpc.codec.payload import PayloadReader, buffer_reader, verify_digest
from fedgrpc.errors import FedgrpcError
from fedgrpc.protocol.tensors import chunk_from_proto, manifest_from_proto
from fedgrpc.v1 import tensor_pb2
from tests.golden.generate import VECTORS
from tests.golden.reading import GOLDEN_NAMES, read_golden

ROOT = Path(__file__).parents[2]
WIRE = (ROOT / "protos" / "WIRE.md").read_text()


def short_name(text: str) -> str:
    """The name that an encoding writes of itself: `int8` for `uniform8`."""
    return str(parse_encoding(text)).partition(":")[0]


def family(name: str) -> str:
    return name.rstrip("0123456789")


# Every encoding there is, once. Whatever one of these tests asks of an encoding, it asks of a new one.
ENCODINGS = sorted({short_name(name) for name in ENCODING_NAMES})


def load_reader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("read_payload", ROOT / "examples" / "read_payload.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


READER = load_reader()


def check(row: dict[str, Any], array: Array) -> None:
    assert array.shape == tuple(row["shape"])
    assert hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() == row["decoded_sha256"]


def test_every_vector_of_the_generator_is_on_disk() -> None:
    assert tuple(sorted(VECTORS)) == GOLDEN_NAMES


def test_every_encoding_has_a_golden_payload() -> None:
    written = {short_name(row["encoding"]) for name in GOLDEN_NAMES for row in read_golden(name)[0]["tensors"]}
    assert written == set(ENCODINGS)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_a_golden_payload_decodes_to_the_same_values_as_ever(name: str) -> None:
    described, manifest, payload = read_golden(name)
    manifest.validate(Limits())
    verify_digest(manifest, buffer_reader(payload))
    for row, (_, array) in zip(described["tensors"], PayloadReader(manifest, buffer_reader(payload)), strict=True):
        check(row, array)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_independent_reader_decodes_a_golden_payload_to_the_same_values(name: str) -> None:
    described, _, payload = read_golden(name)
    tensors = READER.read_payload(described, payload)
    assert list(tensors) == [row["name"] for row in described["tensors"]]
    for row in described["tensors"]:
        array = tensors[row["name"]]
        check(row, array.astype(ml_dtypes.bfloat16) if row["dtype"] == "bfloat16" else array)


def test_the_independent_reader_is_short_and_imports_nothing_of_fedgrpc() -> None:
    source = (ROOT / "examples" / "read_payload.py").read_text()
    assert len(source.splitlines()) <= 210
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy", "xxhash", "zstandard"}


def documented_examples() -> list[tuple[str, str, tuple[int, ...], bytes, list[float]]]:
    """The worked examples of WIRE.md: an `example:` line, lines of hex, a `values:` line."""
    found = []
    for block in re.findall(r"```\n(example: .*?)```", WIRE, flags=re.DOTALL):
        head, values = re.search(r"example: (.*)", block), re.search(r"values: (.*)", block)
        assert head
        assert values
        encoding, dtype, shape = head[1].split()
        hexes = [line.split("|")[0] for line in block.splitlines() if re.match(r"[0-9a-f]{2}( |$)", line)]
        extents = tuple(int(extent) for extent in shape.strip("[]").split(",") if extent)
        numbers = [float(value) for value in values[1].split()]
        found.append((encoding, dtype, extents, bytes.fromhex("".join(hexes)), numbers))
    return found


@pytest.mark.parametrize("example", documented_examples(), ids=lambda example: example[0])
def test_every_worked_example_of_the_wire_document_is_true(
    example: tuple[str, str, tuple[int, ...], bytes, list[float]],
) -> None:
    encoding, dtype, shape, data, values = example
    ours = parse_encoding(encoding).decode(memoryview(data), TensorSpec("x", dtype, shape))
    independent = READER.decode(data, encoding, dtype, list(shape))
    for decoded in (ours, independent):
        np.testing.assert_allclose(decoded.astype(np.float64).reshape(-1), values, rtol=1e-5, atol=1e-7)


def test_the_wire_document_shows_every_encoding() -> None:
    assert {family(example[0].partition(":")[0]) for example in documented_examples()} == set(
        map(family, ENCODINGS)
    )
    assert not [name for name in ENCODINGS if f"`{name}`" not in WIRE]


def documented_hex(after: str) -> bytes:
    """The bytes of the first fenced block after a sentence; each line is hex, then two spaces and words."""
    block = WIRE[WIRE.index(after) :].split("```")[1]
    found = bytearray()
    for line in block.strip().splitlines():
        for token in line.split():
            if not re.fullmatch(r"[0-9a-f]{2}", token):
                break
            found.append(int(token, 16))
    return bytes(found)


def test_the_documented_manifest_and_chunk_are_what_protobuf_reads() -> None:
    message = tensor_pb2.Manifest.FromString(documented_hex("The manifest of a payload with"))
    manifest = manifest_from_proto(message)
    assert [(str(entry.encoding), entry.size_bytes) for entry in manifest.entries] == [
        ("int8:rounding=nearest", 68),
        ("raw", 8),
    ]
    assert manifest.frames == (Frame(28, 76),)
    chunk = chunk_from_proto(tensor_pb2.Chunk.FromString(documented_hex("Three bytes `abc`")))
    assert (chunk.offset, bytes(chunk.data)) == (1 << 20, b"abc")
    chunk.verify()


def test_the_documented_digests_are_what_the_codec_writes() -> None:
    for data in (b"abc", b""):
        assert f"`{digest_of(data).hex()}`" in WIRE


def test_the_documented_counts_and_marks_are_what_the_codec_writes() -> None:
    assert write_marks(np.array([3, 4, 300])).tobytes() == bytes.fromhex("0300ff28")
    assert write_marks(np.array([3, 134]), np.array([True, False])).tobytes() == bytes.fromhex("07ff06")
    assert pack(np.array([1, 2, 3], np.uint8), 3).tobytes() == bytes.fromhex("d100")
    assert bytes(Entropy().encode(np.zeros(99), np.random.default_rng(0))).hex() == "0000000001000000"


def test_an_unknown_encoding_in_a_manifest_is_an_error_of_ours() -> None:
    with pytest.raises(FedgrpcError):
        parse_encoding("zfp:rate=4")


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize(
    "text",
    [
        *ENCODINGS,
        *("rotated2:block=16", "rotated3:block=64", "rotated4:block=65536", "int8:block=8"),
        *("float16:shuffle=yes", "topk:fraction=0.2", "threshold:times=1.0", "entropy:c=0.3"),
    ],
)
def test_an_independent_reader_decodes_the_same_bits(text: str, dtype: str) -> None:
    rng = np.random.default_rng(5)
    for size in (64, 1000, 70_000):
        array = (rng.laplace(size=size) * rng.choice([1e-3, 1, 300])).astype(dtype)
        data = bytes(parse_encoding(text).encode(array, rng))
        ours = parse_encoding(text).decode(memoryview(data), TensorSpec("x", dtype, (size,)))
        assert ours.tobytes() == READER.decode(data, text, dtype, [size]).tobytes()


def feedback_rows() -> list[tuple[str, str]]:
    """Rows of WIRE.md on what keeps what it lost: the encodings with their conditions, and the verdict."""
    table = WIRE[WIRE.index("| encoding | keeps what it lost |") :].split("\n\n")[0]
    return [(row.split("|")[1], row.split("|")[2].strip()) for row in table.splitlines()[2:]]


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_wire_document_says_of_every_encoding_whether_it_may_owe_what_it_loses(name: str) -> None:
    names = {f"`{name}`", f"`{family(name)}N`"}
    told = [(cell, verdict) for cell, verdict in feedback_rows() if names & set(re.findall(r"`[^`]*`", cell))]
    assert told
    for cell, verdict in told:
        # Other rows set a condition: the next test has an example of each.
        if not re.sub(r"`[^`]*`|,| ", "", cell) and "=" not in cell:
            encoding = parse_encoding(name)
            assert (
                encoding.lossless
                if verdict == "loses nothing"
                else encoding.contractive == (verdict != "must not")
            )


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ("`int2`, `rounding=nearest` | may", ["int2:rounding=nearest"]),
        ("`int2`, `rounding=stochastic` | must not", ["int2"]),
        ("`entropy`, `rounding=nearest` | may", ["entropy:c=8.0,rounding=nearest"]),
        ("c below 2 (or a distortion below 1) | may", ["entropy:c=1.99", "entropy:distortion=0.9"]),
        (
            "c of 2 and more (or a distortion of 1 and more) | must not",
            ["entropy:c=2.0", "entropy", "entropy:distortion=1.0"],
        ),
    ],
)
def test_the_wire_document_says_under_which_settings_an_encoding_may_owe(row: str, texts: list[str]) -> None:
    assert row in WIRE
    for text in texts:
        assert parse_encoding(text).contractive == ("must not" not in row)


def test_the_wire_document_gives_the_defaults_that_are_in_force() -> None:
    table = WIRE[WIRE.index("| encoding | keys for the reader") : WIRE.index("Lossy encodings are for")]
    pairs = {
        pair for name in ENCODINGS for pair in parse_encoding(name).text(full=True).partition(":")[2].split(",")
    }
    assert not [pair for pair in pairs if pair and f"`{pair}`" not in table]
