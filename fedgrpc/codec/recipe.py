"""Recipes: which encoding each tensor of a payload gets, and whether its frames are compressed.

    int8+zstd        int8 for every float tensor, frames through zstd level 1
    int4;*.bias=raw;head.*=int8+zstd:3        patterns (fnmatch) in order, the first that fits wins
    entropy:c=5;@vectors=raw;@last=int8+zstd  @vectors: floats of fewer than two dimensions (norms, biases);
                                              @last: the last float tensor of two or more (`for_layout`)

Tensors that are not trained floats (`TensorSpec.is_trained`), have fewer than 64 elements, or would not shrink
travel raw, whatever the recipe says. Before zstd, float bytes that are not quantized are shuffled.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache

from fedgrpc.codec.cast import Cast
from fedgrpc.codec.encoding import Encoding, parse_encoding
from fedgrpc.codec.entropy import Entropy
from fedgrpc.codec.layout import Layout, TensorSpec
from fedgrpc.codec.raw import Raw
from fedgrpc.errors import UsageError

MIN_LOSSY_ELEMENTS = 64
MAX_RECIPE_CHARS = 4096
ZSTD_LEVELS = range(-7, 20)
VECTORS, LAST = "@vectors", "@last"
_KNOWN = 64
_RAW = Raw()
_SUFFIX = re.compile(r"\+(none|zstd)(?::(-?\d{1,3}))?$")


@dataclass(frozen=True)
class Compression:
    """Lossless compression of the payload's frames: `method` is "none" or "zstd"."""

    method: str = "none"
    level: int = 1

    def __post_init__(self) -> None:
        if self.method not in ("none", "zstd"):
            raise UsageError(f"unknown compression {self.method!r}; known: none, zstd")
        if self.level not in ZSTD_LEVELS:
            raise UsageError(f"zstd level {self.level}; allowed: {ZSTD_LEVELS[0]} to {ZSTD_LEVELS[-1]}")

    def __str__(self) -> str:
        return self.method if self.method == "none" or self.level == 1 else f"{self.method}:{self.level}"


@dataclass(frozen=True)
class Recipe:
    """The way a payload is written. A reader does not need it: the manifest names every encoding."""

    default: Encoding
    overrides: tuple[tuple[str, Encoding], ...] = ()
    compression: Compression = field(default_factory=Compression)

    def __post_init__(self) -> None:
        if any(isinstance(encoding, Entropy) and encoding.budget for _, encoding in self.overrides):
            raise UsageError("a budget is for the whole payload: give it to the first encoding of the recipe")

    @staticmethod
    @lru_cache(maxsize=_KNOWN)
    def parse(text: str) -> Recipe:
        """Read `ENCODING[;PATTERN=ENCODING...][+zstd[:LEVEL]]`. Raises UsageError in one line."""
        if len(text) > MAX_RECIPE_CHARS:
            raise UsageError(f"a recipe of {len(text)} characters; allowed: {MAX_RECIPE_CHARS}")
        body, compression = text.strip(), Compression()
        if match := _SUFFIX.search(body):
            body = body[: match.start()]
            compression = Compression(match[1], int(match[2] or 1))
        default, *rest = body.split(";")
        return Recipe(parse_encoding(default), tuple(_override(part) for part in rest), compression)

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        suffix = "" if self.compression.method == "none" else f"+{self.compression}"
        return self._encodings(full=False) + suffix

    @cached_property
    def full_text(self) -> str:
        """The recipe with every key of every encoding, so that its reader needs no table of defaults."""
        level = f":{self.compression.level}" if self.compression.method == "zstd" else ""
        return f"{self._encodings(full=True)}+{self.compression.method}{level}"

    def _encodings(self, *, full: bool) -> str:
        overrides = (f"{pattern}={encoding.text(full=full)}" for pattern, encoding in self.overrides)
        return ";".join((self.default.text(full=full), *overrides))

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        """All encodings that the recipe names."""
        return (self.default, *(encoding for _, encoding in self.overrides))

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the encodings that a reader must know, besides raw."""
        return frozenset(str(encoding).partition(":")[0] for encoding in self.encodings)

    @property
    def budget(self) -> str:
        """The budget of the payload, as in `Entropy.budget`; empty: none."""
        return self.default.budget if isinstance(self.default, Entropy) else ""

    def without_budget(self) -> Recipe:
        """Return this recipe at its finest step, however many bytes that takes."""
        default = self.default
        return replace(self, default=replace(default, budget="")) if isinstance(default, Entropy) else self

    @property
    def lossless(self) -> bool:
        """True if every tensor arrives unchanged."""
        return all(encoding.lossless for encoding in self.encodings)

    @property
    def contractive(self) -> bool:
        """True if error feedback may add what was lost to the next payload without the error growing."""
        return all(encoding.contractive for encoding in self.encodings)

    def for_layout(self, layout: Layout) -> Recipe:
        """Return this recipe with `@last` replaced by the tensor that it means in a payload of that layout."""
        if all(pattern != LAST for pattern, _ in self.overrides):
            return self
        matrices = [spec.name for spec in layout if spec.is_trained and len(spec.shape) >= 2]
        last = [glob.escape(name) for name in matrices[-1:]]
        named = [
            (name, encoding)
            for pattern, encoding in self.overrides
            for name in (last if pattern == LAST else [pattern])
        ]
        return replace(self, overrides=tuple(named))

    def for_tensor(self, spec: TensorSpec) -> Encoding:
        """Return the encoding of this tensor. Call `for_layout` first."""
        if not spec.is_float or spec.size < MIN_LOSSY_ELEMENTS:
            return _RAW
        if not spec.is_trained:
            return Raw(shuffle=self.compression.method != "none")
        encoding = self.default
        if self.overrides:
            matching = (encoding for pattern, encoding in self.overrides if _fits(pattern, spec))
            encoding = next(matching, encoding)
        if not encoding.lossless and encoding.size_bounds(spec)[0] >= spec.nbytes:
            encoding = Raw()
        if isinstance(encoding, Raw | Cast) and self.compression.method != "none":
            return replace(encoding, shuffle=True)
        return encoding


def _fits(pattern: str, spec: TensorSpec) -> bool:
    return len(spec.shape) < 2 if pattern == VECTORS else fnmatchcase(spec.name, pattern)


def _override(text: str) -> tuple[str, Encoding]:
    pattern, equals, encoding = text.partition("=")
    if not pattern or not equals:
        raise UsageError(f"{text!r} is not an override; write PATTERN=ENCODING, such as *.bias=raw")
    if pattern.strip().startswith("@") and pattern.strip() not in (VECTORS, LAST):
        raise UsageError(f"{pattern.strip()!r} names no tensors; known: {VECTORS}, {LAST} and patterns of names")
    return pattern.strip(), parse_encoding(encoding)
