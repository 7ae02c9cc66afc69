"""Settings of a used data folder that differ from those of the last start. Pure.

The rule: nothing is taken over in silence. What would break the run is refused by name, the rest is told.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Final

from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import UsageError

# Every version has the layout of the first one.
_FIXED: Final = ("model",)
OPTIMIZER: Final = "server_optimizer"
_PARTS: Final = ("policy", "choosing", "plan", "target")


def settings_text(settings: AggregatorSettings) -> dict[str, str]:
    """Return the settings as operators see them, without the paths of secrets. Plans have a message."""
    text: dict[str, str] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value) and field.name in _PARTS:
            text.update(
                {f"{field.name}.{name}": str(item) for name, item in vars(value).items() if item is not None}
            )
        elif field.name not in ("tls", "local_models") and value is not None:
            text[field.name] = str(value)
    return text


def compared_text(settings: AggregatorSettings) -> dict[str, str]:
    """Return the settings to compare at the next start: an initial model by its content."""
    text = settings_text(settings)
    text.pop("initial_model", None)
    text["local_models"] = hashlib.sha256(repr(settings.local_models).encode()).hexdigest()[:12]
    return text


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Return `OLD -> NEW` by setting, for all that changed. Raises `UsageError` for one that may not change."""
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    for name in _FIXED:
        if name in changed and before.get(name) and now.get(name):
            raise UsageError(
                f"{name} {now[name]!r} is not that of the run in this data folder, {before[name]!r}: its versions "
                "have another layout; take another data folder"
            )
    return {name: f"{before.get(name, 'none')} -> {now.get(name, 'none')}" for name in changed}
