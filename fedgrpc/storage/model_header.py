"""Headers of safetensors files (https://huggingface.co/docs/safetensors): writing them, and reading foreign ones.

What the format has no place for is in its metadata, which holds text alone: `roles` is a JSON object of roles by
name, without those that names tell; `tied` one of lists of tied names; `sha256`, `xxh3_128` and `crc32` are those
of the tensors. A file that others have written has none of these, and is read all the same.

The rule: nothing that a header says is used before it was checked, and a file that is not safetensors is refused
with what it is instead.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

from fedgrpc.codec.layout import Layout, TensorRole, TensorSpec, check_unique, role_by_name

_NAMES: Final = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES: Final = {name: dtype for dtype, name in _NAMES.items()}
# The key of a header that names no tensor.
METADATA: Final = "__metadata__"
# Bytes of a file that tell what it is.
FIRST_BYTES: Final = 64
_MAX_DIMS: Final = 16
_MAX_HEADER_BYTES: Final = 100_000_000
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_DIGEST: Final = re.compile(r"[0-9a-f]{32}")
_CRC32: Final = re.compile(r"[0-9a-f]{8}")
# Of the length of the real ones: a header is written before the tensors, and their sums are filled in after them.
_UNKNOWN_SHA256: Final = "0" * 64
_UNKNOWN_DIGEST: Final = "-" * 32
_UNKNOWN_CRC32: Final = "-" * 8
# Files that are given in place of a model again and again, by how they begin.
_MARKS: Final = {
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file itself; fetch it with git lfs pull",
    b"<!doctype html": "it is a web page; download the file itself",
    b"<html": "it is a web page; download the file itself",
    b"<?xml": "it is an XML page; download the file itself",
    b"pk\x03\x04": "it is a zip archive, as torch.save writes; save it with safetensors.torch.save_file",
    b"\x80\x02": "it is a pickle, as torch.save writes; save it with safetensors.torch.save_file",
    b"\x1f\x8b": "it is a gzip file; unpack it first",
    b"gguf": "it is a GGUF file; fedgrpc reads safetensors",
}
_LENGTH: Final = struct.Struct("<Q")
_METADATA_FIRST: Final = '{"__metadata__":'
# How the header of a file begins that was written here.
_OWN_START: Final = re.compile(
    rb'\{"__metadata__":\{"format":"pt",(?:"sha256":"[0-9a-f]{64}","xxh3_128":"[0-9a-f-]{32}",)?"crc32":"[0-9a-f-]{8}"'
)
_DECODER: Final = json.JSONDecoder()
_CACHED_HEADERS: Final = 8
_MAX_CACHED_BYTES: Final = 64 << 10

# Spec of a tensor, and from where to where its bytes go behind the header.
Entry = tuple[TensorSpec, int, int]


@dataclass(frozen=True)
class TensorSums:
    """Sums of a file's tensors, end to end, each None where it is not known: SHA-256, XXH3-128 and CRC-32."""

    crc32: int | None = None
    sha256: bytes | None = None
    digest: bytes | None = None


@dataclass(frozen=True)
class Header:
    """Content of a header: tensors in file order, the ends of their bytes, and their sums, None without any."""

    entries: Sequence[Entry]
    end: int
    sums: TensorSums


def header_size(start: bytes) -> int:
    """Bytes of the header of a file that begins so. Raises ValueError, which says what the file is instead."""
    if len(start) < _LENGTH.size:
        raise ValueError("it is cut short" if start else "it is empty")
    size = int(_LENGTH.unpack_from(start)[0])
    if size > _MAX_HEADER_BYTES:
        text = start.lstrip().lower()
        raise ValueError(
            next((what for mark, what in _MARKS.items() if text.startswith(mark)), "its header is too large")
        )
    return size


def packed(text: bytes) -> bytes:
    """The first bytes of a file with that header."""
    return _LENGTH.pack(len(text)) + text


