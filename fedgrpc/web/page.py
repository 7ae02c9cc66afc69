"""The page of one aggregator: who may see it, where it listens, and how it calls the aggregator.

    a loopback address     plain HTTP; everybody on this machine may look, and the link in `page.link` lets steer
    any other address      HTTPS; browsers show the certificate of a viewer, an operator or an admin

The rule: the page is a client like any other. It calls the aggregator over the operators' socket, and sees what
the RPCs show.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import psutil
import structlog

from fedgrpc.calls import Calls
from fedgrpc.errors import StorageError, UsageError
from fedgrpc.rpc.address import Address
from fedgrpc.rpc.behalf import BehalfChannel
from fedgrpc.rpc.channel import open_channel
from fedgrpc.storage.files import storage_errors, write_file
from fedgrpc.web.app import application
from fedgrpc.web.listening import listening
from fedgrpc.web.tls import SERVER_LIFE_S, PageTls, context_of
from fedgrpc.web.visitors import CertifiedVisitors, LocalVisitors, Visitor, Visitors

LINK: Final = "page.link"
_RELOAD_EVERY_S: Final = 30.0
_RENEW_AFTER_S: Final = SERVER_LIFE_S * 2 / 3
_MAX_INTERFACES: Final = 32
_LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")

log = structlog.get_logger()


@dataclass(frozen=True)
class PageSettings:
    """Address of the page, and names besides its own under which browsers may reach it."""

    address: str
    names: tuple[str, ...] = ()

    @property
    def where(self) -> Address:
        """The address. Raises `UsageError`."""
        return Address.parse(self.address)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Every name of the page, in lower case."""
        where = self.where
        own: Iterable[str] = (*_LOCAL_NAMES, where.host) if where.is_local else (where.host, socket.gethostname())
        if where.is_unspecified:
            own = (*_LOCAL_NAMES, socket.gethostname(), *_own_addresses())
        return tuple(dict.fromkeys(name.strip("[].").lower() for name in (*own, *self.names)))


def _own_addresses() -> Iterator[str]:
    """Yield the IP addresses of this machine."""
    for interface in islice(psutil.net_if_addrs().values(), _MAX_INTERFACES):
        for each in interface:
            if each.family in (socket.AF_INET, socket.AF_INET6):
                # Without the zone, which is no part of a name.
                yield each.address.partition("%")[0]


@asynccontextmanager
async def serve_page(
    settings: PageSettings, aggregator: str, folder: Path, tls: PageTls | None = None
) -> AsyncIterator[str]:
    """Serve the page of the aggregator at the unix socket `aggregator` while the block runs; yields its URL.

    `folder` is private to this user. `tls` is needed outside of this machine. Raises `UsageError`.
    """
    where = settings.where
    if where.is_local:
        async with _local(settings, aggregator, folder) as url:
            yield url
        return
    if tls is None:
        raise UsageError(
            f"web_address {settings.address} is not of this machine: there operators need certificates, as of an "
            "aggregator that listens outside or has --tls-ca; or give 127.0.0.1:PORT"
        )
    async with _certified(settings, aggregator, tls) as url:
        yield url


@asynccontextmanager
async def _local(settings: PageSettings, aggregator: str, folder: Path) -> AsyncIterator[str]:
    visitors = LocalVisitors()
    async with _served(settings, aggregator, visitors) as port:
        url = f"http://{settings.where.with_port(port)}"
        with _link(folder / LINK, f"{url}/sign-in#{visitors.secret}"):
            log.info("page", url=url, to_steer=f"open the link in {folder / LINK}")
            yield url


@asynccontextmanager
async def _certified(settings: PageSettings, aggregator: str, tls: PageTls) -> AsyncIterator[str]:
    try:
        context = context_of(tls, time.time())
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"cannot use the TLS files of the page: {error}") from error
    reloading = asyncio.create_task(_keep_loaded(context, tls))
    try:
        async with _served(settings, aggregator, CertifiedVisitors(), context) as port:
            url = f"https://{settings.where.with_port(port)}"
            log.info("page", url=url)
            yield url
    finally:
        reloading.cancel()
        await asyncio.gather(reloading, return_exceptions=True)


@asynccontextmanager
async def _served(
    settings: PageSettings, aggregator: str, visitors: Visitors, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    async with open_channel(aggregator) as channel:
        app = application(client_for(channel, aggregator), visitors, settings.hosts)
        async with listening(settings.where, app, tls) as port:
            yield port


def client_for(channel: object, address: str) -> Callable[[Visitor], Calls]:
    """Return the function that gives the client with which to call for a visitor."""

    def client(visitor: Visitor) -> Calls:
        over = channel if visitor.behalf is None else BehalfChannel(channel, visitor.behalf)
        return Calls(over, address)

    return client


@contextmanager
def _link(path: Path, text: str) -> Iterator[None]:
    """Keep the sign-in link in a file of this user alone. Raises `StorageError`."""
    with storage_errors(path):
        write_file(path, f"{text}\n".encode(), private=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


async def _keep_loaded(context: ssl.SSLContext, tls: PageTls) -> None:
    """Load certificates again when they change, and before the own one ends; new connections use them."""
    loaded, loaded_at = tls.revision(), time.time()
    while True:
        await asyncio.sleep(_RELOAD_EVERY_S)
        try:
            found, now = tls.revision(), time.time()
            if found != loaded or not loaded_at <= now < loaded_at + _RENEW_AFTER_S:
                tls.load(context, now)
                loaded, loaded_at = found, now
        except (OSError, ssl.SSLError, StorageError) as error:
            log.warning("certificates of the page not reloaded", reason=str(error))
