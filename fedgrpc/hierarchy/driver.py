"""Plays the rounds that the aggregator above has given tasks for.

    task.pb         the task whose round is played, or was last
    mean.*          what that round has made (fedgrpc.hierarchy.partial_aggregate)

The rule: as in `Driver`, what was cut off goes on. A round outlives this process and the link above; it ends early
only when the one above no longer wants it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from google.protobuf.message import DecodeError

from fedgrpc import claims
from fedgrpc.aggregation.mean import mean_metrics
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.driver import Driver
from fedgrpc.aggregator.new_version import NewVersion, merged_of, sub_models_of
from fedgrpc.aggregator.report import CurrentRound
from fedgrpc.aggregator.scales import accumulated_of
from fedgrpc.aggregator.scores import scores_of
from fedgrpc.aggregator.training_instructions import TrainingInstructions
from fedgrpc.codec.layout import Array, Layout
from fedgrpc.errors import CodecError, NotFinite, StorageError
from fedgrpc.hierarchy.desk import Desk, Order, Shown
from fedgrpc.hierarchy.partial_aggregate import MeanFile, Tensors, mean_tensors, own_tensors
from fedgrpc.protocol.plans import plan_table_from_proto
from fedgrpc.rounds.events import Abort, Commit
from fedgrpc.rounds.policy import RoundPolicy, TaskKind
from fedgrpc.rounds.round import Round, RoundPhase
from fedgrpc.rounds.version import Version
from fedgrpc.storage.files import storage_errors, write_file
from fedgrpc.storage.model_file import write_model
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.v1.aggregator_pb2 import RUN_PHASE_PAUSED
from fedgrpc.v1.round_pb2 import TASK_KIND_EVALUATE, TASK_KIND_INITIALIZE, TASK_KIND_TRAIN


class LeafDriver(Driver):
    """A driver whose rounds are those of `desk`, in the run `run_id` of the aggregator above."""

    def __init__(self, coordinator: Coordinator, desk: Desk, run_id: str) -> None:
        super().__init__(coordinator)
        folder = self._settings.data_dir / "above"
        self._run_id = run_id
        self._mean = MeanFile(folder)
        self._new_version = _NoVersion(coordinator)
        self._task_path = folder / "task.pb"
        self._task = aggregator_pb2.Task()
        self._desk = desk
        self._it.makes_versions = False
        desk.ordered, desk.withdrawn, desk.showing = self._ordered, self._withdrawn, self._it.wake.set

    async def recover(self) -> None:
        """As `Driver.recover`, with the instructions of the round in progress."""
        it = self._it
        self._task = await asyncio.to_thread(self._read_task)
        if self._task.token:
            self._desk.resuming = True
            self._take_instructions(self._task)
        await super().recover()
        it.run.id = self._run_id
        await it.save_run()
        if it.current is not None and it.current.state.number != self._task.round:
            self._abandon("its task from above is not known any more")

    def _read_task(self) -> aggregator_pb2.Task:
        try:
            with storage_errors(self._task_path):
                text = self._task_path.read_bytes() if self._task_path.exists() else b""
            return aggregator_pb2.Task.FromString(text)
        except DecodeError as error:
            raise StorageError(f"cannot read {self._task_path}: {error}") from error

    def _take_instructions(self, task: aggregator_pb2.Task) -> None:
        """Ask workers for what the parent asks for. Raises `LayoutError`."""
        it = self._it
        plans = plan_table_from_proto(task.leaf.local_models)
        it.instructions = TrainingInstructions.from_parent(task, self._settings)
        if self._settings.local_models.trivial:
            it.local_models.use(plans)

    # What the link above says, on the event loop.

    def _ordered(self, order: Order) -> None:
        current = self._it.current
        if current is not None and order.token != self._task.token:
            self._abandon("the aggregator above has another task")
        elif current is not None:
            _hurry(current, order.due_at)
        self._it.wake.set()

    def _withdrawn(self, order: Order, reason: str) -> None:
        if order.token == self._task.token:
            self._abandon(reason)

    def _abandon(self, reason: str) -> None:
        current = self._it.current
        if current is not None and current.state.phase in (RoundPhase.SELECTING, RoundPhase.REPORTING):
            self._it.dispatch(Abort(reason))

    # What the driver does.

    async def _open(self) -> bool:
        """Open the round of the order in hand; without one, say whether there are workers for it, and wait."""
        it = self._it
        self._count_crew()
        order = self._desk.next()
        shown, self._desk.shown = self._desk.shown, None
        if shown is not None:
            await self._show(*shown)
        if order is None or it.run.phase == RUN_PHASE_PAUSED:
            await self._wait(it.clock() + self._settings.policy.lease_s)
            return False
        if (mean := await asyncio.to_thread(self._mean.load, order.token)) is not None:
            self._desk.done(order.token, mean)
            return False
        try:
            await self._until_stored(partial(self._take_up, order))
        except CodecError as error:
            self._desk.failed(order.token, str(error))
            return False
        if self._desk.next() is not order:
            return False
        policy = self._policy(order)
        state = Round(order.task.round, policy, it.clock())
        it.current = CurrentRound(state, order.task.kind, it.run.version, time.time(), due_at=order.due_at)
        return True

    def _count_crew(self) -> None:
        it = self._it
        enough = it.pool().live_count >= self._settings.policy.needed_idle
        if enough and it.run.phase != RUN_PHASE_PAUSED:
            self._desk.crew.set()
        else:
            self._desk.crew.clear()
        if it.fleet.live_evaluators(it.clock()):
            self._desk.evaluators.set()
        else:
            self._desk.evaluators.clear()

    async def _show(self, shown: Shown, done: asyncio.Future[None]) -> None:
        """Make a version known to evaluators before there is a round of it, if there ever is."""
        record = self._it.last_record
        try:
            if self._it.run.version < shown.version:
                written_in = 0 if record is None else record.number
                keep = partial(self._keep_version, shown.version, written_in, shown.layout, shown.given)
                await self._until_stored(keep)
        except CodecError as error:
            if not done.done():
                done.set_exception(error)
        else:
            if not done.done():
                done.set_result(None)

    async def _take_up(self, order: Order) -> None:
        """Make the order's version this aggregator's own, and the order durable."""
        it, task = self._it, order.task
        if task.kind != TASK_KIND_INITIALIZE and it.run.version != task.model_version:
            # Its scores come with this round's updates, and are those of the round before.
            await self._keep_version(task.model_version, max(0, task.round - 1), order.layout, order.given)
        self._take_instructions(task)
        if task.leaf.HasField("channels"):
            await asyncio.to_thread(it.local_models.learn, task.leaf.channels, it.run.layout)
        await asyncio.to_thread(self._write_task, task)
        self._task = task

    async def _keep_version(
        self, number: int, written_in: int, layout: Layout, given: Mapping[str, Array]
    ) -> None:
        it = self._it
        digest = await asyncio.to_thread(write_model, it.models.path(number), layout, given.values())
        version = Version(number, written_in, digest, trained=number - 1)
        await it.in_database(it.store.save_version, version)
        it.run.take(version, layout)
        it.versions.add(version)
        # Evaluators that wait for something to score.
        it.fleet.wake_all()

    def _write_task(self, task: aggregator_pb2.Task) -> None:
        with storage_errors(self._task_path):
            write_file(self._task_path, task.SerializeToString())

    def _policy(self, order: Order) -> RoundPolicy:
        """This aggregator's own, but for the time that the one above leaves."""
        policy = self._settings.policy.for_kind(TaskKind(order.task.kind))
        if order.due_at is None:
            return policy
        left_s = max(0.001, order.due_at - self._it.clock())
        timeout_s = policy.selection_timeout_s
        return replace(policy, selection_timeout_s=left_s if timeout_s is None else min(left_s, timeout_s))

    async def _commit_once(self, current: CurrentRound, commit: Commit) -> None:
        """The mean is durable before the round counts as committed."""
        weights = self._new_version.weights(current, commit.tokens)
        await self._write_mean(current, weights)
        await super()._commit_once(current, commit)

    async def _write_mean(self, current: CurrentRound, weights: dict[str, float]) -> None:
        it = self._it
        header = self._header(current, weights)
        tokens = list(weights)
        await asyncio.to_thread(self._new_version.check, current, tokens)
        for token in tokens:
            told = self._new_version.load(token).header
            if told.HasField("channels") and not header.HasField("channels"):
                header.channels.CopyFrom(told.channels)
            if current.kind == TASK_KIND_TRAIN:
                await self._new_version.learn_channels(token)
        load = self._new_version.load
        tensors: Tensors
        if current.kind == TASK_KIND_EVALUATE:
            tensors = iter(())
        elif current.kind == TASK_KIND_INITIALIZE:
            tensors = own_tensors(tokens[0], load(tokens[0]))
        else:
            sub_models, merged = sub_models_of(it, current, tokens), merged_of(current, tokens)
            scales = await self._new_version.scales(current, weights)
            current.scales = scales
            base, clips_buffers = it.models.open(current.base_version), self._new_version.clips_buffers
            pairs = list(weights.items())
            tensors = mean_tensors(base, pairs, load, sub_models, merged, scales, current.keeps, clips_buffers)
        try:
            await asyncio.to_thread(self._mean.write, header, tensors)
        except NotFinite as error:
            raise await asyncio.to_thread(self._new_version.blamed, error, weights, current.scales) from error

    def _header(self, current: CurrentRound, weights: dict[str, float]) -> aggregator_pb2.UpdateHeader:
        """What the mean says besides its tensors: sums of counts, as far as they go, and means of scores."""
        reports = [(current.reports[token], weight) for token, weight in weights.items()]
        scores = scores_of(current, weights, self._it.weighing, self._settings.policy.max_share)
        header = aggregator_pb2.UpdateHeader(
            token=self._task.token,
            example_count=claims.EXAMPLES.total(report.example_count for report, _ in reports),
            steps=claims.STEPS.total(report.steps for report, _ in reports),
            metrics=mean_metrics([(report.metrics, weight) for report, weight in reports]),
            evaluation_metrics=scores.metrics,
            scores_not_finite=scores.not_finite,
            evaluation_example_count=claims.EXAMPLES.clamped(scores.example_count),
            scores_of_sub_models=scores.of_sub_models,
        )
        if current.kind != TASK_KIND_INITIALIZE:
            updates = (report.merged_updates or 1 for report, _ in reports)
            header.merged_updates = claims.MERGED_UPDATES.total(updates)
            header.weight = claims.WEIGHT.clamped(sum(weights.values()))
            accumulated_steps = accumulated_of(self._it.instructions, current, weights)
            header.accumulated_steps = claims.ACCUMULATED_STEPS.clamped(accumulated_steps)
        return header

    async def _after_round(self) -> None:
        current, token = self._it.current, self._task.token
        assert current is not None
        await super()._after_round()
        mean = await asyncio.to_thread(self._mean.load, token)
        if current.state.phase is RoundPhase.COMMITTED and mean is not None:
            self._desk.done(token, mean)
        else:
            self._desk.failed(token, f"its own round was abandoned: {current.state.reason}")

    async def _after_abandoned(self, state: Round) -> None:
        """Nothing to rest from: the next round comes when the one above says."""


class _NoVersion(NewVersion):
    """Versions are made at the root."""

    def weights(self, current: CurrentRound, tokens: tuple[str, ...]) -> dict[str, float]:
        """As above, but together no more than one update may weigh there: the mean travels as one."""
        weights = super().weights(current, tokens)
        total = sum(weights.values())
        if total <= claims.WEIGHT.most:
            return weights
        return {token: weight * (claims.WEIGHT.most / total) for token, weight in weights.items()}

    async def write(self, current: CurrentRound, weights: dict[str, float]) -> Version | None:
        return None


def _hurry(current: CurrentRound, due_at: float | None) -> None:
    """A round from before a restart ends in time for the one above."""
    current.due_at = due_at
    deadline_at = current.state.deadline_at
    if due_at is not None and deadline_at is not None and due_at < deadline_at:
        current.state = replace(current.state, deadline_at=due_at)
