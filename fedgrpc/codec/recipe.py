"""Which encoding each tensor of a payload gets, and whether the frames are compressed.

    int8+zstd        int8 for every float tensor, frames through zstd level 1
    int4;*.bias=raw;head.*=int8+zstd:3        patterns (fnmatch) in order, the first that fits wins

Integers, bool, tensors below 64 elements, and tensors that would not shrink travel raw whatever is
asked. Before zstd, float bytes that are not quantized are shuffled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from fedgrpc.codec.cast import Cast
from fedgrpc.codec.encoding import Encoding, parse_encoding
from fedgrpc.codec.layout import TensorSpec
from fedgrpc.codec.raw import Raw
from fedgrpc.errors import UsageError

MIN_LOSSY_ELEMENTS = 64
ZSTD_LEVELS = range(-7, 20)
_SUFFIX = re.compile(r"\+(none|zstd)(?::(-?\d{1,3}))?$")


@dataclass(frozen=True)
class Compression:
    """Lossless compression of the payload's frames: `method` is "none" or "zstd"."""

    method: str = "none"
    level: int = 1

    def __post_init__(self) -> None:
        if self.method not in ("none", "zstd"):
            raise UsageError(f"unknown compression {self.method!r}; known are none, zstd")
        if self.level not in ZSTD_LEVELS:
            raise UsageError(f"zstd level {self.level}; allowed are {ZSTD_LEVELS[0]} to {ZSTD_LEVELS[-1]}")

    def __str__(self) -> str:
        return self.method if self.method == "none" or self.level == 1 else f"{self.method}:{self.level}"


@dataclass(frozen=True)
class Recipe:
    """How a payload is written; a reader never needs it, the manifest says it all."""

    default: Encoding
    overrides: tuple[tuple[str, Encoding], ...] = ()
    compression: Compression = field(default_factory=Compression)

    @staticmethod
    def parse(text: str) -> Recipe:
        """Read `ENCODING[;PATTERN=ENCODING...][+zstd[:LEVEL]]`; raises UsageError in one line."""
        body, compression = text.strip(), Compression()
        if match := _SUFFIX.search(body):
            body = body[: match.start()]
            compression = Compression(match[1], int(match[2] or 1))
        default, *rest = body.split(";")
        return Recipe(parse_encoding(default), tuple(_override(part) for part in rest), compression)

    def __str__(self) -> str:
        parts = [str(self.default), *(f"{pattern}={encoding}" for pattern, encoding in self.overrides)]
        suffix = "" if self.compression.method == "none" else f"+{self.compression}"
        return ";".join(parts) + suffix

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        """All that it names."""
        return (self.default, *(encoding for _, encoding in self.overrides))

    @property
    def lossless(self) -> bool:
        """Whether every tensor arrives as it was."""
        return all(encoding.lossless for encoding in self.encodings)

    @property
    def contractive(self) -> bool:
        """Whether what is lost may be sent again with the next payload without growing."""
        return all(encoding.contractive for encoding in self.encodings)

    def for_tensor(self, spec: TensorSpec) -> Encoding:
        """The encoding this tensor gets."""
        if not spec.is_float or spec.size < MIN_LOSSY_ELEMENTS:
            return Raw()
        matching = (encoding for pattern, encoding in self.overrides if fnmatchcase(spec.name, pattern))
        encoding = next(matching, self.default)
        if not encoding.lossless and encoding.size_bounds(spec)[0] >= spec.nbytes:
            encoding = Raw()
        if isinstance(encoding, Raw | Cast) and self.compression.method != "none":
            return replace(encoding, shuffle=True)
        return encoding


def _override(text: str) -> tuple[str, Encoding]:
    pattern, equals, encoding = text.partition("=")
    if not pattern or not equals:
        raise UsageError(f"{text!r} is no override; write PATTERN=ENCODING, such as *.bias=raw")
    return pattern.strip(), parse_encoding(encoding)
