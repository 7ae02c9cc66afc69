"""TLS of servers whose certificates are replaced while they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import grpc
import structlog

from fedgrpc.errors import FedgrpcError

log = structlog.get_logger()


class ServerTls(Protocol):
    """Keys and certificates that a server listens with."""

    def server_credentials(self) -> Any:
        """Return the credentials. Raises `UsageError`."""


def reloading_credentials(configuration: Callable[[], Any], revision: Callable[[], object], asks: bool) -> Any:
    """Return credentials of a server that ask for `configuration()` again once `revision()` has changed.

    gRPC asks before each handshake, in a thread of its own. What fails then (a file half written) leaves the
    former configuration, and is tried again at the next handshake. `asks`: clients have to show a certificate.
    """
    loaded = revision()

    def fetch() -> Any:
        nonlocal loaded
        try:
            found = revision()
            if found == loaded:
                return None
            fresh = configuration()
        except (OSError, FedgrpcError) as error:
            log.warning("certificates not reloaded", reason=str(error))
            return None
        loaded = found
        return fresh

    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client_authentication=asks)
