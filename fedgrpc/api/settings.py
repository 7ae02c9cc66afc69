"""Settings as keyword arguments: the keys of the settings file (docs/settings.md), with Python's values.

    Aggregator(rounds=3, min_workers=5, deadline="30s", weight={"pi-1": 2.0})

The rule: names, units, defaults and checks are those of the command line. There is no second list of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fedgrpc.cli.options import SettingsCommand
from fedgrpc.cli.values import plain_texts


def values_of(command: SettingsCommand, settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of all settings of a command; `given` by name, and nothing to convert.

    None is as if the setting were not there. Raises `UsageError`, which names the setting.
    """
    table = {key: _plain(value) for key, value in settings.items() if value is not None}
    return command.values_of(table, given)


def texts_of(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return settings of a run as the texts that an aggregator is sent. Raises `UsageError`."""
    return {key: plain_texts(key, _plain(value)) for key, value in settings.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
