"""Gauges of the present beside the counts of `fedgrpc.metrics`: runs, disk, members, certificates.

The rule: they are read every few seconds over the operators' socket, as anybody else would, so that a scrape
costs nothing and says the same as `fedgrpc status`. What cannot be read keeps its last value, and only
`fedgrpc_serving` falls to 0.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Gauge

from fedgrpc.calls import Calls, connect
from fedgrpc.errors import FedgrpcError
from fedgrpc.identity.certificates import end_of, load_certificates
from fedgrpc.identity.members import Lives, Member, MemberState
from fedgrpc.v1.aggregator_pb2 import RunPhase, RunSummary

_INTERVAL_S: Final = 10.0
# How long before a device has to join anew it counts as leaving.
LEAVING_S: Final = 3 * 86_400.0
_PHASES: Final = {
    RunPhase.RUN_PHASE_RUNNING: "running",
    RunPhase.RUN_PHASE_PAUSED: "paused",
    RunPhase.RUN_PHASE_FINISHED: "finished",
    RunPhase.RUN_PHASE_STOPPED: "stopped",
}

log = structlog.get_logger()


class Gauges:
    """The gauges, in the registry of an aggregator's metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.serving = Gauge("fedgrpc_serving", "1 while the aggregator can do its work", registry=registry)
        self.run_phase = Gauge(
            "fedgrpc_run_phase", "1 for the phase of a run", ["run", "phase"], registry=registry
        )
        self.run_round = Gauge("fedgrpc_run_round", "Number of a run's latest round", ["run"], registry=registry)
        self.run_workers = Gauge(
            "fedgrpc_run_workers",
            "Live workers that may serve a run, those with a task of it, and those that its round still wants",
            ["run", "state"],
            registry=registry,
        )
        self.data_free_bytes = Gauge(
            "fedgrpc_data_free_bytes", "Free bytes of the file system with the data folder", registry=registry
        )
        self.members = Gauge("fedgrpc_members", "Members of the fleet by state", ["state"], registry=registry)
        self.members_leaving = Gauge(
            "fedgrpc_members_leaving",
            "Active members that can renew their certificates for less than three days more",
            registry=registry,
        )
        self._registry = registry
        self._certificate_end: Gauge | None = None
        self._runs: frozenset[str] = frozenset()

    def show_runs(self, runs: Sequence[RunSummary]) -> None:
        """Show these runs; others make room."""
        names = frozenset(run.name for run in runs)
        for name in self._runs - names:
            self.run_round.remove(name)
            for label in _PHASES.values():
                self.run_phase.remove(name, label)
            for state in ("eligible", "busy", "wanted"):
                self.run_workers.remove(name, state)
        self._runs = names
        for run in runs:
            for phase, label in _PHASES.items():
                self.run_phase.labels(run.name, label).set(run.phase == phase)
            self.run_round.labels(run.name).set(run.current_round)
            self.run_workers.labels(run.name, "eligible").set(run.eligible_workers)
            self.run_workers.labels(run.name, "busy").set(run.busy_workers)
            self.run_workers.labels(run.name, "wanted").set(run.wanted_workers)

    def show_members(self, members: Iterable[Member], lives: Lives, now: float) -> None:
        """Show how many members there are; `now`: seconds since 1970."""
        known = list(members)
        states = Counter(member.state for member in known)
        for state in MemberState:
            self.members.labels(state.name.lower()).set(states[state])
        leaving = sum(
            member.state is MemberState.ACTIVE
            and member.may_renew(now, lives.grace_s)
            and not member.may_renew(now + LEAVING_S, lives.grace_s)
            for member in known
        )
        self.members_leaving.set(leaving)

    def show_certificate(self, path: Path) -> None:
        """Show when the certificate in a file ends. Raises OSError, and `FedgrpcError` where there is none."""
        end = end_of(load_certificates(path.read_bytes())[0])
        if self._certificate_end is None:
            # Not before it is known: 0 would be a time long past.
            self._certificate_end = Gauge(
                "fedgrpc_certificate_end_seconds",
                "End of the certificate that --tls-cert names, seconds since 1970",
                registry=self._registry,
            )
        self._certificate_end.set(end)


@dataclass(frozen=True)
class Sources:
    """Sources of the gauges: a folder, the members and their lives, a certificate of the operator's."""

    data_dir: Path
    members: Callable[[], Iterable[Member]]
    lives: Lives
    certificate: Path | None = None


@asynccontextmanager
async def kept_fresh(gauges: Gauges, address: str, sources: Sources) -> AsyncIterator[None]:
    """Keep the gauges of the aggregator at `address` fresh while the block runs."""
    async with connect(address) as client:
        keeping = asyncio.create_task(_keep_fresh(gauges, client, sources))
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)


async def _keep_fresh(gauges: Gauges, client: Calls, sources: Sources) -> None:
    while True:
        try:
            await refresh(gauges, client, sources)
        except (FedgrpcError, OSError) as error:
            gauges.serving.set(0)
            log.warning("gauges not refreshed", reason=str(error))
        await asyncio.sleep(_INTERVAL_S)


async def refresh(gauges: Gauges, client: Calls, sources: Sources) -> None:
    """Read everything once. Raises OSError and `FedgrpcError`."""
    gauges.serving.set(await client.healthy())
    gauges.show_runs(await client.runs())
    gauges.show_members(sources.members(), sources.lives, time.time())
    usage = await asyncio.to_thread(shutil.disk_usage, sources.data_dir)
    gauges.data_free_bytes.set(usage.free)
    if sources.certificate is not None:
        gauges.show_certificate(sources.certificate)
