"""Fields of a message from a dataclass's and back, for messages that mirror a dataclass.

The rule: a field has one name on both sides. Only times differ: `NAME_s`, in seconds, is the `Duration` `NAME`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from google.protobuf.message import Message

from fedgrpc.protocol.durations import duration_from_proto, duration_to_proto

_SECONDS: Final = "_s"


def fill(message: Message, values: Mapping[str, Any]) -> None:
    """Set the fields of `values` in `message`; None stays absent."""
    for name, value in values.items():
        if value is None:
            continue
        if name.endswith(_SECONDS):
            getattr(message, name.removesuffix(_SECONDS)).CopyFrom(duration_to_proto(value))
        else:
            setattr(message, name, value)


def values_of(message: Message, owner: type) -> dict[str, Any]:
    """Return the fields of the dataclass `owner` that `message` has, by name; the others are for its defaults."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(owner):
        name = field.name.removesuffix(_SECONDS)
        if message.DESCRIPTOR.fields_by_name[name].has_presence and not message.HasField(name):
            continue
        value = getattr(message, name)
        values[field.name] = value if name == field.name else duration_from_proto(value)
    return values
