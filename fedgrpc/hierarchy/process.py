"""A whole aggregator below another: its folder, its link up, the aggregator below, and how it is told to end."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from typing import Final

import structlog

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import UsageError
from fedgrpc.hierarchy.branch import Branches, Ready
from fedgrpc.hierarchy.upstream import relay_scores, round_link
from fedgrpc.metrics import Metrics
from fedgrpc.process import told_to_end
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.identity import Session
from fedgrpc.storage.folder import folder_id, hold_folder
from fedgrpc.worker.process import IN_USE
from fedgrpc.worker.settings import WorkerSettings

_DECIDED_ABOVE: Final = (
    *("run_name", "rounds", "plan", "initial_model", "target", "evaluate", "seed"),
    *("server_optimizer", "server_learning_rate", "normalize_steps", "precision_weights", "staleness_exponent"),
)

log = structlog.get_logger()


class Leaf:
    """One aggregator below another. `run` it once; `stop` may be called from its event loop meanwhile.

    `settings` are those of any aggregator; what the one above decides (run, model, rounds, plan) is left out of
    them. `above` is how it is a worker there: its state folder lies in the data folder.

    Raises:
        UsageError: a setting is the one above's to make.
    """

    def __init__(
        self, settings: AggregatorSettings, above: WorkerSettings, metrics: Metrics | None = None
    ) -> None:
        _check_undecided(settings)
        self._settings = settings
        self._above = above
        self._metrics = metrics or Metrics()
        self._branches: Branches | None = None
        self._signals = 0
        self._stopping = False

    @property
    def coordinator(self) -> Coordinator | None:
        """State of the run below; None before the one above has been heard."""
        return None if self._branches is None else self._branches.coordinator

    async def run(self, ready: Ready = None) -> int:
        """Until the run above has ended (0), or until told to stop (128 + signal).

        `ready` is called with the port once workers are served: after the one above has been heard for the first
        time. Raises as `Aggregator.run` and `Worker.run`.
        """
        above = self._above
        branches = self._branches = Branches(self._settings, self._metrics, ready)
        async with AsyncExitStack() as stack:
            stack.enter_context(hold_folder(above.state_dir, IN_USE))
            channel = await stack.enter_async_context(open_channel(above.aggregator, above.tls))
            session = Session.begin(folder_id(above.state_dir))
            link = round_link(above, channel, session, branches)
            await branches.resume()
            linked, ended = asyncio.create_task(link.run()), asyncio.create_task(branches.ended.wait())
            scoring = asyncio.create_task(
                relay_scores(above, channel, session, branches, self._settings.policy.lease_s)
            )
            try:
                await asyncio.wait([linked, ended], return_when=asyncio.FIRST_COMPLETED)
                if linked.done() and linked.exception() is None:
                    await branches.present.finish("the run of the aggregator above has ended")
                elif linked.done():
                    self.stop()
                code = await branches.result()
            finally:
                branches.closing = True
                linked.cancel()
                ended.cancel()
                scoring.cancel()
                await asyncio.gather(linked, ended, scoring, return_exceptions=True)
            if not linked.cancelled():
                linked.result()
        return 128 + self._signals if self._signals else code

    def stop(self, signal_number: int = 0) -> None:
        """Drain and end; a second call ends at once. The task in hand is kept for the next start."""
        if self._stopping:
            log.warning("ending at once")
            os._exit(128 + signal_number)
        self._stopping, self._signals = True, signal_number
        if self._branches is not None:
            self._branches.close(signal_number)


def _check_undecided(settings: AggregatorSettings) -> None:
    default = AggregatorSettings(settings.data_dir)
    for name in _DECIDED_ABOVE:
        if getattr(settings, name) != getattr(default, name):
            raise UsageError(f"{name} is for the aggregator above to decide; leave it out beside --upstream")
    if settings.policy.late != "discard":
        raise UsageError("beside --upstream, late = 'discard': a round below ends with the one above it")


async def run_leaf(
    settings: AggregatorSettings, above: WorkerSettings, *, ready: Ready = None, metrics: Metrics | None = None
) -> int:
    """Run an aggregator below another to its end; the exit code. In the main thread, SIGTERM and SIGINT drain it.

    Raises: as `Leaf.run`.
    """
    leaf = Leaf(settings, above, metrics)
    with told_to_end(leaf.stop):
        return await leaf.run(ready)
