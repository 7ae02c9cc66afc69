"""Settings of an aggregator that works for another one, and what they make of it."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedgrpc.cli.options import Declare, Setting
from fedgrpc.cli.tls import FILE
from fedgrpc.errors import UsageError
from fedgrpc.rpc.channel import Tls
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.task import Role

_above = Declare("Past one machine (docs/tree.md)")

UPSTREAM: list[Setting] = [
    _above("--upstream", "Aggregator to work for, with the workers of this one.", metavar="HOST:PORT"),
    _above(
        "--upstream-name", "Name there, unique in its fleet; without: this machine's host name.", metavar="NAME"
    ),
    _above("--upstream-tls", "Use TLS with the certificates that the system trusts.", is_flag=True, default=False),
    _above("--upstream-tls-ca", "Certificates to trust there (PEM); turns TLS on.", type=FILE),
    _above("--upstream-tls-cert", "This side's certificate (PEM), where the one above asks for one.", type=FILE),
    _above("--upstream-tls-key", "Key of that certificate (PEM).", type=FILE),
]


def above_from(values: Mapping[str, Any], data_dir: Path) -> WorkerSettings | None:
    """How this aggregator is a worker of the one above; None where there is none. Raises `UsageError`."""
    files = Tls(values["upstream_tls_ca"], values["upstream_tls_cert"], values["upstream_tls_key"])
    wants_tls = values["upstream_tls"] or files != Tls()
    if values["upstream"] is None:
        if wants_tls or values["upstream_name"] is not None:
            raise UsageError("the --upstream-... settings go with --upstream HOST:PORT")
        return None
    return WorkerSettings(
        name=values["upstream_name"] or socket.gethostname(),
        aggregator=values["upstream"],
        state_dir=data_dir / "upstream",
        role=Role.AGGREGATOR,
        tls=files if wants_tls else None,
        serve_address=None,
    )
