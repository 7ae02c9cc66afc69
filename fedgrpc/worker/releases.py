"""Following releases: what this device is to serve to applications is fetched, served and scored.

The rule: a release never disturbs training. Scoring waits for the task in progress, and whatever fails here is
reported and retried, and ends nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import structlog

from fedgrpc.errors import CorruptError, FedgrpcError, StorageError, WrongOffset
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.rpc.retry import Backoff, Retries
from fedgrpc.v1.models_pb2 import ServedVersion
from fedgrpc.worker.caller import told_reason
from fedgrpc.worker.held_model import HeldModel, Source
from fedgrpc.worker.model_pulls import ModelPulls
from fedgrpc.worker.release_calls import ReleaseCalls
from fedgrpc.worker.released_models import ReleasedModels
from fedgrpc.worker.status import StatusPublisher

# Scores of a whole model of the run with this id; none without local data. Raises `TaskError` if it is of no use.
Score = Callable[[str, HeldModel], Awaitable[Mapping[str, float]]]

_WAIT_S: Final = 300.0
_AGAIN: Final = Backoff(first_s=1.0, cap_s=60.0)
_SHORTEST_INTERVAL_S: Final = 0.2
_MAX_WANTED: Final = 64
# Of an interrupted download the rest may come; what else is refused is refused for good.
_DAMAGED: Final = (CorruptError, WrongOffset)

log = structlog.get_logger()


class ReleaseFollower:
    """Keeps `models` at what the aggregator wants. `run` it once."""

    def __init__(
        self,
        calls: ReleaseCalls,
        pulls: ModelPulls,
        models: ReleasedModels,
        publisher: StatusPublisher,
        score: Score,
        takes: Callable[[str], bool] = lambda run_id: True,
        again: Backoff = _AGAIN,
    ) -> None:
        """`takes` says whether this device has to do with the run of that id."""
        self._calls = calls
        self._pulls = pulls
        self._models = models
        self._publisher = publisher
        self._score = score
        self._takes = takes
        self._again = again
        self._told: list[ServedVersion] = []
        self._serving: dict[str, tuple[ServedVersion, asyncio.Task[None]]] = {}
        self.show()

    def show(self) -> None:
        """Show what is served in the worker's status."""
        served = [each for run_id in self._models.run_ids if (each := self._models.served(run_id)) is not None]
        last = max(served, key=lambda each: each.release, default=None)
        self._publisher.show(
            served_version=0 if last is None else last.version, release=0 if last is None else last.release
        )

    async def run(self) -> None:
        """Follow until cancelled."""
        retries = Retries(self._again)
        try:
            while True:
                try:
                    self._told = await self._calls.follow_releases(self._told, _WAIT_S)
                    await self._take(self._told)
                    retries.reset()
                except FedgrpcError as error:
                    # Also where the worker has not registered yet, and where the aggregator knows no releases.
                    log.debug("releases not followed", reason=str(error))
                    await asyncio.sleep(retries.next_delay_s())
        finally:
            await self._end(list(self._serving))

    async def _take(self, wanted: list[ServedVersion]) -> None:
        """Serve what is wanted of each run, and no release of any other."""
        by_run = {each.run_id: each for each in wanted[:_MAX_WANTED]}
        changed = [run for run, (each, _) in self._serving.items() if by_run.get(run) != each]
        await self._end(changed)
        for run_id in set(self._models.run_ids) - by_run.keys():
            await asyncio.to_thread(self._models.withdraw, run_id)
            log.info("release withdrawn", run_id=run_id)
        self.show()
        for run_id, each in by_run.items():
            if run_id not in self._serving and (run_id in self._models.run_ids or self._takes(run_id)):
                self._serving[run_id] = each, asyncio.create_task(self._serve(each))

    async def _end(self, runs: list[str]) -> None:
        tasks = [self._serving.pop(run)[1] for run in runs]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, wanted: ServedVersion) -> None:
        """Fetch a version and serve it. Score it as often as asked."""
        model = await self._retried(wanted, lambda: self._fetch(wanted))
        if model is None:
            return
        interval_s = duration_from_proto(wanted.score_interval) if wanted.HasField("score_interval") else None
        while interval_s is not None:
            await self._retried(wanted, lambda: self._report_scores(wanted, model))
            await asyncio.sleep(max(interval_s, _SHORTEST_INTERVAL_S))

    async def _retried(self, wanted: ServedVersion, act: Callable[[], Awaitable[HeldModel]]) -> HeldModel | None:
        """Act until it works. Report what fails for good, or on this device; None after the former."""
        retries = Retries(self._again)
        while True:
            try:
                return await act()
            except FedgrpcError as error:
                log.warning(
                    "release not served", version=wanted.version, release=wanted.release, reason=str(error)
                )
                final = not error.retryable and not isinstance(error, _DAMAGED)
                if final or isinstance(error, StorageError):
                    await self._report_failure(wanted, error)
                if final:
                    return None
                await asyncio.sleep(retries.next_delay_s())

    async def _fetch(self, wanted: ServedVersion) -> HeldModel:
        """Return the version, whole, and serve it."""
        models, run_id = self._models, wanted.run_id
        model = models.whole(run_id, wanted.version)
        if model is None:
            folder = await asyncio.to_thread(models.folder_of, run_id, wanted.version)
            model = await self._pulls.pull(folder, Source(run_id, wanted.version))
        await asyncio.to_thread(models.publish, wanted.run, run_id, wanted.version, wanted.release)
        log.info("release served", run=wanted.run, version=wanted.version, release=wanted.release)
        self.show()
        return model

    async def _report_scores(self, wanted: ServedVersion, model: HeldModel) -> HeldModel:
        try:
            scores = {} if wanted.without_scores else await self._score(wanted.run_id, model)
        except FedgrpcError as error:
            await self._report_failure(wanted, error)
        else:
            await self._calls.report_release(wanted.run_id, wanted.release, scores, "")
        return model

    async def _report_failure(self, wanted: ServedVersion, failed: FedgrpcError) -> None:
        """Tell why this device cannot use a version, as soon as the aggregator can be reached."""
        reason, retries = told_reason(failed, wanted.without_scores), Retries(self._again)
        while True:
            try:
                return await self._calls.report_release(wanted.run_id, wanted.release, {}, reason)
            except FedgrpcError as error:
                if not error.retryable:
                    log.warning("release not reported", release=wanted.release, reason=str(error))
                    return
                await asyncio.sleep(retries.next_delay_s())
