"""Golden payloads on disk: their description, their manifest and their bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from fedgrpc.codec.encoding import parse_encoding
from fedgrpc.codec.layout import TensorSpec
from fedgrpc.codec.manifest import Frame, Manifest, TensorEntry

_FOLDER: Final = Path(__file__).parent
GOLDEN_NAMES: Final = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def read_golden(name: str) -> tuple[dict[str, Any], Manifest, bytes]:
    described = json.loads((_FOLDER / f"{name}.json").read_text())
    entries = tuple(
        TensorEntry(
            TensorSpec(row["name"], row["dtype"], tuple(row["shape"])),
            parse_encoding(row["encoding"]),
            row["size_bytes"],
        )
        for row in described["tensors"]
    )
    frames = tuple(Frame(*frame) for frame in described["frames"])
    digest = bytes.fromhex(described["xxh3_128"])
    manifest = Manifest(entries, described["compression"], frames, described["size_bytes"], digest)
    return described, manifest, (_FOLDER / f"{name}.bin").read_bytes()
