"""Settings of logs. A module of its own: `fedgrpc health` starts faster without the logging library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from fedgrpc.cli.options import Declare, Setting
from fedgrpc.logging import FORMATS, LEVELS, configure

_logs = Declare("Logs")
LOGS: list[Setting] = [
    _logs("--log-level", "Lowest level to log.", type=click.Choice(LEVELS), default="info"),
    _logs(
        "--log-format",
        "Format of log lines; auto: readable on a terminal, JSON otherwise.",
        type=click.Choice(FORMATS),
        default="auto",
    ),
]


def configure_logs(values: Mapping[str, Any]) -> None:
    """Apply the settings in `LOGS`."""
    configure(values["log_level"], values["log_format"])
