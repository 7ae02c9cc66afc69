"""The models of one run beyond its rounds: which versions are kept, their tags, and their release to devices.

The rule: what a caller or a device is told is stored first (`ModelRecords`). One change at a time. Releases change
in `fedgrpc.runs.release.step` alone; here is the clock that `step` gets, and the record of what it did by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, Final, TypeVar

import structlog

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aio import to_its_end
from fedgrpc.errors import Exhausted, FedgrpcError, IllegalTransition, NotFound, StorageError, UsageError
from fedgrpc.rpc.retry import Backoff, Retries
from fedgrpc.runs.conditions import Condition
from fedgrpc.runs.keeping import MAX_TAGS, checked_tag, resolve
from fedgrpc.runs.release import (
    AbortAsked,
    DeviceGone,
    Release,
    ReleaseEvent,
    ReleasePhase,
    Reported,
    TimePassed,
    Wanted,
    canaries_of,
    step,
)
from fedgrpc.storage.model_records import MODEL_RECORDS, ModelRecords
from fedgrpc.v1.device_pb2 import WORKER_ROLE_AGGREGATOR

# What the aggregator does by itself, for its audit log: what, and facts.
Record = Callable[[str, Mapping[str, str]], None]

_AFTER_STORAGE_ERROR: Final = Backoff(first_s=1.0, cap_s=30.0)
# The wall clock may be set: look again that often.
_LONGEST_WAIT_S: Final = 60.0

log = structlog.get_logger()
T = TypeVar("T")


class RunModels:
    """Tags and releases of one run. Lives on one event loop."""

    def __init__(
        self,
        coordinator: Coordinator,
        news: Callable[[], None],
        record: Record,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the records. `news` is called when devices are to serve something else. Raises `StorageError`."""
        self.coordinator = coordinator
        self.clock = clock
        self._news = news
        self._record = record
        self._records = ModelRecords(coordinator.settings.data_dir / MODEL_RECORDS)
        self.tags = self._records.tags()
        self.releases = self._records.releases()
        self._starting: frozenset[int] = frozenset()
        self._gone: set[str] = set()
        self._changing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._log = log.bind(run=coordinator.settings.run_name)
        coordinator.named_versions = self.named_versions

    def close(self) -> None:
        """Let the records go, once nothing uses them any more."""
        self._records.close()

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.coordinator.settings.run_name

    @property
    def id(self) -> str:
        """Id of the run."""
        return self.coordinator.machine.id

    @property
    def _scores(self) -> bool:
        """True if devices may tell how good a version is on their data."""
        return self.coordinator.settings.privacy.metrics

    def is_called(self, name: str) -> bool:
        """Return whether the run has this name or id."""
        return name in (self.name, self.id)

    def named_versions(self) -> frozenset[int]:
        """Return the versions that tags and releases keep."""
        return frozenset(self.tags.values()) | self.releases.versions | self._starting

    def number_of(self, version: str) -> int:
        """Return the number of a version: "17", "latest", "best", "final" or a tag. Raises `NotFound`."""
        machine = self.coordinator.machine
        return resolve(version, machine.versions, self.tags, machine.ended)

    # Tags.

    async def tag(self, version: str, tag: str) -> None:
        """Give a version a tag. Raises `NotFound`, `UsageError`, `Exhausted` and `StorageError`."""
        checked_tag(tag)

        async def change() -> None:
            number = self.number_of(version)
            if tag not in self.tags and len(self.tags) >= MAX_TAGS:
                raise Exhausted(f"the run has {MAX_TAGS} tags; remove one")
            before = self.tags
            # Before it is stored: from now on nobody lets the version go.
            self.tags = {**before, tag: number}
            try:
                await self._store(self._records.save_tag, tag, number)
            except FedgrpcError:
                self.tags = before
                raise

        await self._change(change())

    async def remove_tag(self, tag: str) -> None:
        """Take a tag away. Raises `NotFound` and `StorageError`."""

        async def change() -> None:
            if tag not in self.tags:
                raise NotFound(f"no version has the tag {tag[:80]!r}")
            await self._store(self._records.save_tag, tag, None)
            self.tags = {name: version for name, version in self.tags.items() if name != tag}

        await self._change(change())

    # Releases.

    async def start(
        self,
        version: str,
        canary: str,
        conditions: tuple[Condition, ...],
        after_s: float,
        within_s: float,
        started_by: str,
    ) -> Release:
        """Begin a release. Raises `NotFound`, `UsageError`, `IllegalTransition` and `StorageError`."""
        if conditions and not self._scores:
            raise UsageError("a release of this run has no conditions: its devices report no scores (no metrics)")

        async def change() -> Release:
            if self.releases.active is not None:
                raise IllegalTransition(
                    f"release {self.releases.active.number} is in progress; abort it first, or wait for its end"
                )
            number, done, now = self.number_of(version), self.releases.done, self.clock()
            # From here on nobody lets the version go.
            self._starting = frozenset({number})
            release_number = await self._store(self._records.last_number) + 1
            release = Release(
                release_number,
                number,
                canaries_of(self._devices(), canary, lambda device: _rank(f"{self.id} {release_number} {device}")),
                conditions,
                after_s,
                within_s,
                started_at=now,
                previous=0 if done is None else done.version,
                started_by=started_by,
                entered_at=now,
            )
            await self._take(release)
            canary_count = len(release.canaries)
            self._log.info("release started", release=release.number, version=number, canaries=canary_count)
            return release

        try:
            return await self._change(change())
        finally:
            self._starting = frozenset()

    def _devices(self) -> list[str]:
        """Return the devices that are alive and have worked for the run; where none has, all that are alive."""
        now, fleet = self.coordinator.clock(), self.coordinator.fleet
        alive = [
            worker.name
            for worker in fleet
            if not worker.evaluator
            and worker.registration.role != WORKER_ROLE_AGGREGATOR
            and fleet.alive(worker, now)
        ]
        worked = [name for name in alive if self.coordinator.workers.history(name).selected]
        return worked or alive

    async def abort(self, number: int, reason: str) -> Release:
        """End the release in progress. Raises `NotFound`, `IllegalTransition` and `StorageError`."""

        async def change() -> Release:
            active = self.releases.active
            if active is None or number not in (0, active.number):
                known = await self._store(self._records.release, number) if number else None
                if known is not None:
                    raise IllegalTransition(f"release {number} has ended: {known.phase.name.lower()}")
                raise NotFound(f"there is no release {number}" if number else "no release is in progress")
            return await self._step(AbortAsked(reason))

        return await self._change(change())

    async def report(self, device: str, number: int, scores: Mapping[str, float], failure: str) -> None:
        """Take what a device says of a release; a release that is over takes none. Raises `StorageError`."""

        async def change() -> None:
            active = self.releases.active
            if active is not None and active.number == number:
                await self._step(Reported(device, scores, failure), device)

        await self._change(change())

    def device_gone(self, device: str) -> None:
        """Do without a device that may take part no more."""
        self._gone.add(device)
        self._changed.set()

    def wanted(self, device: str) -> Wanted | None:
        """Return what a device is to serve; None: the version that it trains on."""
        found = self.releases.wanted(device)
        return None if found is None else replace(found, without_scores=not self._scores)

    async def keep_time(self) -> None:
        """Let releases go on when their time has come, for as long as the aggregator serves."""
        retries = Retries(_AFTER_STORAGE_ERROR)
        while True:
            self._changed.clear()
            try:
                await self._change(self._catch_up())
                retries.reset()
                active = self.releases.active
                wait_s = max(0.0, active.next_at - self.clock()) if active is not None else math.inf
            except StorageError as error:
                wait_s = retries.next_delay_s()
                self._log.error("release not stored", reason=str(error), retry_in_s=round(wait_s, 2))
            try:
                async with asyncio.timeout(min(wait_s, _LONGEST_WAIT_S)):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _catch_up(self) -> None:
        """Bring the release to the present: devices that have gone, and the time that has passed."""
        while self._gone:
            device = next(iter(self._gone))
            active = self.releases.active
            if active is not None and (device in active.canaries or device in active.reports):
                await self._step(DeviceGone(device), device)
            self._gone.discard(device)
        while (active := self.releases.active) is not None and active.next_at <= self.clock():
            await self._step(TimePassed())

    async def _step(self, event: ReleaseEvent, device: str = "") -> Release:
        """Store the release in progress as the event leaves it, and then take it. Raises as `step`."""
        before = self.releases.active
        assert before is not None
        after = step(before, event, self.clock())
        if after is before:
            return before
        await self._take(after, device)
        if after.phase is not before.phase:
            self._log.info(
                "release " + after.phase.name.lower(),
                release=after.number,
                version=after.version,
                reason=after.reason,
            )
            if not isinstance(event, AbortAsked):
                facts = {"run": self.name, "release": str(after.number), "version": str(after.version)}
                self._record(_RECORDED[after.phase], {**facts, "reason": after.reason})
        return after

    async def _take(self, release: Release, device: str = "") -> None:
        await self._store(self._records.save, release, device)
        self.releases = self.releases.with_release(release)
        self._changed.set()
        self._news()

    async def last_releases(self) -> tuple[list[Release], dict[int, int]]:
        """Return the last releases, newest first, without reports, and how many each has.

        Raises `StorageError`.
        """
        return await self._store(self._records.last_releases), await self._store(self._records.report_counts)

    async def release(self, number: int) -> Release:
        """Return a release with its reports. Raises `NotFound` and `StorageError`."""
        found = await self._store(self._records.release, number)
        if found is None:
            raise NotFound(f"there is no release {number}; see `fedgrpc release list`")
        return found

    async def _store(self, call: Callable[..., T], *args: object) -> T:
        return await self.coordinator.in_database(call, *args)

    async def _change(self, change: Coroutine[Any, Any, T]) -> T:
        """Make one change at a time, each whole though its caller hangs up."""

        async def alone() -> T:
            async with self._changing:
                return await change

        return await to_its_end(alone())


_RECORDED: Final = {
    ReleasePhase.ROLLOUT: "Models/RolledOut",
    ReleasePhase.DONE: "Models/Done",
    ReleasePhase.ROLLED_BACK: "Models/RolledBack",
}


def _rank(text: str) -> float:
    """Return a number that no device can choose, and that is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
