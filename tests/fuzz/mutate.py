"""Damage to bytes and to messages, drawn from a `random.Random`: the same seed damages in the same way."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_BYTES = (0, 1, 127, 128, 253, 254, 255)
_WORDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 8, 2**32 - 1, 0x7F800000, 0xFFC00000)
_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    64,
    255,
    1000,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**62,
    2**63 - 1,
    2**64 - 1,
)
_FLOATS = (0.0, -0.0, 1.0, 0.5, -1.0, 1e-320, 1e-30, 3e38, 1.7e308, math.inf, -math.inf, math.nan)
_TEXTS = (
    *("", "w", "raw", "int8", "loss", "../../x", "\0", "\x1b[2J", "ß\n", "n" * 70, "x" * 3000, "pi-1"),
    *("prefix:0.5", "random:5:0.5", "rolling:-1:0.5", "prefix:nan", "whole", "magnitude:1e-300", "*", "[a-"),
    *("int8:block=7", "entropy:c=nan", "uniform8", "topk:fraction=0.5,bits=3", "float16", "e5s11", "fixed8.4"),
)
_MAX_ITEMS = 4
_MAX_DEPTH = 6
_SHOWN_CHARS = 600


class Recording(Random):
    """A `Random` that remembers what was made with it, to be shown where that is not taken well."""

    def __init__(self, seed: str) -> None:
        super().__init__(seed)
        self.made: list[Any] = []

    def __str__(self) -> str:
        return "; ".join(map(_shown, self.made)) or "nothing"


def _shown(made: Any) -> str:
    text = made.hex() if isinstance(made, bytes) else " ".join(str(made).split())
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(text)} characters)"


def made(value: Any, rnd: Random) -> Any:
    """The value, remembered as what was made with `rnd`."""
    if isinstance(rnd, Recording):
        rnd.made.append(value)
    return value


def mutated(data: bytes, rnd: Random) -> bytes:
    """The bytes with a few changed, cut, doubled, put in or taken out."""
    out = bytearray(data)
    for _ in range(rnd.choice((1, 1, 1, 2, 3, 8))):
        rnd.choice(_DAMAGES)(out, rnd)
    return bytes(made(bytes(out), rnd))


def _flip(out: bytearray, rnd: Random) -> None:
    if out:
        out[rnd.randrange(len(out))] ^= 1 << rnd.randrange(8)


def _set(out: bytearray, rnd: Random) -> None:
    # Headers and trailers say more than what is between.
    if out:
        reach = min(len(out), rnd.choice((8, 40, len(out))))
        at = rnd.randrange(reach)
        out[at if rnd.random() < 0.7 else len(out) - 1 - at] = rnd.choice((*_BYTES, rnd.randrange(256)))


def _word(out: bytearray, rnd: Random) -> None:
    width = rnd.choice((4, 8))
    if len(out) >= width:
        at = rnd.randrange(len(out) - width + 1)
        value = rnd.choice((*_WORDS, len(out), len(out) - at, rnd.getrandbits(32)))
        out[at : at + width] = (value * rnd.choice((1, 1, 2**32)) % 256**width).to_bytes(width, "little")


def _cut(out: bytearray, rnd: Random) -> None:
    del out[rnd.randrange(len(out) + 1) :]


def _grow(out: bytearray, rnd: Random) -> None:
    out += rnd.randbytes(rnd.choice((1, 4, 100)))


def _copy(out: bytearray, rnd: Random) -> None:
    at, source = rnd.randrange(len(out) + 1), rnd.randrange(len(out) + 1)
    out[at:at] = out[source : source + rnd.randrange(64)]


def _remove(out: bytearray, rnd: Random) -> None:
    at = rnd.randrange(len(out) + 1)
    del out[at : at + rnd.randrange(1, 40)]


def _same(out: bytearray, rnd: Random) -> None:
    start = rnd.randrange(len(out) + 1)
    stop = rnd.randrange(start, len(out) + 1)
    out[start:stop] = bytes([rnd.choice(_BYTES)]) * (stop - start)


_DAMAGES: tuple[Callable[[bytearray, Random], None], ...] = (
    *(_flip, _flip, _set, _set, _set, _word, _word, _cut, _grow, _copy, _remove, _same),
)


def spoiled(message: Message, rnd: Random) -> Any:
    """A copy with some of its fields invented, some dropped, anywhere within it."""
    copy = type(message)()
    copy.CopyFrom(message)
    for _ in range(rnd.choice((1, 1, 2, 4))):
        _spoil(copy, rnd, _MAX_DEPTH)
    return made(copy, rnd)


def invented(kind: type[Message], rnd: Random) -> Any:
    """A message whose fields hold what no honest peer would send."""
    message = kind()
    _fill(message, rnd, _MAX_DEPTH)
    return made(message, rnd)


_ODD: tuple[Any, ...] = (
    *(-1, 0, 1, 10**30, 10**400, 0.0, -0.5, 1e308, math.nan, math.inf, True, "", "x", "auto", [], {}, [1], ["x"]),
    *({"x": 1}, [[1]], "0s", "-1s", "1e400s", "10mbit", "nanmbit"),
)


def spoiled_document(document: Any, rnd: Random) -> Any:
    """What a TOML file holds, with one of its values another or missing, anywhere within it."""
    if isinstance(document, dict) and document and rnd.random() < 0.9:
        key = rnd.choice(sorted(document))
        if rnd.random() < 0.1:
            return {name: value for name, value in document.items() if name != key}
        return {**document, key: spoiled_document(document[key], rnd)}
    if isinstance(document, list) and document and rnd.random() < 0.8:
        at = rnd.randrange(len(document))
        return [*document[:at], spoiled_document(document[at], rnd), *document[at + 1 :]]
    return rnd.choice(_ODD)


def _spoil(message: Message, rnd: Random, depth: int) -> None:
    """Change a field, of the message or of one within it."""
    field = rnd.choice(message.DESCRIPTOR.fields)
    within = _messages_of(message, field)
    if within and depth and rnd.random() < 0.8:
        _spoil(rnd.choice(within), rnd, depth - 1)
    elif rnd.random() < 0.15:
        message.ClearField(field.name)
    else:
        _invent(message, field, rnd, depth)


def _messages_of(message: Message, field: FieldDescriptor) -> list[Message]:
    value = getattr(message, field.name)
    if field.message_type is None:
        return []
    if _is_map(field):
        return list(value.values()) if field.message_type.fields_by_name["value"].message_type else []
    if field.is_repeated:
        return list(value)
    return [value] if message.HasField(field.name) else []


def _fill(message: Message, rnd: Random, depth: int) -> None:
    for field in message.DESCRIPTOR.fields:
        if rnd.random() < 0.6:
            _invent(message, field, rnd, depth)


def _invent(message: Message, field: FieldDescriptor, rnd: Random, depth: int) -> None:
    if _is_map(field):
        _invent_map(getattr(message, field.name), field, rnd, depth)
    elif field.message_type is not None:
        if not depth:
            return
        if field.is_repeated:
            for _ in range(rnd.randrange(_MAX_ITEMS)):
                _fill(getattr(message, field.name).add(), rnd, depth - 1)
        else:
            target = getattr(message, field.name)
            target.SetInParent()
            _fill(target, rnd, depth - 1)
    elif field.is_repeated:
        getattr(message, field.name).extend(_scalar(field, rnd) for _ in range(rnd.randrange(_MAX_ITEMS)))
    else:
        setattr(message, field.name, _scalar(field, rnd))


def _invent_map(target: Any, field: FieldDescriptor, rnd: Random, depth: int) -> None:
    value = field.message_type.fields_by_name["value"]
    for _ in range(rnd.randrange(_MAX_ITEMS)):
        key = _scalar(field.message_type.fields_by_name["key"], rnd)
        if value.message_type is None:
            target[key] = _scalar(value, rnd)
        elif depth:
            _fill(target[key], rnd, depth - 1)


def _scalar(field: FieldDescriptor, rnd: Random) -> Any:
    kind = field.cpp_type
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        value = rnd.choice((*_FLOATS, rnd.uniform(-10, 10)))
        return value if kind == FieldDescriptor.CPPTYPE_DOUBLE or abs(value) < 3e38 else 1.0
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rnd.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return rnd.randbytes(rnd.choice((0, 1, 31, 32, 33, 200)))
        return rnd.choice(_TEXTS)
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return rnd.choice((*(value.number for value in field.enum_type.values), 99))
    bits = 32 if kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 64
    signed = kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
    value = rnd.choice((*_NUMBERS, rnd.getrandbits(20))) % (1 << bits)
    return value - (1 << bits) if signed and value >= 1 << (bits - 1) else value


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry
