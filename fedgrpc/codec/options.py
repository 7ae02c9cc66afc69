"""The text form of an encoding's settings: `block=128,rounding=nearest`.

Settings are the fields of the encoding's frozen dataclass; those at their default are left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar

from fedgrpc.errors import UsageError

T = TypeVar("T")

_BOOLS = {"yes": True, "no": False}
_CONVERTERS: dict[str, Any] = {"int": int, "float": float, "str": str, "bool": _BOOLS.__getitem__}


def parse_options(cls: type[T], text: str, **fixed: Any) -> T:
    """Build `cls` from `key=value,key=value`. Raises UsageError in one line for a bad key or value."""
    types = {field.name: _name(field.type) for field in dataclasses.fields(cls) if field.name not in fixed}  # type: ignore[arg-type]
    values: dict[str, Any] = dict(fixed)
    for pair in filter(None, text.split(",")):
        key, _, value = pair.partition("=")
        if key not in types:
            raise UsageError(f"unknown setting {key!r} of an encoding; allowed: {', '.join(types) or 'none'}")
        try:
            values[key] = _CONVERTERS[types[key]](value)
        except (ValueError, KeyError):
            raise UsageError(f"{key}={value!r} is not a valid {types[key]}") from None
    return cls(**values)


def _name(hint: Any) -> str:
    """Return the name of a field's type, which is a text where its module postpones annotations."""
    return hint.__name__ if isinstance(hint, type) else str(hint)


def format_options(name: str, encoding: Any, *hidden: str, full: bool = False) -> str:
    """Return `name:key=value,...` with every setting that is neither hidden nor at its default.

    The `full` text has settings at their default too, except those that are then off, such as a `distortion` of 0.
    """
    pairs = []
    for field in dataclasses.fields(encoding):
        value = getattr(encoding, field.name)
        in_force = full and (isinstance(value, bool) or bool(value))
        if field.name not in hidden and (value != field.default or in_force):
            pairs.append(f"{field.name}={_text(value)}")
    return f"{name}:{','.join(pairs)}" if pairs else name


class TextForm:
    """Text form of an encoding: base of the frozen dataclasses in the modules of the encodings."""

    name: ClassVar[str]

    @property
    def name_and_field(self) -> tuple[str, str]:
        """The name in the text form, and the field whose value that name already tells; empty: none."""
        return self.name, ""

    def __str__(self) -> str:
        return self.text()

    def text(self, *, full: bool = False) -> str:
        """See `Encoding.text`."""
        name, field = self.name_and_field
        return format_options(name, self, field, full=full)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return repr(value) if isinstance(value, float) else str(value)
