"""The second link to the aggregator above: an evaluator there, whose scores are those of the evaluators below.

The rule: it is there as soon as an evaluator is below, and asks for a version to score while one is. It holds no
round: what the evaluators below say of a version is sent when all of them that are alive have said it.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import structlog
from grpc.aio import Channel

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.errors import FedgrpcError, TaskError
from fedgrpc.hierarchy.branch import Branches
from fedgrpc.hierarchy.desk import Shown
from fedgrpc.hierarchy.loop import Link
from fedgrpc.rpc.identity import Session
from fedgrpc.trainer import EvalResult
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.worker.client import AggregatorClient, Polled
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.spool import SpooledUpdate
from fedgrpc.worker.status import Activity, Status, StatusPublisher
from fedgrpc.worker.task import Registration, Role, Task
from fedgrpc.worker.update import Began, Outcome, update_of

log = structlog.get_logger()


async def relay_scores(
    above: WorkerSettings, channel: Channel, session: Session, branches: Branches, lease_s: float
) -> None:
    """Be an evaluator of the aggregator above from when there is one below, until the run above has ended."""
    await _until_needed(branches)
    name, state_dir = f"{above.name}.evaluators", above.state_dir / "evaluators"
    settings = replace(above, name=name, state_dir=state_dir, role=Role.EVALUATOR)
    client = AggregatorClient(channel, name, above.throttle, above.stall_s, session=session)
    try:
        await ScoringLoop(settings, client, branches, lease_s).run()
    except FedgrpcError as error:
        log.warning("the scores of evaluators stay here", reason=str(error))


async def _until_needed(branches: Branches) -> None:
    """Until an evaluator is below. Where another run begins, all who wait are woken: that is none."""
    while True:
        await branches.led.wait()
        branch = branches.present
        await branch.desk.evaluators.wait()
        if branches.led.is_set() and branches.present is branch:
            return


class ScoringLoop(Link):
    """Takes versions to score while there are evaluators below, which are looked for every `lease_s`."""

    def __init__(
        self, settings: WorkerSettings, client: AggregatorClient, branches: Branches, lease_s: float
    ) -> None:
        super().__init__(settings, client, StatusPublisher(Status(settings.name, settings.aggregator)), branches)
        self._lease_s = lease_s

    async def _connect(self) -> Registration:
        registration = await self._register()
        self._branches.of(registration.run_id)
        self._log.info("connected", run=registration.run, aggregator=self._settings.aggregator)
        return registration

    async def _next_answer(self, registration: Registration) -> Polled | None:
        self._publisher.enter(Activity.WAITING)
        evaluators = self._branches.of(registration.run_id).desk.evaluators
        if not evaluators.is_set():
            await self._leave()
            await evaluators.wait()
        return await super()._next_answer(registration)

    async def _work(self, task: Task, message: aggregator_pb2.Task) -> SpooledUpdate:
        """Show the version to the evaluators below, and spool the mean of what they say of it."""
        branch = self._branches.of(task.run_id)
        coordinator, download_s = branch.aggregator.coordinator, 0.0
        assert coordinator is not None
        if coordinator.run.version < task.model_version:
            layout, given, download_s = await self._lazily(task)
            await branch.desk.show(Shown(task.model_version, layout, given))
        began = Began(download_s, time.monotonic())
        self._publisher.enter(Activity.EVALUATING)
        scores = await self._scores(coordinator, task.model_version)
        outcome = Outcome(None, scores.example_count, scores=scores)
        residual = await asyncio.to_thread(self._spool.residual, task.run_id)
        fill = update_of(task, self._settings.name, {}, outcome, residual, began)
        return await asyncio.to_thread(self._spool.write, message, fill)

    async def _scores(self, coordinator: Coordinator, version: int) -> EvalResult:
        """Once all evaluators that are alive have scored it. Raises `TaskError` when none of them has."""
        seen, evaluations = -1, coordinator.evaluations
        while any(
            evaluations.waiting_for(worker.name, version)
            for worker in coordinator.fleet.live_evaluators(coordinator.clock())
        ):
            try:
                # That one is away is no news.
                async with asyncio.timeout(self._lease_s):
                    seen = await coordinator.changes.wait(seen)
            except TimeoutError:
                continue
        if (found := evaluations.scores_of(version)) is None:
            raise TaskError(f"no evaluator has scored version {version}")
        return EvalResult(*found)
