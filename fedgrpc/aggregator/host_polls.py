"""Polls of workers at a process with many runs: what each run hears of the worker, and the work that it gets.

The rule: one poll is for every run that the worker may serve. Questions of secure sums come first, then tasks in
the order of the runs, then a run that the worker is to get ready for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

import structlog

from fedgrpc import claims
from fedgrpc.aggregator.hosted_run import HostedRun
from fedgrpc.aggregator.models_along import ModelsAlong
from fedgrpc.aggregator.polls import polled
from fedgrpc.aggregator.registry import Worker
from fedgrpc.aggregator.run_directory import RunDirectory
from fedgrpc.aggregator.service import checked_digest
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import StorageError, UpdateRefused
from fedgrpc.privacy.one_time_keys import PublicKeys
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.protocol.facts import bounded_conditions
from fedgrpc.protocol.secure import keys_from_proto
from fedgrpc.v1 import aggregator_pb2 as pb

_MOST_HELD: Final = 64

log = structlog.get_logger()
# Result of a poll: a run and the token of a task of it, or a run to get ready for.
Found = tuple[HostedRun, str]
# The part of a poll about one run.
Told = pb.PollTaskRequest | pb.HeldOfRun
# Takes a run's id, a worker and its keys.
CheckKeys = Callable[[str, str, PublicKeys], None]


class HostPolls:
    """Answers polls for all runs of the process. Lives on one event loop."""

    def __init__(self, runs: RunDirectory, settings: AggregatorSettings, check_keys: CheckKeys) -> None:
        """`check_keys` raises `UpdateRefused` for one-time keys that no other device would take."""
        self._runs = runs
        self._settings = settings
        self._check_keys = check_keys
        self._fleet = runs.common.fleet
        self._clock = runs.common.clock
        self._along = ModelsAlong()
        # Workers whose keys were refused, so that each reason is logged once.
        self._refused_keys: dict[str, str] = {}

    async def answer(
        self, worker: Worker, request: pb.PollTaskRequest, sending: ExitStack
    ) -> tuple[pb.PollTaskResponse, bytes]:
        """Return the answer to a poll, and the model that comes along, which has left when `sending` closes.

        Raises `UnknownWorker` for one that registered when the run had other encodings or named others.
        """
        if (own := self._runs.own) is not None:
            own.service.calls.check_known(worker)
        worker.heard(self._clock())
        if request.HasField("conditions"):
            worker.conditions = bounded_conditions(request.conditions)
        self._hear(worker, request)
        found = await polled(
            self._fleet,
            worker,
            min(duration_from_proto(request.wait), self._settings.poll_wait_s),
            self._clock,
            lambda: self._work_for(worker),
            lambda: self._runs.stopping or self._runs.ended,
            self._wake_drivers,
        )
        if found is None:
            for run in self._runs:
                run.service.calls.tell_end(worker.name)
            return pb.PollTaskResponse(run_ended=self._runs.ended), b""
        run, token = found
        if not token:
            return pb.PollTaskResponse(introduce=run.terms()), b""
        if (question := run.coordinator.secure_sums.question(worker.name, token)) is not None:
            return pb.PollTaskResponse(question=question), b""
        return await self._task(run, token, worker, request, sending)

    async def _task(
        self, run: HostedRun, token: str, worker: Worker, request: pb.PollTaskRequest, sending: ExitStack
    ) -> tuple[pb.PollTaskResponse, bytes]:
        """Return the answer with a task, and its model where that comes along."""
        task = run.coordinator.terms.message(worker.name, token)
        if worker.registration.many_runs and not run.is_own:
            task.terms.CopyFrom(run.terms())
        told, held = self._told_of(worker, request).get(run.id), None
        if told is not None and told.held_version:
            held = told.held_version, checked_digest(told.held_digest)
        with run.calling():
            encoded = await run.service.model_of(worker.name, token, held)
            most_bytes = min(request.model_bytes, run.settings.max_chunk_bytes)
            model = await self._along.message(encoded, most_bytes, sending)
        return pb.PollTaskResponse(task=task), model

    def _hear(self, worker: Worker, request: pb.PollTaskRequest) -> None:
        """Tell each run what the worker has of it."""
        told_of = self._told_of(worker, request)
        for run in self._runs:
            told = told_of.get(run.id)
            if told is None:
                run.service.calls.hear_poll(worker.name, None, None)
                continue
            version = (told.held_version, checked_digest(told.held_digest)) if told.held_version else None
            new = claims.EXAMPLES.clamped(told.new_examples) if told.HasField("new_examples") else None
            run.service.calls.hear_poll(worker.name, version, new, self._keys_of(run, worker.name, told))

    def _keys_of(self, run: HostedRun, worker: str, told: Told) -> PublicKeys | None:
        """Return the keys that a worker tells for a run's secure sums; None where other devices would refuse them.

        They would refuse the whole sum: a device with a wrong clock, or an old certificate, harms itself alone.
        """
        if not told.HasField("one_time_keys") or not run.settings.sums_here:
            return None
        keys, known = keys_from_proto(told.one_time_keys), run.coordinator.machine.keys.get(worker)
        if known == keys and known.signature == keys.signature:
            return known
        try:
            self._check_keys(run.id, worker, keys)
        except (UpdateRefused, StorageError) as error:
            if self._refused_keys.get(worker) != str(error):
                log.warning("no part in secure sums", worker=worker, run=run.name, reason=str(error))
            self._refused_keys[worker] = str(error)
            return None
        self._refused_keys.pop(worker, None)
        return keys

    def _told_of(self, worker: Worker, request: pb.PollTaskRequest) -> dict[str, Told]:
        """Return what a poll tells of each run, by its id."""
        told: dict[str, Told] = {each.run_id: each for each in request.held[:_MOST_HELD]}
        bound = self._runs.bound
        if bound is not None and (bound.is_own or not worker.registration.many_runs):
            told.setdefault(bound.id, request)
        return told

    def _work_for(self, worker: Worker) -> Found | None:
        """Return a task of the worker, or a run that it is to get ready for (with an empty token)."""
        serving = self._runs.serving(worker)
        for run in serving:
            # First: others wait for the answer, and it takes no time.
            if token := run.coordinator.secure_sums.question_for(worker.name):
                return run, token
        for run in serving:
            if token := run.service.calls.token_for(worker):
                return run, token
        unprepared = [run for run in serving if not run.fleet.is_ready(worker)]
        if not unprepared:
            return None
        wanted = None if worker.evaluator else self._runs.common.sharing.given().get(worker.name)
        for run in unprepared:
            if worker.evaluator or run.name == wanted:
                return run, ""
        return None

    def _wake_drivers(self) -> None:
        for run in self._runs:
            run.coordinator.wake.set()
