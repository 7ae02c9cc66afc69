"""Views of a run for its operators: messages of the run, its rounds and its workers, and pages of long answers.

The rule: what operators look at never takes more than half of the event loop's time. What many ask for is made
once for all, what is long piece by piece, and what is larger than a message by pages.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Final, TypeVar, cast

from google.protobuf.message import Message

from fedgrpc import __version__
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.histories import tell_history
from fedgrpc.aggregator.registry import Worker
from fedgrpc.codec.layout import Layout
from fedgrpc.errors import Exhausted, NotFound, UsageError
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.protocol.plans import policy_to_proto
from fedgrpc.protocol.privacy import ledger_to_proto
from fedgrpc.protocol.records import version_to_proto
from fedgrpc.protocol.tensors import layout_to_proto
from fedgrpc.rpc.channel import MAX_MESSAGE_BYTES
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import privacy_pb2, round_pb2, tensor_pb2
from fedgrpc.v1.round_pb2 import TASK_PHASE_ACCEPTED
from fedgrpc.v1.round_pb2 import Round as RoundRecord

T = TypeVar("T")

_PIECE: Final = 50
# Half of the time between the messages of the fastest watcher.
_SHARED_S: Final = 0.025
_MAX_WATCHERS: Final = 200
_MAX_OF_ONE_PEER: Final = 20
_RETRY_S: Final = 5.0
_RATE_HZ: Final = 4.0
_MIN_RATE_HZ: Final = 0.1
_MAX_RATE_HZ: Final = 20.0
# `WatchRounds` has the run beside it, with the layout of a model of any size that is taken.
MAX_PAGE_BYTES: Final = MAX_MESSAGE_BYTES // 4
_MAX_ITEMS: Final = 1 << 31
_MAX_NUMBER: Final = (1 << 63) - 1
# Tag and length of an item.
_FRAME_BYTES: Final = 8

M = TypeVar("M", bound=Message)


class RunView:
    """Sight of a run for its operators: the run itself, its present round, and each worker."""

    def __init__(self, coordinator: Coordinator, settings_text: Mapping[str, str]) -> None:
        self._coordinator = coordinator
        self._run = coordinator.machine
        self._settings = coordinator.settings
        self._settings_text = settings_text
        # A layout may have thousands of tensors, and stays the same for all of a run.
        self._layout: tuple[Layout, list[tensor_pb2.TensorSpec]] | None = None

    def run(self) -> pb.Run:
        """Return the run as it stands."""
        state = self._run
        run = pb.Run(
            name=self._settings.run_name,
            id=state.id,
            phase=pb.RunPhase.Name(state.phase),
            reason=state.ending.text or ("" if state.began else self._coordinator.first_model.lacking()),
            model_version=state.version,
            current_round=self._round_number(),
            total_rounds=self._coordinator.terms.instructions.rounds or 0,
            software_version=__version__,
            settings=self._settings_text,
            local_models=self._coordinator.local_models.to_proto(),
            paused_reason=state.paused_reason,
            policy=policy_to_proto(self._settings.policy),
        )
        if self._layout is None or self._layout[0] is not state.layout:
            self._layout = state.layout, layout_to_proto(state.layout)
        run.layout.extend(self._layout[1])
        for known, field in ((self._run.versions.last, run.last), (self._run.versions.best, run.best)):
            if known is not None and known.sha256:
                field.CopyFrom(version_to_proto(known))
        run.started_at.FromNanoseconds(int(state.started_at * 1e9))
        return run

    def privacy(self) -> privacy_pb2.PrivacyLedger:
        """Return the run's ledger. Raises `NotFound` where its versions are released without noise."""
        state, rounds = self._run, self._settings.rounds
        if state.ledger is None:
            raise NotFound("this run releases its versions without noise")
        return ledger_to_proto(state.ledger, 0 if rounds is None else max(0, rounds - state.trained))

    def summary(self) -> pb.RunSummary:
        """Return the run as it stands in a list."""
        run, now = self.run(), self._coordinator.clock()
        return pb.RunSummary(
            name=run.name,
            id=run.id,
            phase=run.phase,
            reason=run.reason or run.paused_reason,
            model_version=run.model_version,
            current_round=run.current_round,
            total_rounds=run.total_rounds,
            started_at=run.started_at,
            learning_task=self._settings.learning_task,
            model=self._settings.model,
            eligible_workers=sum(self._coordinator.fleet.alive(each, now) for each in self._coordinator.fleet),
            busy_workers=len(self._run.leases),
            metrics=run.last.evaluator_metrics or run.last.metrics or run.best.metrics,
        )

    def _round_number(self) -> int:
        """Return the number of the round in progress, else of the last one; 0: there was none."""
        if self._run.round is not None:
            return self._run.round.number
        last = self._coordinator.records.last
        return 0 if last is None else last.number

    def round(self) -> RoundRecord | None:
        """Return the record of the round in progress, else of the last one."""
        return self._coordinator.records.shown(self._run.round, self._coordinator.clock())

    def watched(self) -> pb.WatchRoundsResponse:
        """Return what watchers of the run see now."""
        record = self.round()
        return pb.WatchRoundsResponse(run=self.run(), round=None if record is None else page_of(record)[0])

    def worker(self, worker: Worker) -> pb.WorkerRecord:
        """Return what there is to see of a worker."""
        now = self._coordinator.clock()
        record = pb.WorkerRecord(
            worker=worker.name,
            role=worker.registration.role,
            device=worker.registration.device,
            state=pb.WORKER_STATE_AWAY,
            last_seen_ago=duration_to_proto(0.0 if worker.polls else max(0.0, now - worker.last_seen)),
        )
        if (new := self._run.new_examples.get(worker.name)) is not None:
            record.new_examples = new
        history = self._coordinator.workers.history(worker.name)
        tell_history(history, record)
        self._coordinator.negotiation.tell(worker, history, record)
        round_, token = self._run.round, self._run.leases.get(worker.name)
        if token is not None and round_ is not None and token in round_.state.tasks:
            task = round_.state.find(token)
            record.state = pb.WORKER_STATE_BUSY
            record.task_phase = cast(round_pb2.TaskPhase, task.phase.value)
            record.progress = task.fraction
        elif self._coordinator.fleet.alive(worker, now):
            record.state = pb.WORKER_STATE_IDLE
        return record


