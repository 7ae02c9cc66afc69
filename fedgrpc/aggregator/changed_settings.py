"""Settings as texts, and their changes since the last start of a run. Pure.

The rule: nothing is taken over in silence. A change that would break the run is refused by name, the rest is told.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Final

from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.algorithms.registry import algorithm_of
from fedgrpc.errors import UsageError

# Every version has the layout of the first one.
_FIXED: Final = ("model",)
ALGORITHM: Final = "plan.algorithm"
OPTIMIZER: Final = "server_optimizer"
_PARTS: Final = ("policy", "choosing", "plan", "target", "privacy", "secure")


def settings_text(settings: AggregatorSettings) -> dict[str, str]:
    """Return the settings as operators see them, without the paths of secrets. Plans have a message."""
    text: dict[str, str] = {}
    for setting in dataclasses.fields(settings):
        value = getattr(settings, setting.name)
        if dataclasses.is_dataclass(value) and setting.name in _PARTS:
            text.update(
                {f"{setting.name}.{name}": str(item) for name, item in vars(value).items() if item is not None}
            )
        elif setting.name not in ("tls", "local_models") and value is not None:
            text[setting.name] = str(value)
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
    old, new = before.get(ALGORITHM), now.get(ALGORITHM)
    if ALGORITHM in changed and algorithm_of(old).companions != algorithm_of(new).companions:
        raise UsageError(
            f"algorithm {new or 'fedavg'} has other companion tensors than {old or 'fedavg'}, with which the run "
            "in this data folder began; take another data folder"
        )
    return {name: f"{before.get(name, 'none')} -> {now.get(name, 'none')}" for name in changed}
