"""TLS of servers whose certificates are replaced while they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import structlog

from fedgrpc.errors import FedgrpcError
from fedgrpc.rpc.relay import fields_of, joined

log = structlog.get_logger()


@dataclass(frozen=True)
class TlsMaterial:
    """Keys with their certificate chains, and the anchors of clients' certificates, all PEM.

    `asks`: clients have to show a certificate.
    """

    pairs: tuple[tuple[bytes, bytes], ...]
    anchors: bytes | None
    asks: bool

    def configuration(self) -> Any:
        """Return it as gRPC takes it."""
        return grpc.ssl_server_certificate_configuration(list(self.pairs), self.anchors)

    def encoded(self) -> bytes:
        """Return it as bytes, which hold private keys."""
        flat = (part for pair in self.pairs for part in pair)
        return joined((b"1" if self.asks else b"", self.anchors or b"", *flat))

    @classmethod
    def decoded(cls, data: bytes) -> TlsMaterial:
        """Return what `encoded` made bytes of."""
        asks, anchors, *flat = fields_of(data)
        return cls(tuple(zip(flat[::2], flat[1::2], strict=True)), anchors or None, bool(asks))


class ServerTls(Protocol):
    """Keys and certificates that a server listens with, replaced while it runs."""

    def material(self) -> TlsMaterial:
        """Return the present ones. Raises `UsageError` and OSError."""

    def revision(self) -> object:
        """Return what differs once they have changed. Raises OSError."""


def server_credentials(tls: ServerTls) -> Any:
    """Return credentials of a server. Raises as `ServerTls.material`."""
    return reloading_credentials(lambda: tls.material().configuration(), tls.revision, tls.material().asks)


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
