"""Handing out tasks: who is chosen, what each is given to pull and to train, and the durable record of it.

The rule: a task is on the disk, and its model encoded, before its worker hears of it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import structlog

from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.local_models import Sizing
from fedgrpc.aggregator.report import CurrentRound
from fedgrpc.rounds.choosing import Choosing
from fedgrpc.rounds.events import Deadline, Select, Selected
from fedgrpc.rounds.state import Round, RoundPhase, step
from fedgrpc.rpc.planning import prediction_to_proto
from fedgrpc.v1.round_pb2 import TASK_KIND_INITIALIZE, TASK_KIND_TRAIN

log = structlog.get_logger()


class Offering:
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
        after, _ = step(state, selected, it.clock())
        if chosen and after.phase is RoundPhase.REPORTING:
            await self.prepare_download(current, chosen)
            self._give_local_tasks(current, selected)
            await self.prepare_download(current)
            await self._save_tasks(current, after, chosen)
            self._tell(after, selected)
        if not current.state.phase.final:
            it.dispatch(selected)

    async def _choose(self, current: CurrentRound, select: Select) -> Selected:
        it = self._it
        state = current.state
        rng = np.random.default_rng([self._settings.seed, state.number, len(state.tasks)])
        idle = tuple(name for name in it.fleet.idle_trainers() if name not in select.exclude)
        choosing = self._settings.choosing if current.kind == TASK_KIND_TRAIN else Choosing()
        histories = it.fleet.histories()
        choices, deadline = await asyncio.to_thread(choosing.choose, state, idle, select.count, histories, rng)
        if current.due_at is not None:
            left_s = max(0.0, current.due_at - it.clock())
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

    async def _save_tasks(self, current: CurrentRound, after: Round, chosen: tuple[str, ...]) -> None:
        it = self._it
        assert after.deadline_at is not None
        wall_deadline = time.time() + after.deadline_at - it.clock()
        record = replace(current, state=after).record(time.time(), it.clock())
        histories = {name: it.fleet.get(name).history.chosen(after.number) for name in chosen}
        rows = current.rows(after)
        await it.in_database(it.store.save_open_round, record, after.aim, wall_deadline, rows, histories)
        it.fleet.remember(histories)
        for name in chosen:
            current.device_classes[name] = it.fleet.get(name).registration.device.device_class

    async def prepare_download(self, current: CurrentRound, chosen: tuple[str, ...] = ()) -> None:
        """The encoded model is ready before anyone is asked to pull it; its size is for the record."""
        if current.kind == TASK_KIND_INITIALIZE:
            return
        await self._prepare_whole(current, chosen)
        it = self._it
        for token, local in current.local_tasks.items():
            task = current.state.tasks.get(token)
            fresh = task is None or not task.carried
            if fresh and local.slice not in current.download_bytes:
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

    def _give_local_tasks(self, current: CurrentRound, selected: Selected) -> None:
        """Each worker trains what the plan of its device class says."""
        if current.kind != TASK_KIND_TRAIN:
            return
        it = self._it
        sizing = Sizing(it.run.layout, current.download_bytes[""], self._settings.policy.deadline_s)
        for token, name in selected.tasks:
            # An aggregator takes the whole model: its workers have devices of their own.
            if not it.fleet.get(name).leads:
                task, choice = it.local_models.task_of(it.fleet.get(name), sizing, current.state.number)
                current.local_tasks[token] = task
                current.predictions[token] = prediction_to_proto(choice)
