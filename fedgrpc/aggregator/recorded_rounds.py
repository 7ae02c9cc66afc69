"""Records of rounds: of the one in progress, of the last one, and the writing of all of them.

The rule: a round is recorded with its version and the histories of its workers in one transaction.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fedgrpc.aggregator.histories import RunWorkers, histories_after
from fedgrpc.protocol.rounds import RoundRecords, record_of
from fedgrpc.rounds.history import WorkerHistory
from fedgrpc.rounds.version import Jump, Version
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.storage.run_store import RunStore, carried_rows, rows_of
from fedgrpc.v1.round_pb2 import Round as RoundRecord


class RecordedRounds:
    """The rounds of `store`, whose methods run `in_database`. `last` is the record of the last that ended."""

    def __init__(self, store: RunStore, in_database: Callable[..., Awaitable[Any]], workers: RunWorkers) -> None:
        self._store = store
        self._in_database = in_database
        self._workers = workers
        self._in_progress = RoundRecords()
        self.last: RoundRecord | None = None

    async def restore(self) -> int:
        """Read the last record. Returns its number; 0: there is none. Raises `StorageError`."""
        self.last = await self._in_database(self._store.round)
        return 0 if self.last is None else self.last.number

    async def end(self, round_: RoundInProgress, now: float, version: Version | None = None) -> RoundRecord:
        """Make durable how a round ended, with the version that it made. Raises `StorageError`."""

        def store() -> tuple[RoundRecord, dict[str, WorkerHistory]]:
            # In the thread: with a thousand tasks this takes its time.
            record, histories = record_of(round_, now), histories_after(round_, self._workers)
            rows = [*rows_of(round_), *carried_rows(round_, now)]
            self._store.finish_round(record, rows, histories, version)
            return record, histories

        record: RoundRecord
        record, histories = await self._in_database(store)
        self._workers.remember(histories)
        # The version is known only after this, so that its scores find the record.
        if self.last is None or record.number >= self.last.number:
            self.last = record
        return record

    async def roll_back(self, record: RoundRecord, version: Version) -> None:
        """Record a round without tasks that copied a version. Raises `StorageError`."""
        await self._in_database(self._store.finish_round, record, [], {}, version)
        self.last = record

    async def add_scores(
        self,
        version: int,
        workers: Mapping[str, float],
        evaluator: Mapping[str, float],
        of_sub_models: bool,
        not_finite: Sequence[str],
        jump: Jump,
    ) -> bool:
        """Add scores to the record of the round that wrote a version; whether there is one."""
        record = await self._in_database(
            self._store.add_scores, version, workers, evaluator, of_sub_models, not_finite, jump
        )
        if record is not None and self.last is not None and self.last.number == record.number:
            self.last = record
        return record is not None

    def shown(self, round_: RoundInProgress | None, now: float) -> RoundRecord | None:
        """Return the record of the round in progress, else of the last one."""
        return self.last if round_ is None else self._in_progress.record(round_, now)
