"""Encodings: how one tensor's elements become bytes. The interface of every scheme, and its text form.

Each scheme is a frozen dataclass in its own module. An encoding is stateless, never changes its input,
and carries in its text form (`str(encoding)`) all that a reader needs besides the bytes and the spec.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, Protocol

import numpy as np

from fedgrpc.codec.cast import Cast
from fedgrpc.codec.codebook import Codebook
from fedgrpc.codec.entropy import Entropy
from fedgrpc.codec.layout import Array, TensorSpec
from fedgrpc.codec.options import parse_options
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.rotated import Rotated
from fedgrpc.codec.sparse import Threshold, TopK
from fedgrpc.codec.uniform import BITS, Uniform
from fedgrpc.errors import UsageError
from fedgrpc.plugins import class_of, installed

Buffer = bytes | bytearray | memoryview
MAX_TEXT_CHARS = 200


class Encoding(Protocol):
    """One scheme with its settings."""

    name: ClassVar[str]
    lossless: ClassVar[bool]

    @property
    def contractive(self) -> bool:
        """True if |x - decode(encode(x))| < |x| in the mean square, which error feedback needs."""

    def text(self, *, full: bool = False) -> str:
        """Return `NAME:key=value,...` for `parse_encoding`; the full text leaves no key to its default."""

    def encode(self, array: Array, rng: np.random.Generator) -> Buffer:
        """Return the bytes of the tensor. Raises EncodeError for values that are not finite or out of range."""

    def decode(self, data: memoryview, spec: TensorSpec) -> Array:
        """Return the tensor of `spec`, possibly a read-only view of `data`.

        Takes no more memory than `spec` implies. Raises LayoutError for a wrong number of bytes and
        CorruptError for bytes that no encoder writes.
        """

    def size_bounds(self, spec: TensorSpec) -> tuple[int, int]:
        """Return the least and most bytes that `encode` may give for a tensor of `spec`; equal if fixed."""


_PARSERS: dict[str, Callable[[str], Encoding]] = {
    "raw": partial(parse_options, Raw),
    "float32": partial(parse_options, Raw),
    "float16": partial(parse_options, Cast, dtype="float16"),
    "bfloat16": partial(parse_options, Cast, dtype="bfloat16"),
    "codebook": partial(parse_options, Codebook),
    "entropy": partial(parse_options, Entropy),
    "topk": partial(parse_options, TopK),
    "threshold": partial(parse_options, Threshold),
}
for _bits in (1, 2, 3, 4):
    _PARSERS[f"rotated{_bits}"] = partial(parse_options, Rotated, bits=_bits)
for _bits in BITS:
    _PARSERS[f"int{_bits}"] = _PARSERS[f"uniform{_bits}"] = partial(parse_options, Uniform, bits=_bits)

# Those that come with fedgrpc.
ENCODING_NAMES: tuple[str, ...] = tuple(_PARSERS)


def load_encodings() -> None:
    """Import the encodings of installed packages. A process does so when it starts, before any message comes.

    A manifest from a peer names encodings, and so must import nothing: it finds those that are loaded. Raises
    `UsageError` for a package whose encoding cannot be used.
    """
    for plugin in installed("encoding"):
        if plugin.name in ENCODING_NAMES:
            raise UsageError(f"encoding {plugin.name} of {plugin.package}: fedgrpc has one of this name")
        if plugin.name not in _PARSERS:
            own: Any = class_of("encoding", plugin.name, {})[1]
            fits = is_dataclass(own) and getattr(own, "name", None) == plugin.name
            if not fits:
                raise UsageError(f"encoding {plugin.reference} must be a dataclass with the name {plugin.name!r}")
            _PARSERS[plugin.name] = partial(parse_options, own)


def encoding_names() -> tuple[str, ...]:
    """Return the names of all encodings that are loaded."""
    return tuple(_PARSERS)


@lru_cache(maxsize=1024)
def parse_encoding(text: str) -> Encoding:
    """Read `NAME` or `NAME:key=value,key=value`. Raises UsageError in one line."""
    if len(text) > MAX_TEXT_CHARS:
        raise UsageError(f"an encoding of {len(text)} characters; allowed: {MAX_TEXT_CHARS}")
    name, _, options = text.strip().partition(":")
    if name not in _PARSERS:
        raise UsageError(f"unknown encoding {name!r}; known: {', '.join(_PARSERS)}")
    return _PARSERS[name](options)
