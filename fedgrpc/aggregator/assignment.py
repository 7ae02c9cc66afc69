"""Handing out tasks: who is chosen, what each is given to pull and to train, and the durable record of it.

The rule: a task is on the disk, and its model encoded, before its worker hears of it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import structlog

from fedgrpc.aggregator.blame import blaming
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.local_models import LocalModels, Sizing
from fedgrpc.aggregator.model_store import Downlink, Extent, Held, ModelStore
from fedgrpc.aggregator.registry import WorkerRegistry
from fedgrpc.errors import UnusableUpdate
from fedgrpc.protocol.rounds import record_of
from fedgrpc.rounds.events import Deadline, Select, Selected
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.round import Round, RoundPhase
from fedgrpc.rounds.selection import SelectionPolicy
from fedgrpc.runs.events import TasksGiven
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.task_context import LocalTask, Recipes, TaskContext
from fedgrpc.storage.run_store import rows_of

log = structlog.get_logger()


@dataclass(frozen=True)
class _Whole:
    """Whole models that are ready to be pulled: what each worker pulls, and what most of them do, bytes."""

    of_worker: Mapping[str, int]
    usual_bytes: int


class TaskAssigner:
    """Answers a round's `Select`."""

    def __init__(
        self, coordinator: Coordinator, fleet: WorkerRegistry, models: ModelStore, local_models: LocalModels
    ) -> None:
        self._coordinator = coordinator
        self._run = coordinator.machine
        self._negotiation = coordinator.negotiation
        self._settings = coordinator.settings
        self._fleet = fleet
        self._models = models
        self._local_models = local_models
        self._log = log.bind(run=self._settings.run_name)

    async def select(self, select: Select) -> None:
        """Choose workers and record their tasks; only then are these offered."""
        coordinator, run = self._coordinator, self._run
        selected = await self._choose(run.current, select)
        coordinator.chosen = frozenset(worker for _, worker in selected.tasks)
        opened = run.foresee(selected, coordinator.clock()).current.state.phase is RoundPhase.REPORTING
        if not (selected.tasks and opened):
            coordinator.apply(selected)
            return
        contexts, failed = await self._prepare(run.current, selected)
        if not run.current.open:
            # It was ended, by an operator or the deadline, while the models were encoded.
            coordinator.apply(selected)
            return
        await coordinator.apply_after(TasksGiven(selected, contexts), self._store)
        self._tell(run.current.state, selected)
        for token, reason in failed.items():
            if run.wants(token):
                coordinator.reject(token, reason)
        for _, worker in selected.tasks:
            # To encode a large model takes its time, in which it may have left.
            coordinator.take_back(worker)

    async def _choose(self, round_: RoundInProgress, select: Select) -> Selected:
        coordinator, state = self._coordinator, round_.state
        rng = np.random.default_rng([self._settings.seed, state.number, len(state.tasks)])
        trainers = self._run.idle_trainers(self._fleet, coordinator.clock())
        idle = tuple(name for name in trainers if name not in select.exclude)
        if round_.kind is TaskKind.INITIALIZE:
            idle = coordinator.first_model.largest(idle)
        # Nobody who may be chosen is forgotten meanwhile.
        coordinator.chosen = frozenset(idle)
        choosing = self._settings.choosing if round_.kind is TaskKind.TRAIN else SelectionPolicy()
        histories = self._fleet.histories()
        choices, deadline = await asyncio.to_thread(choosing.choose, state, idle, select.count, histories, rng)
        if round_.due_at is not None:
            left_s = max(0.0, round_.due_at - coordinator.clock())
            if deadline is None or left_s < deadline.seconds:
                deadline = Deadline(left_s, "the aggregator above waits no longer")
        tasks = tuple((secrets.token_urlsafe(18), choice.worker) for choice in choices)
        return Selected(tasks, {choice.worker: choice.reason for choice in choices}, deadline)

    def _tell(self, after: Round, selected: Selected) -> None:
        workers = [worker for _, worker in selected.tasks]
        for worker in workers:
            self._log.debug("worker chosen", round=after.number, worker=worker, reason=selected.reasons[worker])
        told = {"deadline_s": round(after.deadline_s, 3), "reason": after.deadline_reason}
        self._log.info("tasks offered", round=after.number, workers=workers, **(told if told["reason"] else {}))

    async def _store(self, after: RunMachine) -> None:
        """Keep the round with its new tasks, and that their workers were chosen."""
        coordinator, round_, now = self._coordinator, after.current, self._coordinator.clock()
        state = round_.state
        assert state.deadline_at is not None
        wall_deadline = time.time() + state.deadline_at - now
        chosen = (name for name in coordinator.chosen if self._fleet.find(name) is not None)
        histories = {name: self._fleet.get(name).history.chosen(state.number) for name in chosen}

        def store() -> None:
            record = record_of(round_, now)
            coordinator.store.save_open_round(record, state.aim, wall_deadline, rows_of(round_), histories)

        await coordinator.in_database(store)
        self._fleet.remember(histories)

    # What each worker is given.

    async def _prepare(
        self, round_: RoundInProgress, selected: Selected
    ) -> tuple[dict[str, TaskContext], dict[str, str]]:
        """What each of the chosen is given; and why some tasks cannot be given, by token."""
        contexts = {
            token: TaskContext(device_class=self._fleet.get(name).registration.device.device_class)
            for token, name in selected.tasks
        }
        failed = _each(selected.tasks, lambda token, name: self._agree(round_, contexts, token, name))
        new = {token: name for token, name in selected.tasks if token not in failed}
        if round_.kind is TaskKind.INITIALIZE:
            return contexts, failed
        whole = await self._prepare_whole(round_.base_version, tuple(new.values()))
        failed |= _each(new.items(), lambda token, name: self._plan(round_, contexts, whole, token, name))
        given = {token: name for token, name in new.items() if token not in failed}
        return contexts | await self._pulled(round_.base_version, contexts, given, whole), failed

    def _agree(self, round_: RoundInProgress, contexts: dict[str, TaskContext], token: str, name: str) -> None:
        """Settle in which recipes a worker pulls and pushes, for as long as it has this task."""
        agreed = self._negotiation.agreed(self._fleet.get(name))
        upload = "raw" if round_.kind is TaskKind.INITIALIZE else str(agreed.upload)
        contexts[token] = replace(contexts[token], recipes=Recipes(agreed.download_text, upload))
        self._log.debug("recipes agreed", round=round_.number, worker=name, down=agreed.download_text, up=upload)

    def _plan(
        self, round_: RoundInProgress, contexts: dict[str, TaskContext], whole: _Whole, token: str, name: str
    ) -> None:
        """Give a worker what the plan of its device class says: to train, and to score the last version."""
        worker, context = self._fleet.get(name), contexts[token]
        # An aggregator takes the whole model: its workers have devices of their own.
        if worker.leads:
            return
        assert context.recipes is not None
        deadline_s = self._settings.policy.deadline_s
        sizing = Sizing(self._run.layout, whole.usual_bytes, deadline_s, context.recipes.upload)
        local, choice = self._local_models.task_of(worker, sizing, round_.number)
        contexts[token] = replace(context, local=local, choice=choice if round_.kind is TaskKind.TRAIN else None)

    async def prepare_again(
        self, round_: RoundInProgress, workers: Mapping[str, str]
    ) -> Mapping[str, TaskContext]:
        """Encode what the workers of a resumed round, by token, are to pull; what is known of their tasks then."""
        if round_.kind is TaskKind.INITIALIZE:
            return {}
        return await self._pulled(
            round_.base_version, round_.contexts, workers, await self._prepare_whole(round_.base_version, ())
        )

    async def _pulled(
        self, version: int, contexts: Mapping[str, TaskContext], workers: Mapping[str, str], whole: _Whole
    ) -> dict[str, TaskContext]:
        """Encode the sub-models that these workers pull; the contexts with what each pulls. For the record."""
        sizes: dict[tuple[str, Downlink, Held | None], int] = {}
        pulled = {}
        for token, name in workers.items():
            context = contexts.get(token, TaskContext())
            size_bytes = whole.of_worker.get(name, whole.usual_bytes)
            if context.local.sub_model.name:
                held, downlink = self._run.held.get(name), self._downlink(context)
                key = context.local.sub_model.name, downlink, held
                if key not in sizes:
                    sizes[key] = await self._prepare_sub_model(version, context.local, downlink, held)
                size_bytes = sizes[key]
            pulled[token] = replace(context, download_bytes=size_bytes)
        return pulled

    async def _prepare_sub_model(
        self, version: int, local: LocalTask, downlink: Downlink, held: Held | None
    ) -> int:
        """Encode the sub-model or its difference. Returns the bytes to download."""
        kept_channels = await asyncio.to_thread(self._local_models.kept_channels, local.sub_model, version)
        extent = Extent(local.sub_model, kept_channels)
        if held is not None and held[0] == version and self._models.holds(held, extent):
            return 0
        encoded = await self._models.offered(version, held, downlink, extent)
        return encoded.manifest.size_bytes

    def _downlink(self, context: TaskContext) -> Downlink:
        """What was agreed on when the task was given; after a restart with other settings, the usual."""
        told = None if context.recipes is None else self._negotiation.downlink_of(context.recipes.download)
        return told or self._negotiation.downlinks[0]

    async def _prepare_whole(self, version: int, chosen: Collection[str]) -> _Whole:
        """Whole models, or differences to what the chosen hold; first to what most of them hold."""
        wanted = {
            name: (self._run.held.get(name), self._negotiation.agreed(self._fleet.get(name)).downlink)
            for name in chosen
        }
        of_worker: dict[str, int] = {}
        usual_bytes: int | None = None
        for (base, downlink), _ in Counter(wanted.values()).most_common():
            encoded = await self._models.offered(version, base, downlink)
            size_bytes = encoded.manifest.size_bytes
            usual_bytes = size_bytes if usual_bytes is None else usual_bytes
            if base is not None and base[0] == version and self._models.holds(base):
                size_bytes = 0
            of_worker.update({name: size_bytes for name in wanted if wanted[name] == (base, downlink)})
        if usual_bytes is None:
            usual_bytes = (await self._models.offered(version)).manifest.size_bytes
        return _Whole(of_worker, usual_bytes)


def _each(tasks: Iterable[tuple[str, str]], prepare: Callable[[str, str], None]) -> dict[str, str]:
    """Prepare each (token, worker). What a worker has said of itself stops its own task alone: why, by token."""
    failed: dict[str, str] = {}
    for token, worker in tasks:
        try:
            with blaming(token):
                prepare(token, worker)
        except UnusableUpdate as error:
            failed[token] = f"its task cannot be prepared: {error}"
    return failed
