"""The driver: the one task that opens rounds, selects, commits, and ends the run.

The rule: whatever it does can be cut off at any point. What is not in the database did not happen, and what an
update file holds is still there; the next process goes on from that.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import structlog

from fedgrpc.aggregation.mean import mean_metrics
from fedgrpc.aggregation.server_optimizer import server_optimizer
from fedgrpc.aggregator.commit import Commit as CommitFiles
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.local_models import LocalTask, Sizing
from fedgrpc.aggregator.model_file import ModelFile, write_model
from fedgrpc.aggregator.report import CurrentRound, Report
from fedgrpc.aggregator.run_store import OpenRound, TaskRow, Version
from fedgrpc.aggregator.uploads import StoredUpdate
from fedgrpc.codec.manifest import Limits
from fedgrpc.errors import CodecError, NotFound, StorageError, UpdateRefused, UsageError
from fedgrpc.rounds.events import Abort, Commit, Committed, Finished, Select, Selected, TaskPhase, Tick
from fedgrpc.rounds.policy import RoundPolicy, select_uniform
from fedgrpc.rounds.state import Round, RoundPhase, restore, step, wake_at
from fedgrpc.rpc.channel import MAX_MESSAGE_BYTES
from fedgrpc.rpc.convert import layout_to_proto
from fedgrpc.rpc.retry import Backoff, Retries
from fedgrpc.v1.aggregator_pb2 import RUN_PHASE_FINISHED, RUN_PHASE_PAUSED, RUN_PHASE_RUNNING, RunPhase
from fedgrpc.v1.round_pb2 import TASK_KIND_EVALUATE, TASK_KIND_INITIALIZE, TASK_KIND_TRAIN, TaskKind

log = structlog.get_logger()

_AFTER_ABANDONED = Backoff(first_s=0.5, cap_s=15.0)
_AFTER_STORAGE_ERROR = Backoff(first_s=0.5, cap_s=15.0)


class Driver:
    """Plays rounds on a coordinator until the run has ended."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._it = coordinator
        self._settings = coordinator.settings
        self._optimizer = server_optimizer(self._settings.server_optimizer, self._settings.server_learning_rate)
        self._last_number = 0
        self._closing_evaluation = self._settings.evaluate
        self._abandoned = Retries(_AFTER_ABANDONED)
        self._log = log.bind(run=self._settings.run_name)

    async def recover(self) -> None:
        """Take up what a former process left in the data folder. Raises `UsageError` and `StorageError`."""
        it = self._it
        stored = await it.in_database(it.store.run)
        if stored is not None:
            run_id, name, phase, reason, started_at = stored
            if name != self._settings.run_name:
                raise UsageError(f"the data folder holds the run {name!r}, not {self._settings.run_name!r}")
            it.run.id, it.run.phase = run_id, cast(RunPhase, phase)
            it.run.reason, it.run.started_at = reason, started_at
        for registration, selected, accepted in await it.in_database(lambda: list(it.store.workers())):
            it.fleet.restore(registration, selected, accepted, it.clock())
        it.last_record = await it.in_database(it.store.round)
        self._last_number = it.last_record.number if it.last_record else 0
        await self._recover_model()
        open_round = await it.in_database(it.store.open_round)
        if open_round is not None:
            await self._reopen(open_round)
        await asyncio.to_thread(it.journal.keep_only, it.current.state.tasks if it.current else ())
        if it.run.phase == RUN_PHASE_FINISHED and self._trained < self._settings.rounds:
            it.run.phase, it.run.reason = RUN_PHASE_RUNNING, ""
        await it.save_run()

    async def _recover_model(self) -> None:
        it = self._it
        version = await it.in_database(it.store.latest_version)
        if version is not None:
            model = it.models.open(version.version)
            if await asyncio.to_thread(model.sha256) != version.sha256:
                raise StorageError(f"the model {model.path} is corrupt: its SHA-256 is not the one recorded")
            it.run.version, it.run.layout = version.version, model.layout
        elif self._settings.initial_model is not None:
            await self._import(ModelFile.open(self._settings.initial_model))

    async def _import(self, model: ModelFile) -> None:
        """Make a safetensors file version 1."""
        it = self._it
        _check_sendable(model)
        digest = await asyncio.to_thread(write_model, it.models.path(1), model.layout, _finite_tensors(model))
        await it.in_database(it.store.save_version, Version(1, 0, digest))
        it.run.version, it.run.layout = 1, model.layout
        self._log.info("initial model", file=str(model.path), tensors=len(model.layout))

    async def _reopen(self, open_round: OpenRound) -> None:
        """Go on in the round that was open, with the updates that were accepted."""
        it = self._it
        record = open_round.record
        reports: dict[str, Report] = {}
        tasks = []
        for row in open_round.tasks:
            phase = row.phase
            update = await asyncio.to_thread(it.journal.load, row.token)
            if update is not None:
                phase = TaskPhase.ACCEPTED
                reports[row.token] = Report.of(update.header, self._settings.admission)
            elif phase is TaskPhase.ACCEPTED:
                raise StorageError(f"the accepted update of worker {row.worker} is gone from the data folder")
            tasks.append((row.token, row.worker, phase, row.reason))
        left_s = open_round.deadline_at - time.time()
        policy = self._policy(record.kind)
        state = restore(record.number, policy, tasks, open_round.aim, left_s, it.clock())
        started_at = record.started_at.ToNanoseconds() / 1e9
        it.current = current = CurrentRound(state, record.kind, record.base_version, started_at, reports=reports)
        for kept in record.tasks:
            if kept.HasField("local_model"):
                current.local_tasks[kept.worker] = LocalTask.from_proto(kept.local_model)
        for token, task in state.tasks.items():
            device = it.fleet.get(task.worker).registration.device
            current.device_classes[task.worker] = device.device_class
            if not task.phase.final:
                it.fleet.get(task.worker).token = token
        await self._prepare_download(current)
        self._log.info("round resumed", round=record.number, accepted=len(reports))

    @property
    def _trained(self) -> int:
        return max(0, self._it.run.version - 1)

    async def run(self) -> None:
        """Play rounds until the run has ended. Raises `StorageError` only for what waiting cannot mend."""
        it = self._it
        while not it.run.ended:
            if it.current is None and not await self._open():
                continue
            await self._play()
            await self._after_round()

    async def _open(self) -> bool:
        """Open the next round if there is one to open now; else wait or end the run."""
        it = self._it
        if it.run.phase == RUN_PHASE_PAUSED:
            await self._wait(None)
            return False
        if it.run.reason:
            await it.end(RUN_PHASE_FINISHED, it.run.reason)
            return False
        if it.run.version and self._trained >= self._settings.rounds and not self._closing_evaluation:
            await self._wait_for_evaluators()
            await it.end(RUN_PHASE_FINISHED, it.run.reason or f"all {self._settings.rounds} rounds are done")
            return False
        kind = self._next_kind()
        number = 0 if kind == TASK_KIND_INITIALIZE else self._last_number + 1
        state = Round(number, self._policy(kind), it.clock())
        it.current = CurrentRound(state, kind, it.run.version, time.time())
        self._log.debug("round opened", round=number, kind=TaskKind.Name(kind))
        return True

    def _next_kind(self) -> TaskKind:
        if not self._it.run.version:
            return TASK_KIND_INITIALIZE
        return TASK_KIND_TRAIN if self._trained < self._settings.rounds else TASK_KIND_EVALUATE

    def _policy(self, kind: TaskKind) -> RoundPolicy:
        policy = self._settings.policy
        if kind == TASK_KIND_INITIALIZE:
            return replace(
                policy, min_workers=1, min_sample_size=1, max_participants=1, quorum=1, over_selection=1.0
            )
        if kind == TASK_KIND_EVALUATE:
            timeout_s = policy.lease_s + policy.selection_window_s
            return replace(
                policy,
                min_workers=1,
                min_sample_size=1,
                max_participants=None,
                fraction=1.0,
                over_selection=1.0,
                quorum=1,
                selection_timeout_s=timeout_s,
            )
        return policy

    async def _play(self) -> None:
        """Play the round in progress to its end."""
        it = self._it
        assert it.current is not None
        while True:
            while it.effects:
                effect = it.effects.popleft()
                if isinstance(effect, Select):
                    await self._until_stored(partial(self._select, it.current, effect))
                elif isinstance(effect, Commit):
                    await self._until_stored(partial(self._commit, it.current, effect))
                else:
                    await self._until_stored(partial(self._finish, it.current, effect))
                    return
            if it.run.phase == RUN_PHASE_PAUSED and it.current.state.phase is RoundPhase.SELECTING:
                await self._wait(None)
                continue
            it.wake.clear()
            it.dispatch(it.pool())
            if it.effects:
                continue
            await self._wait(wake_at(it.current.state), clear=False)
            due = wake_at(it.current.state)
            if due is not None and it.clock() >= due:
                it.dispatch(Tick())

    async def _wait(self, until: float | None, clear: bool = True) -> None:
        """Wait for news, or for the clock to read `until`."""
        it = self._it
        if clear:
            it.wake.clear()
        timeout_s = None if until is None else max(0.0, until - it.clock())
        try:
            async with asyncio.timeout(timeout_s):
                await it.wake.wait()
        except TimeoutError:
            pass

    async def _until_stored(self, act: Callable[[], Awaitable[None]]) -> None:
        """Do what needs the disk. While it fails the health is bad, and everything accepted is kept."""
        it = self._it
        retries = Retries(_AFTER_STORAGE_ERROR)
        while True:
            try:
                await act()
                it.healthy = True
                return
            except (StorageError, NotFound) as error:
                it.healthy = False
                delay_s = retries.next_delay_s()
                self._log.error("the data folder fails", error=str(error), retry_s=round(delay_s, 2))
                it.changes.notify()
            await asyncio.sleep(delay_s)

    async def _select(self, current: CurrentRound, select: Select) -> None:
        """Choose workers and record their tasks; only then are these offered."""
        it = self._it
        state = current.state
        rng = np.random.default_rng([self._settings.seed, state.number, len(state.tasks)])
        idle = tuple(name for name in it.fleet.idle_trainers() if name not in select.exclude)
        chosen = select_uniform(idle, select.count, rng)
        selected = Selected(tuple((secrets.token_urlsafe(18), worker) for worker in chosen))
        after, _ = step(state, selected, it.clock())
        if chosen and after.phase is RoundPhase.REPORTING:
            await self._prepare_download(current, chosen)
            self._give_local_tasks(current, chosen)
            await self._prepare_download(current)
            await self._save_tasks(current, after, chosen)
            self._log.info("tasks offered", round=state.number, workers=list(chosen))
        if not current.state.phase.final:
            it.dispatch(selected)

    async def _save_tasks(self, current: CurrentRound, after: Round, chosen: tuple[str, ...]) -> None:
        it = self._it
        assert after.deadline_at is not None
        wall_deadline = time.time() + after.deadline_at - it.clock()
        record = replace(current, state=after).record(time.time(), it.clock())
        rows = _rows(after)
        await it.in_database(it.store.save_open_round, record, after.aim, wall_deadline, rows, chosen)
        for name in chosen:
            it.fleet.get(name).selected += 1
            current.device_classes[name] = it.fleet.get(name).registration.device.device_class

    async def _prepare_download(self, current: CurrentRound, chosen: tuple[str, ...] = ()) -> None:
        """The encoded model is ready before anyone is asked to pull it; its size is for the record."""
        if current.kind == TASK_KIND_INITIALIZE:
            return
        await self._prepare_whole(current, chosen)
        it = self._it
        for local in current.local_tasks.values():
            if local.slice not in current.download_bytes:
                version = current.base_version
                selection = await asyncio.to_thread(it.local_models.selection, local.sub_model, version)
                recipe = self._settings.download
                encoded = await it.models.encoded(version, recipe, None, local.slice, selection)
                current.download_bytes[local.slice] = encoded.manifest.size_bytes

    async def _prepare_whole(self, current: CurrentRound, chosen: tuple[str, ...]) -> None:
        """Whole models, or differences to what the chosen hold; first to what most of them hold."""
        it = self._it
        held = {name: it.fleet.get(name).held for name in chosen if name not in current.offered_bytes}
        for base, _ in Counter(held.values()).most_common():
            encoded = await it.models.offered(current.base_version, base)
            size_bytes = encoded.manifest.size_bytes
            current.offered_bytes.update({name: size_bytes for name in held if held[name] == base})
            current.download_bytes.setdefault("", size_bytes)
        if "" not in current.download_bytes:
            encoded = await it.models.offered(current.base_version)
            current.download_bytes[""] = encoded.manifest.size_bytes

    def _give_local_tasks(self, current: CurrentRound, chosen: tuple[str, ...]) -> None:
        """Each worker trains what the plan of its device class says; the same one again if it is asked twice."""
        if current.kind != TASK_KIND_TRAIN:
            return
        it = self._it
        sizing = Sizing(it.run.layout, current.download_bytes[""], self._settings.policy.deadline_s)
        for name in chosen:
            if name not in current.local_tasks:
                task = it.local_models.task_of(it.fleet.get(name), sizing, current.state.number)
                current.local_tasks[name] = task

    async def _commit(self, current: CurrentRound, commit: Commit) -> None:
        """Compute and record the new version; an update that turns out unusable ends the round."""
        try:
            await self._commit_once(current, commit)
        except (CodecError, UpdateRefused) as error:
            self._it.dispatch(Abort(str(error)))

    async def _commit_once(self, current: CurrentRound, commit: Commit) -> None:
        it = self._it
        begun = time.monotonic()
        weights = self._weights(current, commit.tokens)
        version: Version | None = None
        if current.kind != TASK_KIND_EVALUATE:
            version = await self._write_version(current, weights)
        layout = it.models.open(version.version).layout if version else it.run.layout
        after, _ = step(current.state, Committed(version.version if version else current.base_version), it.clock())
        current.weights = weights
        current.global_s = time.monotonic() - begun
        pairs = [(current.reports[token], weight) for token, weight in weights.items()]
        current.training_metrics = mean_metrics([(report.metrics, weight) for report, weight in pairs])
        record = replace(current, state=after).record(time.time(), it.clock())
        accepted = [after.tasks[token].worker for token in commit.tokens]
        await it.in_database(it.store.finish_round, record, _rows(after), accepted, version)
        # It is stored: no wait from here on, or a second try would store it twice.
        if version is not None:
            it.run.version, it.run.layout = version.version, layout
        for name in accepted:
            it.fleet.get(name).accepted += 1
        it.dispatch(Committed(version.version if version else current.base_version))

    async def _keep_scores(self, current: CurrentRound) -> None:
        """What the workers of a committed round say of the version they were given."""
        reports = [current.reports[token] for token in current.weights]
        whole = [current.reports[token] for token in current.weights if self._saw_whole(current, token)]
        scores = mean_metrics([(r.evaluation_metrics, r.evaluation_example_count) for r in whole])
        self._closing_evaluation = self._settings.evaluate and bool(scores)
        if scores:
            await self._it.keep_scores(current.base_version, workers=scores)
        number, version = current.state.number, self._it.run.version
        self._log.info("round committed", round=number, version=version, updates=len(reports), **scores)

    def _saw_whole(self, current: CurrentRound, token: str) -> bool:
        """Whether the worker was given the version itself: a slice's scores are its own."""
        return current.local_task(current.state.tasks[token].worker).sub_model.whole

    def _weights(self, current: CurrentRound, tokens: tuple[str, ...]) -> dict[str, float]:
        """p_m where the operator has set any (1 for workers not named), else the count of examples."""
        chosen = self._settings.worker_weights if current.kind == TASK_KIND_TRAIN else {}
        weights = {}
        for token in tokens:
            count = float(current.reports[token].example_count)
            weights[token] = chosen.get(current.state.tasks[token].worker, 1.0) if chosen else count
        if not sum(weights.values()) > 0:
            raise UpdateRefused("the weights of all accepted updates are zero")
        return weights

    async def _write_version(self, current: CurrentRound, weights: dict[str, float]) -> Version:
        it = self._it
        number = current.base_version + 1
        path = it.models.path(number)
        if current.kind == TASK_KIND_INITIALIZE:
            token = next(iter(weights))
            update = self._load(token)
            if update.header.HasField("channels"):
                learn = it.local_models.learn
                await asyncio.to_thread(learn, update.header.channels, update.manifest.layout)
            digest = await asyncio.to_thread(_write_values, path, update)
        else:
            base = it.models.open(current.base_version)
            memory = it.models.open_memory(current.base_version)
            parts = {}
            for token in weights:
                local = current.local_task(current.state.tasks[token].worker)
                if not local.plain:
                    parts[token] = it.local_models.selection(local.sub_model, current.base_version)
                await self._learn_channels(token)
            updates = list(weights.items())
            files = CommitFiles(base, memory, self._optimizer, updates, self._load, it.models.spares, parts)
            digest = await asyncio.to_thread(files.write, path, it.models.memory_path(number))
        return Version(number, current.state.number, digest)

    async def _learn_channels(self, token: str) -> None:
        it = self._it
        if it.local_models.wants_channels and (header := self._load(token).header).HasField("channels"):
            await asyncio.to_thread(it.local_models.learn, header.channels, it.run.layout)

    def _load(self, token: str) -> StoredUpdate:
        update = self._it.journal.load(token)
        if update is None:
            raise StorageError("an accepted update is gone from the data folder")
        return update

    async def _finish(self, current: CurrentRound, finished: Finished) -> None:
        """Record an abandoned round (a committed one is recorded with its version), and clean up."""
        it = self._it
        record = current.record(time.time(), it.clock())
        if finished.committed:
            it.local_models.observe(record, it.run.layout)
            await self._keep_scores(current)
        else:
            await it.in_database(it.store.finish_round, record, _rows(current.state), (), None)
            self._log.warning("round abandoned", round=record.number, reason=finished.reason)
        for worker in it.fleet:
            if worker.token in current.state.tasks:
                worker.token = None
        tokens = list(current.state.tasks)
        await asyncio.to_thread(it.journal.discard, tokens)
        keep = range(it.run.version - self._settings.keep_versions + 1, it.run.version + 1)
        await it.models.prune(frozenset(keep))
        if it.last_record is None or record.number >= it.last_record.number:
            # As stored: an evaluator may have scored the new version already.
            it.last_record = await it.in_database(it.store.round, record.number)
        self._last_number = max(self._last_number, record.number)
        it.metrics.observe_round(record)
        it.metrics.model_version.set(it.run.version)
        it.metrics.live_workers.set(sum(it.fleet.alive(worker, it.clock()) for worker in it.fleet))

    async def _after_round(self) -> None:
        it = self._it
        assert it.current is not None
        kind, phase = it.current.kind, it.current.state.phase
        it.current = None
        it.effects.clear()
        it.fleet.wake_all()
        it.changes.notify()
        if kind == TASK_KIND_EVALUATE:
            self._closing_evaluation = False
        elif phase is RoundPhase.COMMITTED:
            self._abandoned.reset()
        elif not it.run.ended:
            await self._rest(self._abandoned.next_delay_s())

    async def _rest(self, seconds: float) -> None:
        """Wait, whoever polls meanwhile: rounds that fail at once must not spin."""
        it = self._it
        until = it.clock() + seconds
        while not it.run.ended and it.clock() < until:
            await self._wait(until)

    async def _wait_for_evaluators(self) -> None:
        """Evaluators that are alive may score the last version, within the time of a round."""
        it = self._it
        until = it.clock() + self._settings.policy.deadline_s
        while it.clock() < until:
            alive = it.fleet.live_evaluators(it.clock())
            if not any(it.evaluations.waiting_for(worker.name, it.run.version) for worker in alive):
                return
            await self._wait(min(until, it.clock() + self._settings.policy.lease_s))


def _rows(state: Round) -> list[TaskRow]:
    return [
        TaskRow(token, state.number, task.slot, task.worker, task.phase, task.reason)
        for token, task in state.tasks.items()
    ]


def _check_sendable(model: ModelFile) -> None:
    """Its manifest travels in one message, with each tensor's encoding beside its name and shape."""
    count, most = len(model.layout), Limits().max_tensors
    if not 1 <= count <= most:
        raise UsageError(f"the model {model.path} has {count} tensors; it may have 1 to {most}")
    size_bytes = sum(spec.ByteSize() for spec in layout_to_proto(model.layout))
    if size_bytes > MAX_MESSAGE_BYTES // 2:
        raise UsageError(f"the names and shapes of {model.path} take {size_bytes} bytes, too many for one message")


def _finite_tensors(model: ModelFile) -> Iterator[np.ndarray]:
    for index, spec in enumerate(model.layout):
        values = model.tensor(index)
        if spec.is_float and not np.isfinite(values).all():
            raise UsageError(f"tensor {spec.name!r} of the model {model.path} has values that are not finite")
        yield values


def _write_values(path: Path, update: StoredUpdate) -> bytes:
    with update.open() as reader:
        return write_model(path, update.manifest.layout, (values for _, values in reader))
