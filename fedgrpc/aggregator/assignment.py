"""Handing out tasks: who is chosen, what each is given to pull and to train, and the durable record of it.

The rule: a task is on the disk, and its model encoded, before its worker hears of it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
import structlog

from fedgrpc import claims
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.local_models import Sizing
from fedgrpc.aggregator.negotiation import RAW, reads_reduced, reduction_for
from fedgrpc.aggregator.payload_encoder import Pull
from fedgrpc.aggregator.tokens import new_token
from fedgrpc.errors import UnusableUpdate, blaming
from fedgrpc.protocol.rounds import record_of
from fedgrpc.rounds.events import Deadline, Select, Selected
from fedgrpc.rounds.fields import with_fields
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.round import Round, RoundPhase
from fedgrpc.rounds.selection import SelectionPolicy
from fedgrpc.runs.events import TasksGiven
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.task_context import TaskContext
from fedgrpc.storage.task_rows import rows_of

log = structlog.get_logger()

_FEW: Final = 64


class TaskAssigner:
    """Answers a round's `Select`."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._run = coordinator.machine
        self._negotiation = coordinator.negotiation
        self._settings = coordinator.settings
        self._fleet = coordinator.fleet
        self._workers = coordinator.workers
        self._models = coordinator.encoded_models
        self._local_models = coordinator.local_models
        self._log = log.bind(run=self._settings.run_name)

    async def select(self, select: Select) -> None:
        """Choose workers and record their tasks; only then are these offered."""
        idle = self._idle(self._run.current, select)
        with self._coordinator.candidates.reserving(idle):
            await self._give(await self._choose(self._run.current, idle, select.count))

    def _idle(self, round_: RoundInProgress, select: Select) -> tuple[str, ...]:
        """Names of the workers that may be chosen."""
        coordinator = self._coordinator
        trainers = self._run.idle_trainers(coordinator.candidates, coordinator.clock())
        idle = tuple(name for name in trainers if name not in select.exclude)
        return coordinator.first_model.largest(idle) if round_.kind is TaskKind.INITIALIZE else idle

    async def _give(self, selected: Selected) -> None:
        """Record the tasks, and then offer them."""
        coordinator, run = self._coordinator, self._run
        opened = run.foresee(selected, coordinator.clock()).current.state.phase is RoundPhase.REPORTING
        if not (selected.tasks and opened):
            coordinator.apply(selected)
            return
        contexts, failed = await self._prepare(run.current, selected)
        secure = await coordinator.secure_sums.open(run.current, selected)
        if secure is not None:
            # They have registered anew since they were chosen, or no neighbour would take their keys.
            lacking = (token for token, name in selected.tasks if name not in secure.state.keys)
            failed |= dict.fromkeys(lacking, "it has no one-time keys that the secure sum can take")
        if not run.current.open:
            # It was ended, by an operator or the deadline, while the models were encoded.
            coordinator.apply(selected)
            return
        workers = [worker for _, worker in selected.tasks]
        refused = {token: claims.REASON.cleaned(reason) for token, reason in failed.items()}
        given = TasksGiven(selected, contexts, secure, refused)
        # What cannot be given is stored as lost: a restart would find tasks that no worker could be told.
        await coordinator.apply_after(given, partial(self._store, workers))
        self._tell(run.current.state, selected, refused)
        for worker in workers:
            # To encode a large model takes its time, in which it may have left.
            coordinator.take_back(worker)

    async def _choose(self, round_: RoundInProgress, idle: tuple[str, ...], count: int) -> Selected:
        coordinator, state = self._coordinator, round_.state
        rng = coordinator.releases.sampling(state.number, len(state.tasks)) or np.random.default_rng(
            [self._settings.seed, state.number, len(state.tasks)]
        )
        choosing = self._settings.choosing if round_.kind is TaskKind.TRAIN else SelectionPolicy()
        choose = partial(choosing.choose, state, idle, count, self._workers.trainers(), rng)
        # The choice among a few takes less than a hop to a thread.
        choices, deadline = choose() if len(idle) <= _FEW else await asyncio.to_thread(choose)
        if round_.due_at is not None:
            left_s = max(0.0, round_.due_at - coordinator.clock())
            if deadline is None or left_s < deadline.seconds:
                deadline = Deadline(left_s, "the aggregator above waits no longer")
        tasks = tuple((new_token(self._run.id), choice.worker) for choice in choices)
        return Selected(tasks, {choice.worker: choice.reason for choice in choices}, deadline)

    def _tell(self, after: Round, selected: Selected, refused: Mapping[str, str]) -> None:
        workers = [worker for _, worker in selected.tasks]
        for worker in workers:
            self._log.debug("worker chosen", round=after.number, worker=worker, reason=selected.reasons[worker])
        for token, reason in refused.items():
            worker = after.tasks[token].worker
            self._log.warning("task not given", round=after.number, worker=worker, reason=reason)
        told = {"deadline_s": round(after.deadline_s, 3), "reason": after.deadline_reason}
        self._log.info("tasks offered", round=after.number, workers=workers, **(told if told["reason"] else {}))

    async def _store(self, chosen: list[str], after: RunMachine) -> None:
        """Keep the round with its new tasks, and that these workers were chosen."""
        coordinator, round_, now = self._coordinator, after.current, self._coordinator.clock()
        # First: an open round of a run with secure sums has its own.
        await coordinator.secure_sums.store(round_)
        state = round_.state
        assert state.deadline_at is not None
        wall_deadline = time.time() + state.deadline_at - now
        histories = {name: self._workers.history(name).chosen(state.number) for name in chosen}
        last_steps = {} if after.ledger is None else after.ledger.last_steps
        counted = {name: last_steps[name] for name in chosen if name in last_steps}

        def store() -> None:
            record = record_of(round_, now)
            save = coordinator.store.save_open_round
            save(record, state.aim, wall_deadline, rows_of(round_), histories, counted)

        await coordinator.in_database(store)
        self._workers.remember(histories)

    # What each worker is given.

    async def _prepare(
        self, round_: RoundInProgress, selected: Selected
    ) -> tuple[dict[str, TaskContext], dict[str, str]]:
        """Return what each of the chosen is given, and why some tasks cannot be given, both by token."""
        workers, version = dict(selected.tasks), round_.base_version
        contexts = {
            token: TaskContext(device_class=self._fleet.get(name).registration.device.device_class)
            for token, name in workers.items()
        }
        given, failed = _each(contexts, lambda token, context: self._agree(round_, context, workers[token]))
        contexts |= given
        if round_.kind is TaskKind.INITIALIZE:
            return contexts, failed
        # First the whole model, although not all pull it: the cost of a plan follows from its size.
        sizes = await self._encode(version, workers, given)
        usual_bytes = await self._usual_bytes(version, sizes)
        given, unplanned = _each(
            given, lambda token, context: self._plan(round_, context, usual_bytes, workers[token])
        )
        cut = {token: context for token, context in given.items() if not context.local.plain}
        sizes |= await self._encode(version, workers, cut)
        contexts |= {token: with_fields(context, download_bytes=sizes[token]) for token, context in given.items()}
        return contexts, failed | unplanned

    def _agree(self, round_: RoundInProgress, context: TaskContext, name: str) -> TaskContext:
        """Settle in which recipes a worker pulls and pushes, for as long as it has this task."""
        agreed = self._negotiation.agreed(self._fleet.get(name), self._workers.history(name))
        masked = self._settings.sums_here and round_.kind is TaskKind.TRAIN
        if round_.kind is TaskKind.INITIALIZE or masked:
            agreed = replace(agreed, upload=RAW)
        down, up = str(agreed.downlink.whole), str(agreed.upload)
        self._log.debug("recipes agreed", round=round_.number, worker=name, down=down, up=up)
        return with_fields(context, agreed=agreed)

    def _plan(self, round_: RoundInProgress, context: TaskContext, usual_bytes: int, name: str) -> TaskContext:
        """Give a worker what the plan of its device class says: to train, and to score the last version."""
        worker = self._fleet.get(name)
        # An aggregator takes the whole model: its workers have devices of their own.
        if worker.leads:
            return context
        assert context.agreed is not None
        agreed, deadline_s = context.agreed, self._settings.policy.deadline_s
        down = agreed.downlink.whole if reads_reduced(worker) else None
        told = self._workers.description(name)
        sizing = Sizing(self._run.layout, usual_bytes, deadline_s, agreed.upload, down, told)
        local, choice = self._local_models.task_of(worker, sizing, round_.number)
        return with_fields(context, local=local, choice=choice if round_.kind is TaskKind.TRAIN else None)

    async def prepare_again(
        self, round_: RoundInProgress, workers: Mapping[str, str]
    ) -> Mapping[str, TaskContext]:
        """Encode what the workers of a resumed round, by token, are to pull; what is known of their tasks then."""
        if round_.kind is TaskKind.INITIALIZE:
            return {}
        contexts = {token: round_.context(token) for token in workers}
        sizes = await self._encode(round_.base_version, workers, contexts)
        return {token: with_fields(context, download_bytes=sizes[token]) for token, context in contexts.items()}

    async def _encode(
        self, version: int, workers: Mapping[str, str], contexts: Mapping[str, TaskContext]
    ) -> dict[str, int]:
        """Encode what these tasks pull, first what most of them do. Return the bytes of each, by token."""
        pulls = {token: self._pull(version, context, workers[token]) for token, context in contexts.items()}
        sizes: dict[Pull, int] = {}
        for pull, _ in Counter(pulls.values()).most_common():
            sizes[pull] = (await self._models.get(pull)).manifest.size_bytes
        return {token: sizes[pull] for token, pull in pulls.items()}

    def _pull(self, version: int, context: TaskContext, name: str) -> Pull:
        agreed = context.agreed
        downlink = self._negotiation.downlinks[0] if agreed is None else agreed.downlink
        reduction = reduction_for(self._fleet.get(name), context.local.plan)
        return Pull(version, downlink, self._run.held.get(name), context.local.sub_model, reduction)

    async def _usual_bytes(self, version: int, sizes: Mapping[str, int]) -> int:
        """Return what most of these tasks pull; where all of them hold the version, the size of the model."""
        for size_bytes, _ in Counter(sizes.values()).most_common():
            if size_bytes:
                return size_bytes
        return (await self._models.get(Pull(version, self._negotiation.downlinks[0]))).manifest.size_bytes


def _each(
    contexts: Mapping[str, TaskContext], give: Callable[[str, TaskContext], TaskContext]
) -> tuple[dict[str, TaskContext], dict[str, str]]:
    """Give each task more; return what each then has, and why some have nothing, by token.

    What a worker has said of itself stops its own task alone.
    """
    given: dict[str, TaskContext] = {}
    failed: dict[str, str] = {}
    for token, context in contexts.items():
        try:
            with blaming(token):
                given[token] = give(token, context)
        except UnusableUpdate as error:
            failed[token] = f"its task cannot be prepared: {error}"
    return given, failed
