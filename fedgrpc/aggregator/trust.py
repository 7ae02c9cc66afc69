"""Trust of one aggregator: who may connect, how it shows itself, and the socket for operators on its host.

The rule: outside of this machine nobody calls without a certificate, unless the operator says so.

    --tls-cert, --tls-key, --tls-ca   certificates of the operator's own authority
    an address outside of loopback    the built-in authority, made at the first start
    loopback, a unix socket           plaintext: whoever can connect is on this machine
    --insecure                        anybody, with a warning every hour

Everything lies in one folder beside all runs. The server's own key is only in memory: each start makes a new one.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Final

import structlog

from fedgrpc.aggregator.identity_service import IdentityService, PutOut
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import StorageError
from fedgrpc.identity.audit import AUDIT_FILE, AuditLog
from fedgrpc.identity.certificates import key_pem, make_key, pem_of
from fedgrpc.identity.folder import AUTHORITIES, AuthorityFile, check_private
from fedgrpc.identity.identities import Identities
from fedgrpc.identity.signed_keys import KeyCheck
from fedgrpc.identity.store import DATABASE, IdentityStore
from fedgrpc.privacy.one_time_keys import PublicKeys
from fedgrpc.rpc.address import Address, local_address
from fedgrpc.rpc.admission import Admission
from fedgrpc.rpc.server import Service, identity_service
from fedgrpc.rpc.server_tls import ServerTls, TlsMaterial
from fedgrpc.storage.files import make_private, storage_errors

_SERVER_LIFE_S: Final = 90 * 86_400.0
_RENEW_AFTER: Final = 2 / 3
_TICK_S: Final = 1.0
_SWEEP_EVERY_TICKS: Final = 30
_WARN_EVERY_TICKS: Final = 3600

log = structlog.get_logger()
Clock = Callable[[], float]


class AuthorityTls:
    """TLS with certificates of the built-in authorities; the server's and the anchors are renewed in place.

    The server has one certificate of each authority. A client asks (SNI) for the one whose authority it knows:
    each authority has a server name of its own.
    """

    def __init__(self, identities: Identities, hosts: tuple[str, ...], clock: Clock) -> None:
        self._identities = identities
        self._hosts = hosts
        self._clock = clock
        self._key = make_key()
        self._issued_at = clock()

    def revision(self) -> object:
        """See `ServerTls`."""
        now = self._clock()
        if not self._issued_at <= now < self._issued_at + _RENEW_AFTER * _SERVER_LIFE_S:
            self._issued_at = now
        return self._issued_at, self._identities.anchors_revision

    def material(self) -> TlsMaterial:
        """See `ServerTls`."""
        until = self._issued_at + _SERVER_LIFE_S
        key, authorities = key_pem(self._key), self._identities.authorities
        own = [each.issue_server(self._key.public_key(), self._hosts, until) for each in authorities]
        # Those who join look for the authority that their token names, in whichever chain they get.
        shown = [each.certificate for each in authorities]
        pairs = tuple((key, pem_of(certificate, *shown)) for certificate in own)
        return TlsMaterial(pairs, pem_of(*self._identities.anchors()), asks=True)


class Trust:
    """Trust of one aggregator while it serves. Lives on one event loop."""

    def __init__(self, settings: AggregatorSettings, folder: Path, clock: Clock = time.time) -> None:
        """Open the folder, and make the authority if one is needed. Raises `UsageError` and `StorageError`."""
        self.folder = folder
        self.clock = clock
        self._settings = settings
        with storage_errors(folder):
            make_private(folder)
        check_private(folder)
        listens = Address.parse(settings.address)
        self._is_open = settings.insecure and not settings.authenticated and not listens.is_local
        file = AuthorityFile(folder / AUTHORITIES)
        store = IdentityStore(folder / DATABASE)
        has_members = any(member.key_sha256 for member in store.members())
        authorities = file.opened(has_members) if settings.has_authority else ()
        self.identities = Identities(store, authorities, settings.lives, file.write)
        self.tls: ServerTls | None = settings.tls
        if authorities:
            self.tls = AuthorityTls(self.identities, _hosts(listens), self._now)
        self.audit = AuditLog(folder / AUDIT_FILE)
        self.admission = Admission(self._identify if settings.authenticated else None, self.audit, self._now)
        self._service = IdentityService(self.identities, self.admission, self.audit, self._now)

    def on_put_out(self, call: PutOut) -> None:
        """See `IdentityService.on_put_out`."""
        self._service.on_put_out(call)

    def check_keys(self, run_id: str, worker: str, keys: PublicKeys) -> None:
        """Raise `UpdateRefused` for one-time keys that other devices would not take, if callers have certificates.

        Raises `StorageError` where the authorities cannot be read.
        """
        settings = self._settings
        if settings.has_authority:
            check = KeyCheck([each.certificate for each in self.identities.authorities])
        elif settings.tls is not None and settings.tls.ca is not None:
            check = KeyCheck.read(settings.tls.ca)
        else:
            return
        check.check(run_id, worker, keys, self._now())

    def _now(self) -> float:
        return self.clock()

    def _identify(self, certificate: bytes, renewing: bool) -> Any:
        return self.identities.identify(certificate, self._now(), renewing)

    @property
    def services(self) -> list[Service]:
        """Services beside the aggregator's own one."""
        return [identity_service(self._service)]

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[str]:
        """End calls that become stale while the block runs, and warn of what is open.

        Yields the address of the socket for operators on this host.
        """
        with ExitStack() as stack:
            stack.callback(self.audit.close)
            stack.callback(self.identities.close)
            address = stack.enter_context(local_address(self.folder))
            watching = asyncio.create_task(self._watch())
            try:
                yield address
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self) -> None:
        for tick in count():
            if self._is_open and tick % _WARN_EVERY_TICKS == 0:
                log.warning("anybody may call", reason="--insecure: no caller has to show a certificate")
            if tick % _SWEEP_EVERY_TICKS == 0:
                self.admission.end_stale_calls()
                await self._service.save_moved()
            try:
                await asyncio.to_thread(self.audit.sync)
            except StorageError as error:
                log.error("audit log not synced", reason=str(error))
            await asyncio.sleep(_TICK_S)


def _hosts(address: Address) -> tuple[str, ...]:
    """Return the names of this machine, for clients that know nothing of the fleet's server name."""
    found = ["localhost", "127.0.0.1", "::1"]
    with suppress(ValueError):
        if not ipaddress.ip_address(address.host).is_unspecified:
            found.append(address.host)
    name = socket.gethostname()
    return (*found, name) if name.isascii() and len(name) <= 64 and "_" not in name else tuple(found)