class Watching:
    """The state of a run as watchers see it. `make` gives the message, `revision` changes with every change."""

    def __init__(self, make: Callable[[], Message], revision: Callable[[], int]) -> None:
        self._make = make
        self._revision = revision
        self._made: tuple[int, bytes] = (-1, b"")
        self._made_at = -_SHARED_S
        self._watchers: Counter[str] = Counter()

    @contextmanager
    def watcher(self, peer: str) -> Iterator[None]:
        """Count `peer` as a watcher while the block runs. Raises `Exhausted` when there are too many."""
        if self._watchers[peer] >= _MAX_OF_ONE_PEER or self._watchers.total() >= _MAX_WATCHERS:
            raise Exhausted(f"too many watch this run; try again in {_RETRY_S:g} s", retry_after_s=_RETRY_S)
        self._watchers[peer] += 1
        try:
            yield
        finally:
            self._watchers -= Counter({peer: 1})

    def latest(self, fresh: bool = False) -> tuple[int, bytes]:
        """Return a revision and its message, serialized. Unless `fresh`, others may just have got it."""
        now = time.monotonic()
        if fresh or (self._made[0] != self._revision() and now - self._made_at >= _SHARED_S):
            self._made = self._revision(), self._make().SerializeToString()
            self._made_at = now
        return self._made


class Pieces:
    """Makes long lists on the event loop: one list at a time, with a rest as long as each piece took."""

    def __init__(self) -> None:
        self._making = asyncio.Lock()

    async def list_of(self, items: Iterator[T]) -> list[T]:
        """Return all of `items`, each made when it is asked for."""
        made: list[T] = []
        async with self._making:
            while True:
                begun = time.perf_counter()
                piece = list(islice(items, _PIECE))
                made += piece
                if len(piece) < _PIECE:
                    return made
                await asyncio.sleep(time.perf_counter() - begun)


def watch_interval_s(max_rate_hz: float) -> float:
    """Return the seconds between two answers of a watch. A rate that is not above 0, or NaN, is the default."""
    rate_hz = max_rate_hz if max_rate_hz > 0 else _RATE_HZ
    # A slower watcher would sleep through the end of the run.
    return 1.0 / min(max(rate_hz, _MIN_RATE_HZ), _MAX_RATE_HZ)


def page_of(
    record: RoundRecord, start: int = 0, size: int = 0, max_bytes: int = MAX_PAGE_BYTES
) -> tuple[RoundRecord, int]:
    """Return the round with its tasks from number `start` on: up to `size` of them (0: all), as many as fit.

    The second value is the number to continue from; 0: that was the last page.
    """
    if not start and not size and record.ByteSize() <= max_bytes:
        return record, 0
    page = RoundRecord()
    page.CopyFrom(record)
    del page.tasks[:]
    given = fitting(islice(record.tasks, start, None), size, max_bytes - page.ByteSize())
    page.tasks.extend(given)
    stop = start + len(given)
    page.tasks_left_out = len(record.tasks) - len(given)
    page.accepted_left_out = _accepted(record.tasks) - _accepted(given)
    return page, stop if stop < len(record.tasks) else 0


def fitting(items: Iterable[M], size: int = 0, max_bytes: int = MAX_PAGE_BYTES) -> list[M]:
    """Return the first of them, up to `size` (0: all) and `max_bytes` together, but one at least."""
    page: list[M] = []
    for item in islice(items, size or _MAX_ITEMS):
        max_bytes -= item.ByteSize() + _FRAME_BYTES
        if page and max_bytes < 0:
            break
        page.append(item)
    return page


def _accepted(tasks: Iterable[Message]) -> int:
    return sum(task.phase == TASK_PHASE_ACCEPTED for task in tasks)  # type: ignore[attr-defined]


def numbers(page_token: str, count: int, call: str) -> tuple[int, ...]:
    """Return the numbers in a page token. Raises `UsageError`."""
    parts = page_token.split(".")
    whole = all(part.isascii() and part.isdigit() and len(part) <= len(str(_MAX_NUMBER)) for part in parts)
    if not whole or len(parts) != count:
        raise UsageError(f"the page token is not one that {call} gave")
    return tuple(min(int(part), _MAX_NUMBER) for part in parts)
