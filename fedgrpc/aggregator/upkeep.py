"""Waits of the driver: for news, and for a disk that works. What finished rounds left is cleared away meanwhile.

The rule: nothing that can wait holds a round up, and nothing accepted is dropped because the disk fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.errors import NotFound, StorageError
from fedgrpc.rpc.retry import Backoff, Retries
from fedgrpc.runs.events import VersionsPruned
from fedgrpc.runs.keeping import kept
from fedgrpc.storage.data_folder import Use

_AFTER_STORAGE_ERROR = Backoff(first_s=0.5, cap_s=15.0)


class Upkeep:
    """Waits, and removes the updates and versions of rounds that are over while the driver has nothing to do."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        # Tasks of finished rounds whose updates are still on the disk. None: everything is cleared away.
        self._over: list[str] | None = None
        self._clear_at = 0.0
        self._clearing = Retries(_AFTER_STORAGE_ERROR)

    def over(self, tokens: Iterable[str]) -> None:
        """Note tasks whose updates are not needed any more."""
        self._over = [*(self._over or ()), *tokens]

    async def until(self, time_s: float | None, clear: bool = True) -> None:
        """Wait for news, or for the aggregator's clock to read `time_s`. `clear`: for news from now on only."""
        coordinator = self._coordinator
        if clear:
            coordinator.wake.clear()
        await self.clear_away()
        timeout_s = None if time_s is None else max(0.0, time_s - coordinator.clock())
        try:
            async with asyncio.timeout(timeout_s):
                await coordinator.wake.wait()
        except TimeoutError:
            pass

    async def until_stored(self, act: Callable[[], Awaitable[None]]) -> None:
        """Do what needs the disk. While it fails the health is bad, and everything accepted is kept."""
        data_folder = self._coordinator.data_folder
        retries = Retries(_AFTER_STORAGE_ERROR)
        while True:
            try:
                await act()
                data_folder.works(Use.ROUNDS)
                return
            except (StorageError, NotFound) as error:
                data_folder.failed(Use.ROUNDS, error)
            # The disk may be full of what is not needed any more.
            await self.clear_away()
            await asyncio.sleep(retries.next_delay_s())

    async def clear_away(self) -> None:
        """Remove the updates and versions of rounds that are over.

        A removal that fails is retried at a later wait. What a process leaves by its death is removed by the next
        one before it begins.
        """
        coordinator, data_folder = self._coordinator, self._coordinator.data_folder
        if self._over is None or coordinator.clock() < self._clear_at:
            return
        over, self._over = self._over, None
        try:
            await self._remove(over)
            data_folder.works(Use.OLD_FILES)
            self._clearing.reset()
        except StorageError as error:
            self._over = [*over, *(self._over or ())]
            self._clear_at = coordinator.clock() + self._clearing.next_delay_s()
            data_folder.failed(Use.OLD_FILES, error)

    async def _remove(self, over: list[str]) -> None:
        coordinator, run = self._coordinator, self._coordinator.machine
        await asyncio.to_thread(coordinator.journal.discard, over)
        given = [] if run.round is None else [run.round.version_of(token) for token in run.round.state.tasks]
        best, back = run.versions.best, run.rolling_back
        named = {best.version if best else 0, back.version if back else 0, *coordinator.named_versions()}
        keep, models = kept(
            run.version, coordinator.settings.keep_versions, min(given, default=run.version), named
        )
        coordinator.apply(VersionsPruned(keep | models))
        await coordinator.encoded_models.prune(keep, models)
