"""Memory of an aggregator about its run, in SQLite: workers, rounds, tasks and model versions.

The rule: what the world has been told is here first. A round and its tasks are written before a task is offered, a
committed round, its tasks and its version in one transaction. Records are the protocol's own messages, so that
what operators read and what is stored cannot differ. Everything here blocks, and runs in one thread of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from fedgrpc import claims
from fedgrpc.privacy.ledger import PrivateRelease
from fedgrpc.protocol.devices import bounded_registration
from fedgrpc.protocol.privacy import release_from_proto, release_to_proto
from fedgrpc.protocol.records import (
    history_from_bytes,
    history_to_bytes,
    jump_to_proto,
    version_from_proto,
    version_to_proto,
)
from fedgrpc.rounds.events import LossCause, TaskPhase
from fedgrpc.rounds.history import Histories, WorkerHistory
from fedgrpc.rounds.version import Jump, Version
from fedgrpc.runs.events import EndReason, RunPhase
from fedgrpc.storage.database import Database, Row, database_errors
from fedgrpc.storage.task_rows import TASK_COLUMNS, RunRow, StoredRound, TaskRow
from fedgrpc.v1 import privacy_pb2
from fedgrpc.v1.aggregator_pb2 import RegisterRequest
from fedgrpc.v1.round_pb2 import ROUND_PHASE_COMMITTED, ModelVersion
from fedgrpc.v1.round_pb2 import Round as RoundRecord

_KEEP_TASKS_OF_ROUNDS = 8
_NO_STEPS: Mapping[str, int] = MappingProxyType({})


class RunStore(Database):
    """Records of one run in the database. Every method may raise `StorageError`."""

    def __init__(self, path: Path, keep_rounds: int = 1 << 62, *, read_only: bool = False) -> None:
        """Open the database at `path`; records of rounds older than the last `keep_rounds` are forgotten.

        Raises `UsageError` for a database of another version of the schema.
        """
        super().__init__(path, read_only=read_only)
        # A round whose tasks are kept is kept itself.
        self._keep_rounds = max(keep_rounds, _KEEP_TASKS_OF_ROUNDS)

    def run(self) -> RunRow | None:
        """The run kept here, None for a fresh folder."""
        row = self._one("SELECT id, name, phase, end_reason, reason, started_at, paused_reason FROM run")
        if row is None:
            return None
        run_id, name, phase, end_reason, *rest = row
        with database_errors(self.path):
            return RunRow(run_id, name, RunPhase(phase), EndReason(end_reason), *rest)

    def settings(self) -> dict[str, str]:
        """Read the settings of the last start; none in a fresh folder."""
        return dict(self._all("SELECT name, value FROM settings"))

    def save_settings(self, settings: Mapping[str, str]) -> None:
        """Store the settings of this start."""
        with self._transaction():
            self._db.execute("DELETE FROM settings")
            self._db.executemany("INSERT INTO settings VALUES (?, ?)", settings.items())

    def save_run(self, run: RunRow) -> None:
        """Keep the state of the run."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO run VALUES (1, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(run.id, run.name, run.phase.value, run.end_reason.value),
                    *(run.reason, run.started_at, run.paused_reason),
                ),
            )
        self._checkpoint()

    def workers(self) -> Iterator[tuple[RegisterRequest, WorkerHistory]]:
        """Read every worker with its history, in the order of registration, which decides the slots."""
        query = (
            "SELECT registration, COALESCE(history, x''), selected, accepted "
            "FROM workers LEFT JOIN histories ON worker = name ORDER BY workers.rowid"
        )
        for registration, *kept in self._all(query):
            with database_errors(self.path):
                about = RegisterRequest.FromString(registration)
                history = history_from_bytes(*kept)
            yield bounded_registration(about), history

    def sessions(self) -> dict[str, str]:
        """Read which process spoke last for each worker."""
        return dict(self._all("SELECT worker, session FROM sessions"))

    def save_worker(self, registration: RegisterRequest, session: str = "") -> None:
        """Store what a worker said of itself, and which process said it."""
        blob = registration.SerializeToString()
        with self._transaction():
            self._db.execute(
                "INSERT INTO workers (name, registration) VALUES (?, ?) "
                # Not REPLACE: the row, and with it the worker's place in the order, has to stay.
                "ON CONFLICT (name) DO UPDATE SET registration = excluded.registration",
                (registration.worker, blob),
            )
            self._db.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?)", (registration.worker, session))

    def forget_workers(self, names: Iterable[str]) -> None:
        """Remove workers with all their rows."""
        with self._transaction():
            rows = [(name,) for name in names]
            for table, column in (("workers", "name"), ("sessions", "worker"), ("histories", "worker")):
                self._db.executemany(f"DELETE FROM {table} WHERE {column} = ?", rows)

    def latest_version(self) -> Version | None:
        """Read the newest committed version."""
        row = self._one("SELECT record FROM versions ORDER BY version DESC LIMIT 1")
        return None if row is None else self._version(row)

    def versions(self, numbers: Iterable[int]) -> list[Version]:
        """Read versions; numbers that never were one are left out."""
        rows = (self._one("SELECT record FROM versions WHERE version = ?", number) for number in numbers)
        return [self._version(row) for row in rows if row is not None]

    def save_version(self, version: Version) -> None:
        """Store a version that no round has written: the initial model."""
        with self._transaction():
            self._insert_version(version)
        self._checkpoint()

    def save_open_round(
        self,
        record: RoundRecord,
        aim: int,
        deadline_at: float,
        tasks: Iterable[TaskRow],
        selected: Histories,
        last_steps: Mapping[str, int] = _NO_STEPS,
    ) -> None:
        """Open a round with its tasks, or add tasks to it; `selected` are the workers of the new ones.

        `last_steps`: for which release with noise each of these was chosen, where that is counted.
        """
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO rounds VALUES (?, 1, ?, ?, ?)",
                (record.number, aim, deadline_at, record.SerializeToString()),
            )
            # Rows that a former call wrote, of carried-over tasks that were lost since, must not come back.
            self._db.execute("DELETE FROM tasks WHERE round = ?", (record.number,))
            self._save_tasks(tasks)
            self._save_histories(selected)
            self._db.executemany("INSERT OR REPLACE INTO last_steps VALUES (?, ?)", last_steps.items())

    def save_release(self, release: PrivateRelease) -> None:
        """Enter a release with noise, durably, before its version is written."""
        with self._transaction():
            # Not OR REPLACE: an entry is never taken back.
            self._db.execute(
                "INSERT INTO releases VALUES (?, ?)",
                (release.step, release_to_proto(release).SerializeToString(deterministic=True)),
            )

    def releases(self) -> list[PrivateRelease]:
        """Read all releases with noise, oldest first."""
        rows = self._all("SELECT record FROM releases ORDER BY step")
        with database_errors(self.path):
            return [release_from_proto(privacy_pb2.PrivateRelease.FromString(blob)) for (blob,) in rows]

    def last_steps(self) -> dict[str, int]:
        """Read for which release with noise each device was chosen last."""
        return dict(self._all("SELECT worker, step FROM last_steps"))

    def save_deadline(self, record: RoundRecord, deadline_at: float) -> None:
        """Store a new end of an open round, wall time in seconds, and its record that says so."""
        with self._transaction():
            self._db.execute(
                "UPDATE rounds SET deadline_at = ?, record = ? WHERE number = ? AND open = 1",
                (deadline_at, record.SerializeToString(), record.number),
            )

    def finish_round(
        self, record: RoundRecord, tasks: Iterable[TaskRow], histories: Histories, version: Version | None
    ) -> None:
        """Store a closed round: its record, tasks, histories of workers, and the version it wrote; all or nothing.

        Rows of the next round may be among the tasks, behind those of this one: the same tasks, carried over.
        """
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO rounds VALUES (?, 0, 0, 0, ?)", (record.number, record.SerializeToString())
            )
            # Together: a version without the end of its round would be made once more of the same updates.
            self._save_tasks(tasks)
            self._save_histories(histories)
            if version is not None:
                self._insert_version(version)
            # For so many rounds, a worker that comes back late learns what became of its task.
            self._db.execute("DELETE FROM tasks WHERE round <= ?", (record.number - _KEEP_TASKS_OF_ROUNDS,))
            # The round that wrote the newest version stays: scores of that version are still to come.
            self._db.execute(
                "DELETE FROM rounds WHERE number <= ? AND open = 0 AND number <> "
                "COALESCE((SELECT round FROM versions ORDER BY version DESC LIMIT 1), -1)",
                (record.number - self._keep_rounds,),
            )
        if version is not None:
            # Outside of the transaction, which is durable without it: a copy of the file alone is then the run.
            self._checkpoint()

    def drop_tasks(
        self, dropped: Iterable[tuple[str, int, TaskPhase, str, LossCause]], histories: Histories
    ) -> None:
        """Store tasks that no further round takes: (token, round it belonged to, phase, reason, cause)."""
        with self._transaction():
            self._db.executemany(
                "UPDATE tasks SET round = ?, phase = ?, reason = ?, loss_cause = ? WHERE token = ?",
                (
                    (number, phase.value, reason, cause.value, token)
                    for token, number, phase, reason, cause in dropped
                ),
            )
            self._save_histories(histories)

    def add_scores(
        self,
        version: int,
        workers: Mapping[str, float],
        evaluator: Mapping[str, float],
        of_sub_models: bool = False,
        not_finite: Iterable[str] = (),
        jump: Jump = Jump.NONE,
    ) -> RoundRecord | None:
        """Add scores to `version`, and to the record of its round, if it has one.

        Read and write in one call: scores come from several tasks, and none may undo what another has written.
        """
        scored = [
            replace(
                known,
                metrics={**known.metrics, **workers},
                evaluator_metrics={**known.evaluator_metrics, **evaluator},
                jump=jump if known.jump is Jump.NONE else known.jump,
            )
            for known in self.versions([version])
        ]
        record = self.round_of_version(version)
        if record is not None:
            if jump is not Jump.NONE and not record.jump:
                record.jump = jump_to_proto(jump)
            _add(record.metrics, workers)
            record.metrics_of_sub_models = of_sub_models or (record.metrics_of_sub_models and not workers)
            _add(record.evaluator_metrics, evaluator)
            record.scores_not_finite[:] = sorted({*record.scores_not_finite, *not_finite})[: claims.METRICS]
        # Together: after a kill in between, version and record would tell of different scores for good.
        with self._transaction():
            for each in scored:
                self._insert_version(each)
            if record is not None:
                self._db.execute(
                    "UPDATE rounds SET record = ? WHERE number = ?", (record.SerializeToString(), record.number)
                )
        return record

    def open_round(self) -> StoredRound | None:
        """Read the round that was open when the last process ended."""
        row = self._one("SELECT record, aim, deadline_at FROM rounds WHERE open = 1")
        if row is None:
            return None
        record = self._record(row[0])
        return StoredRound(record, row[1], row[2], tuple(self.tasks(record.number)))

    def forget_open_round(self) -> None:
        """Forget the unfinished round, as if it had never been opened: only who gave all its tasks may say so."""
        with self._transaction():
            self._db.execute("DELETE FROM tasks WHERE round IN (SELECT number FROM rounds WHERE open)")
            self._db.execute("DELETE FROM rounds WHERE open")

    def tasks(self, number: int) -> list[TaskRow]:
        """Read the tasks of a round, by slot; those of rounds long past are gone."""
        rows = self._all(f"SELECT {TASK_COLUMNS} FROM tasks WHERE round = ? ORDER BY slot", number)
        with database_errors(self.path):
            return [TaskRow.of_row(row) for row in rows]

    def task(self, token: str) -> TaskRow | None:
        """Read the task of a token, if one of the last rounds had it."""
        row = self._one(f"SELECT {TASK_COLUMNS} FROM tasks WHERE token = ?", token)
        with database_errors(self.path):
            return None if row is None else TaskRow.of_row(row)

    def round(self, number: int | None = None) -> RoundRecord | None:
        """Read the record of a round; of the latest finished one when no number is given."""
        if number is None:
            row = self._one("SELECT record FROM rounds WHERE open = 0 ORDER BY number DESC LIMIT 1")
        else:
            row = self._one("SELECT record FROM rounds WHERE number = ?", number)
        return None if row is None else self._record(row[0])

    def round_of_version(self, version: int) -> RoundRecord | None:
        """Read the record of the round that wrote `version`; None for the initial model of a file."""
        row = self._one(
            "SELECT rounds.record FROM rounds JOIN versions ON number = versions.round WHERE version = ?",
            version,
        )
        return None if row is None else self._record(row[0])

    def round_of_latest_version(self) -> RoundRecord | None:
        """Read the record of the round that wrote the newest version; None as `round_of_version`."""
        newest = self.latest_version()
        return None if newest is None else self.round_of_version(newest.version)

    def rounds(self, below: int, count: int, max_bytes: int = 1 << 62) -> tuple[list[RoundRecord], bool]:
        """Read finished rounds with a number below `below`, newest first, and whether there are more.

        Up to `count` of them, and no more than `max_bytes` together, but at least one.
        """
        query = "SELECT record FROM rounds WHERE number < ? AND open = 0 ORDER BY number DESC LIMIT ?"
        records: list[RoundRecord] = []
        size_bytes = 0
        with database_errors(self.path), closing(self._db.execute(query, (below, count + 1))) as cursor:
            for (blob,) in cursor:
                # Counted before parsing: records of large fleets take megabytes, and an answer is bounded.
                size_bytes += len(blob)
                if len(records) == count or (records and size_bytes > max_bytes):
                    return records, True
                records.append(self._record(blob))
        return records, False

    def committed_rounds(self, max_bytes: int) -> Iterator[RoundRecord]:
        """Read committed rounds, newest first, until they are `max_bytes` together."""
        query = "SELECT record FROM rounds WHERE open = 0 ORDER BY number DESC"
        size_bytes = 0
        with database_errors(self.path), closing(self._db.execute(query)) as cursor:
            for (blob,) in cursor:
                size_bytes += len(blob)
                if size_bytes > max_bytes:
                    return
                record = self._record(blob)
                if record.phase == ROUND_PHASE_COMMITTED:
                    yield record

    def _save_tasks(self, tasks: Iterable[TaskRow]) -> None:
        self._db.executemany(
            f"INSERT OR REPLACE INTO tasks ({TASK_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (task.columns() for task in tasks),
        )

    def _save_histories(self, histories: Histories) -> None:
        self._db.executemany(
            "UPDATE workers SET selected = ?, accepted = ? WHERE name = ?",
            ((h.selected, h.accepted, worker) for worker, h in histories.items()),
        )
        self._db.executemany(
            "INSERT OR REPLACE INTO histories VALUES (?, ?)",
            ((worker, history_to_bytes(h)) for worker, h in histories.items()),
        )

    def _insert_version(self, version: Version) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO versions VALUES (?, ?, ?)",
            (version.version, version.round, version_to_proto(version).SerializeToString(deterministic=True)),
        )

    def _record(self, blob: bytes) -> RoundRecord:
        with database_errors(self.path):
            return RoundRecord.FromString(blob)

    def _version(self, row: Row) -> Version:
        with database_errors(self.path):
            return version_from_proto(ModelVersion.FromString(row[0]))

    def known_tokens(self) -> frozenset[str]:
        """Read the tokens of all tasks."""
        return frozenset(token for (token,) in self._all("SELECT token FROM tasks"))


def _add(scores: MutableMapping[str, float], new: Mapping[str, float]) -> None:
    """Add scores. Names are the workers' word, so their number is bounded: older ones make room."""
    kept = dict(islice({**new, **scores}.items(), claims.METRICS)) | dict(new)
    scores.clear()
    scores.update(kept)
