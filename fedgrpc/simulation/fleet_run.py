"""A fleet at work: the production run under a virtual clock, with devices that are only numbers.

Modelled: who can be reached when, the speed of each device and link, lost and failed tasks, uploads that pause and
continue, leases, deadlines, replacement, late updates. Not modelled: what is learned (so Oort sees only speed and
counts of examples), days and nights, links that several devices share, the aggregator's own limits, batteries. A
device out of reach trains on, and its transfers wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fedgrpc.codec.layout import TensorSpec
from fedgrpc.errors import RoundClosed, UnknownTask
from fedgrpc.rounds.events import (
    Accepted,
    Cancel,
    Commit,
    Deadline,
    Failed,
    Finished,
    Offer,
    Select,
    Selected,
    TaskPhase,
    Tick,
    WorkersAvailable,
)
from fedgrpc.rounds.history import WorkerHistory, timing_of
from fedgrpc.rounds.round import Round, RoundPhase, wake_at
from fedgrpc.rounds.selection import Choice, choose_oort, learned_deadline
from fedgrpc.rounds.version import Version
from fedgrpc.runs.events import Event, OpenRound, RoundEnded, RoundOpened, UpdatesMerged, VersionTaken
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.merge import Merge
from fedgrpc.runs.rules import RunRules
from fedgrpc.simulation.devices import Devices, Job
from fedgrpc.simulation.fleet import DescribedFleet, FleetVariant
from fedgrpc.simulation.fleet_result import FleetResult, RoundLine, summarize
from fedgrpc.simulation.loop import Life, Process, VirtualLoop, Wait

# Seconds to the next look while too few are idle: no device of a simulation polls, so they are counted.
_LOOK_AGAIN_S = 5.0
_KNOWN_WORKERS = 1000
_ENOUGH_IDLE = 1000
_SHOWN_STEPS = 200
_ENDLESS = 1 << 31
# The run has a model to begin with, of whatever layout.
_LAYOUT = (TensorSpec("weights", "float32", (1,)),)


@dataclass
class _Tally:
    """Counts of a round so far."""

    opened_at: float
    asked: int = 0
    accepted: int = 0


class FleetRun:
    """One variant on one fleet. `run` it once."""

    def __init__(self, fleet: DescribedFleet, variant: FleetVariant, seed: int) -> None:
        self.loop = VirtualLoop()
        self.rng = np.random.default_rng(seed)
        self.variant = variant
        self.devices = Devices(fleet.classes, seed)
        self.jobs: dict[str, Job] = {}
        self.all_jobs: list[Job] = []
        self.busy = np.zeros(self.devices.count, dtype=bool)
        self._in_round = np.zeros(self.devices.count, dtype=bool)
        self.lines: list[RoundLine] = []
        self._histories: dict[str, WorkerHistory] = {}
        self._run = RunMachine(RunRules(variant.policy, _ENDLESS), "simulated", 0.0)
        self._run.apply(VersionTaken(Version(1, 0, b"digest"), _LAYOUT), 0.0)
        self._open_round()
        self._tally = _Tally(0.0)
        self._wake_at = math.inf
        self._tokens = 0
        self._pool_wanted = False
        self._life = Life()

    def run(self, duration_s: float, show: Callable[[float], None] = lambda part: None) -> FleetResult:
        """Play that much virtual time; `show` hears how much of it is over, 0 to 1."""
        self._look(1)
        for number in range(1, _SHOWN_STEPS + 1):
            self.loop.call_at(duration_s * number / _SHOWN_STEPS, partial(show, number / _SHOWN_STEPS))
        self.loop.run(duration_s, lambda: True)
        return summarize(self.variant, self.devices, self.lines, self.all_jobs, duration_s)

    # The aggregator.

    @property
    def _round(self) -> Round:
        return self._run.current.state

    def _open_round(self) -> None:
        opened = self._run.next_step(0.0, self.loop.now)
        assert isinstance(opened, OpenRound)
        self._run.apply(RoundOpened(opened.round), self.loop.now)

    def dispatch(self, event: Event) -> None:
        """Apply an event, and do what the round asks for. Raises as `RunMachine.apply` does."""
        for effect in self._run.apply(event, self.loop.now):
            if isinstance(effect, Select):
                self._select(effect)
            elif isinstance(effect, Offer):
                self._begin(effect)
            elif isinstance(effect, Cancel):
                self._pool_wanted = True
            elif isinstance(effect, Commit):
                self._commit(effect)
            elif isinstance(effect, Finished):
                self.loop.call_at(self.loop.now, self._next_round)
        if isinstance(event, Failed) or (isinstance(event, Accepted) and self._round.policy.buffer_size):
            self._pool_wanted = True
        if self._pool_wanted and self._round.phase is RoundPhase.REPORTING and not self._round.asked:
            self._pool_wanted = False
            self.dispatch(self._pool())
        self._schedule_tick()

    def _schedule_tick(self) -> None:
        due = wake_at(self._round) if self._wake_at is math.inf else None
        if due is not None:
            self._wake_at = due
            self.loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._wake_at = math.inf
        self.dispatch(Tick())
        if self._round.phase is RoundPhase.SELECTING:
            self.dispatch(self._pool())

    def _look(self, number: int) -> None:
        """Count the reachable devices while the round of that number waits for workers."""
        if self._round.number == number and self._round.phase is RoundPhase.SELECTING:
            self.dispatch(self._pool())
            self.loop.call_at(self.loop.now + _LOOK_AGAIN_S, lambda: self._look(number))

    def _idle(self) -> np.ndarray:
        self.devices.advance(self.loop.now)
        return np.flatnonzero(self.devices.reachable & ~self.busy)

    def _pool(self) -> WorkersAvailable:
        names = self.devices.names
        idle = self._idle()
        if self._round.phase is RoundPhase.REPORTING:
            # A round that is under way only counts whether there are enough for those that are missing.
            idle = idle[~self._in_round[idle]][:_ENOUGH_IDLE]
        live_count = int((self.devices.reachable | self.busy).sum())
        return WorkersAvailable(tuple(names[i] for i in idle), live_count)

    def _select(self, select: Select) -> None:
        idle = self._idle()
        idle = idle[~self._in_round[idle]]
        choices = self._choose(idle, select.count)
        workers = [choice.worker for choice in choices]
        for worker in workers:
            history = self._histories.get(worker, WorkerHistory())
            self._histories[worker] = history.chosen(self._round.number)
        self._tally.asked += len(workers)
        tasks = tuple((self._new_token(), worker) for worker in workers)
        reasons = {choice.worker: choice.reason for choice in choices}
        self.dispatch(Selected(tasks, reasons, self._deadline(workers)))

    def _choose(self, idle: np.ndarray, count: int) -> tuple[Choice, ...]:
        names = self.devices.names
        if self.variant.selection == "oort":
            candidates = tuple(names[i] for i in idle)
            return choose_oort(candidates, count, self._histories, self._round.number, self.rng)
        chosen = self.rng.choice(idle, size=min(count, idle.size), replace=False)
        return tuple(Choice(names[i], f"one of {idle.size} by lot") for i in np.sort(chosen))

    def _deadline(self, workers: list[str]) -> Deadline | None:
        if self.variant.deadline == "fixed" or self._round.phase is not RoundPhase.SELECTING:
            return None
        known = list(self._histories)[-_KNOWN_WORKERS:]
        histories = {name: self._histories[name] for name in (*known, *workers) if name in self._histories}
        return learned_deadline(workers, self._round.aim, histories)

    def _new_token(self) -> str:
        self._tokens += 1
        return str(self._tokens)

    def _commit(self, commit: Commit) -> None:
        def done() -> None:
            for token in commit.tokens:
                self.jobs[token].merge(self.loop.now, self._round.tasks[token].staleness)
            version = Version(self._run.version + 1, self._round.number, b"digest", trained=self._run.trained + 1)
            self.dispatch(UpdatesMerged(version, _LAYOUT, Merge({}), self.variant.commit_s))

        self._tally.accepted = len(commit.tokens)
        self.loop.call_at(self.loop.now + self.variant.commit_s, done)

    def _next_round(self) -> None:
        self._remember()
        ended, tally = self._round, self._tally
        committed = ended.phase is RoundPhase.COMMITTED
        accepted = tally.accepted if committed else 0
        self.lines.append(
            RoundLine(
                ended.number, tally.opened_at, self.loop.now, committed, tally.asked, accepted, ended.deadline_s
            )
        )
        self._run.apply(RoundEnded(0.0), self.loop.now)
        if self._run.round is None:
            self._open_round()
        for token, task in ended.tasks.items():
            if token not in self._round.tasks:
                job = self.jobs.pop(token)
                if task.phase is TaskPhase.ACCEPTED and not job.fate:
                    job.stop("in vain")
        self._tally = _Tally(self.loop.now)
        self._wake_at = math.inf
        self._in_round[:] = False
        self._in_round[[self.devices.index[worker] for worker in self._round.workers]] = True
        # An abandoned round is not tried again at once: nothing may have changed.
        pause_s, number = 0.0 if committed else _LOOK_AGAIN_S, self._round.number
        self.loop.call_at(self.loop.now + pause_s, lambda: self._look(number))

    def _remember(self) -> None:
        for token, task in self._round.tasks.items():
            history = self._histories.get(task.worker, WorkerHistory())
            timing = timing_of(self._round.carried.get(token, task))
            if timing is None:
                continue
            if task.phase is TaskPhase.ACCEPTED:
                examples = int(self.devices.examples[self.devices.index[task.worker]])
                self._histories[task.worker] = history.reported(timing, loss=1.0, example_count=examples)
            else:
                self._histories[task.worker] = history.timed(timing)

    # The devices.

    def _begin(self, offer: Offer) -> None:
        device = self.devices.index[offer.worker]
        job = Job(offer.token, device)
        self.jobs[offer.token] = job
        self.all_jobs.append(job)
        self.busy[device] = self._in_round[device] = True
        self.loop.call_at(self.loop.now, lambda: self.loop.spawn(self._work(job), self._life))
        self.loop.spawn(self._beats(job), self._life)

    def _work(self, job: Job) -> Process[None]:
        """One task on one device, from its offer to whatever becomes of it."""
        devices, payload, device = self.devices, self.variant.model, job.device
        yield self.loop.sleep(2 * devices.latency_s[device])
        download_s = devices.varied(device, payload.download_bytes / devices.down[device])
        yield from self._transfer(job, TaskPhase.DOWNLOADING, download_s, payload.download_bytes)
        yield from self._train(job)
        if not job.over:
            upload_s = devices.varied(device, payload.upload_bytes / devices.up[device])
            yield from self._transfer(job, TaskPhase.UPLOADING, upload_s, payload.upload_bytes)
        while not job.over and not devices.advance_one(device, self.loop.now):
            yield Wait(float(devices.changes_at[device]))
        self._tell(job, Accepted(job.token, weight=float(devices.examples[device])))
        job.end(self.loop.now)
        self.busy[device] = False

    def _train(self, job: Job) -> Process[None]:
        if job.over:
            return
        job.enter(TaskPhase.TRAINING, self.loop.now)
        self._tell(job, job.progress())
        seconds = self.devices.varied(job.device, self.devices.train_s[job.device])
        fails = self.rng.random() < self.devices.failure[job.device]
        until = self.loop.now + seconds * (self.rng.random() if fails else 1.0)
        while not job.over and self.loop.now < until:
            yield self.loop.sleep(min(until - self.loop.now, self._beat_s))
        job.trained_s = self.loop.now - job.entered_at
        if fails and not job.over:
            self._tell(job, Failed(job.token, "training failed"))
            job.stop("failed")

    def _transfer(self, job: Job, phase: TaskPhase, seconds: float, size_bytes: int) -> Process[None]:
        """Bytes flow while the device can be reached."""
        job.enter(phase, self.loop.now)
        job.size_bytes = size_bytes
        self._tell(job, job.progress())
        left_s = seconds
        while left_s > 1e-9 and not job.over:
            before = self.loop.now
            reachable = self.devices.advance_one(job.device, before)
            limit = min(float(self.devices.changes_at[job.device]), before + self._beat_s)
            yield self.loop.sleep(min(left_s, limit - before) if reachable else limit - before)
            if reachable:
                left_s -= self.loop.now - before
                job.moved(size_bytes * (1 - max(0.0, left_s) / seconds))

    @property
    def _beat_s(self) -> float:
        """Often enough to keep a lease."""
        return 0.45 * self.variant.policy.lease_s

    def _beats(self, job: Job) -> Process[None]:
        while True:
            yield self.loop.sleep(self._beat_s)
            if job.over:
                return
            self._tell(job, job.progress())

    def _tell(self, job: Job, news: Any) -> None:
        """Send news, if the device can. A refusal ends the job."""
        if job.over or not self.devices.advance_one(job.device, self.loop.now):
            return
        try:
            self.dispatch(news)
        except (RoundClosed, UnknownTask):
            job.stop("late")
