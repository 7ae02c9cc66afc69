"""Handing out tasks: who is chosen, what each is given to pull and to train, and the durable record of it.

The rule: a task is on the disk, and its model encoded, before its worker hears of it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import numpy as np
import structlog

from fedgrpc.aggregator.blame import blaming
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.local_models import LocalTask, Sizing
from fedgrpc.aggregator.model_store import Downlink, Extent, Held
from fedgrpc.aggregator.report import CurrentRound
from fedgrpc.errors import UnusableUpdate
from fedgrpc.protocol.records import prediction_to_proto
from fedgrpc.rounds.events import Deadline, Select, Selected
from fedgrpc.rounds.round import Round, RoundPhase
from fedgrpc.rounds.selection import SelectionPolicy
from fedgrpc.rounds.state import step
from fedgrpc.v1.round_pb2 import TASK_KIND_INITIALIZE, TASK_KIND_TRAIN

log = structlog.get_logger()


class TaskAssigner:
    """Answers a round's `Select`."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._it = coordinator
        self._settings = coordinator.settings
        self._log = log.bind(run=self._settings.run_name)

    async def select(self, current: CurrentRound, select: Select) -> None:
        """Choose workers and record their tasks; only then are these offered."""
        it = self._it
        state = current.state
        selected = await self._choose(current, select)
        chosen = tuple(worker for _, worker in selected.tasks)
        it.chosen = frozenset(chosen)
        after, _ = step(state, selected, it.clock())
        failed: dict[str, str] = {}
        if chosen and after.phase is RoundPhase.REPORTING:
            failed |= self._agree(current, selected)
            new = {token: worker for token, worker in selected.tasks if token not in failed}
            await self.prepare_download(current, new)
            failed |= self._give_local_tasks(current, new)
            await self.prepare_download(current, {token: new[token] for token in new if token not in failed})
            await self._save_tasks(current, after, chosen)
            self._tell(after, selected)
        if not current.state.phase.final:
            it.dispatch(selected)
            for token, reason in failed.items():
                it.reject(token, reason)
            for worker in chosen:
                # To encode a large model takes its time, in which it may have left.
                it.take_back(worker)

    async def _choose(self, current: CurrentRound, select: Select) -> Selected:
        it = self._it
        state = current.state
        rng = np.random.default_rng([self._settings.seed, state.number, len(state.tasks)])
        idle = tuple(name for name in it.idle_trainers() if name not in select.exclude)
        # Nobody who may be chosen is forgotten meanwhile.
        it.chosen = frozenset(idle)
        choosing = self._settings.choosing if current.kind == TASK_KIND_TRAIN else SelectionPolicy()
        histories = it.fleet.histories()
        choices, deadline = await asyncio.to_thread(choosing.choose, state, idle, select.count, histories, rng)
        if current.due_at is not None:
            left_s = max(0.0, current.due_at - it.clock())
            if deadline is None or left_s < deadline.seconds:
                deadline = Deadline(left_s, "the aggregator above waits no longer")
        tasks = tuple((secrets.token_urlsafe(18), choice.worker) for choice in choices)
        return Selected(tasks, {choice.worker: choice.reason for choice in choices}, deadline)

    def _agree(self, current: CurrentRound, selected: Selected) -> dict[str, str]:
        """In which recipes each of the chosen pulls and pushes, for as long as it has this task.

        Returns why some tasks cannot be given, by token, as `_give_local_tasks` does.
        """
        return _each(selected.tasks, partial(self._agree_on, current))

    def _agree_on(self, current: CurrentRound, token: str, name: str) -> None:
        agreed = self._it.negotiation.agreed(self._it.fleet.get(name))
        upload = "raw" if current.kind == TASK_KIND_INITIALIZE else str(agreed.upload)
        current.recipes[token] = agreed.download_text, upload
        self._log.debug(
            "recipes agreed", round=current.state.number, worker=name, down=agreed.download_text, up=upload
        )

    def _tell(self, after: Round, selected: Selected) -> None:
        workers = [worker for _, worker in selected.tasks]
        for worker in workers:
            self._log.debug("worker chosen", round=after.number, worker=worker, reason=selected.reasons[worker])
        told = {"deadline_s": round(after.deadline_s, 3), "reason": after.deadline_reason}
        self._log.info("tasks offered", round=after.number, workers=workers, **(told if told["reason"] else {}))

    async def _save_tasks(self, current: CurrentRound, after: Round, chosen: tuple[str, ...]) -> None:
        it = self._it
        assert after.deadline_at is not None
        wall_deadline = time.time() + after.deadline_at - it.clock()
        offered, now = replace(current, state=after), it.clock()
        histories = {name: it.fleet.get(name).history.chosen(after.number) for name in chosen}

        def store() -> None:
            record = offered.record(now)
            it.store.save_open_round(record, after.aim, wall_deadline, offered.rows(after), histories)

        await it.in_database(store)
        it.fleet.remember(histories)
        for name in chosen:
            current.device_classes[name] = it.fleet.get(name).registration.device.device_class

    async def prepare_download(self, current: CurrentRound, new: Mapping[str, str] = MappingProxyType({})) -> None:
        """The encoded model is ready before anyone is asked to pull it; its size is for the record.

        `new`: the workers of tasks that are not offered yet, by token.
        """
        if current.kind == TASK_KIND_INITIALIZE:
            return
        await self._prepare_whole(current, tuple(new.values()))
        sizes: dict[tuple[str, Downlink, Held | None], int] = {}
        for token, local in current.local_tasks.items():
            task = current.state.tasks.get(token)
            if local.sub_model.name and (task is None or not task.carried):
                name = new[token] if task is None else task.worker
                held, downlink = self._it.fleet.get(name).held, self._downlink(current, token)
                key = local.sub_model.name, downlink, held
                if key not in sizes:
                    sizes[key] = await self._prepare_sub_model(current.base_version, local, downlink, held)
                current.download_bytes[local.sub_model.name] = current.offered_bytes[name] = sizes[key]

    async def _prepare_sub_model(
        self, version: int, local: LocalTask, downlink: Downlink, held: Held | None
    ) -> int:
        """Encode the sub-model or its difference. Returns the bytes to download."""
        it = self._it
        kept_channels = await asyncio.to_thread(it.local_models.kept_channels, local.sub_model, version)
        extent = Extent(local.sub_model, kept_channels)
        if held is not None and held[0] == version and it.models.holds(held, extent):
            return 0
        encoded = await it.models.offered(version, held, downlink, extent)
        return encoded.manifest.size_bytes

    def _downlink(self, current: CurrentRound, token: str) -> Downlink:
        """What was agreed on when the task was given; after a restart with other settings, the usual."""
        negotiation = self._it.negotiation
        told = current.recipes.get(token)
        return (negotiation.downlink_of(told[0]) if told else None) or negotiation.downlinks[0]

    async def _prepare_whole(self, current: CurrentRound, chosen: tuple[str, ...]) -> None:
        """Whole models, or differences to what the chosen hold; first to what most of them hold."""
        it = self._it
        fleet = {name: it.fleet.get(name) for name in chosen if name not in current.offered_bytes}
        wanted = {name: (worker.held, it.negotiation.agreed(worker).downlink) for name, worker in fleet.items()}
        for (base, downlink), _ in Counter(wanted.values()).most_common():
            encoded = await it.models.offered(current.base_version, base, downlink)
            size_bytes = encoded.manifest.size_bytes
            if base is not None and base[0] == current.base_version and it.models.holds(base):
                size_bytes = 0
            current.offered_bytes.update({name: size_bytes for name in wanted if wanted[name] == (base, downlink)})
            current.download_bytes.setdefault("", encoded.manifest.size_bytes)
        if "" not in current.download_bytes:
            encoded = await it.models.offered(current.base_version)
            current.download_bytes[""] = encoded.manifest.size_bytes

    def _give_local_tasks(self, current: CurrentRound, new: Mapping[str, str]) -> dict[str, str]:
        """Give each worker what the plan of its device class says: to train, and to score the last version."""
        if current.kind == TASK_KIND_INITIALIZE:
            return {}
        return _each(new.items(), partial(self._give_local_task, current))

    def _give_local_task(self, current: CurrentRound, token: str, name: str) -> None:
        it, worker = self._it, self._it.fleet.get(name)
        # An aggregator takes the whole model: its workers have devices of their own.
        if worker.leads:
            return
        deadline_s, recipe = self._settings.policy.deadline_s, current.recipes[token][1]
        sizing = Sizing(it.run.layout, current.download_bytes[""], deadline_s, recipe)
        task, choice = it.local_models.task_of(worker, sizing, current.state.number)
        current.local_tasks[token] = task
        if current.kind == TASK_KIND_TRAIN:
            current.predictions[token] = prediction_to_proto(choice)


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
