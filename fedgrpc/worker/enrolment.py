"""Joining an aggregator with a token, and renewing the certificate that comes of it.

The rule: the key is made here and stays here. The device says nothing before the aggregator has shown the key that
the token names. A renewed certificate is used for new connections, and calls in progress stay on theirs.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import grpc.aio
import structlog

from fedgrpc.errors import FedgrpcError, LinkError, NameTaken, NotEnrolled, TokenRefused, UsageError
from fedgrpc.identity.certificates import (
    Certificate,
    issue_to_itself,
    key_sha256,
    load_chain_der,
    make_request,
    pem_of,
    public_key_of,
    server_name_of,
)
from fedgrpc.identity.folder import IDENTITY, DeviceFolder
from fedgrpc.identity.roles import Identity
from fedgrpc.identity.roles import Role as CertificateRole
from fedgrpc.identity.tokens import JoinToken
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.rpc.address import Address, dialled
from fedgrpc.rpc.channel import Tls, open_channel
from fedgrpc.rpc.diagnosis import is_refused, presented_chain
from fedgrpc.rpc.retry import Backoff, Retries
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import identity_pb2 as pb
from fedgrpc.v1 import identity_pb2_grpc
from fedgrpc.worker.client import AggregatorClient
from fedgrpc.worker.settings import WorkerSettings

_CALL_S: Final = 20.0
_RENEW_AFTER: Final = 2 / 3
# A fleet that starts at once does not renew at once.
_FIRST_WITHIN_S: Final = 60.0
_SHORTEST_S: Final = 0.5
_RETRY: Final = Backoff(first_s=5.0, cap_s=600.0)
# Calls of a former connection may take this long to end: an upload over a slow link.
_CLOSING_S: Final = 6 * 3600.0
_CLOCK_S: Final = 300.0
_ROLES: Final = {
    CertificateRole.TRAINER: WorkerRole.TRAINER,
    CertificateRole.EVALUATOR: WorkerRole.EVALUATOR,
    CertificateRole.LEAF: WorkerRole.AGGREGATOR,
}

log = structlog.get_logger()
_wall_clock = time.time


def folder_of(settings: WorkerSettings) -> DeviceFolder:
    """Return where this worker keeps its key and its certificate."""
    return DeviceFolder(settings.state_dir / IDENTITY)


def joined_tls(folder: DeviceFolder) -> Tls:
    """Return the TLS of a device that has joined. Raises as `DeviceFolder.own_certificate`."""
    return Tls(folder.ca, folder.certificate, folder.key, folder.server_name())


async def enrolled(settings: WorkerSettings) -> WorkerSettings:
    """Return the settings with TLS, name and role of the device's certificate; join first where that is due.

    Unchanged for a worker that has no certificate of an aggregator's, nor a token.

    Raises:
        TokenRefused, NameTaken, WrongIdentity: the aggregator refuses this device.
        UsageError, StorageError: the device's own key or certificate cannot be used.
    """
    folder = folder_of(settings)
    token = None if settings.join is None else JoinToken.parse(settings.join)
    if settings.tls is not None:
        if token is not None:
            raise UsageError("join goes without tls_ca, tls_cert and tls_key: it brings a certificate")
        return settings
    if token is not None:
        await _join_patiently(settings, folder, token)
    if not folder.joined:
        return settings
    identity = await asyncio.to_thread(folder.identity)
    role = _ROLES.get(identity.role)
    if role is None:
        raise UsageError(f"{folder.certificate} is of {identity}, and not of a device")
    for what, asked, given in (("name", settings.name, identity.name), ("role", settings.role, role)):
        if asked != given:
            log.info("the certificate decides", what=what, asked=str(asked), given=str(given))
    return replace(settings, name=identity.name, role=role, tls=joined_tls(folder))


async def _is_to_join(settings: WorkerSettings, folder: DeviceFolder, token: JoinToken) -> bool:
    """Return whether the token is needed: not where this device's certificate counts, whoever signed it since."""
    if not folder.joined:
        return True
    try:
        await _renew(settings.aggregator, folder)
    except NotEnrolled as error:
        log.warning("joining again", reason=str(error))
        return True
    except LinkError:
        if token.authority_sha256 not in await asyncio.to_thread(folder.authority_sha256s):
            return True
        # A server whose handshake refuses the certificate says no more than that.
        return await asyncio.to_thread(is_refused, dialled(settings.aggregator), joined_tls(folder))
    return False


async def _join_patiently(settings: WorkerSettings, folder: DeviceFolder, token: JoinToken) -> None:
    """Join if that is due; retry while only the link or the aggregator's disk fails: devices run unattended."""
    retries = Retries(settings.backoff)
    while True:
        try:
            if await _is_to_join(settings, folder, token):
                await join(settings.aggregator, token, settings.name, folder)
            return
        except FedgrpcError as error:
            if not error.retryable or isinstance(error, NameTaken):
                raise
            delay_s = retries.next_delay_s()
            log.warning("not joined", reason=str(error), retry_in_s=round(delay_s, 2))
        await asyncio.sleep(delay_s)


