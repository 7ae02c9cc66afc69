"""Membership of one worker at one aggregator: its registration, the certificate that lets it in, and its leave.

The rule: a worker registers with what it knows of its device, and again once its learning task knows more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from fedgrpc.errors import CertificateStale, FedgrpcError
from fedgrpc.protocol.devices import DeviceProfile
from fedgrpc.protocol.tasks import Registration
from fedgrpc.worker.client import AggregatorClient
from fedgrpc.worker.local_work import LocalWork, TaskFiles
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.status import StatusPublisher

_LEAVE_S: Final = 10.0

log = structlog.get_logger()


class Membership:
    """Registers one worker. `heartbeat_interval_s` is that of the last registration."""

    def __init__(
        self,
        settings: WorkerSettings,
        client: AggregatorClient,
        publisher: StatusPublisher,
        files: TaskFiles,
        work: LocalWork,
        profile: Callable[[], DeviceProfile],
        renew: Callable[[], Awaitable[None]] | None,
        *,
        many_runs: bool,
    ) -> None:
        """`renew` gets a new certificate when the aggregator finds the present one too old."""
        self._settings = settings
        self._client = client
        self._publisher = publisher
        self._files = files
        self._work = work
        self._profile = profile
        self._renew = renew
        self._many_runs = many_runs
        self.heartbeat_interval_s = 5.0

    async def connect(self) -> Registration:
        """Register, and build the learning task of the run. Register again if the device shows more then."""
        registration = await self.register()
        parts = self._work.parts
        if registration.run_id and await self._work.prepare(registration):
            profile = await asyncio.to_thread(self._profile)
            if profile != self._publisher.status.device or self._work.parts != parts:
                # The learning task has loaded its libraries, which know the accelerator.
                registration = await self.register()
        log.info(
            "connected",
            worker=self._settings.name,
            run=registration.run,
            aggregator=self._settings.aggregator,
        )
        return registration

    async def register(self) -> Registration:
        """Register, and keep held models of this run alone."""
        profile = await asyncio.to_thread(self._profile)
        registration = await self._client.register(profile, self._settings.role, self._work.parts, self._many_runs)
        if registration.run_id:
            await asyncio.to_thread(self._files.models.forget_other_runs, registration.run_id)
        self.heartbeat_interval_s = registration.heartbeat_interval_s
        self._publisher.show(run=registration.run, device=profile)
        self._files.show()
        return registration

    async def renewed(self, error: FedgrpcError) -> FedgrpcError:
        """Renew the certificate if that is what failed; return what failed at last. Raises what is final."""
        if not isinstance(error, CertificateStale) or self._renew is None:
            return error
        try:
            await self._renew()
        except FedgrpcError as failure:
            if not failure.retryable:
                raise
            return failure
        return error


async def leave(client: AggregatorClient) -> None:
    """Tell the aggregator to wait for this worker no longer. A failure is only logged: the lease ends anyway."""
    try:
        await client.leave(_LEAVE_S)
    except FedgrpcError as error:
        log.debug("goodbye not heard", reason=str(error))
