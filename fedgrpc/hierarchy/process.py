"""The process of a leaf: its folder, its links to the parent, its aggregator, and how it ends."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from typing import Final

import structlog

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import UsageError
from fedgrpc.hierarchy.leaf_run import LeafRuns, Ready
from fedgrpc.hierarchy.upstream import relay_scores, round_link
from fedgrpc.metrics import ProcessMetrics
from fedgrpc.process import on_end_signal
from fedgrpc.rpc.identity import Session
from fedgrpc.storage.folder import folder_id, hold_folder
from fedgrpc.worker.enrolment import enrolled, linked
from fedgrpc.worker.process import IN_USE
from fedgrpc.worker.settings import WorkerSettings

_DECIDED_BY_PARENT: Final = (
    *("run_name", "rounds", "plan", "initial_model", "target", "patience", "evaluate", "seed"),
    *("server_optimizer", "server_learning_rate", "noise_weights", "staleness_exponent"),
    *("aggregation", "clip_quantile"),
)

log = structlog.get_logger()


class Leaf:
    """A leaf: an aggregator that is a worker of its parent.

    Call `run` once. `stop` may be called from its event loop meanwhile.

    `settings` are those of any aggregator, without what the parent decides (run, model, rounds, plan). `upstream`
    are those of a worker of the parent: its state folder lies in the data folder.

    Raises:
        UsageError: the parent decides one of the settings.
    """

    def __init__(
        self, settings: AggregatorSettings, upstream: WorkerSettings, metrics: ProcessMetrics | None = None
    ) -> None:
        _check_undecided(settings)
        self._settings = settings
        self._upstream = upstream
        self._metrics = metrics or ProcessMetrics()
        self._runs: LeafRuns | None = None
        self._joining: asyncio.Task[WorkerSettings] | None = None
        self._signals = 0
        self._stopping = False

    @property
    def coordinator(self) -> Coordinator | None:
        """Coordinator of the leaf's run; None before the parent has answered for the first time."""
        return None if self._runs is None else self._runs.coordinator

    async def run(self, ready: Ready = None) -> int:
        """Run until the parent's run has ended (0), or until `stop` (128 + signal).

        `ready` is called with the port once workers are served: after the first answer of the parent. Raises as
        `Aggregator.run` and `Worker.run`.
        """
        upstream = self._upstream
        runs = self._runs = LeafRuns(self._settings, self._metrics, ready)
        async with AsyncExitStack() as stack:
            stack.enter_context(hold_folder(upstream.state_dir, IN_USE))
            if (known := await self._enrolled()) is None:
                return 128 + self._signals
            self._upstream = upstream = known
            parent = await stack.enter_async_context(linked(upstream))
            session = Session.begin(folder_id(upstream.state_dir))
            link = round_link(upstream, parent, session, runs)
            await runs.resume()
            working, ended = asyncio.create_task(link.run()), asyncio.create_task(runs.ended.wait())
            renewing = asyncio.create_task(parent.keep_fresh())
            scoring = asyncio.create_task(
                relay_scores(upstream, parent, session, runs, self._settings.policy.lease_s)
            )
            try:
                await asyncio.wait([working, ended, renewing], return_when=asyncio.FIRST_COMPLETED)
                if working.done() and working.exception() is None:
                    await runs.present.finish("the run of the parent has ended")
                elif working.done() or renewing.done():
                    self.stop()
                code = await runs.result()
            finally:
                runs.closing = True
                working.cancel()
                ended.cancel()
                scoring.cancel()
                renewing.cancel()
                await asyncio.gather(working, ended, scoring, renewing, return_exceptions=True)
            for task in (working, renewing):
                if not task.cancelled():
                    task.result()
        return 128 + self._signals if self._signals else code

    async def _enrolled(self) -> WorkerSettings | None:
        """Return the settings that the leaf's certificate decides; None when told to end before there is one."""
        self._joining = joining = asyncio.create_task(enrolled(self._upstream))
        await asyncio.wait([joining])
        self._joining = None
        return None if joining.cancelled() else joining.result()

    def stop(self, signal_number: int = 0) -> None:
        """Drain and end. A second call ends at once. The present task is kept for the next start."""
        if self._stopping:
            log.warning("ending at once")
            os._exit(128 + signal_number)
        self._stopping, self._signals = True, signal_number
        if self._joining is not None:
            self._joining.cancel()
        elif self._runs is not None:
            self._runs.close(signal_number)


def _check_undecided(settings: AggregatorSettings) -> None:
    default = AggregatorSettings(settings.data_dir)
    for name in _DECIDED_BY_PARENT:
        if getattr(settings, name) != getattr(default, name):
            raise UsageError(f"{name} is for the parent to decide; leave it out beside --upstream")
    if settings.privacy.on:
        raise UsageError("--privacy is for the parent: a leaf releases no versions, and would add no noise")
    if settings.policy.late != "discard":
        raise UsageError("beside --upstream, late must be 'discard': a leaf's round ends with its parent's")


async def run_leaf(
    settings: AggregatorSettings,
    upstream: WorkerSettings,
    *,
    ready: Ready = None,
    metrics: ProcessMetrics | None = None,
) -> int:
    """Run a leaf to its end and return the exit code. In the main thread, SIGTERM and SIGINT drain it.

    Raises: as `Leaf.run`.
    """
    leaf = Leaf(settings, upstream, metrics)
    with on_end_signal(leaf.stop):
        return await leaf.run(ready)