def build_header(layout: Layout, about: dict[str, str], *, with_digests: bool, repeat_tied: bool) -> bytes:
    """The first bytes of a file of these tensors, with room for their sums.

    `about` is further metadata. `repeat_tied`: tied tensors come again under their other names, behind all others.
    """
    digests = {"sha256": _UNKNOWN_SHA256, "xxh3_128": _UNKNOWN_DIGEST} if with_digests else {}
    metadata = {"format": "pt", **digests, "crc32": _UNKNOWN_CRC32, **about, **_roles_and_ties(layout)}
    entries: dict[str, object] = {METADATA: metadata}
    offset = 0
    repeated = (replace(spec, name=name) for spec in layout for name in spec.tied_names) if repeat_tied else ()
    for spec in (*layout, *repeated):
        span = [offset, offset + spec.nbytes]
        entries[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Tensors that begin at a multiple of eight can be mapped.
    return packed(text + b" " * (-len(text) % 8))


def with_sums(header: bytes, sums: TensorSums) -> bytes:
    """A header of `build_header` with the sums of its tensors. They are the first of what its metadata says."""
    if sums.sha256 is not None and sums.digest is not None:
        header = header.replace(_UNKNOWN_SHA256.encode(), sums.sha256.hex().encode(), 1)
        header = header.replace(_UNKNOWN_DIGEST.encode(), sums.digest.hex().encode(), 1)
    return header if sums.crc32 is None else header.replace(_UNKNOWN_CRC32.encode(), b"%08x" % sums.crc32, 1)


def tied_spans(layout: Layout) -> list[tuple[int, int]]:
    """Start and size in bytes of what `build_header` repeats, in its order."""
    found, offset = [], 0
    for spec in layout:
        found += [(offset, spec.nbytes) for _ in spec.tied_names]
        offset += spec.nbytes
    return found


def _roles_and_ties(layout: Layout) -> dict[str, str]:
    told: dict[str, dict[str, Any]] = {
        "roles": {spec.name: spec.role for spec in layout if spec.role is not role_by_name(spec.name)},
        "tied": {spec.name: list(spec.tied_names) for spec in layout if spec.tied_names},
    }
    return {key: json.dumps(about, separators=(",", ":")) for key, about in told.items() if about}


def parse_header(text: bytes) -> Header:
    """Read a header. Raises ValueError, KeyError, TypeError, RecursionError or LayoutError for a wrong one."""
    if not _OWN_START.match(text):
        entries, end, metadata = _parse(text)
    else:
        metadata, tensors = _split(text.decode())
        parse = _parse_own if len(text) <= _MAX_CACHED_BYTES else _parse_own.__wrapped__
        # What else it says is of this version: a run may be named as a tensor is.
        entries, end = parse(tensors, metadata.get("roles"), metadata.get("tied"))
    crc, sha256 = _text_of(metadata, "crc32", _CRC32), _text_of(metadata, "sha256", _SHA256)
    digest = _text_of(metadata, "xxh3_128", _DIGEST)
    return Header(
        *(entries, end),
        TensorSums(
            int(crc, 16) if crc else None,
            bytes.fromhex(sha256) if sha256 else None,
            bytes.fromhex(digest) if digest else None,
        ),
    )


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Return the metadata of a header that was written here, and the JSON of its tensors."""
    metadata, end = _DECODER.raw_decode(text, len(_METADATA_FIRST))
    # Behind a header are as many blanks as its metadata needs.
    return metadata, "{" + text[end:].removeprefix(",").rstrip(" ")


@lru_cache(maxsize=_CACHED_HEADERS)
def _parse_own(tensors: str, roles: str | None, tied: str | None) -> tuple[Sequence[Entry], int]:
    """Parse what all versions of a model have in common, once. The rest of the metadata is of one version."""
    entries = _entries(json.loads(tensors))
    return _described(entries, {"roles": roles, "tied": tied}), entries[-1][2] if entries else 0


def _parse(text: bytes) -> tuple[Sequence[Entry], int, object]:
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.get(METADATA)
    entries = _entries(header)
    end = entries[-1][2] if entries else 0
    return _described(entries, metadata if isinstance(metadata, dict) else {}), end, metadata


def _described(entries: list[Entry], metadata: dict[str, Any]) -> list[Entry]:
    """Give the tensors the roles and tied names of the metadata; second copies of tied tensors are left out."""
    roles, tied = _object(metadata, "roles"), _object(metadata, "tied")
    names = {spec.name for spec, _, _ in entries}
    for name, kept in metadata.items():
        # As `safetensors.torch.save_model` notes the names that it leaves out.
        if isinstance(kept, str) and kept in names and name not in names:
            tied.setdefault(kept, []).append(name)
    left_out = {name for tied_names in tied.values() for name in tied_names}
    found = [
        (
            replace(
                spec,
                role=TensorRole(roles[spec.name]) if spec.name in roles else role_by_name(spec.name),
                tied_names=tuple(map(str, tied.get(spec.name, ()))),
            ),
            start,
            stop,
        )
        for spec, start, stop in entries
        if spec.name not in left_out
    ]
    for spec, _, _ in found:
        spec.validate(_MAX_DIMS)
    if sum(spec.nbytes for spec, _, _ in found) != (found[-1][2] if found else 0):
        raise ValueError("tensors under a second name are not behind all others")
    check_unique(tuple(spec for spec, _, _ in found))
    return found


def _object(metadata: dict[str, Any], key: str) -> dict[str, Any]:
    """Value of a key of the metadata that holds a JSON object. Raises ValueError."""
    text = metadata.get(key)
    if text is None:
        return {}
    told = json.loads(text) if isinstance(text, str) else text
    if not isinstance(told, dict):
        raise ValueError(f"its {key} are no JSON object")
    return told


def _text_of(metadata: object, name: str, pattern: re.Pattern[str]) -> str | None:
    """Value of a key of the metadata; None where it is of another form, or was never filled in."""
    text = metadata.get(name) if isinstance(metadata, dict) else None
    if not isinstance(text, str) or not pattern.fullmatch(text) or text == _UNKNOWN_SHA256:
        return None
    return text


def _entries(header: dict[str, dict[str, Any]]) -> list[Entry]:
    """List the tensors in file order. Raises ValueError for holes, overlaps, unknown dtypes and wrong sizes."""
    found: list[Entry] = []
    for name, entry in header.items():
        if name == METADATA:
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {entry['dtype']}")
        start, stop = entry["data_offsets"]
        if any(type(number) is not int for number in (start, stop, *entry["shape"])):
            raise ValueError(f"the shape or place of tensor {name!r} is not in whole numbers")
        spec = TensorSpec(name, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
        spec.validate(_MAX_DIMS)
        found.append((spec, start, stop))
    found.sort(key=lambda item: item[1])
    at = 0
    for spec, start, stop in found:
        if start != at or stop - start != spec.nbytes:
            raise ValueError(f"the bytes of tensor {spec.name!r} are not where they belong")
        at = stop
    return found
