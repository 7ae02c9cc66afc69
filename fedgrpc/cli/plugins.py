"""`fedgrpc plugins`: the plugins that settings may name here, and the packages that they come from.

The rule: nothing of a package is imported to list it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import click

from fedgrpc import __version__
from fedgrpc.aggregation.robust.aggregation import MEAN, RULES
from fedgrpc.aggregation.server_optimizer import OPTIMIZERS
from fedgrpc.algorithms.registry import ALGORITHMS
from fedgrpc.cli.as_json import json_text
from fedgrpc.cli.options import AS_JSON, SettingsCommand
from fedgrpc.codec.encoding import ENCODING_NAMES
from fedgrpc.datasets.partition import KINDS
from fedgrpc.plugins import GROUPS, Installed, installed
from fedgrpc.rounds.selector import SELECTIONS
from fedgrpc.tracking.tracker import TRACKERS

_BUILT_IN: Final[Mapping[str, Sequence[str]]] = {
    "algorithm": tuple(ALGORITHMS),
    "aggregation": (MEAN, *RULES),
    "server optimizer": tuple(OPTIMIZERS),
    "selection": tuple(SELECTIONS),
    "encoding": ENCODING_NAMES,
    "partition": KINDS,
    "tracker": tuple(TRACKERS),
}
_SETTINGS: Final[Mapping[str, str]] = {
    "algorithm": "--algorithm",
    "aggregation": "--aggregation",
    "server optimizer": "--server-optimizer",
    "selection": "--selection",
    "encoding": "--encoding",
    "partition": "--partition",
    "tracker": "--track",
}


def plugins() -> list[Installed]:
    """Return every plugin, those of fedgrpc first."""
    own = [
        Installed(kind, name, "", "fedgrpc", __version__) for kind, names in _BUILT_IN.items() for name in names
    ]
    return own + [plugin for kind in GROUPS for plugin in installed(kind)]


def _run(**values: Any) -> None:
    found = plugins()
    if values["as_json"]:
        click.echo(json_text([asdict(plugin) for plugin in found]))
        return
    for kind, setting in _SETTINGS.items():
        click.echo(f"{kind} ({setting})")
        click.echo(f"  {', '.join(_BUILT_IN[kind])}")
        for plugin in found:
            if plugin.kind == kind and plugin.reference:
                click.echo(f"  {plugin.name:<20} {plugin.reference}, from {plugin.package} {plugin.version}")


COMMAND = SettingsCommand("plugins", _run, [AS_JSON], "List the plugins that settings may name.")