async def join(aggregator: str, token: JoinToken, name: str, folder: DeviceFolder) -> None:
    """Become a member, and keep what comes of it in `folder`.

    Raises:
        TokenRefused: the token is not this aggregator's, or wrong, expired, used up or deleted.
        NameTaken, WrongIdentity: the name is another key's, or this device was revoked.
        LinkError, StorageError.
    """
    address = dialled(aggregator)
    authority = _pinned(token, address, await asyncio.to_thread(presented_chain, address))
    key = await asyncio.to_thread(folder.own_key)
    certificate = issue_to_itself(token.id, token.key, key.public_key())
    with tempfile.TemporaryDirectory(dir=folder.path) as there:
        shown = DeviceFolder(Path(there))
        await asyncio.to_thread(shown.save, pem_of(certificate), pem_of(authority))
        tls = Tls(shown.ca, shown.certificate, folder.key, server_name_of(authority))
        request = pb.EnrollRequest(signing_request=make_request(key), name=name)
        try:
            async with open_channel(aggregator, tls) as channel:
                with domain_errors():
                    answer = await _stub(channel).Enroll(request, timeout=_CALL_S)
        except LinkError as error:
            if await asyncio.to_thread(is_refused, address, tls):
                raise TokenRefused(
                    f"{address} does not know {token}: its secret is wrong, or it was deleted; ask for a new one"
                ) from error
            raise
    await asyncio.to_thread(_keep, folder, answer.credentials)
    found = answer.credentials
    log.info("joined", aggregator=aggregator, name=found.name, role=pb.Role.Name(found.role)[5:].lower())


def _pinned(token: JoinToken, address: Address, chain: Sequence[bytes]) -> Certificate:
    """Return the authority that the token names. Raises `TokenRefused` when the server does not show it."""
    for certificate in load_chain_der(chain):
        with suppress(UsageError):
            if key_sha256(public_key_of(certificate)) == token.authority_sha256:
                return certificate
    raise TokenRefused(f"{token} is not for {address}: that aggregator has another authority; nothing was sent")


def _keep(folder: DeviceFolder, found: pb.Credentials) -> float:
    """Store new credentials; return for how many seconds they count."""
    folder.save(found.certificate, found.ca)
    behind_s = found.now.ToNanoseconds() / 1e9 - _wall_clock()
    if abs(behind_s) > _CLOCK_S:
        log.warning(
            "this machine's clock is wrong",
            behind_s=round(behind_s),
            reason="the aggregator's clock decides how fresh a certificate is",
        )
    return duration_from_proto(found.valid_for)


async def _renew(aggregator: str, folder: DeviceFolder) -> float:
    """Get a new certificate; return for how many seconds it counts. Raises as the call, and `StorageError`."""
    async with open_channel(aggregator, joined_tls(folder)) as channel:
        with domain_errors():
            answer = await _stub(channel).Renew(pb.RenewRequest(), timeout=_CALL_S)
    return await asyncio.to_thread(_keep, folder, answer.credentials)


class WorkerLink:
    """The channel of a worker's clients, which is replaced when the certificate is renewed."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._folder = folder_of(settings)
        self._has_joined = settings.tls is not None and settings.tls.certificate == self._folder.certificate
        self._clients: list[AggregatorClient] = []
        self._renewing = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        self._renew_in_s = random.uniform(0, _FIRST_WITHIN_S)
        self._renewals = 0
        self._tls = settings.tls
        self.channel = self._dial()

    def _dial(self) -> grpc.aio.Channel:
        return open_channel(self._settings.aggregator, self._tls)

    def serve(self, client: AggregatorClient) -> AggregatorClient:
        """Give a client the present channel now, and every later one."""
        client.use(self.channel, self._dial)
        self._clients.append(client)
        return client

    async def renew(self) -> None:
        """Get a new certificate, and connect again with it. Raises as the call.

        Raises `UsageError` when the device has another name or role by now.
        """
        seen = self._renewals
        async with self._renewing:
            if seen != self._renewals:
                return
            valid_for_s = await _renew(self._settings.aggregator, self._folder)
            self._renewals += 1
            self._renew_in_s = max(_SHORTEST_S, _RENEW_AFTER * valid_for_s)
            identity = await asyncio.to_thread(self._folder.identity)
            self._check_same(identity)
            # Another authority may have signed: its server name goes with it.
            self._tls = await asyncio.to_thread(joined_tls, self._folder)
            former, self.channel = self.channel, self._dial()
            for client in self._clients:
                client.use(self.channel, self._dial)
            closing = asyncio.create_task(former.close(_CLOSING_S))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        log.info("certificate renewed", worker=identity.name, valid_for_s=round(valid_for_s))

    def _check_same(self, identity: Identity) -> None:
        if (identity.name, _ROLES.get(identity.role)) != (self._settings.name, self._settings.role):
            raise UsageError(f"this device is {identity} now; start the worker again")

    @property
    def on_stale(self) -> Callable[[], Awaitable[None]] | None:
        """Function to call when the aggregator finds the certificate too old; None: nothing helps."""
        return self.renew if self._has_joined else None

    async def keep_fresh(self) -> None:
        """Renew the certificate whenever that is due, without an end. Raises `UsageError` as `renew`."""
        if not self._has_joined:
            await asyncio.get_running_loop().create_future()
        retries = Retries(_RETRY)
        while True:
            seen = self._renewals
            await asyncio.sleep(self._renew_in_s)
            if seen != self._renewals:
                continue
            try:
                await self.renew()
                retries.reset()
            except UsageError:
                raise
            except FedgrpcError as error:
                # The loop ends with what is final. Here it is only noted.
                self._renew_in_s = retries.next_delay_s()
                log.warning("certificate not renewed", reason=str(error), retry_in_s=round(self._renew_in_s, 2))

    async def close(self) -> None:
        """Close all channels."""
        for closing in list(self._closing):
            closing.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self.channel.close()


@asynccontextmanager
async def linked(settings: WorkerSettings) -> AsyncIterator[WorkerLink]:
    """Yield the link of a worker to its aggregator. Raises `UsageError`."""
    link = WorkerLink(settings)
    try:
        yield link
    finally:
        await link.close()


def _stub(channel: grpc.aio.Channel) -> Any:
    stub: Any = identity_pb2_grpc.IdentityStub
    return stub(channel)
