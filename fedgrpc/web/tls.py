"""TLS of the page: the aggregator's own certificate for it, and the authorities whose operators may look.

The rule: a handshake accepts a certificate of a trusted authority, or none at all, so that a person without one
reads why they are refused. What a certificate counts for is decided with each call. Keys are on the disk for no
longer than it takes to read them.
"""

from __future__ import annotations

import ssl
import tempfile
from pathlib import Path
from typing import Final, Protocol

from fedgrpc.identity.certificates import Authority, key_pem, make_key, pem_of
from fedgrpc.rpc.channel import Tls
from fedgrpc.storage.files import write_file

SERVER_LIFE_S: Final = 90 * 86_400.0


class PageTls(Protocol):
    """Certificate that the page listens with, and how to notice that it changed."""

    def load(self, context: ssl.SSLContext, now: float) -> None:
        """Load certificate, key and authorities into `context`. Raises OSError and ssl.SSLError."""

    def revision(self) -> object:
        """Return what differs once they have to be loaded again. Raises OSError."""


class FileTls:
    """Certificates of the operator's own authority, in files."""

    def __init__(self, files: Tls) -> None:
        assert files.certificate is not None
        assert files.ca is not None
        self._certificate, self._key, self._ca = files.certificate, files.key, files.ca

    def load(self, context: ssl.SSLContext, now: float) -> None:
        """See `PageTls`."""
        context.load_cert_chain(self._certificate, self._key, password="")
        context.load_verify_locations(self._ca)

    def revision(self) -> object:
        """See `PageTls`."""
        return [(found.st_ino, found.st_mtime_ns) for found in (self._certificate.stat(), self._ca.stat())]


class HasAuthorities(Protocol):
    """Knows the authorities that are trusted now, the one that signs first."""

    authorities: tuple[Authority, ...]


class AuthorityPageTls:
    """A certificate of the built-in authority, for these hosts; the key is made at each start."""

    def __init__(self, identities: HasAuthorities, hosts: tuple[str, ...], folder: Path) -> None:
        self._identities = identities
        self._hosts = hosts
        self._folder = folder
        self._key = make_key()

    def load(self, context: ssl.SSLContext, now: float) -> None:
        """See `PageTls`."""
        authorities = self._identities.authorities
        own = authorities[0].issue_server(self._key.public_key(), self._hosts, now + SERVER_LIFE_S)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix="page-") as folder:
            pair = Path(folder) / "pair.pem"
            write_file(pair, key_pem(self._key) + pem_of(own, authorities[0].certificate), private=True)
            context.load_cert_chain(pair)
        context.load_verify_locations(cadata=pem_of(*(each.certificate for each in authorities)).decode())

    def revision(self) -> object:
        """See `PageTls`."""
        return tuple(each.fleet for each in self._identities.authorities)


def context_of(tls: PageTls, now: float) -> ssl.SSLContext:
    """Return the context to listen with. Raises OSError and ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_OPTIONAL
    context.set_alpn_protocols(["http/1.1"])
    tls.load(context, now)
    return context
