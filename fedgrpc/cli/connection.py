"""TLS settings of commands that dial or serve.

A container's health check imports this every few seconds, so it imports no more than it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from fedgrpc.cli.options import Declare, Setting
from fedgrpc.rpc.channel import Tls

FILE: Final = click.Path(path_type=Path, exists=True, dir_okay=False)


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


def client_tls(values: Mapping[str, Any]) -> Tls | None:
    """Return the TLS of a client: on when any of its settings is given."""
    files = Tls(values["tls_ca"], values["tls_cert"], values["tls_key"])
    return files if values["tls"] or files != Tls() else None
