"""Settings that the processes of aggregator and worker share: their logs, TLS to serve with, join tokens."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, Final

import click

from fedgrpc import tracing
from fedgrpc.cli.options import Declare, Setting
from fedgrpc.errors import UsageError
from fedgrpc.logging import FORMATS, LEVELS, configure
from fedgrpc.process import keep_private
from fedgrpc.rpc.channel import Tls

_MOST_TOKEN_CHARS: Final = 1024
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


def begin(values: Mapping[str, Any]) -> None:
    """Begin a process that serves: its logs, its traces, and what it writes kept private. Raises `UsageError`."""
    keep_private()
    configure(values["log_level"], values["log_format"])
    tracing.begin_by_environment("fedgrpc", os.environ)


def server_tls(values: Mapping[str, Any]) -> Tls | None:
    """Return the TLS of a server: on when a certificate is given.

    Raises:
        UsageError: a key or a CA without a certificate.
    """
    files = Tls(values["tls_ca"], values["tls_cert"], values["tls_key"])
    if files == Tls():
        return None
    if files.certificate is None or files.key is None:
        raise UsageError("TLS needs both --tls-cert and --tls-key")
    return files


def join_token(value: str | None) -> str | None:
    """Return the join token that a setting gives: itself, a file with it, or "-" for standard input.

    Raises `UsageError`, which never repeats the value.
    """
    if value is None or value.startswith("fg1."):
        return value
    if value == "-":
        return sys.stdin.readline(_MOST_TOKEN_CHARS).strip()
    try:
        with open(value, encoding="utf-8", errors="replace") as file:
            return file.readline(_MOST_TOKEN_CHARS).strip()
    except (OSError, ValueError):
        raise UsageError("join must be a token that begins with fg1., a file with one, or -") from None
