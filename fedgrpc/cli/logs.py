"""Logs on the command line: from which level up, and in which form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from fedgrpc.cli.options import Declare, Setting
from fedgrpc.logging import FORMATS, LEVELS, configure

_logs = Declare("Logs")
LOGS: list[Setting] = [
    _logs("--log-level", "From which level up.", type=click.Choice(LEVELS), default="info"),
    _logs(
        "--log-format",
        "auto: readable on a terminal, JSON lines otherwise.",
        type=click.Choice(FORMATS),
        default="auto",
    ),
]


def configure_logs(values: Mapping[str, Any]) -> None:
    """Apply the settings in `LOGS`."""
    configure(values["log_level"], values["log_format"])
