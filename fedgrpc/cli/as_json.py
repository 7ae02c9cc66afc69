"""Protocol messages as plain JSON for programs: numbers are numbers, every field is there, nothing is NaN.

Enums become their last words (`committed`), durations seconds, times ISO 8601 in UTC, bytes hex. Absent optional
fields are left out; all others are written, zero or not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, Final

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

_SETTINGS: Final = {"True": True, "False": False}
_WORD: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def json_text(value: Any) -> str:
    """Return indented JSON. A number that JSON does not have (NaN, infinity) becomes null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def plain(message: Message) -> dict[str, Any]:
    """Return the fields of a message by name, as values of JSON."""
    return {
        field.name: _field(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def settings(texts: dict[str, str]) -> dict[str, Any]:
    """Return a run's settings with numbers and booleans for texts that are one."""
    return {name: _setting(text) for name, text in sorted(texts.items())}


def _setting(text: str) -> Any:
    if text in _SETTINGS:
        return _SETTINGS[text]
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


def _field(field: Any, value: Any) -> Any:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        of = kind.fields_by_name["value"]
        return {str(key): _value(of, value[key]) for key in sorted(value)}
    return [_value(field, item) for item in value] if field.is_repeated else _value(field, value)


def _value(field: Any, value: Any) -> Any:
    if isinstance(value, Duration):
        return value.ToNanoseconds() / 1e9
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Message):
        return plain(value)
    if field.enum_type is not None:
        return _word(field.enum_type, value)
    return value.hex() if isinstance(value, bytes) else value


def _word(kind: EnumDescriptor, number: int) -> str | int:
    """Return `committed` for ROUND_PHASE_COMMITTED; an unknown number stays a number."""
    known = kind.values_by_number.get(number)
    prefix = _WORD.sub("_", kind.name).upper() + "_"
    return number if known is None else known.name.removeprefix(prefix).lower()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
