"""Settings of commands that dial or serve: the aggregator's address, and TLS.

A container's health check imports this every few seconds, so it imports no more than it needs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from fedgrpc.cli.options import Declare, Setting
from fedgrpc.errors import UsageError
from fedgrpc.rpc.channel import Tls

_MOST_TOKEN_CHARS = 1024
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
DEFAULT_AGGREGATOR = "127.0.0.1:50051"
AGGREGATOR_SETTING: Setting = Declare("Where")(
    "--aggregator",
    "Address of the aggregator.",
    type=str,
    default=None,
    show_default=DEFAULT_AGGREGATOR,
    metavar="HOST:PORT",
)


def tls_settings(certificate_help: str, ca_help: str) -> list[Setting]:
    """Declare `--tls-cert`, `--tls-key` and `--tls-ca`."""
    declare = Declare("TLS")
    return [
        declare("--tls-cert", certificate_help, type=FILE),
        declare("--tls-key", "Key of the certificate (PEM).", type=FILE),
        declare("--tls-ca", ca_help, type=FILE),
    ]


def client_settings() -> list[Setting]:
    """Declare the TLS settings of a command that dials an aggregator."""
    return [
        *tls_settings(
            "Certificate of this client (PEM), where the aggregator asks for one.",
            "Certificates to trust (PEM); turns TLS on.",
        ),
        Declare("TLS")("--tls", "Use TLS with the system's certificates.", is_flag=True, default=False),
    ]


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


def client_tls(values: Mapping[str, Any]) -> Tls | None:
    """Return the TLS of a client: on when any of its settings is given."""
    files = Tls(values["tls_ca"], values["tls_cert"], values["tls_key"])
    return files if values["tls"] or files != Tls() else None


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
